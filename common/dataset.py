"""The dataset that preprocess_data.py writes and that training and evaluation read."""

import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from common.errors import UserError, short_cause
from prompts import SECTIONS

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = ("dialogue", *SECTIONS)
_PREPROCESS = "run `python preprocess_data.py`"


class Row(TypedDict):
    """A dialogue and its reference note."""

    dialogue: str
    S: str
    O: str  # noqa: E741
    A: str
    P: str


Rows = Sequence[Row] | Mapping[int, Row]  # by index


def load_split(path: str | Path, split: str, limit: int | None = None) -> "Dataset":
    """Return the first `limit` rows of a split, with the columns of Row. Rows are read from disk on access.

    Raises UserError if the folder is missing or damaged, if it has no such split, or if the split has no rows, lacks a
    column or has missing values.
    """
    rows = _open_split(path, split)
    for name in COLUMNS:
        if name not in rows.features or rows.features[name].dtype not in ("string", "large_string"):
            raise UserError(f"{path}, split {split}: no column {name} of text; {_PREPROCESS} again")
        if rows.data.column(name).null_count:
            row = rows[name].index(None)
            raise UserError(f"{path}, split {split}, row {row}: {name} is missing; {_PREPROCESS} again")
    if not len(rows):
        raise UserError(f"{path}, split {split} has no rows; choose another")
    return _first(rows.select_columns(list(COLUMNS)), limit)


def load_kept_column(path: str | Path, split: str, name: str, limit: int | None = None) -> list[str]:
    """Return the values, as text, of a column that preprocess_data.py kept beside those of Row; "" if missing.

    Raises UserError if the folder or the split cannot be read, or has no such column.
    """
    rows = _open_split(path, split)
    kept = [column for column in rows.column_names if column not in COLUMNS]
    if name not in kept:
        raise UserError(
            f"{path}, split {split} has no kept column {name} (it has: {', '.join(kept) or 'none'}); {_PREPROCESS} "
            f"again with --keep_column {shlex.quote(name)}"
        )
    return ["" if value is None else str(value) for value in _first(rows.select_columns([name]), limit)[name]]


def _open_split(path: str | Path, split: str) -> "Dataset":
    import datasets

    if not Path(path).is_dir():
        raise UserError(f"{path}: no such folder; {_PREPROCESS} first")
    datasets.disable_progress_bars()
    try:
        splits = datasets.load_from_disk(str(path))
    except Exception as error:  # for a damaged folder, pyarrow, json and datasets raise many types
        raise UserError(f"{path} cannot be read ({short_cause(error)}); {_PREPROCESS} again") from None
    if not isinstance(splits, datasets.DatasetDict) or split not in splits:
        found = ", ".join(splits) if isinstance(splits, datasets.DatasetDict) else "none"
        raise UserError(f"{path} has no split {split} (it has: {found}); choose another")
    return splits[split]


def _first(rows: "Dataset", limit: int | None) -> "Dataset":
    return rows.select(range(min(len(rows), limit or len(rows))))


def content_hash(rows: Iterable[Row]) -> str:
    """Return a hash of the rows' text, 12 hex digits."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row[name] for name in COLUMNS]).encode())
    return digest.hexdigest()[:12]
