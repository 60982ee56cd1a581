"""Test benchmarks/judge_agreement.py: its cases, its correlations, and a run with the tiny judge."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import judge_agreement
import pytest
from conftest import rows
from test_tokens import QWEN3_LIKE

from evaluation.run.records import record_key

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
    few = judge_agreement.make_cases(notes, limit=2)
    assert [case.key() for case, _ in few] == [case.key() for case, _ in cases[:12]]
    mixed = [*notes[6:], *notes[:6]]  # an index is a position in the file, whatever notes the limit leaves out
    assert all(mixed[case.index]["dialogue"] == case.dialogue for case, _ in judge_agreement.make_cases(mixed, limit=1))
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


@pytest.fixture
def judged(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return a folder with all records of the tiny judge, its ratings, and a function that runs the script."""
    monkeypatch.setattr(judge_agreement, "RESAMPLES", 5)
    state = SimpleNamespace(ratings=write(tmp_path / "ratings.jsonl", rated(3)), folder=tmp_path / "out", asked=[])

    async def ask(cases, options, model, folder) -> None:
        """Write a record for each case that has none. It stands in for the engine only."""
        done = {record_key(record) for record in folder.judgements}
        for case, _ in cases:
            if case.key() not in done:
                state.asked.append(case.index)
                folder.judgements.append(case.record("pass", "", raw="{}", attempts=1))
                statement = {"statement": "a", "log_odds": 1.0}
                record = {"index": case.index, "section": case.section, "control": None, "attack": None, "reason": ""}
                folder.statements.append(record | {"status": "asked", "covered": [statement], "supported": []})

    def run(*words: str, judge: Path = tiny_model) -> int:
        state.asked.clear()
        command = ["--ratings", str(state.ratings), "--output_dir", str(state.folder), "--judge_model", str(judge)]
        return judge_agreement.main([*command, *words])

    monkeypatch.setattr(judge_agreement, "ask", ask)
    state.run = run
    assert run() == 0 and len(state.asked) == 18
    return state


def test_records_of_another_judge_are_refused_in_one_line(judged, tiny_model, tmp_path, capsys):
    before = (judged.folder / "agreement.md").read_text()
    other = shutil.copytree(tiny_model, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{# another #}" + QWEN3_LIKE)
    capsys.readouterr()
    assert judged.run(judge=other) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {judged.folder} holds a run with judge_model = ") and error.count("\n") == 1
    assert judged.asked == [] and (judged.folder / "agreement.md").read_text() == before
    assert judged.run("--judge_sampling_args", '{"temperature": 1}') == 2
    assert "judge_sampling_args" in capsys.readouterr().err
    assert judged.run("--overwrite", judge=other) == 0
    assert len(judged.asked) == 18
    assert f"Judge: {other}. " in (judged.folder / "agreement.md").read_text()


def test_records_of_other_ratings_are_refused_and_a_larger_limit_adds_to_them(judged, capsys):
    assert judged.run("--limit", "1", "--overwrite") == 0 and len(judged.asked) == 6
    assert judged.run("--limit", "2") == 0 and len(judged.asked) == 6
    notes = rated(3)
    write(judged.ratings, notes[::-1])  # the same notes under other indices
    capsys.readouterr()
    assert judged.run() == 2
    assert capsys.readouterr().err.startswith(f"error: {judged.folder} holds a run with ratings_hash = ")


def test_finished_records_are_read_without_the_judge_and_name_it(judged, tiny_model, capsys):
    text = (judged.folder / "agreement.md").read_text()
    assert not any(path.stat().st_mode & 0o077 for path in judged.folder.iterdir())
    assert judged.run("--stage", "report", judge=Path("Another/Judge")) == 0
    assert (judged.folder / "agreement.md").read_text() == text
    assert text.startswith(f"Judge: {tiny_model}. ") and "0 of 18 verdicts unscored" in text
    (judged.folder / "statements.jsonl").unlink()
    assert judged.run("--stage", "report") == 2
    assert "18 verdicts and 0 sections with statements for 18 cases" in capsys.readouterr().err
    (judged.folder / "manifest.json").unlink()
    assert judged.run() == 2
    assert "has records but no manifest.json" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_asks_the_judge_once_for_each_section_and_resumes(tmp_path, tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(judge_agreement, "RESAMPLES", 200)
    path, folder = write(tmp_path / "ratings.jsonl", rated(3)), tmp_path / "out"
    command = ["--ratings", str(path), "--output_dir", str(folder), "--judge_model", str(tiny_model)]
    command += ["--judge_engine_args", '{"dtype": "bfloat16"}']
    assert judge_agreement.main(command) == 0
    verdicts = (folder / "judgements.jsonl").read_text().splitlines(keepends=True)
    statements = (folder / "statements.jsonl").read_text().splitlines(keepends=True)
    assert len(verdicts) == len(statements) == 18
    assert all(json.loads(line)["verdict"] == "pass" for line in verdicts)  # as the tiny model has learned
    (folder / "judgements.jsonl").write_text("".join(verdicts[:15]) + verdicts[15][:20])
    capsys.readouterr()
    assert judge_agreement.main(command) == 0
    again = (folder / "judgements.jsonl").read_text().splitlines(keepends=True)
    assert again[:15] == verdicts[:15] and sorted(again) == sorted(verdicts)
    assert (folder / "statements.jsonl").read_text().splitlines(keepends=True) == statements
    shown = capsys.readouterr().out
    assert "## Assessment and plan" in shown and "0 of 18 verdicts unscored" in shown
