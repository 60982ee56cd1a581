"""Keep further columns of the source, such as a specialty, beside the dialogue and the note.

Kept columns never decide which rows are kept, so the dialogues and notes are the same with and without them.
"""

from collections.abc import Iterable, Sequence

from common.dataset import Row
from common.errors import UserError
from preprocessing.rows import section_columns
from preprocessing.splits import digest
from preprocessing.tables import NOT_TEXT, Record, RepeatedKey, column_names


def check_names(names: Sequence[str]) -> None:
    """Raise UserError for a name that means the dialogue or a section, because the dataset already has these."""
    for name in names:
        if name.strip().lower() == "dialogue" or any(section_columns([name]).values()):
            raise UserError(
                f"--keep_column {name}: the dataset already has a column for this; rename the source's column, or "
                "leave out the flag"
            )


def check_source(names: Sequence[str], dataset: str, records: Iterable[Record]) -> None:
    """Raise UserError for a name that is no column of any record."""
    records = list(records)
    found = column_names(records if names else ())
    for name in names:
        if name in found:
            continue
        if records and all(record.file.endswith(".txt") for record in records):
            raise UserError(f"{dataset} has text files, which have no columns; leave out --keep_column {name}")
        raise UserError(
            f"{dataset} has no column {name}: its columns are {', '.join(map(str, found[:20])) or 'none'}; give one of "
            "them as --keep_column"
        )


def add_columns(rows: Sequence[Row], sources: dict[str, Record], names: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows with the columns `names` of their records, as text. Raises UserError.

    sources: the record of each row, by the `digest` of the row, as from `select`.
    """
    if not names:
        return list(rows)
    records = (sources[digest(*row.values())] for row in rows)
    return [row | {name: as_text(record, name) for name in names} for row, record in zip(rows, records, strict=True)]


def as_text(record: Record, name: str) -> str:
    """Return a record's value as text: "" if it is missing, and U+FFFD for what is not text. Raises UserError."""
    value = record.columns.get(name)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, dict, bytes, RepeatedKey)):
        raise UserError(
            f"{record.file}:{record.row}: {name} is {type(value).__name__}, not text, a number or a boolean; leave out "
            f"--keep_column {name}"
        )
    is_missing = value is None or value != value  # NaN, by which pandas marks missing numbers
    return "" if is_missing else NOT_TEXT.sub("\ufffd", str(value)).strip()
