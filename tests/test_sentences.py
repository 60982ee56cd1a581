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
    "Vit. D 2000 IU daily.",
    "Takes vit. B12 since Jan. 5.",
    "Seen on Sept. 12 in Rm. 4 (cf. p. 7).",
    "Amoxicillin 500 mg. PO b.i.d. for ten days.",
    "Drug from Merck Inc. arrived.",
    "Smith et al. (2019) agree.",
    "E. coli grew in the urine.",
    "Pt. Jones and Rev. Hill came.",
    "The pain fades… slowly.",
    "Pain ... then relief.",
    "INR of 2.5-3.5 on 3.6.2024.",
]
# The last words of sentences before "He smokes.", as abbreviations.
LAST_WORDS = [
    *(
        "on Main St.",
        "on Oak Ave.",
        "at Pfizer Inc.",
        "for Merck Ltd.",
        "in Dec.",
        "in the U.S.",
        "as John Smith Jr.",
        "etc.",
    ),
    *(
        "for 5 min.",
        "at 8 a.m.",
        "80 kg.",
        "500 mg.",
        "t.i.d.",
        "with Dr. Lee, M.D.",
        "of influenza A.",
        "of Influenza A.",
    ),
    *("slowly...", "slowly…", "of vitamin D.", "at 7.4.", "in stage III.", "with Ms. K.", "as shown in Fig. A."),
]
LISTS = [
    ["1. Aspirin", "2. Rest", "3. Fluids."],
    ["1) Aspirin", "2) Rest"],
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


@pytest.mark.parametrize("last", LAST_WORDS)
@pytest.mark.parametrize(
    "following", ["He smokes.", "The wound is dry.", "Denies pain.", "Patient sleeps.", "No rash."]
)
def test_an_abbreviation_at_a_sentence_s_end_does_not_join_the_next(last, following):
    assert split_statements(f"Lives {last} {following}") == [f"Lives {last}", following]


@pytest.mark.parametrize("first", ["pH 7.4.", "Saturation 98%.", "He coughs.", "Is it worse?", "Stable (sitting)."])
@pytest.mark.parametrize("following", ["Then he fell.", "He smokes.", "Lungs, heart normal."])
def test_sentences_without_a_space_between_them_are_split(first, following):
    assert split_statements(first + following) == [first, following]


@pytest.mark.parametrize(
    "text", ["E.coli B.pseudomallei p.Ile553Phe", "Dr.Lee", "10.5.Mg", "y.o. man, U.S.A", "heart.org Site"]
)
def test_a_full_stop_within_a_word_ends_no_sentence(text):
    assert split_statements(text) == [text]


@pytest.mark.parametrize("items", LISTS)
@pytest.mark.parametrize("gap", [" ", "\n"])
def test_items_of_a_numbered_list_keep_their_numbers(items, gap):
    assert split_statements(gap.join(items)) == items


def test_a_heading_line_is_joined_to_the_next_statement():
    assert split_statements("Vitals:\nBP 120/80\nLungs:\n- clear") == ["Vitals:\nBP 120/80", "Lungs:\n- clear"]
    assert split_statements("# Plan\nRest. Fluids.") == ["# Plan\nRest.", "Fluids."]
    assert split_statements("Rest.\nFollow-up:") == ["Rest.", "Follow-up:"]


def test_bullets_within_a_line_split_it():
    assert split_statements("Plan: - Rest - Fluids. - Ice, 2 - 3 times") == [
        "Plan: - Rest",
        "Fluids.",
        "Ice, 2 - 3 times",
    ]
    assert split_statements("- Rest - Fluids\n- Ice") == ["Rest", "Fluids", "Ice"]
    assert split_statements("Scars improve. - Continue gel.") == ["Scars improve.", "Continue gel."]
    assert split_statements("Strength legs - 4, Arms - Normal") == ["Strength legs - 4, Arms - Normal"]
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
