"""Test that clinical text is split into statements where a reader would split it."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.judging.sentences import split_statements

# Statements that no splitter may cut or join. Neighbours are joined with a space.
STATEMENTS = [
    "Mr. Smith denies pain.",
    "Mrs. J. Smith saw Dr. A. B. Jones.",
    "Seen at St. Mary Hospital with Ms. K and Prof. Lee.",
    "Crohn's vs. Ulcerative colitis.",
    "Avoid NSAIDs, e.g. Ibuprofen, i.e. Advil.",
    "Metformin 500 mg p.o. BID.",
    "Amoxicillin 500 mg p.o. q.i.d.",
    "Warfarin 5.25 mg b.i.d. PRN.",
    "Bed No. 5 is free.",
    "Size approx. 5 cm (see Fig. 2).",
    "Tested positive for hepatitis C.",
    "The temperature was 37 C.",
    "The temperature was 39 °C.",
    "Platelets were 186 × 10^9/L.",
    "ESR was 11 mm/hr.",
    "The refractory period was 220 ms.",
    "Cranial nerves IX and X.",
    "ECG and ANA were normal.",
    "Pain score is 5.",
    "The lungs are clear; the heart is regular; the abdomen is soft.",
    "Potassium was 3.5.",
    "Allergies: no.",
    "Pt. reports pain.",
    "Is there pain?",
    'He said "It hurts."',
    "hsCRP is normal.",
    "Blood pressure 120/80 (sitting).",
    "(Repeat later.)",
]
LISTS = [
    ["Plan:\n1. Aspirin 81 mg", "2. Rest", "3. Fluids."],
    ["Plan: 1. Aspirin 81 mg", "2. Rest", "3. Fluids."],
    ["1. Dr. Lee will call.", "2. Vitamin B12 for 3 months.", "3) Return in a week."],
]


@given(
    st.lists(st.sampled_from(STATEMENTS), min_size=1, max_size=8), st.sampled_from([" ", "  ", "\n", " \n\n", "\r\n"])
)
def test_joined_statements_are_split_again(statements, gap):
    assert split_statements(gap.join(statements)) == statements


@given(st.lists(st.sampled_from(STATEMENTS), min_size=1, max_size=8), st.sampled_from(["- ", "* ", "• ", "  – "]))
def test_list_items_are_statements_without_bullets(statements, bullet):
    assert split_statements("\n".join(bullet + statement for statement in statements)) == statements


@pytest.mark.parametrize("items", LISTS)
@pytest.mark.parametrize("gap", [" ", "\n"])
def test_items_of_a_numbered_list_keep_their_numbers(items, gap):
    assert split_statements(gap.join(items)) == items


def test_a_heading_line_is_joined_to_the_next_statement():
    assert split_statements("Vitals:\nBP 120/80\nLungs:\n- clear") == ["Vitals:\nBP 120/80", "Lungs:\n- clear"]
    assert split_statements("# Plan\nRest. Fluids.") == ["# Plan\nRest.", "Fluids."]
    assert split_statements("Rest.\nFollow-up:") == ["Rest.", "Follow-up:"]


def test_bullets_within_a_line_split_it():
    assert split_statements("Assessment: • Acne • Asthma. • Gout") == ["Assessment: • Acne", "Asthma.", "Gout"]


@given(st.text() | st.lists(st.sampled_from([*STATEMENTS, "1.", "\n", ":", "- ", " ", "•", "A."])).map("".join))
def test_statements_are_stripped_substrings_in_order_and_lose_no_letter(text):
    statements, place = split_statements(text), 0
    for statement in statements:
        assert statement == statement.strip()
        assert any(map(str.isalnum, statement))
        place = text.index(statement, place) + len(statement)
    kept = [character for statement in statements for character in statement if character.isalnum()]
    assert kept == [character for character in text if character.isalnum()]


@pytest.mark.parametrize(
    "piece", ["No pain. ", "1-", " \t", "\n", "x; ", "A. ", "1. A", "- ", "Vitals:\n", "Mr. A. ", "."]
)
def test_a_long_text_takes_little_time(piece):
    start = time.process_time()
    split_statements(piece * (200_000 // len(piece)))
    assert time.process_time() - start < 5
