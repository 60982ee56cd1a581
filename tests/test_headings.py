import contextlib
import time
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import prompts
from preprocessing.headings import read_soap
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
# Text made of what the reader looks for, so that it gets far into it.
NEAR_SOAP = st.lists(
    st.sampled_from([*LETTERS, *WORDS, ":", "**", "##", "(", ")", " ", "\n", "\r\n", "-", "a.", "P: 88", "\ud800"])
).map("".join)


def under(headings: list[str], between: str = "\n", after: str = " ") -> str:
    """NOTE as text under four headings."""
    return between.join(heading + after + NOTE[section] for heading, section in zip(headings, SECTIONS, strict=True))


@given(st.one_of(ANY_TEXT, NEAR_SOAP))
@example("[" * 100_000)
def test_no_text_raises_anything_but_note_error(text: str):
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
def test_headings_are_letters_or_words_bold_or_not_on_lines_or_in_one(text: str):
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
def test_a_colon_inside_a_section_is_no_heading(objective: str, assessment: str, between: str):
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
        ("The patient came in today. S: cough. O: clear. A: flu. P: rest.", "text stands before"),
        ("S: cough.\nO: clear.\nA: flu.\nP: rest.\nA: asthma.\nP: inhaler.", "more headings follow the Plan"),
        ("\n".join(["S: cough.", "O: clear.", "A: flu.", "P: rest."] * 2), "more headings follow the Plan"),
        ("S: cough.\nO: clear.\nA/P: flu, rest.", "Assessment and Plan stand under one heading"),
        ("**Subjective:** cough.\n**Objective:** clear.\n**Assessment and Plan:** flu.", "under one heading"),
    ],
)
def test_text_without_four_sections_is_refused_with_the_reason(text: str, reason: str):
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
def test_sections_of_any_characters_are_read_back_to_the_letter(note: dict[str, str]):
    expected = {section: f"{text}.".strip() for section, text in note.items()}
    for between in ("\n", "\r\n\r\n"):
        assert read_soap(between.join(f"{section}: {note[section]}." for section in SECTIONS)) == expected


# --- time

TAIL = "\nS: a\nO: b\nA: c\nP: d"
LONG = {
    "white space": lambda n: " " * n + "!" + TAIL,
    "line breaks": lambda n: "\n" * n + "!" + TAIL,
    "stars": lambda n: "*" * n + "!" + TAIL,
    "a title": lambda n: "a" * n + TAIL,
    "a word and white space": lambda n: "a" + " " * n + "!" + TAIL,
    "brackets": lambda n: "(" * n,
    "headings": lambda n: "S: a O: b A: c P: d " * (n // 20),
    "letters": lambda n: "S: " * n,
    "bold words": lambda n: "plan**" * n,
    "a letter and white space": lambda n: ("S" + " " * 50) * (n // 50),
    "white space at the end": lambda n: TAIL + " " * n + "x",
}


@pytest.mark.parametrize("build", LONG.values(), ids=LONG.keys())
def test_reading_is_linear_in_length(build: Callable[[int], str]):
    def seconds(text: str) -> float:
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            with contextlib.suppress(NoteError):
                read_soap(text)
            best = min(best, time.process_time() - start)
        return best

    short, long = seconds(build(5_000)), seconds(build(40_000))
    assert long < 8 * 3 * short + 0.05, f"8 times the text took {long / short:.0f} times as long"
