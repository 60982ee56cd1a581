"""Test benchmarks/judge_agreement.py: its cases, its correlations, and a run with the tiny judge."""

import json
import math
from pathlib import Path

import judge_agreement
import pytest
from conftest import rows

AP = "ASSESSMENT AND PLAN:\n1. {}\nAssessment: {}\nPlan:\n- {}\n"


def rated(dialogues: int) -> list[dict]:
    """Return rated notes in llama-clinic's form. The models' ratings rise with the dialogue's number."""
    notes = []
    for k, row in enumerate(rows(dialogues)):
        texts = {"sub": row["S"], "ap": AP.format("Problem", row["A"], row["P"])}
        for part, text in texts.items():
            for source in ("note_1", "note_2", "note_3"):
                level = 1 + 4 * k / dialogues + (source == "note_3") / 10
                ratings = [
                    {"reviewer": reviewer, **dict.fromkeys(judge_agreement.RATINGS, level)} for reviewer in (1, 2, 3, 4)
                ]
                notes.append(
                    {"dialogue": row["dialogue"], "part": part, "note_source": source, "note": text, "ratings": ratings}
                )
    return notes


def write(path: Path, notes: list[dict]) -> Path:
    path.write_text("".join(json.dumps(note) + "\n" for note in notes))
    return path


@pytest.mark.parametrize(
    ("text", "assessment", "plan"),
    [
        (AP.format("Cough", "Viral.", "Rest."), "1. Cough\nAssessment: Viral.", "Plan:\n- Rest."),
        (
            AP.format("Cough", "Viral.", "Rest.") + "2. Rash\nAssessment: Mild.\nPlan: Cream.\nFollow-up: none.",
            "1. Cough\nAssessment: Viral.\n2. Rash\nAssessment: Mild.",
            "Plan:\n- Rest.\nPlan: Cream.\nFollow-up: none.",
        ),
        ("1. Cough_x000B_Assessment: Viral._x000B_Plan:\n- Rest.", "1. Cough\nAssessment: Viral.", "Plan:\n- Rest."),
        ("Cough, rest.", "Cough, rest.", "Cough, rest."),
    ],
)
def test_a_plan_is_split_problem_by_problem(text, assessment, plan):
    assert judge_agreement.split_plan(text) == {"A": assessment, "P": plan}


def test_the_physicians_own_note_is_the_reference_and_is_not_judged():
    notes = rated(3)
    cases = judge_agreement.make_cases(notes)
    assert len(cases) == 3 * 2 * 3  # dialogues, models, sections
    assert all(notes[case.index]["note_source"] != "note_1" for case, _ in cases)
    assert all(case.reference == expert[case.section] for case, expert in cases)
    assert {case.section for case, _ in cases} == {"S", "A", "P"}
    with pytest.raises(judge_agreement.UserError, match="note 4 has no note_1 of its dialogue and part"):
        judge_agreement.make_cases(notes[:3] + notes[4:])  # without the physician's "ap"


def test_scores_are_shares_of_answers_and_leave_out_what_has_none():
    verdicts = [{"index": 0, "verdict": verdict} for verdict in ("pass", "fail", "unscored")]
    verdicts.append({"index": 1, "verdict": "unscored"})
    covered = [{"log_odds": 2.0}, {"log_odds": -4.0}, {"log_odds": None}]
    statements = [{"index": 0, "covered": covered, "supported": [{"log_odds": 5.0}]}]
    scores = judge_agreement.note_scores(verdicts, statements)
    assert scores == {0: {"verdict": 0.5, "covered": 0.5, "supported": 1.0, "log_odds": 1.0, "worst": -4.0}, 1: {}}


def test_a_correlation_has_an_interval_over_dialogues():
    """The notes of a dialogue are copies here, so they must not narrow the interval."""
    single = [(str(k), k, (7 * k) % 20) for k in range(20)]
    estimate, low, high = judge_agreement.correlation(single)
    assert judge_agreement.correlation(single * 6) == pytest.approx((estimate, low, high), abs=0.03)
    assert low < estimate < high
    assert judge_agreement.correlation([(str(k), k, 2 * k) for k in range(20)]) == pytest.approx((1, 1, 1))
    assert math.isnan(judge_agreement.correlation([(str(k), 1.0, k) for k in range(9)])[0])


def test_a_perfect_judge_and_equal_physicians_correlate_fully(monkeypatch):
    monkeypatch.setattr(judge_agreement, "RESAMPLES", 200)
    notes = rated(8)
    scores = {
        k: {"verdict": note["ratings"][0]["accuracy"]}
        for k, note in enumerate(notes)
        if note["note_source"] != "note_1"
    }
    table = judge_agreement.agreement(notes, scores, ["sub", "ap"])
    full = " | ".join(["1.00 [1.00, 1.00]"] * 3)
    assert table[0] == f"| judge: verdicts that are pass | 32 | {full} |"
    assert table[1] == "| judge: reference statements covered | 0 | not measured | not measured | not measured |"
    assert table[5:] == [f"| physician {k} with the others | 32 | {full} |" for k in (1, 2, 3, 4)]


@pytest.mark.parametrize("change", [{"part": "plan"}, {"ratings": [{"reviewer": 1}]}, {"note": None}])
def test_a_line_that_is_not_a_rated_note_is_named(tmp_path, capsys, change):
    notes = rated(2)
    notes[3] |= change
    path = write(tmp_path / "ratings.jsonl", notes)
    assert judge_agreement.main(["--ratings", str(path), "--output_dir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}:4 is not a rated note; ")


@pytest.mark.slow
def test_a_run_asks_the_judge_once_for_each_section_and_resumes(tmp_path, tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(judge_agreement, "RESAMPLES", 200)
    path, folder = write(tmp_path / "ratings.jsonl", rated(3)), tmp_path / "out"
    command = ["--ratings", str(path), "--output_dir", str(folder), "--judge_model", str(tiny_model)]
    command += ["--judge_engine_args", '{"dtype": "bfloat16"}']
    assert judge_agreement.main(command) == 0
    verdicts = (folder / "verdicts.jsonl").read_text().splitlines(keepends=True)
    statements = (folder / "statements.jsonl").read_text().splitlines(keepends=True)
    assert len(verdicts) == len(statements) == 18
    assert all(json.loads(line)["verdict"] == "pass" for line in verdicts)  # as the tiny model has learned
    (folder / "verdicts.jsonl").write_text("".join(verdicts[:15]) + verdicts[15][:20])
    capsys.readouterr()
    assert judge_agreement.main(command) == 0
    again = (folder / "verdicts.jsonl").read_text().splitlines(keepends=True)
    assert again[:15] == verdicts[:15] and sorted(again) == sorted(verdicts)
    assert (folder / "statements.jsonl").read_text().splitlines(keepends=True) == statements
    shown = capsys.readouterr().out
    assert "## Assessment and plan" in shown and "0 of 18 verdicts unscored" in shown
