"""Files of rows -> records. A row that cannot be read becomes a record with the reason; no value is lost in silence."""

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

NO_TEXT = re.compile("[\0\ud800-\udfff]")
DELIMITERS = ",;\t|"
# The first line by which Excel learns the delimiter of a CSV file.
EXCEL_DELIMITER = re.compile(r'"?sep=([^"\w\s]|\t)"?')
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
LFS_POINTER = b"version https://git-lfs"

# Whether a table with these columns has a dialogue and a note.
Holds = Callable[[Collection[str]], bool]


@dataclass(frozen=True)
class Record:
    """A row as its source has it, or why it cannot be read. Rows count from 1; a CSV header is row 1."""

    file: str
    row: int
    columns: object = None
    reason: str | None = None


@dataclass(frozen=True)
class RepeatedKey:
    """Takes the place of a JSON object that gives `key` twice, of which json would keep the last."""

    key: str


def read_table(path: Path, holds: Holds) -> list[Record]:
    """The records of one file; its suffix is one of READERS. Raises UserError, OSError."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{path} is a Git LFS pointer, not the data; run git lfs pull in its folder")
    return list(READERS[path.suffix.lower()](path, holds))


def column_names(records: Iterable[Record]) -> list[str]:
    """The columns of all records, in the order of their first appearance."""
    return list(
        dict.fromkeys(name for record in records if isinstance(record.columns, dict) for name in record.columns)
    )


def check_repeated(path: Path, names: list[str], holds: Holds) -> None:
    """Raise UserError if two columns of a table to read have one name: a row could keep only one of them."""
    repeated = [name for name, count in Counter(names).items() if count > 1 and name]
    if repeated and holds(names):
        raise UserError(f"{path} has two columns named {repeated[0]}; rename or remove one")


# --- JSON ------------------------------------------------------------------------------------------------------------


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object] | RepeatedKey:
    columns = dict(pairs)
    if len(columns) == len(pairs):
        return columns
    return RepeatedKey(Counter(key for key, _ in pairs).most_common(1)[0][0])


JSON = json.JSONDecoder(object_pairs_hook=unique_keys)


def json_record(path: Path, row: int, value: object) -> Record:
    if isinstance(value, RepeatedKey):
        return Record(str(path), row, reason=f"key {value.key} is given twice")
    return Record(str(path), row, value)


def read_jsonl(path: Path, _: Holds) -> Iterator[Record]:
    """A record for each line that is not blank. A broken line costs only itself."""
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


def read_json(path: Path, holds: Holds) -> Iterable[Record]:
    """A record for each object of a list, or of the only list in an object. Else the file is lines of JSON.

    An object that itself has a dialogue and a note is a row, whatever lists it holds.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = JSON.decode(text)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; save it in that encoding") from None
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise UserError(f"{path} is not JSON, or cut off ({error}); give one list of objects") from None
        return read_jsonl(path, holds)
    if isinstance(value, dict) and not holds(value):
        lists = [part for part in value.values() if isinstance(part, list)]
        value = lists[0] if len(lists) == 1 else [value]
    rows = value if isinstance(value, list) else [value]
    return (json_record(path, row, columns) for row, columns in enumerate(rows, 1))


# --- CSV -------------------------------------------------------------------------------------------------------------


def read_csv(path: Path, holds: Holds) -> Iterator[Record]:
    """A record for each row below the header that is not blank.

    A broken row costs only itself, but for a quote that is not closed: the lines up to the next quote go with it, and
    the reason names them. Raises UserError for another encoding, a broken header, or a column's name given twice.
    """
    check_encoding(path)
    csv.field_size_limit(sys.maxsize)
    # Bytes that are not UTF-8 become surrogates, which no text column may hold.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = parse_csv(file, find_delimiter(path, file, holds))
        _, fields, fault = next(rows, (0, [], None))
        if fault:
            raise broken_header(path, fault)
        header = [name.strip() for name in fields]
        if NO_TEXT.search("".join(header)):
            raise UserError(f"{path} is not UTF-8; save it in that encoding")
        check_repeated(path, header, holds)
        for row, fields, fault in rows:
            if not fault and len(fields) != len(header):
                fault = "more or fewer fields than the header"
            elif not fault and [field.strip("\ufeff").strip() for field in fields] == header:
                fault = "the header again"  # files put together by `cat`
            columns = dict.fromkeys(header) if fault else dict(zip(header, fields, strict=True))
            yield Record(str(path), row, columns, fault)


def parse_csv(file: TextIO, delimiter: str) -> Iterator[tuple[int, list[str], str | None]]:
    """Number, fields and fault of each row, without blank rows and Excel's line `sep=`."""
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


def find_delimiter(path: Path, file: TextIO, holds: Holds) -> str:
    """The delimiter at which the header has the columns to read. Raises UserError for a header broken or of two minds.

    If none has them, no row will be kept: the delimiter that gives most columns serves to name them.
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
    fitting = [delimiter for delimiter in names if holds(names[delimiter])]
    if len(fitting) > 1:
        raise UserError(f"{path}: the header has the columns both at {' and at '.join(map(repr, fitting))}; keep one")
    return fitting[0] if fitting else max(names, key=lambda delimiter: len(names[delimiter]))


def broken_header(path: Path, fault: str) -> UserError:
    return UserError(f"{path}: the header is {fault}; correct it")


def check_encoding(path: Path) -> None:
    """Raise UserError for UTF-16, and for a file in an encoding such as Windows-1252.

    That is one with more lines that are not UTF-8 than lines that are, apart from ASCII, which tells nothing. A single
    such line may be damage and costs only itself.
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
            f"{path} is not UTF-8 in {lines['other']} lines, first in line {first}, but perhaps Windows-1252; "
            "save it as CSV UTF-8"
        )


# --- Parquet ---------------------------------------------------------------------------------------------------------


def read_parquet(path: Path, holds: Holds) -> Iterable[Record]:
    """A record for each row."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        check_repeated(path, file.schema_arrow.names, holds)
        rows = file.read().to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"{path} is not Parquet, or damaged ({error}); write it again") from error
    return (Record(str(path), row, columns) for row, columns in enumerate(rows, 1))


READERS = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".tsv": read_csv,
    ".ndjson": read_jsonl,
}
