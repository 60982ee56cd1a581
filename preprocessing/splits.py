"""Select the rows to keep, and assign them to splits."""

import hashlib

from tqdm import tqdm

from common.dataset import Row
from preprocessing.labels import SectionMap
from preprocessing.rows import RowError, read_row
from preprocessing.tables import Record
from prompts import NoteError


def digest(*texts: str) -> str:
    """Return 64 hex digits, equal for texts that differ only in white space."""
    return hashlib.sha256("\0".join(" ".join(text.split()) for text in texts).encode()).hexdigest()


def select(
    records: dict[str, list[Record]], dialogue_column: str, note_column: str, section_map: SectionMap | None = None
) -> tuple[dict[str, list[Row]], list[dict], dict[str, Record]]:
    """Return the rows to keep of each split, a reject with its reason for every other row, and the source records.

    There is a source record for each kept row, keyed by the row's `digest`.

    Reject rows that cannot be read, copies of a row within its split (another note on the same dialogue is no copy),
    validation rows whose dialogue is in test, and train rows whose dialogue is in validation or test.
    """
    rows: dict[str, list[Row]] = {}
    rejects = []
    sources: dict[str, Record] = {}
    held_out: dict[str, str] = {}
    with tqdm(total=sum(map(len, records.values())), desc="Reading notes", unit=" rows") as bar:
        for split in ("test", "validation", "train"):
            kept: dict[str, Row] = {}
            dialogues = {}
            for record in records.get(split, []):
                bar.update()
                try:
                    row = read_row(record, dialogue_column, note_column, section_map)
                    dialogue, whole = digest(row["dialogue"]), digest(*row.values())
                    if dialogue in held_out:
                        raise RowError(f"same dialogue in {held_out[dialogue]}")
                    if whole in kept:
                        raise RowError("same as an earlier row")
                except (RowError, NoteError) as error:
                    rejects.append(reject(split, record, str(error)))
                    continue
                kept[whole], sources[whole] = row, record
                dialogues[dialogue] = split
            held_out |= dialogues
            if split in records:
                rows[split] = list(kept.values())
    return rows, rejects, sources


def reject(split: str, record: Record, reason: str) -> dict[str, str | int]:
    """Return the line of rejects.jsonl for a record."""
    return {"split": split, "file": record.file, "row": record.row, "reason": reason}


def drop_near_duplicates(
    rows: dict[str, list[Row]], near: dict[str, dict[int, str]], sources: dict[str, Record]
) -> tuple[dict[str, list[Row]], list[dict]]:
    """Return the rows without those in `near` (from `find_near_duplicates`), and a reject for each of these."""
    rejects = [
        reject(split, sources[digest(*rows[split][number].values())], f"nearly the same dialogue in {other}")
        for split, found in near.items()
        for number, other in found.items()
    ]
    kept = {split: [row for number, row in enumerate(rows[split]) if number not in near[split]] for split in rows}
    return kept, rejects


def hold_out(rows: list[Row], shares: dict[str, float]) -> dict[str, list[Row]]:
    """Hold out splits from `rows`, each a share of the distinct dialogues and at least one; the rest is train.

    Dialogues are ordered by their hash, so equal ones stay together and the order of the rows does not matter.
    """
    dialogues = sorted({digest(row["dialogue"]) for row in rows})
    split_of_dialogue = dict.fromkeys(dialogues, "train")
    start = 0
    for split, share in shares.items():
        end = start + max(1, round(share * len(dialogues)))
        split_of_dialogue |= dict.fromkeys(dialogues[start:end], split)
        start = end
    parts: dict[str, list[Row]] = {split: [] for split in ("train", *shares)}
    for row in rows:
        parts[split_of_dialogue[digest(row["dialogue"])]].append(row)
    return parts
