"""Write the review sheet, a blinded CSV sample of a run's sections for people to pass or fail, and read it back.

It shows neither the judge's verdicts nor the model's name. The sample is random within each stratum (section and
verdict), as the estimates from people's labels require.
"""

import random
from collections.abc import Iterable
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

from common.dataset import Rows
from common.errors import UserError
from evaluation.run.records import Judgement, Prediction, note_hash
from evaluation.scoring.judgements import TO_LABEL, SectionKey, sort_judgements, stratum_of
from evaluation.sheets import HASH_PREFIX, read_cells, write_cells
from prompts import SECTIONS

COLUMNS = ("index", "section", "note_hash", "dialogue", "reference", "note section", "verdict", "rater")
_SEED = 0  # of the sample and its order


def draw_sample(predictions: Iterable[Prediction], judgements: Iterable[Judgement], size: int) -> list[SectionKey]:
    """Return up to `size` sections of the notes, (index, section), in random order.

    Sections of lenient notes are included, by the judge's verdicts, for the lenient estimate. The sampled sections in
    the JSON form are still a random sample of each stratum's, as the strict estimate requires.
    The strata are, for each of S, O, A and P, the sections that passed, failed, failed by rule or are unscored. Each
    stratum contributes the same number; if one has too few, the others make up the difference. A larger sample includes
    a smaller one.
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
    cells = []
    for index, section in sample:
        row, note = rows[index], notes[index][section]
        texts = row["dialogue"], row[section], note
        cells.append([index, section, HASH_PREFIX + note_hash(note), *texts, "", ""])
    write_cells(path, COLUMNS, cells)
    return len(sample)


def read_sheet(path: str) -> tuple[list[dict[str, Any]], int]:
    """Return (labels for `read_labels`, number of rows without a verdict) from a filled-in sheet.

    Only index, section and verdict are needed. Raises OSError, and UserError with file:row; row 1 is the header.
    """
    labels, without_verdict = [], 0
    for where, values in read_cells(path, COLUMNS, ("index", "section", "verdict")):
        if not values["verdict"]:
            without_verdict += 1
            continue
        if not values["index"].isdecimal():
            raise UserError(f"{where}: the index is not a number; correct it")
        labels.append(
            {
                "index": int(values["index"]),
                "section": values["section"],
                "verdict": values["verdict"].lower(),
                "rater": values["rater"],
                "note_hash": values["note_hash"].removeprefix(HASH_PREFIX),
                "where": where,
            }
        )
    return labels, without_verdict
