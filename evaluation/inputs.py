"""Read eval.py's other inputs: people's verdicts and finished runs."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.errors import UserError, short_cause
from evaluation.run.records import open_records, parse_record


def load_labels(path: str) -> tuple[list[dict[str, Any]], int]:
    """Return (people's labels, number of rows without one) from a filled-in sheet (.csv) or from JSONL.

    A label is a verdict, with the keys that `people.read_labels` checks, or an answer on a statement, with those of
    `statement_labels.read_labels` (both in evaluation.scoring); `where` is its file and row. Raises UserError.
    """
    from evaluation.review_sheet import read_sheet
    from evaluation.sheets import read_header
    from evaluation.statement_sheet import read_statement_sheet

    try:
        if path.lower().endswith(".csv"):
            return read_statement_sheet(path) if "answer" in read_header(path) else read_sheet(path)
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(
            f'--human_labels {path}: {error.strerror}; give lines {{"index", "section", "verdict"}}, or a review sheet'
        ) from None
    places = [(f"{path}:{row}", line) for row, line in enumerate(lines, 1) if line.strip()]
    return [parse_record(line, where, "correct it") | {"where": where} for where, line in places], 0


def load_runs(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Return finished runs in the form that compare_runs takes: name, results, records without texts, statements.

    The judge's log odds of the same controls differ a little between two calls, and so do the thresholds that they fit.
    So all runs' statements are read at one threshold: that of the run with the most controls. Raises UserError.
    """
    from evaluation.scoring.statements import read_statements

    runs = [load_run(path) for path in paths]
    scores = [run["results"].get("statements") for run in runs]
    if all(scores):
        threshold = max(scores, key=lambda score: score["fitted_on"])["threshold"]
        for run in runs:
            run |= {"threshold": threshold, "statements": read_statements(run["statements"], threshold).notes}
    return runs


def load_run(path: str | Path) -> dict[str, Any]:
    folder = Path(path)
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no readable results.json ({short_cause(error)}); give a finished run") from None
    if not isinstance(results, dict) or "sections" not in results:
        raise UserError(f"{path}: results.json was not written by eval.py; give a finished run")
    predictions, judgements, statements = open_records(folder)
    return {
        "name": folder.resolve().name,
        "results": results,
        "predictions": [_pick(record, "index", "dialogue_hash", "status") for record in predictions],
        "judgements": [
            _pick(record, "index", "section", "verdict", "source", "control", "attack") for record in judgements
        ],
        "statements": statements,
    }


def _pick(record: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: record[key] for key in keys}
