"""Mark words and statements in the texts of a reference and a note."""

import difflib
import re
from typing import NamedTuple, TypedDict

Pieces = list[tuple[str, bool]]  # a text in pieces; True if the other text does not have these words

# Comparing n with m words takes time up to n * m * (n + m), so longer texts are not compared.
_MOST_WORDS = 1_000


def word_differences(reference: str, prediction: str) -> tuple[Pieces, Pieces]:
    """Mark the words of each text that the other does not have. Texts of over 1,000 words stay unmarked.

    Case and punctuation at the end of a word are ignored.
    """
    words = [re.findall(r"\S+\s*", text.strip()) for text in (reference, prediction)]
    if max(map(len, words)) > _MOST_WORDS:
        return [(reference, False)], [(prediction, False)]
    keys = [[word.casefold().strip().rstrip(".,;:") for word in side] for side in words]
    matcher = difflib.SequenceMatcher(None, *keys, autojunk=False)
    pieces: tuple[Pieces, Pieces] = ([], [])
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        for side, start, end in ((0, i1, i2), (1, j1, j2)):
            text = "".join(words[side][start:end])
            kept = text.rstrip()
            pieces[side].extend([(kept, tag != "equal"), (text[len(kept) :], False)] if text else [])
    return pieces


class Statement(TypedDict):
    """A sentence with its state: covered or missing, supported or unsupported, or unscored.

    log_odds: ln P(yes) / P(no); None without an answer. title: the state in words, for a tooltip.
    """

    statement: str
    log_odds: float | None
    state: str
    title: str


class Segment(NamedTuple):
    """A part of a text: one statement, or the text between two (statement None)."""

    statement: Statement | None
    pieces: Pieces


def read_statements(record: dict, threshold: float) -> dict[str, list[Statement]]:
    """Return the states of a record of statements.jsonl as {"covered": [...], "supported": [...]}.

    A statement counts as yes if its log odds are at least `threshold`. If the record was decided by rule (status
    "missing"), all statements count as no. If the note was never written (status "unscored"), none is scored.
    """
    return {
        question: [_read(entry, record, threshold, yes, no) for entry in record[question]]
        for question, yes, no in (("covered", "covered", "missing"), ("supported", "supported", "unsupported"))
    }


def _read(entry: dict, record: dict, threshold: float, yes: str, no: str) -> Statement:
    log_odds = entry["log_odds"]
    if record["status"] == "missing":
        state, why = no, f" by rule: {record['reason']}"
    elif record["status"] == "unscored" or log_odds is None:
        state, why = "unscored", f": {record['reason'] or 'the judge said neither yes nor no'}"
    else:
        state, why = yes if log_odds >= threshold else no, f", log odds {log_odds:+.2f}".replace("-", "−")
    return {"statement": entry["statement"], "log_odds": log_odds, "state": state, "title": state + why}


def locate_statements(pieces: Pieces, statements: list[Statement]) -> tuple[list[Segment], list[Statement]]:
    """Cut a text at its statements. Return (segments of the whole text in order, statements that were not found).

    Each statement is searched for from the end of the one before, so that a sentence that occurs twice is marked twice.
    """
    text = "".join(piece for piece, _ in pieces)
    spans: list[tuple[int, int, Statement | None]] = []
    lost, end = [], 0
    for statement in statements:
        start = text.find(statement["statement"], end)
        if start < 0 or not statement["statement"]:
            lost.append(statement)
            continue
        spans.append((end, start, None))
        end = start + len(statement["statement"])
        spans.append((start, end, statement))
    spans.append((end, len(text), None))
    cut = _cut(pieces, [end for _, end, _ in spans])
    return [Segment(statement, part) for (_, _, statement), part in zip(spans, cut, strict=True) if part], lost


def _cut(pieces: Pieces, ends: list[int]) -> list[Pieces]:
    """Cut pieces at the positions in `ends`, which are in order and end with the length of the text."""
    parts: list[Pieces] = [[] for _ in ends]
    part, start = 0, 0
    for text, is_marked in pieces:
        while text:
            while ends[part] == start:
                part += 1
            head, text = text[: ends[part] - start], text[ends[part] - start :]
            parts[part].append((head, is_marked))
            start += len(head)
    return parts
