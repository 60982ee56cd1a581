"""Figures of groups of dialogues: right for known rates, honest about chance, small groups and hostile values."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import save_dataset
from report_data import cells, make_results, make_run, statement_records
from test_eval import Harness, harness  # noqa: F401
from test_preprocess_data import write_jsonl

import eval
import preprocess_data
from common.dataset import load_kept_column, load_split
from evaluation.report import html, messages
from evaluation.report.results import write_results_json
from evaluation.report.text import console_table
from evaluation.scoring import scores
from evaluation.scoring import slices as slices_module
from evaluation.scoring.scores import score_run
from evaluation.scoring.slices import group_by_value, heterogeneity, score_slices
from prompts import SECTIONS


@pytest.fixture(autouse=True)
def no_rouge(monkeypatch):
    """Leave out ROUGE-L, which takes longer than everything else here."""
    monkeypatch.setattr(scores, "_rouge_l", lambda: lambda reference, text: 0.0)


def score(values: list[str], column: str = "specialty", has_statements: bool = True) -> dict:
    """Score the run of `make_run`, with a value for each dialogue."""
    predictions, judgements, rows = make_run(len(values), words=200)
    records = statement_records(predictions, rows) if has_statements else []
    return score_run(predictions, judgements, rows, None, records, (column, values))


# --- figures ---------------------------------------------------------------------------------------------------------


def test_a_group_has_the_figures_that_a_run_of_its_dialogues_alone_would_have():
    values = [("ent", "cardiology", "ent", "")[k % 4] for k in range(120)]
    predictions, judgements, rows = make_run(120, words=200)
    for k in (8, 13, 50):
        predictions[k] |= {"status": "lenient", "form": "headings"}
    records = statement_records(predictions, rows)
    whole = score_run(predictions, judgements, rows, None, records, ("specialty", values))
    groups = {group["value"]: group for group in whole["slices"]["groups"]}
    assert {value: group["n"] for value, group in groups.items()} == {"ent": 60, "cardiology": 30, "": 30}
    for value, group in groups.items():
        part = [
            [record for record in of if values[record["index"]] == value] for of in (predictions, judgements, records)
        ]
        alone = score_run(part[0], part[1], rows, None, part[2])
        assert group["verdicts"] == alone["mean"]
        assert group["statements"] == alone["statements"]["mean"]
        assert group["valid_notes"] == alone["valid_notes"]
        assert group["readable"]["share"] == alone["valid_notes"] / alone["n"]
        low, high = group["readable"]["ci95"]
        assert low < group["readable"]["share"] < high
    reverse = [list(reversed(of)) for of in (predictions, judgements, records)]
    assert score_run(*reverse[:2], rows, None, reverse[2], ("specialty", values))["slices"] == whole["slices"]
    without = score_run(predictions, judgements, rows, None, records)
    assert without["slices"] is None
    assert without | {"slices": whole["slices"]} == whole


def test_groups_are_tested_by_statements_only_where_these_tell_more(monkeypatch):
    for better, measure in (("statements", "statements"), ("verdict", "verdicts"), (None, "verdicts")):
        monkeypatch.setattr(scores, "compare_instruments", lambda *_, better=better: {"better": better})
        slices = score(["a", "b"] * 20)["slices"]
        assert slices["measure"] == measure
        words = {"statements": "By statements, ", "verdicts": "By the judge's verdicts, "}[measure]
        assert messages.slices_message(slices).startswith(words)


def passes_of(rng: np.random.Generator, *groups: tuple[int, list[float]]) -> list[list[int]]:
    """Return the sections passed in each note of each group, given (number of notes, probabilities of 0 to 4)."""
    return [rng.choice(5, size=n, p=probabilities).tolist() for n, probabilities in groups]


ALL_OR_NOTHING, MIDDLE = [0.4, 0.1, 0, 0.1, 0.4], [0.02, 0.18, 0.6, 0.18, 0.02]  # both have a mean of 2
SPREAD, MOSTLY_0, MOSTLY_4 = [0.3, 0.2, 0.1, 0.1, 0.3], [0.8, 0.1, 0, 0, 0.1], [0.05, 0.05, 0.1, 0.2, 0.6]


@pytest.mark.parametrize(
    ("groups", "most"),
    [
        ([(60, SPREAD), (25, SPREAD), (10, SPREAD), (5, SPREAD)], 0.08),
        ([(60, MOSTLY_0), (25, MOSTLY_0), (10, MOSTLY_0), (5, MOSTLY_0)], 0.08),
        ([(5, SPREAD)] * 10, 0.08),
        ([(50, ALL_OR_NOTHING), (50, MIDDLE)], 0.08),
        ([(20, ALL_OR_NOTHING), (100, MIDDLE)], 0.12),  # without weights, in 24%
    ],
)
def test_equal_groups_are_said_to_differ_in_about_5_percent_of_runs_or_fewer(groups, most, monkeypatch):
    monkeypatch.setattr(slices_module, "DRAWS", 1000)
    rng = np.random.default_rng(5)
    p = np.array([heterogeneity(passes_of(rng, *groups)) for _ in range(300)])
    assert 0.005 <= (p < 0.05).mean() <= most  # the standard error is 1.3%


def test_groups_that_differ_are_found_and_a_single_group_is_not_tested():
    rng = np.random.default_rng(6)
    p = [heterogeneity(passes_of(rng, (50, MOSTLY_4), (30, MOSTLY_4), (20, SPREAD))) for _ in range(50)]
    assert np.mean(np.array(p) < 0.05) > 0.8
    assert heterogeneity([[0] * 50, [4] * 50]) == 0.0001
    assert heterogeneity([[4] * 50, [4] * 5]) == 1
    assert heterogeneity([[0, 4, 2]]) is None
    # Of the 6 equally likely ways to divide 0, 0, 4 and 4 in halves, 2 are as far apart as these.
    assert heterogeneity([[0, 0], [4, 4]]) == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.parametrize(
    ("counts", "shown", "pooled"),
    [
        ({"a": 9, "b": 5}, ["a", "b"], 0),
        ({"a": 9, "b": 4}, ["a", "b"], 0),  # one small group keeps its name
        ({"b": 9, "": 9, "c": 4, "d": 1}, ["", "b"], 2),
        ({f"{k:02}": 9 for k in range(20)}, [f"{k:02}" for k in range(20)], 0),
        ({f"{k:02}": 9 for k in range(22)}, [f"{k:02}" for k in range(20)], 2),
        ({f"{k}": 1 for k in range(50)}, [], 50),
    ],
)
def test_rare_values_are_pooled_from_two_on(counts, shown, pooled):
    values = [value for value, n in counts.items() for _ in range(n)]
    order = np.random.default_rng(0).permutation(len(values)).tolist()
    groups = group_by_value(values, order)
    expected = [{"value": value, "pooled": 1} for value in shown]
    assert [group for group, _ in groups] == expected + [{"value": None, "pooled": pooled}] * (pooled > 0)
    for group, members in groups:
        assert members == [k for k, value in enumerate(values) if value == group["value"]] or group["value"] is None
    assert sorted(index for _, members in groups for index in members) == list(range(len(values)))


def test_25000_dialogues_are_grouped_in_seconds():
    n = 25_000
    verdicts = dict.fromkeys(SECTIONS, ("pass", "judge"))
    notes = {index: verdicts if index % 3 else {} for index in range(n)}
    values = [f"clinic {k % 300}" for k in range(n)]
    began = time.process_time()
    slices = score_slices("clinic", values, range(n), set(range(n)), notes, None, "verdicts")
    assert time.process_time() - began < 5
    assert [group["n"] for group in slices["groups"]][-1] == n - sum(group["n"] for group in slices["groups"][:-1])
    assert slices["groups"][-1]["pooled"] == 280


# --- report ----------------------------------------------------------------------------------------------------------


def sentence(slices: dict, p: float | None) -> str:
    return messages.slices_message(slices | {"p": p})


def test_one_sentence_says_whether_the_groups_could_be_shown_to_differ():
    slices = score(["a", "b"] * 50)["slices"]
    assert "verdicts, the mean pass rate differs between the groups of specialty (permutation test, p = 0.049)." in (
        sentence(slices, 0.049)
    )
    assert "(permutation test, p < 0.001)." in sentence(slices, 0.0001)
    assert "could not be shown with 100 dialogues (permutation test, p = 0.050)." in sentence(slices, 0.05)
    one = score(["a"] * 10)["slices"]
    assert messages.slices_message(one) == (
        "All 10 dialogues are in one group of specialty, so there is nothing to compare."
    )


def test_small_and_pooled_groups_are_said_to_be_so():
    assert "fewer than" not in messages.slices_message(score(["a", "b"] * 10)["slices"])
    assert "fewer than 5 dialogues, whose figures show little: 1." in messages.slices_message(
        score(["a"] * 10 + ["b"] * 4)["slices"]
    )
    text = messages.slices_message(score(["a"] * 10 + [f"b{k}" for k in range(30)])["slices"])
    assert "Other (30 values) pools values with fewer than 5 dialogues or beyond the 20 most frequent." in text
    assert "merge values in the source" in text
    assert "show little" not in text


@pytest.mark.parametrize("has_statements", [True, False])
def test_the_console_table_of_groups_fits_120_columns(has_statements):
    values = [("Obstetrics and gynecology, outpatients", "a|b\n\x1b[31mred\u202e", "")[k % 3] for k in range(60)]
    results = make_results() | score(values, "special\x1bty " * 9, has_statements)
    for group in results["slices"]["groups"]:
        group["n"] = 25_000
    wide = results["slices"]["groups"][0]
    for figure in (wide["readable"], wide["verdicts"], *((wide["statements"]["covered"],) if has_statements else ())):
        figure |= {"share": 1.0, "accuracy": 1.0, "ci95": [0.999, 1.0]}
    text = console_table(results)
    table = text[text.index("By special") :].split("\n\n")[1]
    lines = table.splitlines()
    assert len(lines) == 5
    assert len(set(map(len, lines))) == 1
    assert len(lines[0]) <= 120
    assert len(cells(table, "(missing)")) == (7 if has_statements else 4)
    assert cells(table, "Obstetrics")[0] == "Obstetrics and gynecology, …"
    assert cells(table, "a¦b")[0] == "a¦b \ufffd[31mred\ufffd"
    assert "\x1b" not in text


# --- from the source to the report -----------------------------------------------------------------------------------


@pytest.fixture
def restored(tmp_path, monkeypatch):
    """Restore the environment and the umask, which the scripts change."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    umask = os.umask(0o022)
    yield tmp_path
    os.umask(umask)


def test_a_column_goes_from_the_source_into_the_results_and_the_report(restored):
    predictions, judgements, rows = make_run(90, words=200)
    good = {row["dialogue"] for row in rows[::3]}  # of these dialogues, all sections pass
    source = [row | {"clinic": "north" if row["dialogue"] in good else "south"} for row in rows]
    path, folder = write_jsonl(str(restored / "notes.jsonl"), source), str(restored / "data")
    shares = ["--test_fraction", "0.6", "--validation_fraction", "0.1"]
    assert preprocess_data.main(["--dataset", path, "--output_dir", folder, "--keep_column", "clinic", *shares]) == 0
    test = load_split(folder, "test")
    by = "clinic", load_kept_column(folder, "test", "clinic")
    predictions = [record for record in predictions if record["index"] < len(test)]
    judgements = [
        record | {"verdict": "pass" if test[record["index"]]["dialogue"] in good else "fail"}
        for record in judgements
        if record["index"] < len(test)
    ]
    results = make_results() | score_run(predictions, judgements, test, None, (), by)
    rates = {group["value"]: group["verdicts"]["accuracy"] for group in results["slices"]["groups"]}
    assert rates == {"north": 1, "south": 0}
    assert results["slices"]["p"] < 0.001
    write_results_json(restored / "results.json", results)
    assert json.loads((restored / "results.json").read_text())["slices"] == results["slices"]
    assert cells(console_table(results), "north")[3].startswith("100 (")
    html.write_report(
        restored / "report.html", results, html.select_dialogues(predictions, judgements, test, values=by[1])
    )
    assert "differs between the groups of clinic" in (restored / "report.html").read_text()


def test_a_finished_run_is_reported_by_a_column_without_becoming_another_run(harness, tmp_path, capsys):  # noqa: F811
    assert harness.run() == 0
    before, manifest = harness.results(), (harness.folder / "manifest.json").read_bytes()
    asked, last = len(harness.judges[0].asked), capsys.readouterr().out.split("\n\n")[-2]
    report = ["--stage", "report", "--by", "clinic"]
    assert harness.run(*report) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "has no kept column clinic (it has: none); run `python preprocess_data.py` again with --keep_column" in error

    data = Path(harness.argv[harness.argv.index("--dataset_path") + 1])
    splits = {split: list(load_split(data, split)) for split in ("train", "test")}
    for part in splits.values():
        part[:] = [row | {"clinic": ("north", "south")[k == 2]} for k, row in enumerate(part)]
    report += ["--dataset_path", str(save_dataset(tmp_path / "with_column", splits))]
    assert harness.run(*report) == 0
    after = harness.results()
    assert [(group["value"], group["n"]) for group in after["slices"]["groups"]] == [("north", 5), ("south", 1)]
    assert {**after, "slices": None, "dataset": before["dataset"]} == before
    assert (harness.folder / "manifest.json").read_bytes() == manifest
    assert [len(judge.asked) for judge in harness.judges] == [asked]
    table = capsys.readouterr().out.split("\n\n")
    assert "By clinic, in percent (95% interval):" in table
    assert table[-2] == last  # the sentences on the judge
    assert harness.run(*report, "--limit", "5") == 2  # another run, whatever the column

    assert eval.main(["--compare", str(harness.folder), str(harness.folder), "--by", "clinic"]) == 2
    assert "--by has no effect with --compare" in capsys.readouterr().err
