import copy
import itertools
import json
import os
import random
import re
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.report import html
from evaluation.report.results import write_results_json
from evaluation.report.text import comparison_table, console_table
from evaluation.scoring.comparison import compare_runs
from evaluation.scoring.scores import score_run
from prompts import SECTIONS

# What an untrusted file may contain wherever the report shows text.
HOSTILE = [
    "<script>window.injected = 1</script>",
    "</script><script>window.injected = 1</script>",
    '"><img src=x onerror="window.injected = 1">',
    "<svg onload='window.injected = 1'></svg><style>body { display: none }</style>",
    "<a href='javascript:window.injected = 1'>Dose</a><iframe srcdoc='<script>parent.injected = 1</script>'></iframe>",
    "--></textarea></title></style><base href='http://127.0.0.1:1/'><meta http-equiv=refresh content='0;http://127.0.0.1:1/'>",
    "{{ 7 * 7 }} {% raw %} ${7 * 7}",
    "NUL \x00, escape \x1b[31m, half a pair \ud800, reordered \u202e50 mg",
    "المريض يشكو من السعال منذ ثلاثة أيام.",
    "W" * 20_000,
]


# --- figures in the form of scoring -----------------------------------------------------------------------------------


def around(rate: float, half: float = 0.06) -> list[float]:
    return [max(0.0, rate - half), min(1.0, rate + half)]


def check(sensitivity: float, specificity: float, informative: bool = True, n: int = 20) -> dict:
    by_kind = {"reworded": ("pass", sensitivity)} | dict.fromkeys(
        ("other_patient", "dropped_finding", "turned_negation", "changed_number"), ("fail", specificity)
    )
    return {
        "sensitivity": sensitivity,
        "sensitivity_ci95": around(sensitivity, 0.2),
        "specificity": specificity,
        "specificity_ci95": around(specificity, 0.2),
        "n_good": n,
        "n_bad": n,
        "by_kind": {
            kind: {
                "expected": expected,
                "n": 5,
                "right": round(5 * rate),
                "unscored": 0,
                "rate": rate,
                "ci95": around(rate, 0.3),
            }
            for kind, (expected, rate) in by_kind.items()
        },
        "youden": sensitivity + specificity - 1,
        "youden_ci95": [sensitivity + specificity - 1.2, sensitivity + specificity - 0.8],
        "informative": informative,
        "judged": 250,
        "judged_passed": 150,
        "contradiction": None,
        "corrected_accuracy": None,
        "corrected_ci95": None,
    }


def by_people(sensitivity: float, specificity: float, rate: float, informative: bool = True) -> dict:
    """Return the check of a section against people's verdicts."""
    strata = {"passed by the judge": (161, 10, 9), "failed by the judge": (89, 10, 2.5), "unscored": (4, 0, 0)}
    return check(sensitivity, specificity, informative) | {
        "by_kind": {},
        "agreement": 0.86,
        "corrected_accuracy": rate,
        "corrected_ci95": around(rate, 0.15),
        "strata": {name: dict(zip(("n", "labelled", "passed"), row, strict=True)) for name, row in strata.items()},
    }


def all_labels(rate: float | None = 0.6, **more) -> dict:
    kappas = [{"raters": ["A", "B"], "n": 12, "agreement": 0.9, "kappa": 0.74}]
    figures = {"labelled": 80, "labels": 92, "raters": ["A", "B"], "kappas": kappas, "open": []}
    return figures | {"accuracy": rate, "ci95": around(rate or 0.5, 0.1)} | more


def section(passed: int, unscored: int, n: int = 250) -> dict:
    return {
        "pass": passed,
        "fail": n - passed - unscored,
        "unscored": unscored,
        "accuracy": passed / n,
        "ci95": around(passed / n),
        "worst": passed / n,
        "best": (passed + unscored) / n,
        "rougeL": 0.412,
    }


@pytest.fixture
def results() -> dict:
    return {
        "model": "Qwen/Qwen3-1.7B",
        "lora_path": "./ckpt/Qwen3-1.7B-LoRA/global_step_289",
        "judge_model": "Qwen/Qwen3-8B",
        "dataset": "./soap_dataset",
        "split": "test",
        "n": 250,
        "valid_notes": 247,
        "finish_reasons": {"stop": 247, "length": 3},
        "sections": {"S": section(161, 4), "O": section(142, 0), "A": section(127, 0), "P": section(162, 0)},
        "mean": {"accuracy": 0.592, "ci95": [0.561, 0.622]},
        "judge_controls": {
            "S": check(0.9, 0.85),
            "O": check(0.95, 0.8),
            "A": check(0.85, 0.9),
            "P": check(0.9, 0.75),
        },
        "judge_controls_all": check(0.9, 0.825, n=80),
        "human_labels": None,
        "human_labels_all": None,
        "attacks": None,
        "timings_s": {"generate_init": 12.6, "generate": 6.9, "judge_init": 12.2, "judge": 14.5},
    }


@pytest.fixture
def results_of_an_unproven_judge(results: dict) -> dict:
    results["judge_controls"]["O"] = check(0.95, 0.05, False)
    results["judge_controls"]["P"] = check(0.5, 0.5, False)
    return results


def line(accuracy: list[float]) -> dict:
    best = [k for k, rate in enumerate(accuracy) if rate == max(accuracy)]
    return {"accuracy": accuracy, "ci95": [around(rate) for rate in accuracy], "best": best}


def pair(a: int, b: int, difference: float, p: float) -> dict:
    figures = {"n": 249, "unscored": 1, "difference": difference, "ci95": [difference - 0.08, difference + 0.08]}
    return {
        "a": a,
        "b": b,
        "n": 250,
        "sections": {key: {**figures, "only_a": 12, "only_b": 43, "p": p, "p_holm": min(1, 4 * p)} for key in SECTIONS},
        "mean": {"n": 247, "difference": difference, "ci95": [difference - 0.04, difference + 0.04], "p": p},
        "flips": [
            {"index": 3, "section": "S", "from": "fail", "to": "pass"},
            {"index": 17, "section": "S", "from": "fail", "to": "pass"},
            {"index": 17, "section": "P", "from": "pass", "to": "fail"},
        ],
    }


@pytest.fixture
def comparison() -> dict:
    return {
        "names": ["Qwen3-1.7B", "Finetuned", "LoRA Adapter"],
        "n": [250, 250, 250],
        "sections": {
            "S": line([0.356, 0.736, 0.644]),
            "O": line([0.524, 0.724, 0.568]),
            "A": line([0.528, 0.692, 0.508]),
            "P": line([0.548, 0.708, 0.708]),
        },
        "mean": line([0.489, 0.715, 0.607]),
        "pairs": [pair(0, 1, 0.226, 0.0000002), pair(0, 2, 0.118, 0.0131), pair(1, 2, -0.0001, 1.0)],
    }


def runs_of(comparison: dict, results: dict) -> list[dict]:
    return [{"name": name, "results": results} for name in comparison["names"]]


def cells(table: str, first: str) -> list[str]:
    """Return the cells of the first line of a Markdown table that begins with `first`."""
    row = next(row for row in table.splitlines() if row.startswith(f"| {first} "))
    return [cell.strip() for cell in row.strip("|").split("|")]


# --- console ---------------------------------------------------------------------------------------------------------


def test_the_console_shows_rate_interval_unscored_and_rouge_of_each_section(results):
    text = console_table(results)
    assert text.startswith("Qwen3-1.7B + Qwen3-1.7B-LoRA, judged by Qwen3-8B, 250 dialogues")
    assert cells(text, "S") == ["S", "64.4%", "58.4-70.4%", "4 (pass rate 64.4-66.0%)", "0.412"]
    assert cells(text, "O") == ["O", "56.8%", "50.8-62.8%", "0", "0.412"]
    assert cells(text, "mean") == ["mean", "59.2%", "56.1-62.2%", "", "0.412"]
    assert "Readable notes: 247 of 250; 3 reached the token limit." in text


def test_the_lines_of_a_console_table_have_the_same_length(results):
    table = console_table(results).split("\n\n")[1].splitlines()
    assert len(table) == 7
    assert len({len(row) for row in table}) == 1


def test_the_console_shows_sensitivity_and_specificity_with_intervals(results):
    judge = console_table(results).split("\n\n")[3]
    assert cells(judge, "S")[1:] == [
        "90.0% (70.0-100.0%, n = 20)",
        "85.0% (65.0-100.0%, n = 20)",
        "0.75 (0.55 to 0.95)",
    ]
    assert cells(judge, "all")[1].endswith("n = 80)")


def test_the_console_warns_of_an_unproven_judge(results_of_an_unproven_judge):
    text = console_table(results_of_an_unproven_judge)
    assert (
        "WARNING: It could not be shown that the judge passes good sections more often than bad ones in O (20 good and "
        "20 bad controls) and P (20 good and 20 bad controls). That does not prove that it cannot: more controls"
    ) in text
    assert cells(text, "O")[1] == "56.8% (judge unproven)"
    judge = text.split("\n\n")[3]
    assert [cells(judge, key)[3] for key in "OP"] == ["0.00 (-0.20 to 0.20)"] * 2


@pytest.mark.parametrize(
    ("contradiction", "words"),
    [
        (
            "below_false_passes",
            "In S the judge passed 10.0% of the notes, but 15.0% of the controls that it should",
        ),
        (
            "above_sensitivity",
            "In S the judge passed 10.0% of the notes, but only 90.0% of the controls that it should",
        ),
    ],
)
def test_the_console_warns_if_the_notes_contradict_the_controls(results, contradiction, words):
    results["judge_controls"]["S"] |= {"judged_passed": 25, "contradiction": contradiction}
    text = console_table(results)
    assert f"WARNING: {words}" in text
    assert "its errors on the notes are not those on the controls" in text
    results["judge_controls"]["S"]["contradiction"] = None
    results["judge_controls_all"] |= {"judged_passed": 25, "contradiction": contradiction}
    assert words.replace("In S", "Over all sections")[:50] in console_table(results)


def test_a_run_with_controls_alone_shows_no_corrected_rate(results):
    text = console_table(results)
    assert "orrected" not in text.replace("no pass rate is corrected", "")


def test_the_console_says_if_the_judge_was_not_checked(results):
    results["judge_controls"] = None
    text = console_table(results)
    assert text.endswith("The judge was not checked in this run, so it is unknown how often its verdicts are wrong.")
    assert "Sensitivity" not in text


def test_human_labels_can_check_the_judge_instead_of_controls(results):
    labels = {key: by_people(0.9, 0.8, 0.6) for key in SECTIONS}
    labels["O"] = by_people(0.5, 0.5, 0.6, informative=False)
    text = console_table(results | {"judge_controls": None, "human_labels": labels})
    assert "By people's verdicts it could not be shown" in text and "failed in O." in text
    assert cells(text, "O")[1] == "56.8% (judge unproven)"


@pytest.mark.parametrize(("sensitivity", "interval", "outranks"), [(0.5, [0.3, 0.7], True), (0.8, [0.4, 0.9], False)])
def test_labels_outrank_controls_where_they_disagree_or_are_informative(results, sensitivity, interval, outranks):
    labels = {key: by_people(0.9, 0.8, 0.6) for key in SECTIONS}
    labels["O"] |= {"sensitivity": sensitivity, "sensitivity_ci95": interval, "informative": False}
    text = console_table(results | {"human_labels": labels})
    assert ("judge unproven" in cells(text, "O")[1]) == outranks
    results["judge_controls"]["A"]["informative"] = False
    assert "judge unproven" not in cells(console_table(results | {"human_labels": labels}), "A")[1]


def test_peoples_rate_comes_first_and_a_judge_outside_its_interval_is_a_warning(results):
    results["human_labels"] = {key: by_people(0.9, 0.8, 0.6) for key in SECTIONS}
    near = console_table(results | {"human_labels_all": all_labels(0.6)})
    words = "By people's verdicts on 80 sections, the mean pass rate is 60.0% (50.0-70.0%); by the judge it is 59.2%."
    assert words in near and f"WARNING: {words}" not in near
    far = console_table(results | {"human_labels_all": all_labels(0.8)})
    assert "WARNING: By people's verdicts on 80 sections, the mean pass rate is 80.0%" in far
    people = near[near.index("| People") :]
    labelled = "passed by the judge: 9 of 10; failed by the judge: 2.5 of 10"
    assert cells(people, "S")[1:] == ["60.0% (45.0-75.0%)", "90.0% (70.0-100.0%)", "80.0% (60.0-100.0%)", labelled]
    assert cells(people, "mean")[1] == "60.0% (50.0-70.0%)"
    assert "A and B both labelled 12 sections and agree on 90.0%, Cohen's kappa 0.74." in near


def test_a_pass_rate_without_estimate_is_a_range_and_names_the_missing_labels(results):
    results["human_labels"] = {key: by_people(0.9, 0.8, 0.6) for key in SECTIONS}
    results["human_labels"]["S"] |= {"corrected_accuracy": None, "sensitivity": None, "sensitivity_ci95": None}
    results["human_labels_all"] = all_labels(None, open=["failed by rule", "unscored"])
    text = console_table(results)
    assert "is somewhere within 40.0-60.0%; by the judge it is 59.2%." in text
    assert "labelled none of those that are: failed by rule, unscored." in text
    people = text[text.index("| People") :]
    assert cells(people, "S")[1:3] == ["45.0-75.0%", "not checked"]


def test_disagreements_of_controls_and_people_are_shown(results):
    results["human_labels"] = {key: by_people(0.9, 0.8, 0.6) for key in SECTIONS}
    results["human_labels"]["A"] |= {"sensitivity": 0.4, "sensitivity_ci95": [0.3, 0.5]}
    text = console_table(results | {"human_labels_all": all_labels()})
    assert text.count("Controls and people disagree") == 1
    assert "disagree on the judge's sensitivity in A: 85.0% by controls, 40.0% by people, whose verdicts take" in text


def test_a_section_without_controls_to_pass_and_to_fail_is_not_checked(results):
    unchecked = dict.fromkeys(("specificity", "specificity_ci95", "youden", "youden_ci95"))
    results["judge_controls"]["A"] |= {"n_bad": 0, "informative": False} | unchecked
    text = console_table(results)
    assert cells(text.split("\n\n")[3], "A")[2:] == ["not checked", "not checked"]
    assert "The judge could not be checked in A" in text
    assert "unproven" not in text


def test_a_run_without_a_valid_note_has_a_table(results):
    results |= {"valid_notes": 0, "finish_reasons": {"length": 240, "prompt_too_long": 10}}
    results["sections"] = {key: {**section(0, 0), "rougeL": 0.0} for key in SECTIONS}
    results["mean"] = {"accuracy": 0.0, "ci95": [0.0, 0.0]}
    text = console_table(results)
    assert cells(text, "P") == ["P", "0.0%", "0.0-6.0%", "0", "0.000"]
    assert "Readable notes: 0 of 250; 240 reached the token limit; 10 not written because the dialogue is too" in text


def test_the_console_shows_human_labels_and_attacks_if_there_are_any(results):
    results["human_labels"] = {key: by_people(0.9, 0.8, 0.6) for key in SECTIONS}
    results["human_labels_all"] = all_labels()
    results["attacks"] = attacks()
    text = console_table(results)
    assert "of sections people passed" in text
    assert (
        "Attacks on the judge: 4 of 20 wrong texts that failed alone passed with an attack: 20.0% (8.1-41.6%). Pass "
        "rate of all 23: 30.4% with an attack, 13.0% without, difference +17.4 points (+0.7 to +36.5)."
    ) in text


def test_attacks_without_baselines_are_shown_without_a_rate(results):
    none = {"pairs": 0, "succeeded": 0} | dict.fromkeys(
        ("pass_rate", "baseline_pass_rate", "difference", "difference_ci95", "success_rate", "ci95")
    )
    results["attacks"] = attacks() | none
    assert "8 of 24 attacks passed. Their success cannot be measured, because the verdicts" in console_table(results)


def attacks() -> dict:
    figures = {"n": 24, "passed": 8, "unscored": 1, "pairs": 23, "pass_rate": 7 / 23, "baseline_pass_rate": 3 / 23}
    figures |= {"difference": 4 / 23, "difference_ci95": [0.007, 0.365]}
    figures |= {"succeeded": 4, "success_rate": 0.2, "ci95": [0.081, 0.416]}
    return figures | {"by_kind": {"fake_verdict": figures, "closing_quote": figures}}


# --- comparison ------------------------------------------------------------------------------------------------------


def test_the_comparison_has_a_column_for_each_run_and_the_best_in_bold(comparison, results):
    text = comparison_table(comparison, runs_of(comparison, results))
    assert cells(text, "Section") == ["Section", "Qwen3-1.7B", "Finetuned", "LoRA Adapter"]
    assert cells(text, "S") == ["S", "35.6%", "**73.6%**", "64.4%"]
    assert cells(text, "P") == ["P", "54.8%", "**70.8%**", "**70.8%**"]
    assert cells(text, "mean") == ["mean", "48.9%", "**71.5%**", "60.7%"]


def test_the_comparison_shows_the_measures_that_need_no_judge(comparison, results):
    text = comparison_table(comparison, runs_of(comparison, results))
    rouge = f"{results['sections']['O']['rougeL']:.3f}"
    assert cells(text, "Readable notes") == ["Readable notes", *["247 of 250"] * 3]
    assert cells(text, "ROUGE-L, O") == ["ROUGE-L, O", *[rouge] * 3]


def test_rouge_of_readable_notes_is_shown_if_it_differs_from_rouge_of_all(comparison, results):
    runs = [run | {"results": copy.deepcopy(run["results"])} for run in runs_of(comparison, results)]
    for run, readable in zip(runs, (None, 0.5, 0.412), strict=True):
        run["results"]["sections"]["S"]["rougeL_readable"] = readable
    expected = ["0.412 (no note readable)", "0.412 (readable: 0.500)", "0.412"]
    assert cells(comparison_table(comparison, runs), "ROUGE-L, S")[1:] == expected
    assert expected[1] in console_table(runs[1]["results"])


def test_the_comparison_has_differences_mcnemar_and_flips_of_each_pair(comparison, results):
    text = comparison_table(comparison, runs_of(comparison, results))
    first = text[text.index("Finetuned minus Qwen3-1.7B") : text.index("LoRA Adapter minus Qwen3-1.7B")]
    assert cells(first, "O") == ["O", "+22.6", "+14.6 to +30.6", "< 0.001", "43", "12", "1"]
    assert cells(first, "mean") == ["mean", "+22.6", "+18.6 to +26.6", "< 0.001", "", "", "3"]
    assert "The mean's p, from a paired permutation test" in first
    assert "S fail -> pass (2): 3, 17\nP pass -> fail (1): 17" in first
    last = text[text.index("LoRA Adapter minus Finetuned") :]
    assert cells(last, "O")[1:4] == ["+0.0", "-8.0 to +8.0", "1.000"]  # never "-0.0"


def test_a_pair_without_a_note_scored_in_both_is_shown_without_figures(comparison, results):
    empty = {
        "n": 0,
        "unscored": 250,
        "difference": None,
        "ci95": None,
        "only_a": 0,
        "only_b": 0,
        "p": None,
        "p_holm": None,
    }
    comparison["pairs"][0]["sections"]["A"] = empty
    text = comparison_table(comparison, runs_of(comparison, results))
    assert ["A", "-", "-", "-", "-", "-", "250"] in [cells(part, "A") for part in text.split("\n\n") if "| A " in part]


def test_the_comparison_warns_of_an_unproven_judge(comparison, results_of_an_unproven_judge):
    text = comparison_table(comparison, runs_of(comparison, results_of_an_unproven_judge))
    assert text.count("WARNING: ") == 3
    assert "Finetuned: It could not be shown that the judge passes good sections" in text


# --- results.json ----------------------------------------------------------------------------------------------------


def test_results_json_always_has_the_same_key_order(results, tmp_path):
    shuffled = dict(reversed(results.items()))
    shuffled["sections"] = dict(reversed(results["sections"].items()))
    texts = []
    for values in (results, shuffled):
        write_results_json(tmp_path / "results.json", values)
        texts.append(json.loads((tmp_path / "results.json").read_text()))
    assert [list(text)[:11] for text in texts] == [list(texts[0])[:11]] * 2
    assert list(texts[1]["sections"]) == list(SECTIONS)
    assert texts[0] == texts[1] == json.loads(json.dumps(results))
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda results: results.pop("valid_notes"), "results: no valid_notes"),
        (lambda results: results["sections"].pop("A"), "sections: no A"),
        (lambda results: results["sections"]["P"].pop("ci95"), "section P: no ci95"),
        (lambda results: results["mean"].update(accuracy=float("nan")), "not JSON compliant"),
    ],
)
def test_incomplete_results_are_refused_and_the_old_file_is_kept(results, tmp_path, spoil, message):
    path = tmp_path / "results.json"
    path.write_text("old")
    spoil(results)
    with pytest.raises(ValueError, match=message):
        write_results_json(path, results)
    assert path.read_text() == "old"


# --- differences of words --------------------------------------------------------------------------------------------


def marked(pieces: html.Pieces) -> list[str]:
    return [text for text, only_here in pieces if only_here]


def test_words_in_only_one_text_are_marked():
    left, right = html.word_differences(
        "Denies fever. Metoprolol 50 mg twice daily.", "denies fever, metoprolol 25 mg twice daily"
    )
    assert (marked(left), marked(right)) == (["50"], ["25"])


def test_a_mark_ends_before_the_space():
    left, _ = html.word_differences("one two\nthree four", "one four")
    assert left == [("one", False), (" ", False), ("two\nthree", True), (" ", False), ("four", False), ("", False)]


@given(st.text(), st.text())
def test_marking_changes_no_character(left, right):
    pieces = html.word_differences(left, right)
    assert ["".join(text for text, _ in side) for side in pieces] == [left.strip(), right.strip()]


@pytest.mark.parametrize("words", [1_000, 20_000])
def test_texts_designed_to_be_slow_are_compared_in_bounded_time(words):
    start = time.perf_counter()
    html.word_differences("a b " * (words // 2), "b a " * (words // 2))
    html.word_differences(" " * 1_000_000, "x" * 1_000_000)
    assert time.perf_counter() - start < 2


# --- files -----------------------------------------------------------------------------------------------------------


def make_run(n: int, words: int = 600, seed: int = 0) -> tuple[list[dict], list[dict], list[dict]]:
    """Return predictions, judgements and rows of n dialogues of `words` words; every tenth note is unreadable."""
    rng = random.Random(seed)
    vocabulary = [a + b for a, b in itertools.product(("ca", "dor", "fe", "lum", "ne", "pre", "sta", "vi"), repeat=2)]
    predictions, judgements, rows = [], [], []
    for index in range(n):
        text = rng.choices(vocabulary, k=words)
        turns = [
            ("Doctor: ", "Patient: ")[k % 2] + " ".join(text[20 * k : 20 * k + 20]) + "." for k in range(words // 20)
        ]
        note = {key: " ".join(text[50 * k : 50 * k + 50]) for k, key in enumerate(SECTIONS)}
        rows.append({"dialogue": "\n".join(turns), **note})
        valid = index % 10 != 9
        written = {key: " ".join(w if rng.random() < 0.7 else "xeno" for w in note[key].split()) for key in SECTIONS}
        predictions.append(
            {
                "index": index,
                "dialogue_hash": "0" * 12,
                "raw": json.dumps(written)[: None if valid else 100],
                "finish_reason": "stop" if valid else "length",
                "status": "ok" if valid else "invalid",
                "reason": None if valid else "JSON is cut off",
                **(written if valid else dict.fromkeys(SECTIONS)),
                "prompt_tokens": 900,
                "output_tokens": 300,
            }
        )
        for k, key in enumerate(SECTIONS):
            verdict = ("pass", "fail", "unscored")[(index + k) % 3] if valid else "fail"
            judgements.append(
                {
                    "index": index,
                    "section": key,
                    "verdict": verdict,
                    "reason": f"Reason number {index}.",
                    "raw": None,
                    "source": "judge" if valid else "code",
                    "attempts": 1,
                    "control": None,
                    "attack": None,
                }
            )
    return predictions, judgements, rows


def test_the_figures_from_scoring_can_be_shown(results, tmp_path):
    predictions, judgements, rows = make_run(60, words=200)
    for index, key in itertools.product(range(12), SECTIONS):
        record = {**judgements[0], "index": index, "section": key}
        for kind, expected, right in (("reworded", "pass", True), ("changed_number", "fail", key != "P")):
            verdict = expected if right else "pass"
            judgements.append({**record, "verdict": verdict, "control": {"kind": kind, "expected": expected}})
        judgements.append({**record, "verdict": "fail" if index else "pass", "attack": "fake_verdict"})
        judgements.append({**record, "verdict": "fail", "attack": "none"})
    labels = [{"index": index, "section": "S", "verdict": ("pass", "fail")[index % 2]} for index in range(8)]
    results |= score_run(predictions, judgements, rows, labels)
    results |= {"dataset_hash": "d", "prompts_hash": "p", "judge_hash": "j"}
    text = console_table(results)
    assert "bad ones in P (12 good and 12 bad controls)" in text
    assert "4 of 48 wrong texts that failed alone passed with an attack: 8.3%" in text
    run = {"name": "a", "results": results, "predictions": predictions, "judgements": judgements}
    comparison = compare_runs([run, {**run, "name": "b"}])
    assert cells(comparison_table(comparison, [run, run]), "S")[1:] == ["**30.0%**", "**30.0%**"]
    write_results_json(tmp_path / "results.json", results)
    html.write_report(tmp_path / "report.html", results, html.select_dialogues(predictions, judgements, rows))
    html.write_comparison(tmp_path / "comparison.html", comparison, [run, run])


def test_a_kind_of_control_without_a_readable_verdict_has_no_rate(results, tmp_path):
    for entry in results["judge_controls"]["S"]["by_kind"].values():
        entry |= {"right": 0, "unscored": entry["n"], "rate": None, "ci95": None}
    html.write_report(tmp_path / "report.html", results, [])
    unread = results["judge_controls"]["S"]["by_kind"]["reworded"]["n"]
    assert f"0 of 0, {unread} unreadable" in (tmp_path / "report.html").read_text()


def test_a_report_of_too_many_dialogues_shows_the_first_and_says_so(results, tmp_path):
    predictions, judgements, rows = make_run(10, words=200)
    view = html.select_dialogues(predictions[::-1], judgements[::-1], rows, most=3)
    assert [entry["index"] for entry in view] == [0, 1, 2]
    html.write_report(tmp_path / "report.html", results, view)
    page = (tmp_path / "report.html").read_text()
    assert "The first 3 of 250 dialogues" in page and "All notes" not in page
    html.write_report(tmp_path / "report.html", results | {"n": 3}, view)
    assert "All notes" in (tmp_path / "report.html").read_text()


def test_the_dialogues_of_a_report_have_no_verdicts_on_controls_or_attacks():
    predictions, judgements, rows = make_run(10, words=200)
    extra = [
        {**judgements[0], "verdict": "unscored", "control": {"kind": "reworded", "expected": "pass"}},
        {**judgements[0], "verdict": "unscored", "attack": "fake_verdict"},
    ]
    view = html.select_dialogues(predictions, judgements + extra, rows)
    assert len(view) == 10
    assert view[0]["judgements"]["S"] == {"verdict": "pass", "reason": "Reason number 0.", "source": "judge"}
    assert view[0]["prediction"] == {key: predictions[0][key] for key in SECTIONS}
    assert view[9]["prediction"] is None
    assert view[9]["judgements"]["P"]["source"] == "code"


# --- the page in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        if os.environ.get("CI"):
            pytest.fail("no chromium on this machine; CI installs Debian's package `chromium`")
        pytest.skip("no chromium on this machine (Debian's package: chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--disable-gpu", "--disable-quic", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Open a report from disk; fail if it logs, throws or requests anything from the network."""
    contexts, complaints, requests = [], [], []

    def open_page(path: Path, width: int = 1280, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        return page

    open_page.complaints, open_page.requests = complaints, requests
    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(tmp_path.as_uri())] == []


@pytest.fixture
def small_report(results, tmp_path) -> Path:
    html.write_report(tmp_path / "report.html", results, html.select_dialogues(*make_run(10, words=200)))
    return tmp_path / "report.html"


@pytest.fixture
def hostile_report(results, tmp_path) -> Path:
    """Write a report whose every text is hostile, from the model's name to the judge's reasons."""
    predictions, judgements, rows = make_run(len(HOSTILE), words=200)
    for row, prediction, text in zip(rows, predictions, HOSTILE, strict=True):
        row.update(dict.fromkeys(row, text))
        prediction.update(raw=text, reason=prediction["reason"] and text)
        if prediction["status"] == "ok":
            prediction.update({key: f"{text} {key}" for key in SECTIONS})
    for record in judgements:
        record["reason"] = HOSTILE[record["index"]]
    for key in ("model", "lora_path", "judge_model", "dataset", "split"):
        results[key] = "".join(HOSTILE)
    results["versions"] = {HOSTILE[0]: HOSTILE[1]}
    results["attacks"] = {**attacks(), "by_kind": {text: attacks() for text in HOSTILE}}
    html.write_report(tmp_path / "hostile.html", results, html.select_dialogues(predictions, judgements, rows))
    return tmp_path / "hostile.html"


def shown(page) -> tuple[int, int]:
    """Return the numbers of visible dialogues and sections."""
    count = "selector => Array.from(document.querySelectorAll(selector)).filter(e => e.checkVisibility()).length"
    return page.evaluate(count, "article"), page.evaluate(count, "article .section")


def test_filters_keep_the_sections_that_match_both(open_page, small_report):
    page = open_page(small_report)
    assert shown(page) == (10, 40)
    page.get_by_role("radio", name="Objective").check()
    assert shown(page) == (10, 10)
    page.get_by_role("radio", name="fail").check()
    assert shown(page) == (4, 4)  # O of dialogues 0, 3 and 6, and of 9, which is unreadable
    assert page.get_by_role("status").inner_text() == "4 of 10 dialogues, 4 sections shown"
    page.get_by_role("radio", name="all").first.check()
    assert shown(page) == (10, 16)
    page.get_by_role("button", name="Reset").click()
    page.get_by_role("status").get_by_text("10 of 10 dialogues, 40 sections shown").wait_for()
    assert shown(page) == (10, 40)


def test_search_finds_words_in_dialogues_notes_and_reasons(open_page, results, tmp_path):
    predictions, judgements, rows = make_run(10, words=200)
    rows[2]["dialogue"] += "\nPatient: Since Tuesday my ANKLE hurts."
    predictions[4]["P"] += " Ménière"
    judgements[4 * 6]["reason"] = "The ankle is missing."
    html.write_report(tmp_path / "report.html", results, html.select_dialogues(predictions, judgements, rows))
    page = open_page(tmp_path / "report.html")
    search = page.get_by_role("searchbox", name="Search")
    for text, dialogues in (("ankle", 2), ("tuesday ankle", 1), ("meniere", 1), ("ankle meniere", 0), ("", 10)):
        search.fill(text)
        assert shown(page)[0] == dialogues, text
    search.fill("Prediction")  # a label of the page, not part of the data
    assert shown(page)[0] == 0


def test_filters_work_with_the_keyboard_alone(open_page, small_report):
    page = open_page(small_report)
    page.get_by_role("radio", name="all").nth(1).focus()
    page.keyboard.press("ArrowRight")
    assert shown(page) == (9, 12)
    page.keyboard.press("Tab")
    page.keyboard.type("number 8")
    page.keyboard.press("Enter")  # does not submit the form
    assert shown(page) == (1, 1)


def test_injected_scripts_are_shown_as_text_and_do_not_run(open_page, hostile_report):
    page = open_page(hostile_report)
    for details in page.locator("details").all():
        details.evaluate("element => element.open = true")
    assert page.evaluate("window.injected") is None
    assert page.locator("script").count() == 1
    assert page.locator("article :is(img, svg, style, iframe, base, meta, form)").count() == 0
    for text in HOSTILE[:6]:
        assert page.locator("article .text", has_text=text).count() >= 4, text
    body = page.locator("body").inner_text()
    assert "{{ 7 * 7 }} {% raw %} ${7 * 7}" in body
    assert "NUL ␀, escape ␛[31m, half a pair ?, reordered \ufffd50 mg" in body
    assert shown(page) == (len(HOSTILE), 4 * len(HOSTILE))


def test_a_script_added_to_the_page_does_not_run(open_page, small_report):
    page = open_page(small_report)
    blocked = page.evaluate(
        """async () => {
            const blocked = [];
            document.addEventListener("securitypolicyviolation", (event) => blocked.push(event.effectiveDirective));
            const script = document.createElement("script");
            script.textContent = "window.injected = 1";
            const image = document.createElement("img");
            image.src = "http://127.0.0.1:1/x.png";
            document.body.append(script, image);
            await fetch("http://127.0.0.1:1/").catch(() => {});
            await new Promise((resolve) => setTimeout(resolve, 100));
            return blocked;
        }"""
    )
    assert {"script-src-elem", "img-src", "connect-src"} <= set(blocked)
    assert page.evaluate("window.injected") is None
    assert all("Content Security Policy" in complaint for complaint in open_page.complaints[:3])
    assert open_page.requests[1:] in ([], ["http://127.0.0.1:1/x.png"])  # the blocked image
    open_page.complaints.clear()
    open_page.requests.clear()


@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_the_screen(
    open_page, small_report, hostile_report, comparison, results, width, tmp_path
):
    html.write_comparison(tmp_path / "comparison.html", comparison, runs_of(comparison, results))
    for path in (small_report, hostile_report, tmp_path / "comparison.html"):
        page = open_page(path, width)
        for details in page.locator("details").all():
            details.evaluate("element => element.open = true")
        assert page.evaluate("document.documentElement.scrollWidth") == width, path.name


def test_250_dialogues_open_in_under_two_seconds(open_page, results, tmp_path):
    html.write_report(tmp_path / "report.html", results, html.select_dialogues(*make_run(250)))
    seconds = []
    for _ in range(2):  # the first start may wait for a busy disk
        page = open_page(tmp_path / "report.html")
        page.get_by_role("status").get_by_text("250 of 250").wait_for()
        timing = "Math.max(...performance.getEntries().map(entry => entry.loadEventEnd || entry.startTime)) / 1000"
        seconds.append(page.evaluate(timing))
    assert min(seconds) < 2
    milliseconds = page.evaluate(
        """() => {
            const start = performance.now();
            document.querySelector("[name=query]").value = "number 24";
            document.getElementById("filters").dispatchEvent(new Event("input"));
            document.body.offsetHeight;
            return performance.now() - start;
        }"""
    )
    assert shown(page)[0] == 13  # 24, 124, 224, 240 to 249
    assert milliseconds < 1000


def test_print_shows_the_notes_without_filters_on_white(open_page, small_report):
    page = open_page(small_report, color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 24)"
    page.get_by_role("radio", name="Plan").check()
    page.emulate_media(media="print")
    assert not page.locator("fieldset, nav, button, input").filter(visible=True).all()
    assert page.get_by_role("status").inner_text() == "10 of 10 dialogues, 10 sections shown"
    assert page.evaluate("getComputedStyle(document.querySelector('article')).contentVisibility") == "visible"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(29, 28, 26)"


def test_every_note_can_be_read_without_javascript(open_page, small_report):
    page = open_page(small_report, java_script_enabled=False)
    assert page.locator("article .section:visible").count() == 40
    assert not page.locator("form").is_visible()


def test_the_report_shows_table_chart_and_checks_of_the_judge(open_page, results, tmp_path):
    results["attacks"] = attacks()
    results["human_labels"] = {key: by_people(0.9, 0.8, 0.6) for key in SECTIONS}
    results["human_labels_all"] = all_labels()
    html.write_report(tmp_path / "report.html", results, html.select_dialogues(*make_run(2, words=200)))
    page = open_page(tmp_path / "report.html")
    assert page.get_by_role("heading", level=1).inner_text() == "Qwen3-1.7B + Qwen3-1.7B-LoRA"
    table = page.get_by_role("region", name="Results for each section").inner_text()
    assert re.search(r"S Subjective\s+64\.4%\s+58\.4–70\.4%\s+4\s+64\.4–66\.0%\s+0\.412", table)
    chart = "S: 64.4%, 95% interval 58.4–70.4%; by people 60.0%, 45.0–75.0%"
    assert page.get_by_role("img", name=chart).is_visible()
    assert "by people’s verdicts 60.0% (50.0–70.0%)" in page.locator("header").first.inner_text()
    text = page.locator("main").inner_text()
    for words in (
        "Sensitivity",
        "turned negation",
        "4 of 20 wrong texts that failed alone passed with an attack: 20.0%",
        "Cohen's kappa 0.74",
        "Judge and people agree on S 86.0%",
    ):
        assert words in text
    assert page.get_by_text("Not for clinical use.").count() == 2
    assert page.locator(".alarm").count() == 0


def test_the_report_warns_of_an_unproven_judge(open_page, results_of_an_unproven_judge, tmp_path):
    html.write_report(tmp_path / "report.html", results_of_an_unproven_judge, [])
    page = open_page(tmp_path / "report.html")
    assert page.locator(".alarm:visible").count() == 2
    assert "It could not be shown that the judge" in page.locator("header .alarm").inner_text()
    for name in ("Results for each section", "The judge on sections with known answers"):
        assert page.get_by_role("region", name=name).get_by_text("judge unproven").count() == 2
    assert page.get_by_role("img", name="by people").count() == 0


def test_an_unchecked_judge_and_an_empty_run_have_a_report(open_page, results, tmp_path):
    results |= {"judge_controls": None, "n": 0, "valid_notes": 0}
    html.write_report(tmp_path / "report.html", results, [])
    page = open_page(tmp_path / "report.html")
    assert page.get_by_text("The judge was not checked in this run").is_visible()
    assert page.get_by_role("status").inner_text() == "0 of 0 dialogues, 0 sections shown"


def test_the_comparison_page_shows_rates_differences_and_flips(open_page, comparison, results, tmp_path):
    comparison["pairs"][0]["sections"]["A"] |= {"n": 0, "difference": None, "ci95": None, "p": None}
    html.write_comparison(tmp_path / "comparison.html", comparison, runs_of(comparison, results))
    page = open_page(tmp_path / "comparison.html")
    rates = page.get_by_role("region", name="Pass rates of all runs")
    assert rates.locator("b").all_inner_texts() == ["73.6%", "72.4%", "69.2%", "70.8%", "70.8%", "71.5%"]
    unjudged = page.get_by_role("region", name="Readable notes and ROUGE-L of all runs").inner_text()
    assert "247 of 250" in unjudged and "ROUGE-L, P" in unjudged
    pairs = page.get_by_role("region", name="Finetuned against Qwen3-1.7B").inner_text()
    assert re.search(r"O Objective\s+\+22\.6\s+\+14\.6 to \+30\.6\s+< 0\.001\s+43\s+12\s+1", pairs)
    assert page.get_by_role("img", name="points").count() == 11
    page.locator("summary").first.click()
    assert page.get_by_text("S, fail to pass (2): dialogues 3, 17").first.is_visible()


# --- style -----------------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Return the relative luminance of #rrggbb by WCAG 2.2."""
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_has_the_contrast_that_wcag_requires(theme):
    css = (Path(html.__file__).parent / "templates" / "report.css").read_text()
    blocks = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)
    ]
    assert len(blocks) == 2
    colour = blocks[theme]
    pairs = [*itertools.product(("ink", "soft", "accent"), ("paper", "card")), ("fail", "paper")]
    pairs += [("ink", tint) for tint in ("mark", "none-tint", "fail-tint")]
    pairs += [(verdict, f"{verdict}-tint") for verdict in ("pass", "fail", "none")]
    for text, ground in pairs:
        light, dark = sorted((luminance(colour[text]), luminance(colour[ground])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)
