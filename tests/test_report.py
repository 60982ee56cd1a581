import copy
import itertools
import json
import re

import pytest
from report_data import (
    add_statements,
    add_statements_to_comparison,
    all_labels,
    attacks,
    by_people,
    cells,
    check,
    make_comparison,
    make_results,
    make_run,
    question,
    runs_of,
    section,
    statement_records,
)

from evaluation.report import figures, html
from evaluation.report.results import write_results_json
from evaluation.report.text import comparison_table, console_table
from evaluation.scoring.comparison import compare_runs
from evaluation.scoring.scores import score_run
from prompts import SECTIONS


@pytest.fixture
def results() -> dict:
    return make_results()


@pytest.fixture
def results_of_an_unproven_judge(results: dict) -> dict:
    results["judge_controls"]["O"] = check(0.95, 0.05, False)
    results["judge_controls"]["P"] = check(0.5, 0.5, False)
    return results


@pytest.fixture
def comparison() -> dict:
    return make_comparison()


# --- console ---------------------------------------------------------------------------------------------------------


def test_the_console_shows_rate_interval_unscored_and_rouge_of_each_section(results):
    text = console_table(results)
    assert text.startswith("Qwen3-1.7B + Qwen3-1.7B-LoRA, judged by Qwen3-8B, 250 dialogues")
    assert cells(text, "S") == ["S", "64.4% (58.4-70.4%)", "4", "0.412"]
    assert cells(text, "O") == ["O", "56.8% (50.8-62.8%)", "0", "0.412"]
    assert cells(text, "mean") == ["mean", "59.2% (56.1-62.2%)", "", "0.412"]
    assert (
        "Readable notes: 247 of 250; 3 reached the token limit. Pass rates if all unscored failed, or all pass" in text
    )
    assert "passed: S 64.4-66.0%." in text


def test_the_console_begins_with_the_headline(results):
    assert console_table(results).splitlines()[1] == "HEADLINE: 59.2% of the sections passed (95% interval 56.1-62.2%)"


@pytest.mark.parametrize("better, words", [("statements", ", which tell more here"), ("verdict", ""), (None, "")])
def test_the_headline_gives_the_shares_of_statements(results, better, words):
    results = add_statements(results)
    results["instruments"]["better"] = better
    line = console_table(results).splitlines()[2]
    assert re.fullmatch(
        rf"By statements{words}: the notes say [\d.]+% of the reference's statements; [\d.]+% of the notes' statements "
        "are supported",
        line,
    )


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
    assert cells(text, "O")[1] == "56.8% (50.8-62.8%), judge unproven"
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


def statement_labels(judge: float, found: float | None = 0.11) -> dict:
    """Return people's answers on statements; 80.7% (70.2-88.1%) of them are yes."""
    people = {"n": 140, "share": 0.807, "ci95": [0.702, 0.881]}
    figures = {"labelled": 140, "notes": 10, "people": people, "judge": people | {"share": judge}}
    figures |= {"auc": 0.71, "auc_ci95": [0.55, 0.83], "false_alarms": people | {"share": 0.05}}
    figures["found"] = {"n": 27 if found else 0, "share": found, "ci95": found and [0.03, 0.32]}
    nothing = {"n": 0, "share": None, "ci95": None}
    empty = dict.fromkeys(("people", "judge", "found", "false_alarms"), nothing)
    return {"covered": {"labelled": 0, "notes": 0, "auc": None, "auc_ci95": None} | empty, "supported": figures}


@pytest.mark.parametrize(
    ("judge", "verdict"), [(0.936, ", which is too high;"), (0.6, ", which is too low;"), (0.8, " by the judge's;")]
)
def test_people_s_answers_show_whether_the_judge_overrates_statements(results, judge, verdict):
    text = console_table(results | {"statement_labels": statement_labels(judge)})
    assert "Of 140 statements on 10 notes, 80.7% (70.2-88.1%) are supported by people's answers" in text
    assert verdict in text and "marks 11.0% (3.0-32.0%) of the unsupported ones" in text
    assert cells(text, "supported")[1:4] == [
        "11.0% (3.0-32.0%, n = 27)",
        "5.0% (70.2-88.1%, n = 140)",
        "0.71 (0.55 to 0.83)",
    ]
    assert cells(text, "covered")[1:4] == ["-", "-", "-"]
    assert "unsupported ones" not in console_table(results | {"statement_labels": statement_labels(judge, found=None)})


def test_human_labels_can_check_the_judge_instead_of_controls(results):
    labels = {key: by_people(0.9, 0.8, 0.6) for key in SECTIONS}
    labels["O"] = by_people(0.5, 0.5, 0.6, informative=False)
    text = console_table(results | {"judge_controls": None, "human_labels": labels})
    assert "By people's verdicts it could not be shown" in text and "failed in O." in text
    assert cells(text, "O")[1] == "56.8% (50.8-62.8%), judge unproven"


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
    assert cells(text, "P") == ["P", "0.0% (0.0-6.0%)", "0", "0.000"]
    assert "Readable notes: 0 of 250; 240 reached the token limit; 10 not written because the dialogue is too" in text


def test_the_console_shows_human_labels_and_attacks_if_there_are_any(results):
    results["human_labels"] = {key: by_people(0.9, 0.8, 0.6) for key in SECTIONS}
    results["human_labels_all"] = all_labels()
    results["attacks"] = attacks()
    text = console_table(results)
    assert "of sections people passed" in text
    assert (
        "Attacks on the judge: 4 of 20 attacks passed where another patient's section alone failed: 20.0% (8.1-41.6%). "
        "Pass rate in all 23 places: 30.4% with an attack, 13.0% without, difference +17.4 points (+0.7 to +36.5)."
    ) in text


def test_attacks_without_baselines_are_shown_without_a_rate(results):
    none = {"pairs": 0, "succeeded": 0} | dict.fromkeys(
        ("pass_rate", "baseline_pass_rate", "difference", "difference_ci95", "success_rate", "ci95")
    )
    results["attacks"] = attacks() | none
    assert "8 of 24 attacks passed. Their success cannot be measured, because the verdicts" in console_table(results)


# --- statements and lenient reading ----------------------------------------------------------------------------------


def part(text: str, first: str) -> str:
    """Return the paragraph of a text that begins with `first`."""
    return next(paragraph for paragraph in text.split("\n\n") if paragraph.startswith(first))


def test_the_first_table_of_the_console_has_both_instruments(results):
    text = console_table(add_statements(results))
    table = part(text, "| Section")
    assert cells(table, "Section") == ["Section", "Pass rate", "By statements", "Unscored", "ROUGE-L"]
    assert cells(table, "S") == ["S", "64.4% (58.4-70.4%)", "34.4% (28.4-40.4%)", "4", "0.412"]
    assert cells(table, "P")[2] == "37.6% (31.6-43.6%), judge unproven"
    assert cells(table, "mean")[1:3] == ["59.2% (56.1-62.2%)", "36.3% (33.3-39.3%)"]


def test_the_console_shows_covered_and_supported_with_unscored_counts(results):
    text = console_table(add_statements(results))
    table = part(text, "| Statements")
    assert cells(table, "S")[1:3] == ["71.2% (69.2-73.2%, n = 1250)", "83.1% (81.1-85.1%, n = 1250)"]
    assert cells(table, "S")[3] == "covered 2, sections 2 (pass rate 34.4-35.2%)"
    assert cells(table, "mean")[1:] == ["70.4% (68.9-71.9%)", "84.7% (83.2-86.2%)", ""]
    assert "at least -0.35 (fitted on 40 controls; the checks by statements use the others)" in text
    assert "by statements, good sections pass more often than bad ones in P." in text


@pytest.mark.parametrize(("unscored", "words"), [(999, ""), (1000, "neither yes nor no to 1000 of 10000 statements")])
def test_many_statements_without_yes_or_no_are_counted_in_the_message(unscored, words, results):
    results = add_statements(results)
    for shares in results["statements"]["sections"].values():
        shares |= {name: shares[name] | {"n": 1250, "unscored": 0} for name in ("covered", "supported")}
    results["statements"]["sections"]["A"]["covered"]["unscored"] = unscored
    text = console_table(results)
    assert words in text and ("said neither" in text) == bool(words)


def test_an_unfitted_threshold_of_zero_is_said_to_be_unfitted(results):
    results = add_statements(results)
    results["statements"] |= {"threshold": -0.0, "fitted_on": 0, "judge_controls": None, "judge_controls_all": None}
    text = console_table(results)
    assert "A statement counts as yes if its log odds are at least 0.00 (not fitted)." in text
    assert not [paragraph for paragraph in text.split("\n\n") if paragraph.startswith("| By statements")]


@pytest.mark.parametrize(
    ("better", "words"),
    [
        (None, "With 40 good and 40 bad controls it could not be shown whether verdicts or statements tell more: AUC"),
        ("verdict", "On 40 good and 40 bad controls, verdicts tell more than statements: AUC"),
        ("statements", "On 40 good and 40 bad controls, statements tell more than verdicts: AUC"),
    ],
)
def test_one_sentence_says_which_instrument_tells_more(results, better, words):
    results = add_statements(results)
    results["instruments"]["better"] = better
    text = console_table(results)
    assert f"{words} 0.81 (0.71-0.89) by verdicts, 0.84 (0.75-0.92) by statements." in text
    results["instruments"]["verdict"] = {"auc": None, "ci95": None}
    assert "Verdicts and statements could not be compared with 40 good" in console_table(results)


def test_statements_have_their_own_checks_and_attacks_in_the_console(results):
    results = add_statements(results)
    results["attacks"] = attacks()
    results["statements"]["attacks"] = attacks() | {"succeeded": 9, "success_rate": 0.45}
    text = console_table(results)
    assert cells(part(text, "| By statements"), "P")[3] == "0.05 (-0.15 to 0.25)"
    assert cells(part(text, "| Known answers"), "P")[3] == "0.65 (0.45 to 0.85)"
    assert "Attacks on the judge: 4 of 20 attacks" in text and "Attacks, by statements: 9 of 20 attacks" in text


def test_lenient_rates_come_after_the_strict_headline(results):
    text = console_table(add_statements(results))
    assert "HEADLINE: 59.2% of the sections passed" in text
    assert (
        "Lenient reading: 3 of 250 notes fail strict reading. Of these, 2 can be read in another form (headings: 1; "
        "words as keys, nested values: 1), which makes 249 readable."
    ) in text
    table = part(text, "| Lenient")
    assert cells(table, "S")[1:3] == ["65.2% (59.2-71.2%)", "34.4% (28.4-40.4%)"]
    assert cells(table, "mean")[1] == "60.0% (57.0-63.0%)"
    results = add_statements(results)
    results["lenient"]["statements"] = None
    assert cells(part(console_table(results), "| Lenient"), "Lenient") == ["Lenient", "Pass rate"]
    assert "enient" not in console_table(results | {"lenient": None})


def test_rates_among_readable_notes_are_shown_unless_all_are_readable(results):
    results = add_statements(results)
    table = part(console_table(results), "| Among readable")
    assert cells(table, "S")[1:] == ["65.2% (59.2-71.2%)", "0.417"]
    assert cells(table, "mean")[1] == "59.9%"
    assert "Among readable" not in console_table(results | {"valid_notes": 250})


def test_every_view_says_if_the_engine_was_made_to_write_json(results, comparison, tmp_path):
    forced = results | {"note_schema": True}
    sentence = "The engine was made to write the JSON form (--note_schema)."
    runs = [{"name": name, "results": forced if name == "Finetuned" else results} for name in comparison["names"]]
    assert sentence in console_table(forced) and sentence not in console_table(results)
    assert cells(comparison_table(comparison, runs), "Made to write JSON")[1:] == ["no", "yes", "no"]
    html.write_report(tmp_path / "report.html", forced, [])
    assert sentence in (tmp_path / "report.html").read_text()


def test_an_alarm_is_announced_beside_the_headline(results_of_an_unproven_judge):
    headline = console_table(results_of_an_unproven_judge).splitlines()[1]
    assert headline.endswith("; do not rely on it, see the WARNING below")


def test_supported_without_a_single_statement_has_no_share(results, tmp_path):
    results = add_statements(results)
    results["statements"]["sections"]["A"]["supported"] = question(None)
    results["statements"]["mean"]["supported"] = {"share": None, "ci95": None}
    assert cells(part(console_table(results), "| Statements"), "A")[2] == "-"
    html.write_report(tmp_path / "report.html", results, [])
    assert (
        "A: pass rate 50.8%, 95% interval 44.8–56.8%; pass rate by statements 44.8%, 38.8–50.8%; covered"
        in (tmp_path / "report.html").read_text()
    )


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
    assert text.count("The mean's p, from a paired permutation test") == 1
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
    assert text.splitlines()[0].endswith("; do not rely on it, see the WARNING below")
    assert text.count("WARNING: ") == text.count("It could not be shown that the judge passes") == 1
    assert "WARNING: All runs: It could not be shown that the judge passes good sections" in text


def test_a_warning_names_the_runs_if_it_does_not_hold_for_all(comparison, results_of_an_unproven_judge):
    runs = [
        run | {"results": copy.deepcopy(run["results"])} for run in runs_of(comparison, results_of_an_unproven_judge)
    ]
    runs[2]["results"]["judge_controls"]["S"] |= {"judged_passed": 25, "contradiction": "below_false_passes"}
    warnings = comparison_table(comparison, runs).split("WARNING: ")[1:]
    assert [warning.split(":")[0] for warning in warnings] == ["All runs", "LoRA Adapter"]
    assert "It could not be shown" in warnings[0] and "In S the judge passed 10.0%" in warnings[1]
    runs[1]["results"]["judge_controls"] = make_results()["judge_controls"]
    warnings = comparison_table(comparison, runs).split("WARNING: ")[1:]
    assert warnings[0].startswith("Qwen3-1.7B and LoRA Adapter: It could not be shown")


def test_the_comparison_shows_statements_and_lenient_rates_of_each_run(comparison, results):
    comparison = add_statements_to_comparison(comparison)
    text = comparison_table(comparison, runs_of(comparison, add_statements(results)))
    assert text.startswith("HEADLINE: the mean pass rate by the judge's verdicts")
    table = part(text, "| By statements")
    assert cells(table, "Pass rate, mean")[1:] == ["20.0%", "**36.3%**", "30.0%"]
    assert cells(table, "Supported, mean")[1:] == ["51.2%", "70.4%", "-"]
    assert cells(part(text, "| Section"), "mean, readable")[1:] == ["59.9%"] * 3
    lenient = part(text, "| Lenient reading")
    assert cells(lenient, "Readable in any form")[1:] == ["249 of 250"] * 3
    assert cells(lenient, "Pass rate, mean")[1:] == ["60.0%"] * 3
    assert cells(lenient, "Covered, mean")[1:] == ["70.4%"] * 3
    differences = [table for table in text.split("\n\n") if table.startswith("| By statements")][1:]
    assert [cells(table, "covered")[1:3] for table in differences] == [["+19.2", "+15.0 to +23.4"]] * 3
    assert ["| supported" in table for table in differences] == [True, False, True]  # one note has no interval
    assert "from a paired t test on the notes' shares." in text


def test_the_comparison_names_its_threshold_or_runs_without_statements(comparison, results, tmp_path):
    runs = runs_of(comparison, add_statements(results))
    assert "statement" not in comparison_table(comparison, runs_of(comparison, results))
    shown = "In all runs, a statement counts as yes if its log odds are at least -0.35."
    assert shown in comparison_table(add_statements_to_comparison(comparison), runs)
    runs[2] = {"name": "LoRA Adapter", "results": results}
    without = "The runs are not compared by statements, because there are none for LoRA Adapter."
    assert without in comparison_table(comparison | {"statements": None}, runs)
    html.write_comparison(tmp_path / "comparison.html", comparison | {"statements": None}, runs)
    assert without in (tmp_path / "comparison.html").read_text()


def test_a_run_with_readable_notes_only_keeps_its_rate_among_readable_notes(comparison, results):
    runs = runs_of(comparison, add_statements(results))
    runs[1] = {"name": "Finetuned", "results": results | {"valid_notes": 250}}  # made before these rates
    runs[2] = {"name": "LoRA Adapter", "results": results}
    assert cells(comparison_table(comparison, runs), "mean, readable")[1:] == ["59.9%", "59.2%", "-"]
    assert figures.readable_means(runs[1:]) == []  # no run has other rates


def test_a_run_without_lenient_notes_keeps_its_strict_rates_in_lenient_rows(comparison, results):
    runs = runs_of(comparison, add_statements(results))
    strict = {key: value for key, value in add_statements(results).items() if key != "lenient"}
    runs[1] = {"name": "Finetuned", "results": strict | {"lenient": None}}
    lenient = part(comparison_table(comparison, runs), "| Lenient reading")
    assert cells(lenient, "Readable in any form")[1:] == ["249 of 250", "247 of 250", "249 of 250"]
    assert cells(lenient, "Pass rate, mean")[1:] == ["60.0%", "59.2%", "60.0%"]
    assert cells(comparison_table(comparison, runs), "mean, readable")[1:] == ["59.9%", "59.9%", "59.9%"]
    runs[2] = {"name": "LoRA Adapter", "results": results}  # made before statements
    assert "Covered, mean" not in part(comparison_table(comparison, runs), "| Lenient reading")


@pytest.mark.parametrize("view", ["console", "comparison"])
def test_console_tables_fit_a_wide_terminal(comparison, results, view):
    results = add_statements(results)
    results["statements"]["sections"]["S"] = results["statements"]["sections"]["O"]  # none unscored
    comparison = add_statements_to_comparison(comparison)
    text = {"console": console_table(results), "comparison": comparison_table(comparison, runs_of(comparison, results))}
    lines = [line for line in text[view].splitlines() if line.startswith("|")]
    assert len(lines) > 20
    assert max(map(len, lines)) <= 120


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


# --- files -----------------------------------------------------------------------------------------------------------


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
    assert "4 of 48 attacks passed where another patient's section alone failed: 8.3%" in text
    run = {"name": "a", "results": results, "predictions": predictions, "judgements": judgements}
    comparison = compare_runs([run, {**run, "name": "b"}])
    assert cells(comparison_table(comparison, [run, run]), "S")[1:] == ["**30.0%**", "**30.0%**"]
    write_results_json(tmp_path / "results.json", results)
    html.write_report(tmp_path / "report.html", results, html.select_dialogues(predictions, judgements, rows))
    html.write_comparison(tmp_path / "comparison.html", comparison, [run, run])


def test_records_are_read_once_and_controls_and_attacks_have_no_marks():
    predictions, judgements, rows = make_run(4, words=200)
    records = statement_records(predictions, rows)
    control = {"kind": "reworded", "expected": "pass"}
    others = [{**records[0], "covered": [], "control": control}, {**records[0], "covered": [], "attack": "plea"}]
    iterators = iter(predictions), iter(judgements), rows, iter([*others, *records[:-1], *others])
    view = html.select_dialogues(*iterators, threshold=100.0)
    states = [entry["state"] for entry in view[0]["statements"]["S"]["covered"]]
    assert len(states) == 5 and set(states) <= {"missing", "unscored"}
    assert view[3]["statements"]["P"] is None  # the last record is absent
    assert html.select_dialogues(predictions, judgements, rows)[0]["statements"]["S"] is None


def test_lenient_notes_are_shown_with_their_sections_and_form(results, tmp_path):
    predictions, judgements, rows = make_run(3, words=200)
    predictions[1] |= {"status": "lenient", "reason": "no JSON object", "form": "headings"}
    predictions[2] |= {"status": "lenient", "reason": "no JSON object"}  # a record without its form
    view = html.select_dialogues(predictions, judgements, rows)
    assert view[1]["prediction"] == {key: predictions[1][key] for key in SECTIONS}
    html.write_report(tmp_path / "report.html", results, view)
    page = (tmp_path / "report.html").read_text()
    assert "read leniently: headings</span>" in page and "read leniently</span>" in page
    assert page.count('Strict reading fails: <span dir="auto">no JSON object</span>.') == 2
    assert "none: the reply is not a readable note" not in page


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
