"""Compute all figures from the records of runs, without files or models."""
