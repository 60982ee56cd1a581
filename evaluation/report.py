"""Scores for reading: the console's tables, results.json, report.html and comparison.html."""

from pathlib import Path

from prompts import Note


def console_table(results: dict) -> str:
    """The table of one run: pass rate, unscored and ROUGE-L for each section, and how far the judge can be trusted."""
    raise NotImplementedError


def comparison_table(comparison: dict, runs: list[dict]) -> str:
    """A column for each run with the best pass rate in bold, then differences, exact McNemar p and flips."""
    raise NotImplementedError


def write_results_json(path: Path, results: dict) -> None:
    """Write results.json, keys in a fixed order. Raises ValueError when a key is missing or a number is not finite."""
    raise NotImplementedError


def view_rows(predictions: list[dict], judgements: list[dict], rows: list[Note]) -> list[dict]:
    """One entry for each prediction: dialogue, reference, prediction and its four verdicts, as `write_report` reads it."""
    raise NotImplementedError


def write_report(path: Path, results: dict, rows_view: list[dict]) -> None:
    """Write report.html: one file that needs no network and in which nothing from data or models can run."""
    raise NotImplementedError


def write_comparison(path: Path, comparison: dict, runs: list[dict]) -> None:
    """Write comparison.html, in the style of report.html."""
    raise NotImplementedError
