"""Measures, beside what a user would pick instead. Each prints machine, versions and command; `make bench` runs them."""
