"""Write the review sheet, a blinded CSV sample of a run's sections for people to pass or fail, and read it back.

Spreadsheet programs may save it with another delimiter and encoding. It shows neither the judge's verdicts nor the
model's name. The sample is random within each stratum (section and verdict), as the estimates from people's labels
require.
"""

import csv
import io
import random
from collections.abc import Iterable
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

from common.dataset import Rows
from common.errors import UserError
from common.files import write_atomically
from evaluation.run.records import Judgement, Prediction, note_hash
from evaluation.scoring.judgements import TO_LABEL, SectionKey, sort_judgements, stratum_of
from prompts import SECTIONS

COLUMNS = ("index", "section", "note_hash", "dialogue", "reference", "note section", "verdict", "rater")
_SEED = 0  # of the sample and its order
_MOST_CHARACTERS = 30_000  # in a cell; Excel holds 32,767 and moves the rest into other cells
_HASH_PREFIX = "sha256:"  # without it, a spreadsheet would read 123456789012 or 12345678e901 as a number
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def draw_sample(predictions: Iterable[Prediction], judgements: Iterable[Judgement], size: int) -> list[SectionKey]:
    """Return up to `size` sections of the notes, (index, section), in random order.

    Sections of lenient notes take part with the judge's verdicts. They serve the lenient estimate. The sections of each
    stratum that are in the JSON form remain a random sample of theirs, as the strict estimate requires.
    The strata are, for each of S, O, A and P, the sections that passed, failed, failed by rule or are unscored. Each
    stratum gives the same number; if it has fewer, the others fill its places. A larger sample includes a smaller one.
    """
    texts = {
        (prediction["index"], section): bool((prediction[section] or "").strip())
        for prediction in predictions
        for section in SECTIONS
    }
    notes, _, _ = sort_judgements(judgements, {index for index, _ in texts})
    strata: dict[tuple[str, str], list[SectionKey]] = {(name, key): [] for name in TO_LABEL for key in SECTIONS}
    for index, section in sorted(texts):
        verdict = notes.get(index, {}).get(section, ("unscored", ""))
        stratum = stratum_of(verdict, texts[index, section]), section
        if stratum in strata:
            strata[stratum].append((index, section))
    for (name, section), keys in strata.items():
        random.Random(f"{_SEED} {name} {section}").shuffle(keys)
    in_turn = chain.from_iterable(zip_longest(*strata.values()))
    sample = list(islice(filter(None, in_turn), size))
    random.Random(_SEED).shuffle(sample)
    return sample


def write_sheet(
    path: Path, predictions: Iterable[Prediction], judgements: Iterable[Judgement], rows: Rows, size: int
) -> int:
    """Write a sheet of up to `size` sections; return how many. `predictions` is read twice.

    rows: the dataset; `rows[index]` holds dialogue, S, O, A, P. Raises UserError if no section can be labelled.
    """
    sample = draw_sample(predictions, judgements, size)
    if not sample:
        raise UserError(f"--review_sheet {path}: no note of this run has text to review; evaluate another model")
    wanted = {index for index, _ in sample}
    notes = {prediction["index"]: prediction for prediction in predictions if prediction["index"] in wanted}
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerow(COLUMNS)
    for index, section in sample:
        row, note = rows[index], notes[index][section]
        shown = [_as_cell(cell) for cell in (row["dialogue"], row[section], note)]
        writer.writerow([index, section, _HASH_PREFIX + note_hash(note), *shown, "", ""])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "\ufeff" + text.getvalue())  # Excel recognizes UTF-8 by this mark
    return len(sample)


def _as_cell(text: str) -> str:
    """Shorten a long text, and put an apostrophe before one that a spreadsheet would run as a formula (OWASP)."""
    if len(text) > _MOST_CHARACTERS:
        text = f"{text[:_MOST_CHARACTERS]} [{len(text) - _MOST_CHARACTERS} more characters]"
    return f"'{text}" if text.startswith(_FORMULA) else text


def _from_cell(cell: str) -> str:
    cell = cell.strip()
    return cell[1:] if cell[:1] == "'" and cell[1:].startswith(_FORMULA) else cell


def read_sheet(path: str) -> tuple[list[dict[str, Any]], int]:
    """Return (labels for `read_labels`, number of rows without a verdict) from a filled-in sheet.

    Only index, section and verdict are needed. Commas, semicolons or tabs separate the cells. The text is UTF-8 or,
    from an old Excel, Windows-1252. Raises OSError, and UserError with file:row; row 1 is the header.
    """
    content = Path(path).read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", "replace")
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    labels, without_verdict, row = [], 0, 1
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        missing = [name for name in ("index", "section", "verdict") if name not in (reader.fieldnames or ())]
        if missing:
            raise UserError(f"{path}:1 has no column {missing[0]}; give a sheet of --review_sheet, filled in")
        for row, cells in enumerate(reader, 2):
            values = {name: _from_cell(cells.get(name) or "") for name in COLUMNS}
            if not any(values.values()):
                continue
            if not values["verdict"]:
                without_verdict += 1
                continue
            if not values["index"].isdecimal():
                raise UserError(f"{path}:{row}: the index is not a number; correct it")
            labels.append(
                {
                    "index": int(values["index"]),
                    "section": values["section"],
                    "verdict": values["verdict"].lower(),
                    "rater": values["rater"],
                    "note_hash": values["note_hash"].removeprefix(_HASH_PREFIX),
                    "where": f"{path}:{row}",
                }
            )
    except csv.Error as error:
        raise UserError(f"{path}:{row + 1} is not valid CSV ({error}); correct it") from None
    return labels, without_verdict
