"""Test the edits of a section: one keeps every fact, and each of the other four makes exactly one error."""

import json
import re
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.judging import edits
from preprocessing.headings import read_soap

NUMBER_WORDS = "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
NUMBERS = re.compile(rf"\d+(?:[.,]\d+)*|\b(?:{NUMBER_WORDS})\b", re.IGNORECASE)
SIDES = re.compile(r"\b(?:left|right|bilateral)", re.IGNORECASE)
NEGATIONS = re.compile(
    r"\b(?:no|not|never|none|nothing|nor|without|cannot|negative|absent|absence|deny|denies|denied|denying)\b|n't",
    re.IGNORECASE,
)
EDITS = {
    "reword": lambda text: edits.reword(text),
    "drop_finding": lambda text: edits.drop_finding(text, RARITY),
    "turn_negation": lambda text: edits.turn_negation(text, RARITY),
    "change_number": lambda text: edits.change_number(text),
    "change_side": lambda text: edits.change_side(text),
}

DEMO_FILE = Path(__file__).resolve().parent.parent / "demo" / "dialogues.jsonl"
DEMO = [json.loads(line) for line in DEMO_FILE.read_text("utf-8").splitlines()]
DEMO_SECTIONS = [text for row in DEMO for text in read_soap(row["soap"]).values()]
RARITY = edits.Rarity(DEMO_SECTIONS)

# Sentences with slots, joined to sections that the patterns were not written for.
SENTENCES = [
    "The patient reports {n} weeks of {side} knee pain due to a fall.",
    "She denies fever, chills and night sweats.",
    "Blood pressure {n}/70 mmHg, pulse {n} and regular.",
    "Physical examination revealed a {n}.5 cm mass in the {side} breast.",
    "CT of the chest showed no effusion on the {side}.",
    "Initiate amoxicillin {n} mg three times daily for ten days.",
    "The primary diagnosis is {side}-sided pneumonia without sepsis.",
    "He was not able to lift the {side} arm prior to surgery.",
    "Temperature 38.{n} °C, approximately {n} breaths per minute.",
    "Then the drain was removed.",
    "His mother had a stroke at {n}.",
    "COPD and GERD, treated with omeprazole {n} mg.",
    "1. Return if the wound opens.",
    "Murphy's sign is negative; the spleen was not felt.",
    "Lab results were within normal limits, CRP {n} mg/L.",
]
SECTIONS = st.lists(
    st.builds(
        lambda sentence, n, side: sentence.format(n=n, side=side),
        st.sampled_from(SENTENCES),
        st.integers(1, 120),
        st.sampled_from(["left", "right"]),
    ),
    min_size=1,
    max_size=7,
).flatmap(lambda sentences: st.sampled_from([" ", "\n"]).map(lambda gap: gap.join(sentences)))


def found(pattern: re.Pattern, text: str) -> Counter:
    return Counter(match.lower() for match in pattern.findall(text))


def changed_part(text: str, edited: str) -> tuple[str, str]:
    """Return both texts without their common words at the start and at the end."""
    old, new = text.split(" "), edited.split(" ")
    while old and new and old[0] == new[0]:
        old, new = old[1:], new[1:]
    while old and new and old[-1] == new[-1]:
        old, new = old[:-1], new[:-1]
    return " ".join(old), " ".join(new)


def check_reworded(text: str, edited: str) -> None:
    assert edited != text
    for pattern in (NUMBERS, SIDES, NEGATIONS):
        assert found(pattern, edited) == found(pattern, text)


def check_dropped(text: str, edited: str) -> None:
    old, new = changed_part(text, edited)
    assert len(old) > len(new)
    assert len(edits.words(old) - edits.words(edited)) >= 3
    assert edits.words(edited) <= edits.words(text)


def check_negation(text: str, edited: str) -> None:
    for pattern in (NUMBERS, SIDES):
        assert found(pattern, edited) == found(pattern, text)
    before, after = found(NEGATIONS, text), found(NEGATIONS, edited)
    assert (before - after).total() + (after - before).total() == 1
    old, new = changed_part(text, edited)
    assert len(old.split()) <= 3 and len(new.split()) <= 3


def check_number(text: str, edited: str) -> None:
    for pattern in (SIDES, NEGATIONS):
        assert found(pattern, edited) == found(pattern, text)
    old, new = NUMBERS.findall(text), NUMBERS.findall(edited)
    pairs = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
    assert len(pairs) == 1
    assert NUMBERS.sub("#", edited) == NUMBERS.sub("#", text)
    if pairs[0][0][0].isdigit():
        a, b = (float(number.replace(",", "")) for number in pairs[0])
        assert abs(a - b) >= 0.05 * a  # 37.0 to 39.5 degrees is the smallest change


def check_side(text: str, edited: str) -> None:
    for pattern in (NUMBERS, NEGATIONS):
        assert found(pattern, edited) == found(pattern, text)
    assert edited != text
    assert edits.change_side(edited) == text
    assert SIDES.sub("#", edited) == SIDES.sub("#", text)


CHECKS = {
    "reword": check_reworded,
    "drop_finding": check_dropped,
    "turn_negation": check_negation,
    "change_number": check_number,
    "change_side": check_side,
}


@pytest.mark.parametrize("name", EDITS)
@given(text=SECTIONS)
@settings(max_examples=300, deadline=None)
def test_each_edit_changes_only_its_intended_part(name, text):
    edited = EDITS[name](text)
    if edited is not None:
        CHECKS[name](text, edited)


@pytest.mark.parametrize(
    ("name", "least"),
    [("reword", 400), ("drop_finding", 400), ("turn_negation", 350), ("change_number", 400), ("change_side", 150)],
)
def test_the_edits_are_right_on_the_demo_and_apply_often_enough(name, least):
    pairs = [(text, EDITS[name](text)) for text in DEMO_SECTIONS]
    pairs = [(text, edited) for text, edited in pairs if edited is not None]
    assert len(pairs) >= least, f"{len(pairs)} of {len(DEMO_SECTIONS)}"
    for text, edited in pairs:
        CHECKS[name](text, edited)


@pytest.mark.parametrize("name", EDITS)
@given(text=st.text(max_size=300))
@settings(max_examples=150, deadline=None)
def test_no_text_makes_an_edit_raise_an_error(name, text):
    edited = EDITS[name](text)
    assert edited is None or (isinstance(edited, str) and edited != text)


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize(
    "piece",
    ["No pain. ", "1-", "12 ", "left ", " \t", "Denies ", "5 to ", "BP 120/80 ", "\n", "x; ", "normal (2 mg ", "A. "],
)
def test_an_edit_of_a_long_text_takes_little_time(name, piece):
    text = piece * (200_000 // len(piece))
    start = time.process_time()
    EDITS[name](text)
    assert time.process_time() - start < 5


def test_no_synonym_or_abbreviation_changes_a_number_side_or_negation():
    pairs = [*edits._SYNONYMS.items(), *edits._ABBREVIATIONS.items()]
    assert len(pairs) > 80
    for old, new in pairs:
        for pattern in (NUMBERS, SIDES, NEGATIONS):
            assert found(pattern, old) == found(pattern, new), (old, new)


@pytest.mark.parametrize(
    ("name", "text", "edited"),
    [
        ("reword", "The patient reports nausea. No vomiting.", "No vomiting. The patient describes nausea."),
        ("reword", "BP 120/80, HR 70.", "Blood pressure 120/80, heart rate 70."),
        # "It was then removed" refers to the sentence before, so the two move as one.
        (
            "reword",
            "A drain was placed. It was then removed. Wound dry.",
            "Wound dry. A drain was placed. It was then removed.",
        ),
        ("reword", "Chronic obstructive pulmonary disease (COPD).", None),
        ("reword", "1. Rest.\n2. Fluids.", None),
        ("reword", "Cellulitis.", None),
        (
            "drop_finding",
            "Chest clear. Firm irregular thyroid nodule. Follow-up next week.",
            "Chest clear. Follow-up next week.",
        ),
        ("drop_finding", "Asthma, with seasonal pollen allergy.", "Asthma."),
        ("drop_finding", "Follow-up in our clinic next month. Educate the patient about warning symptoms.", None),
        ("drop_finding", "Cellulitis.", None),
        ("turn_negation", "He denies any chest pain.", "He reports chest pain."),
        ("turn_negation", "No rash was seen.", "Rash was seen."),
        ("turn_negation", "Urine culture negative.", "Urine culture positive."),
        ("turn_negation", "The patient reports chest pain.", "The patient denies chest pain."),
        ("turn_negation", "The primary diagnosis is gout.", "The primary diagnosis is not gout."),
        ("turn_negation", "Start metformin.", "Do not start metformin."),
        ("turn_negation", "No longer coughs. Cough lasted no more than a day.", None),
        ("turn_negation", "No additional symptoms were noted.", None),
        ("turn_negation", "Gout.", None),
        ("change_number", "Metoprolol 25 mg, seen 3 weeks ago.", "Metoprolol 250 mg, seen 3 weeks ago."),
        ("change_number", "Aspirin 325 mg.", "Aspirin 32.5 mg."),
        ("change_number", "Blood pressure 120/80 mmHg.", "Blood pressure 180/80 mmHg."),
        ("change_number", "Temperature 36.8°C.", "Temperature 39.3°C."),
        ("change_number", "Platelets 1,200 cells/µL (normal 150 g/L).", "Platelets 3,600 cells/µL (normal 150 g/L)."),
        ("change_number", "A 2-3 cm mass.", "A 2-9 cm mass."),
        ("change_number", "Return in two weeks.", "Return in seven weeks."),
        ("change_number", "A 58-year-old woman.", "A 28-year-old woman."),
        ("change_number", "Vitamin B12, L4 fracture, in 2019, COVID-19, type 2 diabetes.", None),
        ("change_side", "Left knee and right-sided hernia.", "Right knee and left-sided hernia."),
        ("change_side", "He left the ward right away with a left shift.", None),
    ],
)
def test_an_edit_of_a_known_text_gives_the_known_result(name, text, edited):
    assert EDITS[name](text) == edited


def test_the_sentence_with_the_rarest_words_is_dropped():
    rarity = edits.Rarity(["Abdomen soft without tenderness."] * 50 + ["Splenic infarction confirmed today."])
    text = "Abdomen soft without tenderness. Splenic infarction confirmed today."
    assert edits.drop_finding(text, rarity) == "Abdomen soft without tenderness."
