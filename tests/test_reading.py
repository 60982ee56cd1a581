"""Test that right notes in other forms are read exactly, and that wrong or ambiguous ones are refused."""

import contextlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import heading_notes
import pytest
from conftest import assert_linear
from hypothesis import given
from hypothesis import strategies as st

from evaluation.engines.base import Completion
from evaluation.judging.judge import plain_cases
from evaluation.reading import read_leniently, read_prediction
from evaluation.run.records import open_records
from prompts import SECTION_NAMES, SECTIONS, NoteError, read_note, write_note

NOTE = {
    "S": "Cough for 3 days. Denies fever.",
    "O": "BP: 120/80, P: 88, T 37.1 C.",
    "A": 'Viral "cold"; no {pneumonia}.',
    "P": "Rest, the patient's fluids; return in 7 days.",
}
WORDS = {SECTION_NAMES[section]: text for section, text in NOTE.items()}
JSON = write_note(NOTE)

# --- generated notes -------------------------------------------------------------------------------------------------

SENTENCES = [
    "Cough for 3 days.", "Denies fever, chills: none.", 'Says "it hurts" at night.', "BP 120/80, P: 88.", "Plan: rest.",
    "The patient's wife agrees.", "Weight 70.50 kg {stable}.", "Pain [left] 7/10", "A: none known", "Übelkeit – mäßig",
    "back\\slash", "S: said\nO: two lines", "```", "Take 1 tablet, then 2.", "</b> & <b>", "痛み", "// no", "#1",
]  # fmt: skip
NAMES = ["Chief Complaint", "HPI", "current_medications", "Vitals", "note", "1", "Follow-up", "Patient's words"]
KEYS = {
    section: [section, section.lower(), name, name.lower(), name.upper(), f"{name} ({section})", f"{section}: {name}"]
    for section, name in SECTION_NAMES.items()
}
KEYS["P"] += ["treatment_plan", "Plan of Care"]
KEYS["S"] += ["subjective_findings"]
WRAPPERS = ["SOAP", "note", "SOAP Note", "soap_note", "result"]
BEFORE = [
    "Here is the note:\n",
    "The patient {coughs} a lot. ",
    "Sure!\n\n",
    '{"patient": "Jane"}\n',
    "<think>S: ?</think>",
]
BEFORE += [
    '{"S": "...", "O": "...", "A": "...", "P": "..."}\n',
    "Note:\n```json\n",
    "Reasoning:\n- A viral cold [1].\n",
]
AFTER = ["\n```", "\n\nLet me know if you need {anything} else.", "\n", '\n{"confidence": 0.90}', "\nPlan: none."]


def text_of(rng: random.Random) -> str:
    return " ".join(rng.choices(SENTENCES, k=rng.randint(1, 4)))


def value_of(rng: random.Random, depth: int = 0) -> tuple[object, str]:
    """Return a value and how it must be read."""
    kind = rng.choice(("text", "text", "list", "object", "number", "constant")) if depth < 3 else "text"
    if kind == "number":
        number = rng.choice(("72", "37.10", "-1", "120", "1e3"))
        return Number(number), number
    if kind == "constant":
        return rng.choice(((True, "true"), (False, "false"), (None, "null")))
    if kind == "text":
        text = text_of(rng)
        return text, text
    between = ("\n", "; ", ", ")[min(depth, 2)]
    items = [value_of(rng, depth + 1) for _ in range(rng.randint(1, 3))]
    if kind == "list":
        return [value for value, _ in items], between.join(text for _, text in items)
    keys = rng.sample(NAMES, len(items))
    texts = [f"{key.replace('_', ' ')}: {text}" for key, (_, text) in zip(keys, items, strict=True)]
    return {key: value for key, (value, _) in zip(keys, items, strict=True)}, between.join(texts)


class Number:
    """A number as it is written, such as 37.10."""

    def __init__(self, text: str):
        self.text = text


def quoted(text: str, quote: str) -> str:
    inner = json.dumps(text, ensure_ascii=False)[1:-1]
    return f'"{inner}"' if quote == '"' else "'" + inner.replace('\\"', '"').replace("'", "\\'") + "'"


def written(value: object, rng: random.Random, loose: bool, pad: str) -> str:
    """Write JSON, or JSON5 if `loose`; `pad` is the white space after a comma."""
    if isinstance(value, Number):
        return value.text
    if isinstance(value, str):
        return quoted(value, rng.choice("\"'") if loose else '"')
    if not isinstance(value, dict | list):
        return json.dumps(value)
    last = rng.choice(("", "", ",")) if loose else ""
    if isinstance(value, list):
        return "[" + f",{pad}".join(written(item, rng, loose, pad) for item in value) + last + "]"
    items = []
    for key, item in value.items():
        name = key if loose and key.isidentifier() and rng.random() < 0.5 else quoted(key, '"')
        items.append(f"{name}: {written(item, rng, loose, pad)}")
    return "{" + f",{pad}".join(items) + last + "}"


def draft(rng: random.Random) -> tuple[dict, dict[str, str]]:
    """Return a note as an object in another form, and the note."""
    is_plain = rng.random() < 0.2  # only text under the letters
    values = {section: value_of(rng, 3 * is_plain) for section in SECTIONS}
    style = 0 if is_plain else rng.randrange(7)
    mixed = 0.0 if is_plain else 0.3
    keys = {s: rng.choice(KEYS[s]) if rng.random() < mixed else KEYS[s][style] for s in rng.sample(SECTIONS, 4)}
    entry = {key: values[section][0] for section, key in keys.items()}
    if rng.random() < 0.2:
        entry["confidence"] = Number("0.9")
    return entry, {section: text for section, (_, text) in values.items()}


def wrapped(rng: random.Random, value: object) -> object:
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        others = {"date": "3 May", "codes": [{"icd": "J06"}]} if rng.random() < 0.3 else {}
        value = rng.choice(({rng.choice(WRAPPERS): value}, others | {rng.choice(WRAPPERS): value}, {"notes": [value]}))
    return value


def right_reply(rng: random.Random) -> tuple[str, dict[str, str]]:
    """Return a reply whose reading is known, and the note in it."""
    entry, note = draft(rng)
    loose, pad = rng.random() < 0.3, rng.choice((" ", "\n  ", ""))
    text = written(wrapped(rng, entry), rng, loose, pad)
    if not loose and rng.random() < 0.2:
        end = re.search(r"[\"\]}\s]*\Z", text).start()
        kept = rng.randint(end, len(text) - 1)
        last_value = list(entry.values())[-1]
        if kept < len(text) and not (kept == end and isinstance(last_value, str) and last_value.endswith("\\")):
            return rng.choice(BEFORE[:-2]) + text[:kept] + rng.choice(("", "\n", "\n```")), note
    return rng.choice(["", *BEFORE]) + text + rng.choice(["", *AFTER]), note


def wrong_reply(rng: random.Random) -> tuple[str, str]:
    """Return a reply from which no note may be read, and its fault."""
    entry, _ = draft(rng)
    fault = rng.choice(("missing", "twice", "two notes", "combined", "thinking", "beside headings"))
    keys = [key for key in entry if key != "confidence"]
    if fault == "missing":
        del entry[rng.choice(keys)]
    elif fault == "combined":
        entry[rng.choice(("Assessment and Plan", "A/P", "Plan for today"))] = "Rest."
    elif fault == "twice":
        section = rng.choice(SECTIONS)
        entry |= {KEYS[section][0]: "Other.", KEYS[section][2]: "Another."}
    text = written(wrapped(rng, entry), rng, rng.random() < 0.3, " ")
    if fault == "twice" and rng.random() < 0.5:  # the same key twice in one object
        text = text[: text.rindex("}")] + ', "x": 1, "x": 2}' if not text.rstrip("} \n]").endswith(",") else text
    if fault == "two notes":
        text += "\n" + written(draft(rng)[0], rng, False, " ")
    if fault == "thinking":
        text = f"<think>{text}"
    if fault == "beside headings":
        text += "\n\n## Subjective\nCough.\n## Objective\nClear.\n## Assessment\nCold.\n## Plan\nRest.\n"
    return text, fault


def outcome(reply: str, note: dict[str, str] | None) -> str:
    try:
        read, _ = read_leniently(reply)
    except NoteError:
        return "refused"
    return "right" if read == note else "misread"


def clean(note: dict[str, str]) -> dict[str, str]:
    return {section: text.strip() for section, text in note.items()}


def test_3000_right_notes_in_other_json_forms_are_read_exactly():
    rng, counts, forms = random.Random(1), Counter(), Counter()
    for _ in range(3000):
        reply, note = right_reply(rng)
        read, form = read_leniently(reply)
        counts["right" if read == clean(note) else "misread"] += 1
        forms.update(form.split(", "))
    assert counts == {"right": 3000}
    expected = ("wrapped object", "words as keys", "nested values", "JSON5", "unclosed JSON", "text around JSON")
    assert set(forms) == set(expected)
    assert min(forms.values()) > 20


def test_no_note_is_read_from_3000_replies_without_exactly_one_note():
    rng, faults = random.Random(2), Counter()
    for _ in range(3000):
        reply, fault = wrong_reply(rng)
        assert outcome(reply, None) == "refused", (fault, reply)
        faults[fault] += 1
    assert len(faults) == 6 and min(faults.values()) > 300


def test_a_damaged_character_of_the_json_never_changes_the_note():
    """Remove one quote, bracket, colon or comma that belongs to the JSON, not to a text."""
    rng, counts = random.Random(3), Counter()
    plain = ["Cough for 3 days.", "Denies fever", "The patient's wife agrees.", "No pain (left)."]
    for _ in range(2000):
        note = {section: " ".join(rng.choices(plain, k=2)) for section in SECTIONS}
        value: object = {rng.choice(KEYS[section]): text for section, text in note.items()}
        value = rng.choice((value, {"SOAP": value}, {"notes": [value]}))
        text = json.dumps(value, indent=rng.choice((None, 2)))
        at = rng.choice([match.start() for match in re.finditer(r'["\[\]{},:]', text)])
        counts[outcome(text[:at] + text[at + 1 :], note)] += 1
    assert counts["misread"] == 0
    assert counts["right"] > 80 and counts["refused"] > 800


def test_a_reply_cut_at_any_place_is_refused_or_lacks_only_an_end_of_the_last_section():
    for value in (NOTE, {"SOAP": WORDS}, {"SOAP": {**NOTE, "P": ["Rest.", "Fluids."]}}):
        text = json.dumps(value)
        for end in range(len(text)):
            with contextlib.suppress(NoteError):
                note, form = read_leniently(text[:end])
                last = value.get("SOAP", value).get("P", NOTE["P"])
                assert {key: note[key] for key in "SOA"} == {key: NOTE[key] for key in "SOA"}
                assert ("\n".join(last) if isinstance(last, list) else last).startswith(note["P"])
                assert "unclosed JSON" in form


def test_2000_generated_notes_under_headings_are_read_as_by_preprocessing():
    rng, faults, counts = random.Random(4), Counter(), Counter()
    for _ in range(2000):
        case = heading_notes.make_case(rng)
        if case.kind.startswith("prose_before"):
            continue  # lenient reading drops such text
        before = rng.choice(("", "", "Here is the SOAP note:\n\n", "**Patient:** Jane Roe\n**Date:** 3 May\n\n"))
        if case.note is not None and ", one line" not in case.kind:
            case.text = before + case.text
        faults[heading_notes.fault(case, lambda text: read_leniently(text)[0])] += 1
        counts[case.note is not None and not case.may_be_rejected] += 1
    assert faults.keys() == {""}, faults
    assert min(counts.values()) > 300


# --- single forms ----------------------------------------------------------------------------------------------------

QWEN = """\
```json
{
  "SOAP Note": {
    "Subjective": {
      "Chief Complaint": "Cough for 3 days",
      "History": ["No fever", "Smokes"],
      "Medications": {"Current": ["aspirin"], "Past": []}
    },
    "Objective": {"Vitals": {"BP": "120/80", "HR": 72, "T": 37.10}, "Lungs": "clear"},
    "Assessment": ["Viral bronchitis", "Tobacco use"],
    "Plan": [{"Medication": "paracetamol", "Dose": "500 mg"}, "Return in 7 days"]
  }
}
```

This note summarizes the visit. Let me know if you need any changes!
"""
READ_QWEN = {
    "S": "Chief Complaint: Cough for 3 days\nHistory: No fever; Smokes\nMedications: Current: aspirin; Past:",
    "O": "Vitals: BP: 120/80; HR: 72; T: 37.10\nLungs: clear",
    "A": "Viral bronchitis\nTobacco use",
    "P": "Medication: paracetamol; Dose: 500 mg\nReturn in 7 days",
}


def headed(form: str, gap: str = "\n\n") -> str:
    return gap.join(form.format(SECTION_NAMES[section], letter=section) + NOTE[section] for section in SECTIONS)


@pytest.mark.parametrize(
    ("reply", "form"),
    [
        (json.dumps({"SOAP": NOTE}), "wrapped object"),
        (json.dumps(WORDS), "words as keys"),
        (json.dumps({"note": WORDS}), "wrapped object, words as keys"),
        (str(NOTE), "JSON5"),
        (JSON[:-1] + ",}", "JSON5"),
        (JSON[:-1], "unclosed JSON"),
        (JSON[:-2], "unclosed JSON"),
        (JSON[:-2] + "}", "unclosed JSON"),
        (f"```json\n{json.dumps({'SOAP': NOTE})[:-1]}\n```", "unclosed JSON, wrapped object"),
        (f"The patient {{coughs}}.\n{JSON}", "text around JSON"),
        (f"{{{JSON}}}", "text around JSON"),
        (f'{{"S": "...", "O": "...", "A": "...", "P": "..."}}\n{JSON}', "text around JSON"),
        (f'{{"visit": 1}}\n{JSON}\n{JSON}', "text around JSON"),
        (headed("{}: "), "headings"),
        (headed("## {}\n"), "headings"),
        (headed("**{} ({letter}):**\n", "\n"), "headings"),
        ("Here is the note:\n\n**SOAP Note**\n\n" + headed("### {letter} - {}:\n"), "headings"),
        (f"Sure!\n```markdown\n{headed('# {}' + chr(10))}\n```\nLet me know.", "headings"),
        ("Here is the note. " + headed("{}: ", " "), "headings"),
        (f"<think>\nS: unclear\n</think>\n{headed('{letter}: ')}", "headings"),
    ],
)
def test_a_right_note_in_another_form_is_read(reply: str, form: str):
    with pytest.raises(NoteError):
        read_note(reply)
    assert read_leniently(reply) == (NOTE, form)


def test_nested_values_become_text_with_their_numbers_unchanged():
    assert read_leniently(QWEN) == (READ_QWEN, "wrapped object, words as keys, nested values")


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("The patient coughs.", "neither JSON nor headings"),
        ("", "neither JSON nor headings"),
        (f"<think>{JSON}", "while thinking"),
        (json.dumps({key: NOTE[key] for key in "SOA"}), "section P is missing"),
        (json.dumps({"Chief complaint": "x", "O": "x", "A": "x", "P": "x"}), "section S is missing"),
        (json.dumps(NOTE | {"Plan": "Surgery."}), "section P appears twice"),
        (json.dumps(NOTE | {"Assessment and Plan": "Surgery."}), "a key may be a section"),
        (JSON + json.dumps(NOTE | {"P": "Surgery."}), "several different notes"),
        (json.dumps({"visit 1": NOTE, "visit 2": NOTE | {"P": "Surgery."}}), "several different notes"),
        (JSON + '\n{"S": "More."}', "section O is missing"),
        (JSON + "\n" + headed("{}: "), "a note as JSON and one under headings"),
        (JSON.replace('"cold', "cold").replace("\\", ""), "not JSON"),
        (JSON.replace('", "O', ', "O'), "not JSON"),
        (JSON[:-1] + '\n{"S": "More."}', "not JSON"),
        ("\n".join(f'"{key}": "{text}",' for key, text in WORDS.items()), "quoted keys"),
        (headed("{}: ") + "\n\nAssessment: Influenza.", "more headings follow the Plan"),
        (f"Plan: rest.\n{headed('{}: ')}", "before the Subjective heading"),
        ("{" + '"a":{' * 100_000, "nested too deeply"),
        ('{"S": ' + "[" * 100_000, "nested too deeply"),
        ("{a: 1}" * 60, "more than 50"),
        (json.dumps(dict.fromkeys(SECTIONS, "...")), "neither JSON nor headings"),
    ],
)
def test_a_reply_without_exactly_one_note_is_refused(reply: str, reason: str):
    with pytest.raises(NoteError, match=reason):
        read_leniently(reply)


# --- records ---------------------------------------------------------------------------------------------------------


def record(text: str, finish_reason: str = "stop") -> dict:
    return read_prediction(0, "Doctor: Hello.", Completion(text, finish_reason))


def test_a_record_tells_strict_lenient_and_unreadable_notes_apart():
    strict, lenient, unreadable = record(JSON), record(json.dumps({"SOAP": NOTE})), record("No.")
    assert [entry["status"] for entry in (strict, lenient, unreadable)] == ["ok", "lenient", "invalid"]
    assert [entry["form"] for entry in (strict, lenient, unreadable)] == [None, "wrapped object", None]
    assert strict["reason"] is None
    assert lenient["reason"] == "section S is missing"  # why strict reading failed
    assert unreadable["reason"] == "no JSON object in the reply"
    assert {key: lenient[key] for key in SECTIONS} == NOTE
    assert {unreadable[key] for key in SECTIONS} == {None}


@pytest.mark.parametrize("finish_reason", ["length", "error", "prompt_too_long"])
def test_a_note_that_did_not_end_by_itself_is_not_read_leniently(finish_reason: str):
    for text in (JSON[:-2], json.dumps({"SOAP": NOTE}), headed("{}: ")):
        entry = record(text, finish_reason)
        assert (entry["status"], entry["form"], entry["S"]) == ("invalid", None, None)


def test_a_lenient_note_is_judged_like_one_in_the_json_form():
    lenient = record(json.dumps({"SOAP": NOTE | {"A": "N/A"}}))
    cases, decided = plain_cases([lenient], [{"dialogue": "Doctor: Hello.", **NOTE}])
    assert {case.section: case.prediction for case in cases} == {key: NOTE[key] for key in "SOP"}
    assert [(entry["section"], entry["verdict"], entry["reason"]) for entry in decided] == [
        ("A", "fail", "the section says nothing")
    ]


def test_a_run_without_forms_still_loads(tmp_path: Path):
    old = {key: value for key, value in record(JSON).items() if key != "form"}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(old) + "\n")
    predictions, *_ = open_records(tmp_path)
    assert list(predictions) == [old]


# --- any text, and time ----------------------------------------------------------------------------------------------

PARTS = [*"{}[]\"':,\\/ ", *map(json.dumps, (*SECTIONS, "Plan")), "S:", "\nO: x", "## Plan\n", "null", "1", "```\n"]
PARTS += ["<think>", "</think>", "\ud800", "0x1", "NaN"]
PARTS = [*"{}[]\"':,\\/ ", *map(json.dumps, (*SECTIONS, "Plan")), "S:", "\nO: x", "## Plan\n", "null", "1", "```\n"]
PARTS += ["<think>", "</think>", "\ud800", "0x1", "NaN"]
NEAR_NOTE = st.lists(st.sampled_from(PARTS)).map("".join)


@given(st.one_of(st.text(st.characters(), max_size=200), NEAR_NOTE))
def test_no_text_raises_any_error_except_note_error(text: str):
    try:
        note, form = read_leniently(text)
    except NoteError as error:
        assert len(str(error)) < 120
    else:
        assert list(note) == list(SECTIONS) and form
        assert all(section == section.strip() for section in note.values())


LONG = {
    "an open string": lambda n: '{"S": "' + "a" * n,
    "a single-quoted string": lambda n: "{'S': '" + "a" * n,
    "escapes": lambda n: '{"S": "' + "\\n" * (n // 2),
    "a list": lambda n: '{"S": [' + '"a",' * (n // 4),
    "spaces": lambda n: '{"S": "a"' + " " * n + "x",
    "open braces": lambda n: "{ " * (n // 2),
    "objects": lambda n: "{a: 1}" * (n // 6),
    "objects far apart": lambda n: ("{a: 1}" + " " * (n // 50)) * 50,
    "fences": lambda n: "```\n" * (n // 4),
    "headings": lambda n: "## Subjective\n" * (n // 14),
    "a long note": lambda n: json.dumps({"SOAP": dict.fromkeys(SECTIONS, ["a b"] * (n // 24))}),
    "a long note under headings": lambda n: headed("## {}\n" + "word " * (n // 20)),
}


@pytest.mark.parametrize("build", LONG.values(), ids=LONG.keys())
def test_reading_is_linear_in_length(build: Callable[[int], str]):
    assert_linear(read_leniently, build)
