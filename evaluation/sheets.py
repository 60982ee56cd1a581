"""Write CSV sheets that spreadsheet programs open unchanged, and read what such programs save."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from common.errors import UserError
from common.files import write_atomically

HASH_PREFIX = "sha256:"  # without it, a spreadsheet would read 123456789012 or 12345678e901 as a number
_MOST_CHARACTERS = 30_000  # in a cell; Excel holds 32,767 and moves the rest into other cells
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def write_cells(path: Path, columns: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a sheet atomically, with a header of `columns`."""
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerow(columns)
    writer.writerows([_as_cell(str(cell)) for cell in row] for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "\ufeff" + text.getvalue())  # Excel recognizes UTF-8 by this mark


def read_cells(path: str, columns: Sequence[str], needed: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (file:row, {column: text}) of each row that is not empty; row 1 is the header.

    Commas, semicolons or tabs separate the cells. The text is UTF-8 or, from an old Excel, Windows-1252. A column that
    is not `needed` may be missing. Raises OSError, and UserError with file:row.
    """
    text = _decoded(path)
    row = 1
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True)
        if missing := [name for name in needed if name not in (reader.fieldnames or ())]:
            raise UserError(f"{path}:1 has no column {missing[0]}; give a sheet that eval.py wrote, filled in")
        for row, cells in enumerate(reader, 2):
            values = {name: _from_cell(cells.get(name) or "") for name in columns}
            if any(values.values()):
                yield f"{path}:{row}", values
    except csv.Error as error:
        raise UserError(f"{path}:{row + 1} is not valid CSV ({error}); correct it") from None


def read_header(path: str) -> list[str]:
    """Return the names of the columns. Raises OSError."""
    text = _decoded(path)
    return next(csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text)), [])


def _decoded(path: str) -> str:
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def _delimiter(text: str) -> str:
    return max(",;\t", key=text.partition("\n")[0].count)


def _as_cell(text: str) -> str:
    """Shorten a long text, and put an apostrophe before one that a spreadsheet would run as a formula (OWASP)."""
    if len(text) > _MOST_CHARACTERS:
        text = f"{text[:_MOST_CHARACTERS]} [{len(text) - _MOST_CHARACTERS} more characters]"
    return f"'{text}" if text.startswith(_FORMULA) else text


def _from_cell(cell: str) -> str:
    cell = cell.strip()
    return cell[1:] if cell[:1] == "'" and cell[1:].startswith(_FORMULA) else cell
