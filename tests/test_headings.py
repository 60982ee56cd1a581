import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import heading_notes
import pytest
from conftest import assert_linear
from hypothesis import example, given
from hypothesis import strategies as st

import prompts
from common.errors import UserError
from preprocessing.headings import read_soap
from preprocessing.labels import normal_form, read_section_map
from prompts import SECTIONS, NoteError

NOTE = {
    "S": "Cough for 3 days. Denies fever. Goal: walk 5 km.",
    "O": "BP: 120/80, P: 88, T 37.1 C. Chest CTA: clear. Hepatitis A: negative.",
    "A": "Viral bronchitis, no sign of pneumonia.",
    "P": "Rest and fluids. Return in 7 days.",
}
LETTERS = list(SECTIONS)
WORDS = [prompts.SECTION_NAMES[section] for section in SECTIONS]

ANY_TEXT = st.text(st.characters(), max_size=200)
# Text made of pieces that the reader looks for, so that many branches run.
NEAR_SOAP = st.lists(
    st.sampled_from([*LETTERS, *WORDS, ":", "**", "##", "(", ")", " ", "\n", "\r\n", "-", "a.", "P: 88", "\ud800"])
).map("".join)


def under(headings: list[str], between: str = "\n", after: str = " ") -> str:
    """NOTE as text under four headings."""
    return between.join(heading + after + NOTE[section] for heading, section in zip(headings, SECTIONS, strict=True))


@given(st.one_of(ANY_TEXT, NEAR_SOAP))
@example("[" * 100_000)
def test_every_text_is_read_or_raises_note_error(text: str):
    try:
        note = read_soap(text)
    except NoteError as error:
        assert len(str(error)) < 100
    else:
        assert list(note) == list(SECTIONS)
        assert all(isinstance(section, str) and section == section.strip() for section in note.values())


@pytest.mark.parametrize(
    "text",
    [
        under([f"{letter}:" for letter in LETTERS]),
        under([f"{letter}:" for letter in LETTERS], between=" "),
        under([f"{letter}:" for letter in LETTERS], between="\r\n\r\n"),
        under([f"{letter}:" for letter in LETTERS], after="\n"),
        under([f"{letter} -" for letter in LETTERS]),
        under([f"[{letter}]:" for letter in LETTERS]),
        under([f"**{letter}:**" for letter in LETTERS]),
        under([f"**{letter}:**" for letter in LETTERS], between=" "),
        under(LETTERS, after="\n"),
        under([f"**{letter}**" for letter in LETTERS], after="\n\n"),
        under([f"{word}:" for word in WORDS]),
        under([f"{word}:" for word in WORDS], between=" "),
        under([f"{word.upper()}:" for word in WORDS]),
        under([f"{word}：" for word in WORDS]),
        under([f"**{word}:**" for word in WORDS]),
        under([f"**{word}:**" for word in WORDS], between=" "),
        under([f"**{word}**:" for word in WORDS]),
        under([f"__{word}:__" for word in WORDS]),
        under([f"**{word}**" for word in WORDS], after="\n"),
        under([f"## {word}" for word in WORDS], after="\n", between="\n\n"),
        under([f"### {word}:" for word in WORDS], after="\n"),
        under([f"{letter} ({word}):" for letter, word in zip(LETTERS, WORDS, strict=True)]),
        under([f"{letter} ({word}):" for letter, word in zip(LETTERS, WORDS, strict=True)], between=" "),
        under([f"**{word} ({letter}):**" for letter, word in zip(LETTERS, WORDS, strict=True)]),
        under([f"{k}. {word}:" for k, word in enumerate(WORDS, 1)]),
        under([f"{k}) **{word}**" for k, word in enumerate(WORDS, 1)], after="\n"),
        under([f"- **{letter}:**" for letter in LETTERS], between="\r\n"),
        under([f"## {k}. {word}" for k, word in enumerate(WORDS, 1)], after="\n", between="\n\n"),
        "SOAP Note\n\n" + under([f"{letter}:" for letter in LETTERS]),
        "**Medical SOAP Note:**\n" + under([f"**{word}:**" for word in WORDS]),
    ],
)
def test_headings_are_read_in_every_common_style(text: str):
    assert read_soap(text) == NOTE


@pytest.mark.parametrize(
    ("objective", "assessment"),
    [
        ("BP: 120/80. CTA: clear.", "Flu."),
        ("P: 88, R: 16.", "Flu."),
        ("Vitals\nT: 37\nP: 88", "Flu."),
        ("Hepatitis A: negative.", "Hepatitis A: excluded."),
        ("Blood group:\nA\nRh positive.", "Anaemia."),
        ("Walks 3 km, her objective: 5 km.", "On plan: yes."),
        ("PO: 2 L. SpO2: 97%. HPA: normal. S1, S2 normal.", "STEMI - none."),
        ("Patient points at the assessment\nform.", "Flu."),
    ],
)
@pytest.mark.parametrize("between", [" ", "\n"])
def test_a_colon_inside_a_section_does_not_begin_another(objective: str, assessment: str, between: str):
    note = {"S": "Tired.", "O": objective, "A": assessment, "P": "Rest."}
    assert read_soap(between.join(f"{section}: {text}" for section, text in note.items())) == note


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no heading for Subjective"),
        ("Cough for 3 days, rest.", "no heading for Subjective"),
        ("s: a o: b a: c p: d", "no heading for Subjective"),
        ("S: cough. O: clear. P: rest.", "no heading for Assessment"),
        ("S: cough. A: flu. O: clear. P: rest.", r"no heading for (Assessment|Plan)"),
        ("S: cough. O: A: flu. P: rest.", "section O is empty"),
        ("S: cough. O: clear. A: flu. P:", "section P is empty"),
        ("The patient came in today. S: cough. O: clear. A: flu. P: rest.", "there is text before"),
        ("S: cough.\nO: clear.\nA: flu.\nP: rest.\nA: asthma.\nP: inhaler.", "more headings follow the Plan"),
        ("\n".join(["S: cough.", "O: clear.", "A: flu.", "P: rest."] * 2), "more headings follow the Plan"),
        ("S: cough.\nO: clear.\nA/P: flu, rest.", "Assessment and Plan share one heading"),
        ("**Subjective:** cough.\n**Objective:** clear.\n**Assessment and Plan:** flu.", "share one heading"),
    ],
)
def test_text_without_four_sections_is_rejected_with_the_reason(text: str, reason: str):
    with pytest.raises(NoteError, match=reason):
        read_soap(text)


@given(
    st.fixed_dictionaries({section: st.from_regex(r"[a-z0-9 ,%/]*[a-z0-9]", fullmatch=True) for section in SECTIONS})
)
def test_sections_of_plain_words_are_read_back_from_any_layout(note: dict[str, str]):
    expected = {section: text.strip() for section, text in note.items()}
    for between, mark in (("\n", ":"), (" ", ":"), ("\n\n", " -")):
        assert read_soap(between.join(f"{section}{mark} {note[section]}." for section in SECTIONS)) == {
            section: f"{text}." for section, text in expected.items()
        }


# Any characters but those that can end a heading, and the ends of lines.
UNMARKED = st.text(st.characters(exclude_characters=":\uff1a-\u2013\u2014*_()[]#\r\n"), max_size=80).filter(str.strip)


@given(st.fixed_dictionaries(dict.fromkeys(SECTIONS, st.lists(UNMARKED, min_size=1, max_size=3).map(". ".join))))
def test_sections_of_any_characters_are_read_back_exactly(note: dict[str, str]):
    expected = {section: f"{text}.".strip() for section, text in note.items()}
    for between in ("\n", "\r\n\r\n"):
        assert read_soap(between.join(f"{section}: {note[section]}." for section in SECTIONS)) == expected


# --- look-alikes, repeats and longer headings

SHORT = {"S": "Cough.", "O": "Clear.", "A": "Flu.", "P": "Rest."}


@pytest.mark.parametrize(
    "text",
    [
        "S - Subjective:\nCough.\nO - Objective:\nClear.\nA - Assessment:\nFlu.\nP - Plan:\nRest.",
        "S: Subjective: Cough. O: Objective: Clear. A: Assessment: Flu. P: Plan: Rest.",
        "**S: Subjective**\nCough.\n**O: Objective**\nClear.\n**A: Assessment**\nFlu.\n**P: Plan**\nRest.",
        "S: Cough.\nO: Clear.\nA: Assessment\nFlu.\nP: Plan: Rest.",
        "S:\nSubjective: Cough.\nO:\nObjective: Clear.\nA:\nAssessment: Flu.\nP:\nPlan: Rest.",
        "Subjective: Cough.\nObjective: Clear.\nAssessment: Flu.\nTreatment Plan: Rest.",
        "Subjective: Cough. Objective: Clear. Assessment: Flu. Treatment Plan: Rest.",
        "Subjective: Cough.\nObjective: Clear.\nAssessment / Problem List: Flu.\nPlan & Recommendations: Rest.",
        "Subjective:\nCough.\nObjective:\nClear.\nAssessment / Problem List:\n\nAssessment: Flu.\nPlan: Rest.",
        "S: Cough.\nO: Clear.\nA/P:\nA: Flu.\nP: Rest.",
        "O: Objective / Exam: Clear.".join(["S: Cough.\n", "\nA: Flu.\nP: Rest."]),
        "S: Cough.\nO: Clear.\nAssessment: Flu.\nPlan: Rest.",
        "Subjective\n----------\nCough.\n\n---\n\nObjective\n---------\nClear.\n\nAssessment\n---\nFlu.\nPlan\n---\nRest.",
        "SOAP Note: S: Cough. O: Clear. A: Flu. P: Rest.",
        "  S: Cough.\n  O: Clear.\n  A: Flu.\n  P: Rest.",
    ],
)
def test_the_whole_label_is_the_heading(text: str):
    assert read_soap(text) == SHORT


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ("S", "HPI: 3 days of cough.\nROS: no fever.\nMedications: none"),
        ("O", "Vitals:\nT: 37\nP: 88\nPhysical exam: clear.\nImpression: no pneumonia on the film."),
        ("O", "Risk assessment: low.\nNutrition Assessment: at risk."),
        ("O", "Primary survey\nA: patent\nB: clear\nC: warm"),
        ("O", "Influenza A: confirmed. Hepatitis A: excluded."),
        ("A", "Impression: bronchitis.\nDifferential diagnosis: asthma."),
        ("P", "Treatment plan: rest.\nFollow-up plan: 2 weeks.\nMedications: aspirin."),
        ("P", "Rest. We agreed on a follow-up plan: return in 2 weeks."),
        ("P", "Take **aspirin**"),
        ("P", "10 days of rest."),
    ],
)
@pytest.mark.parametrize("names", [LETTERS, WORDS])
def test_the_heading_of_a_part_of_a_section_stays_text(section: str, text: str, names: list[str]):
    note = SHORT | {section: text}
    headings = dict(zip(SECTIONS, names, strict=True))
    assert read_soap("\n".join(f"{headings[key]}: {note[key]}" for key in SECTIONS)) == note
    assert read_soap("\n\n".join(f"## {headings[key]}\n{note[key]}" for key in SECTIONS)) == note


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("S: a.\nO: b.\nAssessment and Plan:\n1. Influenza A: confirmed.\nPlan: c.", "Assessment and Plan share one"),
        ("Subjective and Objective: a.\nAssessment: b.\nPlan: c.", "Subjective and Objective share one"),
        ("Subjective: a.\nObjective: b. Risk assessment: low.\nImpression: c.\nPlan: d.", "no heading for Assessment"),
        ("Subjective: a.\nObjective: b. Risk assessment: low.\nPlan: d.", "no heading for Assessment"),
        ("S: a.\nO: b.\nImpression: c.\nP: d.", 'no heading for Assessment .*"Impression"'),
        ("S: a.\nO: b.\nA: c.\nRecommendations: d.", 'no heading for Plan .*"Recommendations"'),
        ("S: a. O: Influenza A: confirmed. P: b.", "no heading for Assessment .* after the end of a sentence"),
        ("S: a. O: Hep. A: negative. P: b.", "no heading for Assessment"),
        ("S: a.\nO: b.\nA: c. P: d.", "no heading for Plan .* at the start of a line"),
        ("Subjective: a.\nObjective: b.\nA: c.\nPlan: d.", "some are letters, some words"),
        ("S: a.\nO: b.\nA: 1. Gout\n  - P: ice", "no heading for Plan .* looks like the first"),
        ("S: a.\nO: b.\nA: c.\n  P: d.", "differ in indentation"),
        ("Subjective: a.\nObjective: b.\nAssessment: c.\nHTN plan: d.\nGout plan: e.", "only a longer one"),
        ("Subjective: a.\nObjective: b.\nAssessment: c.\nRx: d.\nTreatment plan: e.", "more than one that may be it"),
        ("S: a.\nO: b.\nA: patent\nB: clear\nC: warm\nP: c.", "no heading for Assessment"),
        ("S: a.\nO: Q: Any pain?\nA: No.\nP: c.", "no heading for Assessment"),
        ("S\na\nO\nBlood group:\nA\nRh positive\nP\nd", "may be a value"),
        ("S: a.\nO: b.\nA: c.\nP: 88\nR: 16", "may be a pulse"),
        (
            "S: a.\nO: a line about the swab, positive for influenza\nA: as the people of the laboratory\nsay.\nP: c.",
            "wrapped",
        ),
        (f"S: a.\nO: b {'word ' * 100}\nA: as the people of the laboratory\nsay.\nP: c.", "wrapped"),
        ("S:\nSubjective: a O:\n\n  \nObjective: b.\nAssessment: c.\nPlan: d.", "section S ends with another"),
        ("S: a.\nO: b.\nA: c.\nP: 88.\nP: d.", "more headings follow the Plan|more than one heading for Plan"),
        ("S: a.\nS: b.\nO: c.\nA: d.\nP: e.", "more than one heading for Subjective"),
        ("S: a.\nO: b.\nA: c.\nO: d.\nP: e.", "more than one heading for Objective"),
        ("S: a. O: b. A: c. P: d. S: e. O: f. A: g. P: h.", "more headings follow the Plan"),
        ("S: a. O: b. A: c. P: d S: e O: f A: g P: h", "more headings follow the Plan"),
        (
            "S: a.\nO: b.\nA: c.\nP: d.\nSubjective: e. Objective: f. Assessment: g. Plan: h.",
            "more headings follow the",
        ),
        ("## S\na\n## O\nb\n## A\nc\n## P\nd\n## S\ne\n## O\nf\n## A\ng\n## P\nh", "more headings follow the Plan"),
        ("**S:** a **O:** b **A:** c **P:** d **S:** e **O:** f **A:** g **P:** h", "more headings follow the Plan"),
        ("Subjective: a.\nObjective: b.\nAssessment: c.\nPlan: d.\nAssessment (continued): e.", "more headings follow"),
        (
            "Subjective: a.\nObjective: b.\nAssessment: c.\nPlan: d.\nAssessment 2: e.\nPlan 2: f.",
            "more headings follow",
        ),
        ("S: a.\nO: b.\nA: c.\nP: d.\nHPI: e.\nExam: f.", "HPI appears under Plan"),
        ("S: a.\nO: b.\nA: c.\nP: d.\nAddendum: e.", "Addendum belongs to no section"),
        ("S: a.\nO: b.\nA: c.\nP: d.\nElectronically signed by Mrs Miller", "^Signature belongs to no section$"),
        ("S: a.\nO: b.\nA: c.\nP: d.\nS) e\nO) f\nA) g\nP) h", "more headings follow the Plan"),
        ("S: a.\nO: b.\nA: c.\nP: d.\n| Subjective | e |\n| Objective | f |", "more headings follow the Plan"),
        ("S: a. O: Seen by Dr. A: none. P: b.", "no heading for Assessment"),
        ("S: a. O: Room: 3 A: bed. P: b.", "no heading for Assessment"),
        ("SUBJECTIVE: a. OBJECTIVE: b, suicide risk ASSESSMENT: low. PLAN: c.", "no heading for Assessment"),
        ("S (Objective): a.\nO: b.\nA: c.\nP: d.", "no heading for Subjective"),
    ],
)
def test_a_doubtful_heading_is_rejected_with_the_reason(text: str, reason: str):
    with pytest.raises(NoteError, match=reason) as caught:
        read_soap(text)
    assert len(str(caught.value)) < 100


@pytest.mark.parametrize("seed", range(4))
def test_no_generated_note_is_misread_and_every_well_formed_one_is_read(seed: int):
    rng = random.Random(seed)
    faults, expected = Counter(), Counter()
    for _ in range(2_000):
        case = heading_notes.make_case(rng)
        expected[case.note is not None, case.may_be_rejected] += 1
        if problem := heading_notes.fault(case, read_soap):
            faults[f"{case.kind}: {problem}"] += 1
    assert not faults
    assert len(expected) == 3
    assert min(expected.values()) > 300


def test_the_generator_exposes_a_reader_that_splits_at_any_letter_or_word():
    """It counts the misreadings of a reader that splits at each of the four names, in their order."""

    def split(text: str) -> dict[str, str]:
        note = {}
        for section, word in reversed(prompts.SECTION_NAMES.items()):
            for name in (f"{word}:", f"{section}:"):
                if name in text:
                    text, _, note[section] = text.rpartition(name)
                    break
            else:
                raise ValueError
        return {section: note[section].strip() for section in SECTIONS}

    rng = random.Random(0)
    faults = Counter(heading_notes.fault(heading_notes.make_case(rng), split).split(":")[0] for _ in range(500))
    assert faults["misread"] > 50
    assert faults["rejected"] > 20


# --- a clinic's own headings


def section_map(tmp_path: Path, content: object) -> dict[str, str]:
    file = tmp_path / "map.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return read_section_map(file)


def test_mapped_headings_are_read_and_stay_text_where_several_make_a_section(tmp_path: Path):
    names = {"HPI": "S", "Review of Systems:": "s", "Exam": "Objective", "Impression": "A", "Next steps & advice": "P"}
    own = section_map(tmp_path, names)
    text = "HPI: a.\nReview of systems: b.\nEXAM: c.\nImpression: d.\nNext steps and advice: e."
    assert read_soap(text, own) == {"S": "HPI: a.\nReview of systems: b.", "O": "c.", "A": "d.", "P": "e."}
    assert read_soap("S: a. O: b. Impression: c. P: d.", own) == {"S": "a.", "O": "b.", "A": "c.", "P": "d."}
    text = "## Subjective\n### HPI\na\n## Objective\nb\n## Impression\nc\n## Plan\nd"
    assert read_soap(text, own) == {"S": "### HPI\na", "O": "b", "A": "c", "P": "d"}


def test_other_languages_can_be_mapped(tmp_path: Path):
    own = section_map(tmp_path, {"Subjektiv": "S", "Objektiv": "O", "Beurteilung": "A", "Procedere": "P"})
    text = "Subjektiv: Husten.\nObjektiv: Unauff\u00e4llig.\nBeurteilung: Grippe.\nProcedere: Ruhe."
    assert read_soap(text, own) == {"S": "Husten.", "O": "Unauff\u00e4llig.", "A": "Grippe.", "P": "Ruhe."}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("S: a.\nO: CT\nImpression: normal.\nA: b.\nP: c.\nImpression: d.", "more headings follow the Plan"),
        ("HPI: a.\nO: b.\nHPI: c.\nA: d.\nP: e.", "more than one heading for Subjective"),
    ],
)
def test_mapped_headings_of_one_section_must_be_adjacent(tmp_path: Path, text: str, reason: str):
    with pytest.raises(NoteError, match=reason):
        read_soap(text, section_map(tmp_path, {"Impression": "A", "HPI": "S"}))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is not an object"),
        ("{}", "is not an object"),
        ('["Impression", "A"]', "is not an object"),
        ({"Impression": "B"}, "Impression: the section is B"),
        ({"Impression": ["A"]}, "Impression: the section is"),
        ({"Impression": None}, "Impression: the section is None"),
        ({"Plan": "A"}, "Plan: its section cannot be changed"),
        ({"p": "P", "P:": "A"}, "P:: its section cannot be changed"),
        ({"A/P": "A"}, "A/P: its section cannot be changed"),
        ({" : ": "A"}, "not a heading"),
        ({"Impression: final": "A"}, "Impression: final: not a heading"),
        ({"x" * 61: "A"}, "not a heading"),
        ('{"Impression": "A", "IMPRESSION:": "A"}', "IMPRESSION:: named twice"),
    ],
)
def test_a_bad_section_map_is_rejected_with_file_and_heading(tmp_path: Path, content: object, reason: str):
    with pytest.raises(UserError, match=reason) as caught:
        section_map(tmp_path, content)
    assert str(tmp_path / "map.json") in str(caught.value)


def test_a_missing_section_map_is_rejected(tmp_path: Path):
    with pytest.raises(UserError, match=r"cannot read .*none\.json"):
        read_section_map(tmp_path / "none.json")


def test_the_normal_form_ignores_case_marks_and_the_spelling_of_and():
    assert normal_form("**Assessment &  Plan:**") == normal_form("ASSESSMENT/PLAN") == "assessment and plan"


# --- time

TAIL = "\nS: a\nO: b\nA: c\nP: d"
LONG = {
    "white space": lambda n: " " * n + "!" + TAIL,
    "line breaks": lambda n: "\n" * n + "!" + TAIL,
    "stars": lambda n: "*" * n + "!" + TAIL,
    "a title": lambda n: "a" * n + TAIL,
    "a word and white space": lambda n: "a" + " " * n + "!" + TAIL,
    "brackets": lambda n: "(" * n,
    "rules": lambda n: TAIL + "\n---" * (n // 4),
    "headings on lines": lambda n: "S: a\n" * (n // 5) + TAIL,
    "labels": lambda n: "S: a\nO: b\nA: c\nP: " + "Labs: ok. Plan: x, S: 1, " * (n // 25),
    "double labels": lambda n: "S: Subjective: " * (n // 15),
    "combined headings": lambda n: TAIL + "\nA/P:" * (n // 5),
    "wrapped sentences": lambda n: TAIL + ("\n" + "words " * 8 + "and") * (n // 50) + "\nand",
    "dashes": lambda n: "S " + "- " * (n // 2),
    "numbers": lambda n: TAIL + "\n1. " * (n // 4),
    "headings": lambda n: "S: a O: b A: c P: d " * (n // 20),
    "letters": lambda n: "S: " * n,
    "bold words": lambda n: "plan**" * n,
    "a letter and white space": lambda n: ("S" + " " * 50) * (n // 50),
    "white space at the end": lambda n: TAIL + " " * n + "x",
}


@pytest.mark.parametrize("build", LONG.values(), ids=LONG.keys())
def test_reading_is_linear_in_length(build: Callable[[int], str]):
    assert_linear(read_soap, build)
