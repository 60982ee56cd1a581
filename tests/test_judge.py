"""Test verdicts, the cases of a note, controls and attacks."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import prompts
from evaluation.judging import judge
from evaluation.judging.asking import known_cases
from evaluation.judging.attacks import ATTACKS, NO_CONTENT, attack_cases
from evaluation.judging.known_answers import control_cases
from evaluation.judging.sentences import split_statements
from evaluation.run.records import NO_ATTACK
from preprocessing.headings import read_soap

DEMO_FILE = Path(__file__).resolve().parent.parent / "demo" / "dialogues.jsonl"
GOOD_KINDS = {"reworded", "further_fact", "minor_omission"}
BAD_KINDS = {
    *("other_patient", "dropped_finding", "turned_negation", "changed_number", "small_dose", "changed_side"),
    *("invented_finding", "other_drug", "other_diagnosis", "wrong_section", "raised_certainty", "changed_status"),
    *("other_source", "reversed_cause", "usual_addition"),
}
# Not in each section of the demo's notes.
RARE_KINDS = {
    *("small_dose", "changed_side", "other_drug", "other_diagnosis"),
    *("raised_certainty", "changed_status", "other_source", "reversed_cause"),
}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    demo = [json.loads(line) for line in DEMO_FILE.read_text("utf-8").splitlines()]
    return [{"dialogue": row["dialogue"]} | read_soap(row["soap"]) for row in demo]


def prediction(index: int = 0, status: str = "ok", finish_reason: str = "stop", **sections) -> dict:
    note = dict.fromkeys(prompts.SECTIONS) if status != "ok" else dict.fromkeys(prompts.SECTIONS, "Mild asthma.")
    reason = None if status == "ok" else "JSON is cut off"
    return {"index": index, "status": status, "finish_reason": finish_reason, "reason": reason} | note | sections


# --- verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", ["pass", "fail"])
def test_a_reply_of_the_schema_is_read(verdict):
    raw = json.dumps({"reason": "The dose agrees.", "verdict": verdict})
    assert judge.read_verdict(raw, "stop") == (verdict, "The dose agrees.")
    assert judge.read_verdict(f"  {raw}\n", "stop") == (verdict, "The dose agrees.")


@pytest.mark.parametrize(
    ("raw", "finish_reason", "why"),
    [
        ('{"reason": "ok", "verdict": "pass"}', "length", "cut off"),
        ('{"reason": "ok", "verdict": "pass"}', "error", "no reply"),
        ('{"reason": "ok", "verdict": "pa', "stop", "not JSON"),
        ("", "stop", "not JSON"),
        ("pass", "stop", "not JSON"),
        ("verdict: pass", "stop", "not JSON"),
        ('The verdict: {"reason": "ok", "verdict": "pass"}', "stop", "not JSON"),
        ('{"reason": "ok", "verdict": "pass"} {"reason": "ok", "verdict": "fail"}', "stop", "not JSON"),
        ('{"reason": "ok", "verdict": "fail", "verdict": "pass"}', "stop", "not JSON"),
        ("[" * 100_000, "stop", "not JSON"),
        ('"pass"', "stop", "not an object"),
        ('["ok", "pass"]', "stop", "not an object"),
        ('{"verdict": "pass"}', "stop", "not an object with reason"),
        ('{"reason": "ok", "verdict": "pass", "score": 1}', "stop", "not an object with reason"),
        ('{"reason": "ok", "verdict": "Pass"}', "stop", "neither pass nor fail"),
        ('{"reason": "ok", "verdict": "unscored"}', "stop", "neither pass nor fail"),
        ('{"reason": "ok", "verdict": true}', "stop", "neither pass nor fail"),
        ('{"reason": "ok", "verdict": ["pass"]}', "stop", "neither pass nor fail"),
        ('{"reason": null, "verdict": "pass"}', "stop", "the reason"),
        (json.dumps({"reason": "x" * 201, "verdict": "pass"}), "stop", "the reason"),
    ],
)
def test_any_other_reply_is_unscored_with_the_reason_and_never_guessed(raw, finish_reason, why):
    verdict, reason = judge.read_verdict(raw, finish_reason)
    assert verdict == "unscored"
    assert why in reason


@given(st.text())
def test_no_reply_raises_an_error(raw):
    verdict, reason = judge.read_verdict(raw, "stop")
    assert verdict == "unscored" and reason


def test_a_reason_with_half_a_surrogate_pair_can_be_written_to_a_file():
    verdict, reason = judge.read_verdict('{"reason": "dose \\ud800", "verdict": "fail"}', "stop")
    assert verdict == "fail"
    reason.encode("utf-8")


def test_the_schema_matches_the_parser_and_asks_for_the_reason_first():
    assert list(judge.VERDICT_SCHEMA["properties"]) == judge.VERDICT_SCHEMA["required"] == ["reason", "verdict"]
    assert judge.VERDICT_SCHEMA["additionalProperties"] is False
    longest = json.dumps({"reason": "x" * judge.VERDICT_SCHEMA["properties"]["reason"]["maxLength"], "verdict": "pass"})
    assert judge.read_verdict(longest, "stop")[0] == "pass"


# --- cases -----------------------------------------------------------------------------------------------------------


def test_a_valid_note_gives_a_case_for_each_section(rows):
    cases, decided = judge.plain_cases([prediction(2, A="Gout of the left toe.")], rows)
    assert [case.section for case in cases] == ["S", "O", "A", "P"]
    assert decided == []
    case = cases[2]
    assert (case.index, case.prediction, case.reference) == (2, "Gout of the left toe.", rows[2]["A"])
    question = json.loads(case.messages()[1]["content"])
    assert question["prediction"] == "Gout of the left toe."
    assert question["dialogue"] == rows[2]["dialogue"]


def test_an_invalid_note_fails_all_sections_without_the_judge(rows):
    cases, decided = judge.plain_cases([prediction(1, status="invalid", finish_reason="length")], rows)
    assert cases == []
    assert [(record["section"], record["verdict"], record["source"]) for record in decided] == [
        (section, "fail", "code") for section in "SOAP"
    ]
    assert all("JSON is cut off" in record["reason"] for record in decided)


def test_a_note_that_the_engine_failed_to_write_is_unscored(rows):
    _, decided = judge.plain_cases([prediction(1, status="invalid", finish_reason="error")], rows)
    assert [record["verdict"] for record in decided] == ["unscored"] * 4


@pytest.mark.parametrize("text", ["", " \n", "...", "N/A", "none", "Subjective:", "[S]", "TBD", "—"])
def test_an_empty_section_or_a_placeholder_fails_without_the_judge(rows, text):
    cases, decided = judge.plain_cases([prediction(0, O=text)], rows)
    assert [case.section for case in cases] == ["S", "A", "P"]
    assert [(record["section"], record["verdict"], record["attempts"]) for record in decided] == [("O", "fail", 0)]


def test_a_section_that_states_a_lack_of_findings_goes_to_the_judge(rows):
    said = "No examination findings were mentioned."
    assert len(judge.plain_cases([prediction(0, O=said)], rows)[0]) == 4
    nothing = [rows[0] | {"O": "N/A"}]
    assert len(judge.plain_cases([prediction(0, O="None")], nothing)[0]) == 4


def test_a_record_and_its_case_have_the_same_key(rows):
    cases = control_cases(rows, 5, 0) + attack_cases(rows, 5, 0) + judge.plain_cases([prediction()], rows)[0]
    for case in cases:
        record = case.record("pass", "agrees", raw="{}", attempts=2)
        assert judge.record_key(json.loads(json.dumps(record))) == case.key()
    assert len({case.key() for case in cases}) == len(cases) > 70


# --- controls --------------------------------------------------------------------------------------------------------


def test_each_section_gets_n_controls_to_pass_and_n_to_fail_of_all_kinds(rows):
    cases = control_cases(rows, 30, seed=1)
    for section in prompts.SECTIONS:
        kinds = Counter((case.control["kind"], case.control["expected"]) for case in cases if case.section == section)
        good = {kind: n for (kind, expected), n in kinds.items() if expected == "pass"}
        bad = {kind: n for (kind, expected), n in kinds.items() if expected == "fail"}
        assert sum(good.values()) == sum(bad.values()) == 30
        assert good.keys() <= GOOD_KINDS and "reworded" in good
        assert ("further_fact" in good) == (section != "O")
        assert bad.keys() >= BAD_KINDS - RARE_KINDS
        assert ("other_diagnosis" in bad) == (section == "A")
        assert max(bad.values()) <= 6
    assert {case.control["kind"] for case in cases} >= BAD_KINDS
    for case in cases:
        row = rows[case.index]
        assert (case.dialogue, case.reference) == (row["dialogue"], row[case.section])
        assert case.prediction != case.reference


def test_the_same_rows_n_and_seed_give_the_same_controls(rows):
    assert control_cases(rows, 7, 3) == control_cases(dict(enumerate(rows)), 7, 3)
    assert control_cases(rows, 7, 3) != control_cases(rows, 7, 4)


@pytest.mark.parametrize(("few", "many"), [(1, 2), (4, 8), (9, 31), (30, 70)])
def test_more_controls_include_those_of_a_smaller_number_in_order(rows, few, many):
    def by_kind(n: int) -> dict:
        kinds = {}
        for case in control_cases(rows, n, 0):
            kinds.setdefault((case.section, case.control["kind"]), []).append(case)
        return kinds

    more = by_kind(many)
    for kind, cases in by_kind(few).items():
        assert more[kind][: len(cases)] == cases


def test_controls_to_fail_use_different_rows_if_there_are_enough(rows):
    for section in prompts.SECTIONS:
        bad = [
            case
            for case in control_cases(rows, 15, 0)
            if case.section == section and case.control["expected"] == "fail"
        ]
        assert len({case.index for case in bad}) == len(bad) == 15


def test_few_rows_give_few_controls_without_duplicates(rows):
    cases = control_cases(rows[:3], 50, 0)
    assert len({case.key() for case in cases}) == len(cases)
    assert {case.control["kind"] for case in cases} >= {"reworded", "other_patient", "dropped_finding"}
    assert control_cases(rows, 0, 0) == control_cases([], 5, 0) == []


def test_another_patient_s_section_comes_from_another_row(rows):
    cases = [case for case in control_cases(rows, 100, 0) if case.control["kind"] == "other_patient"]
    assert len(cases) >= 30
    for case in cases:
        others = [row[case.section] for k, row in enumerate(rows) if k != case.index]
        assert case.prediction in others


def test_a_wrong_section_comes_from_the_same_note(rows):
    cases = [case for case in control_cases(rows, 100, 0) if case.control["kind"] == "wrong_section"]
    assert len(cases) >= 30
    for case in cases:
        others = [rows[case.index][section] for section in prompts.SECTIONS if section != case.section]
        assert case.prediction in others


def test_a_further_fact_is_in_the_visit_s_own_texts(rows):
    cases = [case for case in control_cases(rows, 60, 0) if case.control["kind"] == "further_fact"]
    assert len(cases) >= 40
    for case in cases:
        row = rows[case.index]
        added = case.prediction.replace(case.reference, "")
        fact = added.split('"')[1] if '"' in added else added.partition(": ")[2].strip()
        assert fact in (row["dialogue"] if case.section == "S" else row["O"] + row["A"])


def test_an_invented_or_exchanged_term_is_not_in_the_visit(rows):
    cases = [case for case in control_cases(rows, 80, 0) if case.control["kind"].startswith(("invented", "other_d"))]
    assert len(cases) >= 45
    for case in cases:
        row = rows[case.index]
        new = Counter(case.prediction.lower().split()) - Counter(case.reference.lower().split())
        visit = " ".join([row["dialogue"], *(row[section] for section in prompts.SECTIONS)]).lower()
        assert any(word.strip(".,;()") not in visit for word in new), case.prediction


def test_a_duplicate_row_is_not_another_patient(rows):
    cases = control_cases([rows[0], dict(rows[0])], 5, 0)
    assert "other_patient" not in {case.control["kind"] for case in cases}


def test_a_row_that_gives_no_control_of_a_kind_is_skipped(rows):
    plain = {"dialogue": "d", "S": "Itchy skin.", "O": "Dry skin.", "A": "Eczema.", "P": "Emollient cream."}
    cases = control_cases([*[plain] * 30, *rows[:10]], 5, 0)
    any_text = {"other_patient", "invented_finding", "usual_addition", "wrong_section"}
    edited = [case for case in cases if case.control["kind"] not in any_text]
    assert len(edited) >= 20
    assert all(case.index >= 30 for case in edited)


def test_notes_in_another_layout_give_controls_and_kinds_that_do_not_apply_are_skipped(rows):
    def as_list(text: str) -> str:
        return "\n".join(f"- {statement}" for statement in split_statements(text))

    lists = [{section: as_list(row[section]) for section in prompts.SECTIONS} for row in rows[:60]]
    lists = [{"dialogue": "A: Hello. B: I have had a cough for weeks."} | row for row in lists]
    cases = control_cases(lists, 12, 0)
    kinds = Counter(case.control["kind"] for case in cases if case.section == "S")
    assert "further_fact" not in kinds
    assert sum(kinds.values()) == 24
    assert all(case.prediction.strip() for case in cases)


# --- attacks ---------------------------------------------------------------------------------------------------------


def test_attacks_are_of_all_kinds_and_each_has_a_fitting_baseline(rows):
    cases = attack_cases(rows, 10, 0)
    attacks = [case for case in cases if case.attack != NO_ATTACK]
    assert Counter(case.section for case in attacks) == dict.fromkeys("SOAP", 10)
    assert len(ATTACKS) >= 10 and len(ATTACKS) % 2
    assert {case.attack for case in attacks} == set(ATTACKS)
    assert all(case.control is None for case in cases)
    for case in cases:
        assert case.reference not in case.prediction
        assert "{wrong}" not in case.prediction
    baselines = {(case.index, case.section): case.prediction for case in cases if case.attack == NO_ATTACK}
    assert len(baselines) == len(attacks) == len(cases) / 2
    for case in attacks:
        wrong = baselines[case.index, case.section]
        assert case.prediction == ATTACKS[case.attack].replace("{wrong}", wrong)
        if "{wrong}" in ATTACKS[case.attack]:
            assert wrong in {row[case.section] for row in rows}
        else:
            assert wrong == NO_CONTENT
    assert cases == attack_cases(rows, 10, 0)
    assert attack_cases(rows, 0, 0) == []


@pytest.mark.parametrize(("few", "many"), [(1, 2), (3, 10), (5, 13)])
def test_more_attacks_include_those_of_a_smaller_number_and_keep_names_balanced(rows, few, many):
    more = attack_cases(rows, many, 0)
    assert {case.key() for case in attack_cases(rows, few, 0)} < {case.key() for case in more}
    names = Counter(case.attack for case in more if case.attack != NO_ATTACK)
    assert sum(names.values()) == 4 * many
    assert max(names.values()) - min(names[name] for name in ATTACKS) <= 1


def test_no_attack_escapes_its_json_string_or_adds_a_control_token(rows):
    for case in attack_cases(rows, 13, 0):
        content = case.messages()[1]["content"]
        question = json.loads(content)
        assert set(question) == {"dialogue", "section", "reference", "prediction"}
        assert "<|im_end|>" not in content and "<think>" not in content


def test_controls_and_attacks_read_a_bounded_number_of_dialogues(rows):
    read = set()

    class Rows(list):
        def __getitem__(self, index: int) -> dict:
            read.add(index)
            return super().__getitem__(index)

    many = Rows(rows * 20)
    cases = known_cases(many, controls=2, attacks=1)
    assert len(cases) == len(prompts.SECTIONS) * 6
    assert len(read) == 500 < len(many)
    assert all(case.dialogue == many[case.index]["dialogue"] for case in cases)
