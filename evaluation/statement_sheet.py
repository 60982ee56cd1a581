"""Write the statement sheet, on which people answer the judge's questions about a few notes, and read it back.

It has all statements of a random sample of the judged notes, without the judge's answers and the model's name.
"""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.dataset import Rows
from common.errors import UserError
from evaluation.run.records import Prediction, StatementRecord, note_hash
from evaluation.sheets import HASH_PREFIX, read_cells, write_cells
from prompts import SECTIONS

COLUMNS = (
    "index",
    "section",
    "question",
    "number",
    "hash",
    "dialogue",
    "reference",
    "note section",
    "statement",
    "answer",
    "rater",
)
QUESTIONS = {
    "covered": "covered: does the note section say this?",
    "supported": "supported: do the dialogue or the reference say this?",
}
_SEED = 0  # of the sample


def write_statement_sheet(
    path: Path, predictions: Iterable[Prediction], statements: Iterable[StatementRecord], rows: Rows, size: int
) -> int:
    """Write a sheet with all statements of up to `size` notes; return the number of statements.

    rows: the dataset; `rows[index]` holds dialogue, S, O, A, P. A larger sample includes a smaller one.
    Raises UserError if the judge was asked about no statement of a note.
    """

    def asked() -> Iterable[StatementRecord]:
        return (r for r in statements if r["status"] == "asked" and not r["control"] and not r["attack"])

    indices = sorted({record["index"] for record in asked()})
    if not indices:
        raise UserError(f"--review_statements {path}: the judge answered no statement of this run; leave it out")
    random.Random(_SEED).shuffle(indices)
    sample = set(indices[:size])
    notes = {prediction["index"]: prediction for prediction in predictions if prediction["index"] in sample}
    records = [record for record in asked() if record["index"] in sample]
    cells = []
    for record in sorted(records, key=lambda record: (record["index"], SECTIONS.index(record["section"]))):
        index, section = record["index"], record["section"]
        row = rows[index]
        reference = "\n\n".join(f"{key}: {row[key]}" for key in SECTIONS)
        for side, question in QUESTIONS.items():
            for number, statement in enumerate(record[side], 1):
                digest = HASH_PREFIX + note_hash(statement["statement"])
                texts = row["dialogue"], reference, notes[index][section], statement["statement"]
                cells.append([index, section, question, number, digest, *texts, "", ""])
    write_cells(path, COLUMNS, cells)
    return len(cells)


def read_statement_sheet(path: str) -> tuple[list[dict[str, Any]], int]:
    """Return (labels for `statement_labels.read_labels`, number of rows without an answer) from a filled-in sheet.

    Raises OSError, and UserError with file:row; row 1 is the header.
    """
    labels, without_answer = [], 0
    for where, values in read_cells(path, COLUMNS, ("index", "section", "question", "number", "answer")):
        if not values["answer"]:
            without_answer += 1
            continue
        if not (values["index"].isdecimal() and values["number"].isdecimal()):
            raise UserError(f"{where}: the index or the number is not a number; correct it")
        labels.append(
            {
                "index": int(values["index"]),
                "section": values["section"],
                "question": values["question"].partition(":")[0],
                "number": int(values["number"]),
                "hash": values["hash"].removeprefix(HASH_PREFIX),
                "answer": values["answer"].lower(),
                "rater": values["rater"],
                "where": where,
            }
        )
    return labels, without_answer
