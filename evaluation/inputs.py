"""What eval.py reads: the dataset, people's verdicts, finished runs. Each fault is one line."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import prompts
from evaluation.errors import UserError
from evaluation.store import open_records, parse_record

COLUMNS = ("dialogue", *prompts.SECTIONS)


def load_rows(path: str, split: str, limit: int | None) -> tuple[Sequence[dict[str, str]], str]:
    """The first `limit` rows of a split that preprocess_data.py wrote, and 12 hex digits that stand for their text.

    Rows have the keys dialogue, S, O, A, P and stay on disk until they are read. Raises UserError.
    """
    import datasets

    again = "run `python preprocess_data.py`"
    if not Path(path).is_dir():
        raise UserError(f"--dataset_path {path}: no such folder; {again} first")
    datasets.disable_progress_bars()
    try:
        splits = datasets.load_from_disk(path)
    except Exception as error:  # whatever a damaged folder makes pyarrow, json or datasets raise
        raise UserError(f"--dataset_path {path} cannot be read ({_first_words(error)}); {again}") from None
    if not isinstance(splits, datasets.DatasetDict) or split not in splits:
        found = ", ".join(splits) if isinstance(splits, datasets.DatasetDict) else "none"
        raise UserError(f"{path} has no split {split} (it has: {found}); choose another --split")
    rows = splits[split]
    for name in COLUMNS:
        if name not in rows.features or rows.features[name].dtype not in ("string", "large_string"):
            raise UserError(f"{path}, split {split}: no column {name} of text; {again}")
    if not len(rows):
        raise UserError(f"{path}, split {split} has no rows; choose another --split")
    rows = rows.select_columns(list(COLUMNS)).select(range(min(len(rows), limit or len(rows))))
    digest = hashlib.sha256()
    for index, row in enumerate(rows):
        empty = next((name for name in COLUMNS if row[name] is None), None)
        if empty:
            raise UserError(f"{path}, split {split}, row {index}: {empty} is missing; {again}")
        digest.update(json.dumps([row[name] for name in COLUMNS]).encode())
    return rows, digest.hexdigest()[:12]


def load_labels(path: str) -> list[dict[str, Any]]:
    """People's verdicts: a JSONL file of {"index", "section", "verdict"}. Raises UserError."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(
            f'--human_labels {path}: {error.strerror}; give lines {{"index", "section", "verdict"}}'
        ) from None
    return [parse_record(line, f"{path}:{row}", "correct it") for row, line in enumerate(lines, 1) if line.strip()]


def load_run(path: str | Path) -> dict[str, Any]:
    """A finished run as scoring.compare_runs takes it: name, results, predictions, judgements, without their texts.

    Raises UserError.
    """
    folder = Path(path)
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no readable results.json ({_first_words(error)}); give a finished run") from None
    if not isinstance(results, dict) or "sections" not in results:
        raise UserError(f"{path}: results.json is not eval.py's; give a finished run")
    predictions, judgements = open_records(folder)
    return {
        "name": folder.resolve().name,
        "results": results,
        "predictions": [_pick(record, "index", "dialogue_hash") for record in predictions],
        "judgements": [
            _pick(record, "index", "section", "verdict", "source", "control", "attack") for record in judgements
        ],
    }


def _pick(record: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: record[key] for key in keys}


def _first_words(error: Exception) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error)).split())[:100]
