"""Test the statement sheet, and the comparison of the judge's answers on statements with people's."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

from common.errors import UserError
from evaluation.scoring.intervals import auc, clustered_auc
from evaluation.scoring.people import LabelError
from evaluation.scoring.statement_labels import check_statements, read_labels
from evaluation.statement_sheet import COLUMNS, read_statement_sheet, write_statement_sheet
from prompts import SECTIONS

ROW = {"dialogue": "Doctor: What is it?\nPatient: A cough.", "S": "Cough.", "O": "Clear.", "A": "Cold.", "P": "Rest."}


def record_of(index: int, section: str, log_odds: float = 1.0, **fields) -> dict:
    """Return a record with two covered statements and one supported one."""
    covered = [{"statement": f"=Said {index} {section} {k}", "log_odds": log_odds} for k in range(2)]
    supported = [{"statement": f"Note {index} {section}\nsecond line", "log_odds": -log_odds}]
    record = {"index": index, "section": section, "control": None, "attack": None, "status": "asked", "reason": ""}
    return record | {"covered": covered, "supported": supported} | fields


def run_of(notes: int) -> tuple[list[dict], list[dict]]:
    """Return predictions and statement records of `notes` notes; the last one failed by rule."""
    predictions = [{"index": index} | {key: f"Note {index} {key}" for key in SECTIONS} for index in range(notes)]
    records = [
        record_of(index, section, status="missing" if index == notes - 1 else "asked")
        for index in range(notes)
        for section in SECTIONS
    ]
    return predictions, records


def written(path: Path, size: int, notes: int = 6) -> list[dict[str, str]]:
    predictions, records = run_of(notes)
    control = record_of(0, "S", control={"kind": "own", "expected": "pass"})
    write_statement_sheet(path, predictions, [control, *records[::-1]], [ROW] * notes, size)
    return list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))


def answered(rows: list[dict[str, str]], path: Path, answers: dict[str, str], delimiter: str = ",") -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, delimiter=delimiter)
    writer.writeheader()
    for row in rows:
        writer.writerow(row | {"answer": answers[row["question"].split(":")[0]], "rater": "Zoë"})
    path.write_text(text.getvalue(), encoding="utf-8-sig")
    return path


def test_the_sheet_has_all_statements_of_few_notes_and_no_answers(tmp_path):
    small, large = (written(tmp_path / f"{size}.csv", size) for size in (2, 100))
    assert len(small) == 2 * 4 * 3 and len(large) == 5 * 4 * 3  # the note that failed by rule was not asked about
    assert {row["index"] for row in small} < {row["index"] for row in large}
    assert tuple(small[0]) == COLUMNS
    for row in small:
        assert row["answer"] == row["rater"] == ""
        assert row["note section"] == f"Note {row['index']} {row['section']}"
        assert "1.0" not in "".join(row.values())


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_filled_in_sheet_labels_the_same_statements(tmp_path, delimiter):
    rows = written(tmp_path / "sheet.csv", 3)
    rows[0]["answer"] = "kept by the writer below"
    path = answered(rows, tmp_path / "filled.csv", {"covered": "YES ", "supported": "no"}, delimiter)
    labels, without = read_statement_sheet(str(path))
    assert (len(labels), without) == (3 * 4 * 3, 0)
    answers, log_odds = read_labels(labels, run_of(6)[1])
    assert list(answers) == ["Zoë"] and len(answers["Zoë"]) == len(log_odds) == 36
    assert {key.question: value for key, value in answers["Zoë"].items()} == {"covered": True, "supported": False}
    assert {key.question: value for key, value in log_odds.items()} == {"covered": 1.0, "supported": -1.0}


def test_rows_without_an_answer_are_counted_and_left_out(tmp_path):
    written(tmp_path / "sheet.csv", 2)
    assert read_statement_sheet(str(tmp_path / "sheet.csv")) == ([], 24)


def test_a_run_without_statements_gives_no_sheet(tmp_path):
    with pytest.raises(UserError, match="answered no statement"):
        write_statement_sheet(tmp_path / "sheet.csv", [], [record_of(0, "S", status="unscored")], [ROW], 5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "maybe"}, "neither yes nor no"),
        ({"number": 9}, "no such statement"),
        ({"index": 5.5}, "no such statement"),
        ({"section": ["S"]}, "no such statement"),
        ({"question": "true"}, "no such statement"),
        ({"hash": "0" * 12}, "another statement"),
        ({"rater": 5}, "must be a text"),
    ],
)
def test_a_label_that_does_not_fit_the_run_is_refused_with_its_place(change, message):
    label = {"index": 0, "section": "S", "question": "covered", "number": 1, "answer": "yes", "where": "a.csv:2"}
    with pytest.raises(LabelError, match=f"^a.csv:2: .*{message}"):
        read_labels([label | change], run_of(2)[1])
    assert read_labels([label], run_of(2)[1])[1] == {(0, "S", "covered", 1): 1.0}


def test_a_second_label_of_one_rater_is_refused_and_of_two_raters_counted():
    label = {"index": 0, "section": "S", "question": "covered", "number": 1, "answer": "yes"}
    with pytest.raises(LabelError, match="already has a label"):
        read_labels([label, label], run_of(2)[1])
    by_two = [label | {"rater": "a"}, label | {"rater": "b", "answer": "no"}]
    figures = check_statements(*read_labels(by_two, run_of(2)[1]), threshold=0.0)
    assert figures["covered"]["labelled"] == 0  # they disagree
    figures = check_statements(*read_labels([*by_two, label | {"rater": "c"}], run_of(2)[1]), threshold=0.0)
    assert figures["covered"]["people"] == {"n": 1, "share": 1.0, "ci95": figures["covered"]["people"]["ci95"]}


def test_figures_count_what_the_judge_found_and_what_it_marked_wrongly():
    truth = [True, True, True, False, False]
    scores = [2.0, 0.5, -1.0, -2.0, 1.0]
    keys = [(index, "S", "covered", 1) for index in range(5)]
    labels = [
        dict(zip(("index", "section", "question", "number"), key, strict=True)) | {"answer": "yes" if yes else "no"}
        for key, yes in zip(keys, truth, strict=True)
    ]
    records = [record_of(index, "S", score) for index, score in enumerate(scores)]
    figures = check_statements(*read_labels(labels, records), threshold=0.2)["covered"]
    assert (figures["labelled"], figures["notes"]) == (5, 5)
    assert [figures[name]["n"] for name in ("people", "judge", "found", "false_alarms")] == [5, 5, 2, 3]
    assert [figures[name]["share"] for name in ("people", "judge", "found", "false_alarms")] == [0.6, 0.6, 0.5, 1 / 3]
    assert figures["auc"] == auc([2.0, 0.5, -1.0], [-2.0, 1.0]) == 4 / 6
    assert figures["auc_ci95"][0] < 4 / 6 < figures["auc_ci95"][1]


@pytest.mark.parametrize(("notes", "spread"), [(10, 0.7), (25, 0.0), (10, 1.5)])
def test_the_interval_of_a_clustered_auc_covers_the_truth(notes, spread):
    rng = np.random.default_rng(notes)
    true = norm.cdf(1 / np.sqrt(2 + 2 * spread**2))
    covered = []
    for _ in range(400):
        drawn = []
        for _ in range(notes):
            is_bad = rng.random(12) < 0.2
            scores = rng.normal(0, spread) + rng.normal(0, 1, 12) + ~is_bad
            drawn.append((scores[~is_bad].tolist(), scores[is_bad].tolist()))
        area, (low, high) = clustered_auc(drawn)
        assert low <= area <= high
        covered.append(low <= true <= high)
    assert 0.93 <= np.mean(covered) <= 0.995


def test_a_clustered_auc_needs_good_and_bad_statements():
    assert clustered_auc([([1.0], [])]) == clustered_auc([]) == (None, None)
    area, (low, high) = clustered_auc([([1.0, 2.0], [0.0])] * 3)
    assert (area, high) == (1.0, 1.0) and low < 0.8  # equal notes still leave room for doubt
