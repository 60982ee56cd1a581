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
