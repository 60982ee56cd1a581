"""Compute all figures from the records of runs. Pure: no files, no models."""
