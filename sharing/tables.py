"""Turn the records of a run folder into tables for other tools: CSV and Parquet."""

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.replies import encodable
from evaluation.run.records import JsonLines


def export_tables(run: Path, folder: Path) -> dict[str, int]:
    """Write each .jsonl file of a run folder to `folder`, as .csv and as .parquet. Return {name: number of rows}.

    A column holds whole numbers, numbers, true or false, or else text; text is exact. An object becomes one column for
    each of its keys, such as control_kind, and a list becomes JSON text. What is missing is null, and empty in CSV.
    Raises UserError if there are no records, or for a damaged file.
    """
    import pyarrow
    from pyarrow import parquet

    counts = {}
    for path in sorted(run.glob("*.jsonl")):
        rows = [flatten(record) for record in JsonLines(path)]
        if not rows:
            continue
        table = pyarrow.table(columns(rows))
        parquet.write_table(table, folder / f"{path.stem}.parquet")
        # Spreadsheets recognise UTF-8 by the mark at the start of the file.
        with (folder / f"{path.stem}.csv").open("w", encoding="utf-8-sig", newline="", errors="replace") as file:
            writer = csv.writer(file)
            writer.writerow(table.column_names)
            writer.writerows(zip(*table.to_pydict().values(), strict=True))
        counts[path.stem] = len(rows)
    if not counts:
        raise UserError(f"{run} has no records (predictions.jsonl); give the folder of a run of eval.py")
    return counts


def flatten(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record with a column for each key of an object in it, and lists as JSON text."""
    row: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            row |= {f"{key}_{name}": part for name, part in flatten(value).items()}
        else:
            row[key] = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
    return row


def columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return {name: Arrow array} in the order of first appearance.

    A key that is an object in some rows and null in others, such as `control`, gives only the columns of its keys.
    """
    import pyarrow

    names = list(dict.fromkeys(name for row in rows for name in row))
    values = {name: [row.get(name) for row in rows] for name in names}
    empty = {name for name in names if set(values[name]) == {None}}
    covered = {name for name in empty if any(other.startswith(f"{name}_") for other in names)}
    result = {}
    for name in names:
        if name not in covered:
            kind = column_type(values[name])
            texts = kind == pyarrow.string()
            result[name] = pyarrow.array(map(_as_text, values[name]) if texts else values[name], kind)
    return result


def column_type(values: Iterable[Any]) -> Any:
    """Return the Arrow type of a column: int64, float64, bool or, for anything else and for only nulls, string."""
    import pyarrow

    kinds = {type(value) for value in values} - {type(None)}
    if kinds == {int}:
        return pyarrow.int64()
    if kinds == {bool}:
        return pyarrow.bool_()
    return pyarrow.float64() if kinds and kinds <= {int, float} else pyarrow.string()


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value and encodable(value)
    return json.dumps(value)
