"""Make controls, which check the judge: sections of the dataset, edited so that the right verdict is known."""

import random
from collections.abc import Callable, Iterator
from itertools import chain, islice, zip_longest

from common.dataset import Row, Rows
from evaluation.judging import edits
from evaluation.judging.judge import Case
from prompts import SECTIONS


def control_cases(rows: Rows, n: int, seed: int) -> list[Case]:
    """Return n controls that should pass and n that should fail for each section. Equal arguments give equal controls.

    Controls that should pass have the kind "reworded". Those that should fail have the kinds "other_patient",
    "dropped_finding", "turned_negation", "changed_number" and "changed_side" in turn. Rows that do not allow a kind are
    skipped, so few rows may give fewer than n controls.
    """
    return [case for section in SECTIONS for case in _section_controls(by_index(rows), section, n, seed)]


def _section_controls(rows: dict[int, Row], section: str, n: int, seed: int) -> Iterator[Case]:
    rarity = edits.Rarity(row[section] for row in rows.values())
    order = shuffled_indices(rows, section, seed)
    to_fail = {
        "other_patient": lambda index: other_patient(rows, section, order, index),
        "dropped_finding": lambda index: edits.drop_finding(rows[index][section], rarity),
        "turned_negation": lambda index: edits.turn_negation(rows[index][section], rarity),
        "changed_number": lambda index: edits.change_number(rows[index][section]),
        "changed_side": lambda index: edits.change_side(rows[index][section]),
    }

    def controls(kind: str, expected: str, make: Callable[[int], str | None], used: set[int]) -> Iterator[Case]:
        """Yield a control for each row that allows the kind: first the rows that are not in `used`, then the others."""
        used_here: set[int] = set()
        for skipped in (used, used_here):
            for index in order:
                text = make(index) if index not in skipped else None
                if text is not None:
                    used.add(index)
                    used_here.add(index)
                    control = {"kind": kind, "expected": expected}
                    yield Case(index, section, rows[index]["dialogue"], rows[index][section], text, control)

    yield from islice(controls("reworded", "pass", lambda index: edits.reword(rows[index][section]), set()), n)
    used: set[int] = set()
    in_turn = zip_longest(*(controls(kind, "fail", make, used) for kind, make in to_fail.items()))
    yield from islice(filter(None, chain.from_iterable(in_turn)), n)


def other_patient(rows: dict[int, Row], section: str, order: list[int], index: int) -> str | None:
    """Return another row's section: of the next eight in `order`, the one that shares the fewest words with this row's.

    Return None if all of them share 60% of their words or more.
    """
    start = order.index(index)
    words = edits.words(rows[index][section])
    texts = [rows[order[(start + step) % len(order)]][section] for step in range(1, min(9, len(order)))]
    texts = [text for text in texts if len(edits.words(text)) >= 3]
    other = min(texts, key=lambda text: _overlap(words, edits.words(text)), default=None)
    return other if other is not None and _overlap(words, edits.words(other)) < 0.6 else None


def _overlap(first: set[str], second: set[str]) -> float:
    """Return the share of the smaller set's words that are also in the larger set, 0 to 1."""
    return len(first & second) / max(1, min(len(first), len(second)))


def by_index(rows: Rows) -> dict[int, Row]:
    """Return the rows as a dict from index to row."""
    return rows if isinstance(rows, dict) else dict(enumerate(rows))


def shuffled_indices(rows: dict[int, Row], section: str, seed: int) -> list[int]:
    """Return the indices of `rows` in an order that depends only on the indices, the section and the seed."""
    order = sorted(rows)
    random.Random(f"{seed} {section}").shuffle(order)
    return order
