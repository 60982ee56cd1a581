"""Shared by all three scripts: the user's error, locks and atomic writes, the dataset. Imports no other room."""
