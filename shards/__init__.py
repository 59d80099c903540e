"""The contract: records that flow between stages and bytes that land in a run's folder. Knows neither Beam nor torch."""
