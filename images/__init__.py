"""Fetching, decoding and measuring images. Knows neither Beam nor torch."""
