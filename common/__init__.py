"""Shared by all three scripts: the user's error, locks and atomic writes, the dataset, the rules for adapters."""
