"""Read files of rows as records. A row that cannot be read becomes a record with the reason, so no value is lost."""

import csv
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from common.errors import UserError

NOT_TEXT = re.compile("[\0\ud800-\udfff]")
DELIMITERS = ",;\t|"
# The first line by which Excel learns the delimiter of a CSV file.
EXCEL_DELIMITER = re.compile(r'"?sep=([^"\w\s]|\t)"?')
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
LFS_POINTER = b"version https://git-lfs"

# Returns whether a table with these columns has a dialogue and a note.
ColumnCheck = Callable[[Collection[str]], bool]


@dataclass(frozen=True)
class Record:
    """A row as its source has it, or why it cannot be read. Rows count from 1; a CSV header is row 1."""

    file: str
    row: int
    columns: object = None
    reason: str | None = None


@dataclass(frozen=True)
class RepeatedKey:
    """A JSON object in which `key` occurs twice; json would keep only the last value."""

    key: str


def read_table(path: Path, is_usable: ColumnCheck) -> list[Record]:
    """Return the records of one file, whose suffix is one of READERS. Raises UserError, OSError."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{path} is a Git LFS pointer, not the data; run git lfs pull in its folder")
    return list(READERS[path.suffix.lower()](path, is_usable))


def column_names(records: Iterable[Record]) -> list[str]:
    """Return the columns of all records, in the order of their first appearance."""
    return list(
        dict.fromkeys(name for record in records if isinstance(record.columns, dict) for name in record.columns)
    )


def reject_repeated_columns(path: Path, names: list[str], is_usable: ColumnCheck) -> None:
    """Raise UserError if two columns of a usable table have the same name: a row could keep only one of them."""
    repeated = [name for name, count in Counter(names).items() if count > 1 and name]
    if repeated and is_usable(names):
        raise UserError(f"{path} has two columns named {repeated[0]}; rename or remove one")


# --- JSON ------------------------------------------------------------------------------------------------------------


def columns_or_repeated_key(pairs: list[tuple[str, object]]) -> dict[str, object] | RepeatedKey:
    """Return the object with these keys, or the key that occurs twice."""
    columns = dict(pairs)
    if len(columns) == len(pairs):
        return columns
    return RepeatedKey(Counter(key for key, _ in pairs).most_common(1)[0][0])


JSON = json.JSONDecoder(object_pairs_hook=columns_or_repeated_key)


def json_record(path: Path, row: int, value: object) -> Record:
    """Return the record of one JSON value."""
    if isinstance(value, RepeatedKey):
        return Record(str(path), row, reason=f"key {value.key} is given twice")
    return Record(str(path), row, value)


def read_jsonl(path: Path, _: ColumnCheck) -> Iterator[Record]:
    """Yield a record for each line that is not blank. A broken line affects no other row."""
    with path.open("rb") as file:
        for row, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield json_record(path, row, JSON.decode(line.decode("utf-8-sig")))
            except UnicodeDecodeError:
                yield Record(str(path), row, reason="not UTF-8")
            except (ValueError, RecursionError):
                damage = "NUL bytes, as in UTF-16 or a damaged file" if b"\0" in line else "not JSON, or cut off"
                yield Record(str(path), row, reason=damage)


def read_json(path: Path, is_usable: ColumnCheck) -> Iterable[Record]:
    """Return a record for each object of a list, or of the only list in an object; or read the file as JSON lines.

    An object that itself has a dialogue and a note is a row, even if it contains lists.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = JSON.decode(text)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; save it in that encoding") from None
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise UserError(f"{path} is not JSON, or cut off ({error}); give one list of objects") from None
        return read_jsonl(path, is_usable)
    if isinstance(value, dict) and not is_usable(value):
        lists = [part for part in value.values() if isinstance(part, list)]
        value = lists[0] if len(lists) == 1 else [value]
    rows = value if isinstance(value, list) else [value]
    return (json_record(path, row, columns) for row, columns in enumerate(rows, 1))


# --- CSV -------------------------------------------------------------------------------------------------------------


def read_csv(path: Path, is_usable: ColumnCheck) -> Iterator[Record]:
    """Yield a record for each row below the header that is not blank.

    A broken row affects no other row, with one exception: an open quote also takes in the lines up to the next quote;
    the reason names them. Raises UserError for another encoding, a broken header, or a repeated column name.
    """
    check_encoding(path)
    csv.field_size_limit(sys.maxsize)
    # Bytes that are not UTF-8 become surrogates, which no text column may hold.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = parse_csv(file, find_delimiter(path, file, is_usable))
        _, fields, fault = next(rows, (0, [], None))
        if fault:
            raise broken_header(path, fault)
        header = [name.strip() for name in fields]
        if NOT_TEXT.search("".join(header)):
            raise UserError(f"{path} is not UTF-8; save it in that encoding")
        reject_repeated_columns(path, header, is_usable)
        for row, fields, fault in rows:
            if not fault and len(fields) != len(header):
                fault = "more or fewer fields than the header"
            elif not fault and [field.strip("\ufeff").strip() for field in fields] == header:
                fault = "the header again"  # files put together by `cat`
            columns = dict.fromkeys(header) if fault else dict(zip(header, fields, strict=True))
            yield Record(str(path), row, columns, fault)


def parse_csv(file: TextIO, delimiter: str) -> Iterator[tuple[int, list[str], str | None]]:
    """Yield the number, fields and fault of each row; skip blank rows and Excel's line `sep=`."""
    file.seek(0)
    reader = csv.reader(file, delimiter=delimiter, strict=True, skipinitialspace=True)
    for row in itertools.count(1):
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines = f", lines {line} to {reader.line_num} of the file" if reader.line_num > line else ""
            yield row, [], f"not CSV, or cut off ({error}){lines}"
            continue
        if row == 1 and EXCEL_DELIMITER.fullmatch(delimiter.join(fields)):
            continue
        if any(field.strip() for field in fields):
            yield row, fields, None


def find_delimiter(path: Path, file: TextIO, is_usable: ColumnCheck) -> str:
    """Return the delimiter that gives the header the columns to read.

    If no delimiter does, no row will be kept; return the one that gives most columns, so that an error can list them.
    Raises UserError if the header is broken, or if two delimiters give the columns.
    """
    file.seek(0)
    if excel := EXCEL_DELIMITER.fullmatch(file.readline().rstrip("\r\n")):
        return excel[1]
    headers = {delimiter: next(parse_csv(file, delimiter), (0, [], None)) for delimiter in DELIMITERS}
    names = {
        delimiter: [name.strip() for name in fields] for delimiter, (_, fields, fault) in headers.items() if not fault
    }
    if not names:
        raise broken_header(path, headers[","][2])
    fitting = [delimiter for delimiter in names if is_usable(names[delimiter])]
    if len(fitting) > 1:
        raise UserError(
            f"{path}: the header has the columns with delimiter {' and with '.join(map(repr, fitting))}; use one"
        )
    return fitting[0] if fitting else max(names, key=lambda delimiter: len(names[delimiter]))


def broken_header(path: Path, fault: str) -> UserError:
    """Return the error for a CSV header that cannot be read."""
    return UserError(f"{path}: the header is {fault}; correct it")


def check_encoding(path: Path) -> None:
    """Raise UserError for a file in UTF-16, or in an encoding such as Windows-1252.

    Windows-1252 is assumed if more lines are not UTF-8 than are; lines of ASCII count as neither. A single line that is
    not UTF-8 may be damage and affects only its row.
    """
    lines = Counter()
    first = None
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith(UTF_16):
                raise UserError(f"{path} is UTF-16, not UTF-8; save it as CSV UTF-8")
            if line.isascii():
                continue
            try:
                line.decode()
                lines["UTF-8"] += 1
            except UnicodeDecodeError:
                lines["other"] += 1
                first = first or number
    if lines["other"] > max(1, lines["UTF-8"]):
        raise UserError(
            f"{path} is not UTF-8 in {lines['other']} lines, first in line {first}; it may be Windows-1252: "
            "save it as CSV UTF-8"
        )


# --- Parquet ---------------------------------------------------------------------------------------------------------


def read_parquet(path: Path, is_usable: ColumnCheck) -> Iterable[Record]:
    """Return a record for each row."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        reject_repeated_columns(path, file.schema_arrow.names, is_usable)
        rows = file.read().to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"{path} is not Parquet, or damaged ({error}); export it again") from error
    return (Record(str(path), row, columns) for row, columns in enumerate(rows, 1))


READERS = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".tsv": read_csv,
    ".ndjson": read_jsonl,
}
