"""Test the comparison of finished runs by statements, from their files."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.inputs import load_runs
from evaluation.scoring.comparison import _share_difference, compare_runs
from evaluation.scoring.scores import score_run
from prompts import SECTIONS

ROWS = [{"dialogue": f"Visit {index}", **dict.fromkeys(SECTIONS, "Cough.")} for index in range(20)]
HASHES = {"dataset_hash": "d", "prompts_hash": "p", "judge_hash": "j", "judge_model": "Judge"}


def statements_of(index: int, section: str, log_odds: list[float | None], control: str | None = None) -> dict:
    """Return a record whose first statement is supported, and whose others are covered."""
    rated = [{"statement": f"Statement {k}.", "log_odds": value} for k, value in enumerate(log_odds)]
    known = control and {"kind": control, "expected": "pass" if control == "own" else "fail"}
    record = {"index": index, "section": section, "control": known, "attack": None, "status": "asked", "reason": ""}
    return record | {"covered": rated[1:], "supported": rated[:1]}


def write_run(folder: Path, answers: dict[int, list[float | None]], noise: float = 0.0, controls: int = 20) -> Path:
    """Write a finished run in which all sections of a note have the same answers."""
    rng = random.Random(str(folder.name))
    predictions, judgements, statements = [], [], []
    for index, row in enumerate(ROWS):
        note = {key: row[key] for key in SECTIONS}
        prediction = {"index": index, "dialogue_hash": str(index), "finish_reason": "stop", "status": "ok", **note}
        predictions.append(prediction | {"raw": "", "reason": None, "prompt_tokens": 1, "output_tokens": 1})
        for key in SECTIONS:
            verdict = {"index": index, "section": key, "verdict": "pass", "source": "judge", "control": None}
            judgements.append(verdict | {"attack": None, "reason": "", "raw": "", "output_tokens": 1})
            statements.append(statements_of(index, key, answers[index]))
    for index in range(controls):
        for kind, center in (("own", 1.0), ("swapped", -1.0)):
            odds = center + 0.1 * index + rng.gauss(0, noise)
            statements.append(statements_of(index, "S", [odds, odds], kind))
    folder.mkdir()
    for name, records in (("predictions", predictions), ("judgements", judgements), ("statements", statements)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    results = score_run(predictions, judgements, ROWS, statements=statements) | HASHES
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_runs_are_compared_though_noise_moves_their_fitted_thresholds(tmp_path):
    worse, better = ({index: [3.0, 3.0, value] for index in range(20)} for value in (-3.0, 3.0))
    folders = [write_run(tmp_path / name, answers, 0.01) for name, answers in (("a", worse), ("b", better))]
    runs = load_runs(folders)
    thresholds = [run["results"]["statements"]["threshold"] for run in runs]
    assert thresholds[0] != thresholds[1] and thresholds[0] == pytest.approx(thresholds[1], abs=0.1)
    compared = compare_runs(runs)["statements"]
    assert compared["threshold"] == thresholds[0]
    assert compared["covered"]["mean"]["share"] == [0.5, 1.0]
    assert compared["pairs"][0]["covered"]["difference"] == 0.5
    assert compared["pairs"][0]["supported"]["difference"] == 0
    assert compared["mean"]["accuracy"] == [0, 1]


def test_the_threshold_of_a_comparison_is_that_of_the_run_with_most_controls(tmp_path):
    answers = {index: [3.0, 3.0] for index in range(20)}
    folders = [write_run(tmp_path / str(n), answers, controls=n) for n in (0, 20, 4)]
    runs = load_runs(folders)
    thresholds = [run["results"]["statements"]["threshold"] for run in runs]
    assert thresholds[0] == 0 and len(set(thresholds)) == 3
    assert {run["threshold"] for run in runs} == {thresholds[1]}
    assert compare_runs(runs)["statements"]["threshold"] == thresholds[1]


def test_statements_without_an_answer_change_no_share_and_no_difference(tmp_path):
    rng = random.Random(0)
    whole = {index: [3.0, *(rng.choice((-3.0, 3.0)) for _ in range(4))] for index in range(20)}
    gaps = {index: [*odds, None, None] if index < 5 else odds for index, odds in whole.items()}
    runs = load_runs([write_run(tmp_path / "whole", whole), write_run(tmp_path / "gaps", gaps)])
    compared = compare_runs(runs)["statements"]
    first, second = compared["covered"]["mean"]["share"]
    assert first == second
    assert compared["pairs"][0]["covered"]["difference"] == 0
    assert runs[1]["results"]["statements"]["sections"]["S"]["covered"]["unscored"] == 10


SHARES = st.integers(0, 12).map(lambda yes: yes / 12)


@given(st.lists(st.tuples(SHARES, SHARES), min_size=2, max_size=6))
def test_a_difference_of_shares_stays_within_100_points(pairs):
    first, second = (dict(enumerate(side)) for side in zip(*pairs, strict=True))
    figures = _share_difference(first, second)
    low, high = figures["ci95"]
    assert -1 <= low <= figures["difference"] + 1e-9 and figures["difference"] - 1e-9 <= high <= 1
    assert 0 < figures["p"] <= 1
    swapped = _share_difference(second, first)
    assert swapped["difference"] == pytest.approx(-figures["difference"])
    assert swapped["ci95"] == pytest.approx([-high, -low])


def test_two_notes_with_the_same_change_prove_nothing():
    assert _share_difference({0: 0.5, 1: 0.25}, {0: 1.0, 1: 0.75})["p"] == 0.5
    assert _share_difference(dict.fromkeys(range(9), 0.5), dict.fromkeys(range(9), 1.0))["p"] == 2**-8
    assert _share_difference({0: 0.5, 1: 0.5}, {0: 0.5, 1: 0.5})["p"] == 1.0


@given(st.integers(2, 300), st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0]))
def test_equal_changes_of_few_notes_leave_room_for_others(n, change):
    before = max(0.0, -change)
    low, high = _share_difference(dict.fromkeys(range(n), before), dict.fromkeys(range(n), before + change))["ci95"]
    assert high - low > 0.5 / n
    assert low <= change <= high
    if change and n > 8:
        assert (low > 0) == (change > 0) and (high < 0) == (change < 0)
