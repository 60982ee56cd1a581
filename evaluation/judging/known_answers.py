"""Make controls, which check the judge: sections of the dataset, edited so that the right verdict is known."""

import random
from collections.abc import Callable, Iterator
from itertools import chain, islice, zip_longest

from common.dataset import Row, Rows
from evaluation.judging import edits, plausible, rewording
from evaluation.judging.additions import INVENTED, USUAL
from evaluation.judging.judge import Case
from evaluation.judging.texts import Rarity, words
from prompts import SECTIONS

Make = Callable[[int], str | None]  # from a row's index to the edited section, or None if the row does not allow it


def control_cases(rows: Rows, n: int, seed: int) -> list[Case]:
    """Return n controls that should pass and n that should fail for each section. Equal arguments give equal controls.

    The kinds take turns. Those that should pass: "reworded" (other words and order), "further_fact" (a true fact from
    the same visit; not for section O) and "minor_omission" (a sentence of general education is missing). Those that
    should fail: "other_patient", "dropped_finding", "turned_negation", "changed_number", "small_dose", "changed_side",
    "invented_finding", "other_drug", "other_diagnosis" (section A only), "wrong_section" (another section of the same
    note), and errors that fine-tuned models make: "raised_certainty", "changed_status" (of time or treatment),
    "other_source" (another relative or examination), "reversed_cause" and "usual_addition" (a sentence that many notes
    have). Rows that do not allow a kind are skipped, so few rows may give fewer than n controls. The k-th control of a
    kind does not depend on n.
    """
    return [case for section in SECTIONS for case in _section_controls(by_index(rows), section, n, seed)]


def _section_controls(rows: dict[int, Row], section: str, n: int, seed: int) -> Iterator[Case]:
    order = shuffled_indices(rows, section, seed)

    def controls(kind: str, expected: str, make: Make, used: set[int]) -> Iterator[Case]:
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

    for expected, kinds in (
        ("pass", _kinds_to_pass(rows, section)),
        ("fail", _kinds_to_fail(rows, section, order, seed)),
    ):
        used: set[int] = set()
        in_turn = zip_longest(*(controls(kind, expected, make, used) for kind, make in kinds.items()))
        yield from islice(filter(None, chain.from_iterable(in_turn)), n)


def _kinds_to_pass(rows: dict[int, Row], section: str) -> dict[str, Make]:
    rarity = Rarity(row["S"] + " " + row["O"] for row in rows.values())

    def further_fact(index: int) -> str | None:
        row, text = rows[index], rows[index][section]

        def weight_of_new_words(sentence: str) -> float:
            return rarity.weight(words(sentence) - words(text))

        if section == "S":
            return rewording.quote_patient(text, row["dialogue"], weight_of_new_words)
        if section == "A":
            return rewording.add_finding(text, row["O"], weight_of_new_words)
        return rewording.add_diagnosis(text, row["A"]) if section == "P" else None

    return {
        "reworded": lambda index: rewording.reword(rows[index][section]),
        "further_fact": further_fact,
        "minor_omission": lambda index: rewording.omit_minor(rows[index][section]),
    }


def _kinds_to_fail(rows: dict[int, Row], section: str, order: list[int], seed: int) -> dict[str, Make]:
    rarity = Rarity(row[section] for row in rows.values())

    def visit(index: int) -> str:
        return "\n".join([rows[index]["dialogue"], *(rows[index][name] for name in SECTIONS)])

    def added(index: int, sentences: dict[str, list[tuple[str, str]]]) -> str | None:
        return edits.add_sentence(rows[index][section], sentences[section], visit(index), f"{seed} {section} {index}")

    def other_diagnosis(index: int) -> str | None:
        return edits.change_diagnosis(rows[index][section], visit(index)) if section == "A" else None

    return {
        "other_patient": lambda index: other_patient(rows, section, order, index),
        "dropped_finding": lambda index: edits.drop_finding(rows[index][section], rarity),
        "turned_negation": lambda index: edits.turn_negation(rows[index][section], rarity),
        "raised_certainty": lambda index: plausible.raise_certainty(rows[index][section], visit(index)),
        "changed_number": lambda index: edits.change_number(rows[index][section]),
        "changed_status": lambda index: plausible.change_status(rows[index][section]),
        "small_dose": lambda index: edits.change_dose(rows[index][section]),
        "changed_side": lambda index: edits.change_side(rows[index][section]),
        "usual_addition": lambda index: added(index, USUAL),
        "invented_finding": lambda index: added(index, INVENTED),
        "other_source": lambda index: plausible.change_source(rows[index][section], visit(index)),
        "other_drug": lambda index: edits.change_drug(rows[index][section], visit(index)),
        "reversed_cause": lambda index: plausible.reverse_cause(rows[index][section]),
        "other_diagnosis": other_diagnosis,
        "wrong_section": lambda index: wrong_section(rows[index], section),
    }


def wrong_section(row: Row, section: str) -> str | None:
    """Return the section of the row that shares the fewest words with `section`, or None if it shares 40% or more."""
    texts = [row[name] for name in SECTIONS if name != section]
    return _least_similar(row[section], texts, 0.4)


def other_patient(rows: dict[int, Row], section: str, order: list[int], index: int) -> str | None:
    """Return another row's section: of the next eight in `order`, the one that shares the fewest words with this row's.

    Return None if all of them share 60% of their words or more.
    """
    start = order.index(index)
    texts = [rows[order[(start + step) % len(order)]][section] for step in range(1, min(9, len(order)))]
    return _least_similar(rows[index][section], texts, 0.6)


def _least_similar(text: str, others: list[str], below: float) -> str | None:
    """Return the text in `others` that shares the smallest fraction of words with `text`, or None.

    The fraction is of the words of the shorter text, and must be under `below`. Texts of fewer than three words are
    left out.
    """
    own = words(text)

    def overlap(other: str) -> float:
        return len(own & words(other)) / max(1, min(len(own), len(words(other))))

    other = min((other for other in others if len(words(other)) >= 3), key=overlap, default=None)
    return other if other is not None and overlap(other) < below else None


def by_index(rows: Rows) -> dict[int, Row]:
    """Return the rows as a dict from index to row."""
    return rows if isinstance(rows, dict) else dict(enumerate(rows))


def shuffled_indices(rows: dict[int, Row], section: str, seed: int) -> list[int]:
    """Return the indices of `rows` in an order that depends only on the indices, the section and the seed."""
    order = sorted(rows)
    random.Random(f"{seed} {section}").shuffle(order)
    return order
