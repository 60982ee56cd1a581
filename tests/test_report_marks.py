import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.report import marks

# --- differences of words --------------------------------------------------------------------------------------------


def marked(pieces: marks.Pieces) -> list[str]:
    return [text for text, only_here in pieces if only_here]


def test_words_in_only_one_text_are_marked():
    left, right = marks.word_differences(
        "Denies fever. Metoprolol 50 mg twice daily.", "denies fever, metoprolol 25 mg twice daily"
    )
    assert (marked(left), marked(right)) == (["50"], ["25"])


def test_a_mark_ends_before_the_space():
    left, _ = marks.word_differences("one two\nthree four", "one four")
    assert left == [("one", False), (" ", False), ("two\nthree", True), (" ", False), ("four", False), ("", False)]


@given(st.text(), st.text())
def test_marking_changes_no_character(left, right):
    pieces = marks.word_differences(left, right)
    assert ["".join(text for text, _ in side) for side in pieces] == [left.strip(), right.strip()]


@pytest.mark.parametrize("words", [1_000, 20_000])
def test_texts_designed_to_be_slow_are_compared_in_bounded_time(words):
    start = time.perf_counter()
    marks.word_differences("a b " * (words // 2), "b a " * (words // 2))
    marks.word_differences(" " * 1_000_000, "x" * 1_000_000)
    assert time.perf_counter() - start < 2


# --- statements ------------------------------------------------------------------------------------------------------


def record(covered: list[tuple], supported: list[tuple] = (), status: str = "asked", reason: str = "") -> dict:
    lists = {"covered": covered, "supported": supported}
    return {"status": status, "reason": reason} | {
        name: [{"statement": text, "log_odds": log_odds} for text, log_odds in entries]
        for name, entries in lists.items()
    }


def states(record: dict, threshold: float = 0.0) -> dict[str, list[str]]:
    read = marks.read_statements(record, threshold)
    return {name: [statement["state"] for statement in statements] for name, statements in read.items()}


def test_a_statement_counts_as_yes_from_the_threshold():
    entries = [("a", 0.49), ("b", 0.5), ("c", None), ("d", -2.0)]
    assert states(record(entries, entries), 0.5) == {
        "covered": ["missing", "covered", "unscored", "missing"],
        "supported": ["unsupported", "supported", "unscored", "unsupported"],
    }


def test_the_rule_makes_all_missing_and_a_failed_engine_leaves_all_unscored():
    entries = [("a", None), ("b", None)]
    assert states(record(entries, status="missing"))["covered"] == ["missing"] * 2
    assert states(record(entries, status="unscored"))["covered"] == ["unscored"] * 2


@pytest.mark.parametrize(
    ("entry", "title"),
    [
        (record([("a", -1.234)]), "missing, log odds −1.23"),
        (record([("a", 2.0)]), "covered, log odds +2.00"),
        (record([("a", None)]), "unscored: the judge said neither yes nor no"),
        (record([("a", None)], status="missing", reason="empty section"), "missing by rule: empty section"),
        (record([("a", None)], status="unscored", reason="the engine failed"), "unscored: the engine failed"),
    ],
)
def test_a_tooltip_gives_log_odds_or_the_reason(entry, title):
    assert marks.read_statements(entry, 0.0)["covered"][0]["title"] == title


def locate(text: str, *statements: str) -> tuple[list[tuple[str | None, str]], list[str]]:
    read = marks.read_statements(record([(statement, 1.0) for statement in statements]), 0.0)["covered"]
    segments, lost = marks.locate_statements([(text, False)], read)
    shown = [
        (statement and statement["statement"], "".join(piece for piece, _ in pieces)) for statement, pieces in segments
    ]
    return shown, [statement["statement"] for statement in lost]


def test_a_sentence_that_occurs_twice_is_located_twice():
    located, lost = locate("No fever. No fever.\nCough.", "No fever.", "No fever.", "Cough.")
    assert [text for _, text in located] == ["No fever.", " ", "No fever.", "\n", "Cough."]
    assert [statement for statement, _ in located] == ["No fever.", None, "No fever.", None, "Cough."]
    assert lost == []


def test_a_statement_that_the_text_lacks_is_returned_and_the_next_one_is_found():
    located, lost = locate("Cough. Fever.", "Rash.", "Fever.", "Cough.", "")
    assert located == [(None, "Cough. "), ("Fever.", "Fever.")]
    assert lost == ["Rash.", "Cough.", ""]  # "Cough." comes before "Fever."


@given(st.lists(st.text(min_size=1), max_size=8), st.lists(st.booleans(), min_size=8, max_size=8), st.text(max_size=20))
def test_marking_statements_changes_no_character_and_no_word_mark(parts, is_statement, other):
    text = "".join(parts)
    statements = [part for part, chosen in zip(parts, is_statement, strict=False) if chosen]
    pieces, _ = marks.word_differences(text, other)
    read = marks.read_statements(record([(statement, 1.0) for statement in statements]), 0.0)["covered"]
    segments, lost = marks.locate_statements(pieces, read)
    letters = [(letter, only_here) for _, cut in segments for piece, only_here in cut for letter in piece]
    assert letters == [(letter, only_here) for piece, only_here in pieces for letter in piece]
    found = ["".join(piece for piece, _ in cut) for statement, cut in segments if statement]
    assert sorted(found + [statement["statement"] for statement in lost]) == sorted(statements)
