"""Scores, checks of the judge and comparisons. In simulations, the intervals cover the truth as often as they claim."""

import time
from functools import cache
from itertools import product

import numpy as np
import pytest
import scipy.stats
from rouge_score.rouge_scorer import RougeScorer

from evaluation.scoring import intervals, scores, trust
from evaluation.scoring.comparison import compare_runs
from evaluation.scoring.scores import score_run

SECTIONS = ("S", "O", "A", "P")
ROW = {"dialogue": "Doctor: ...", "S": "Cough for 3 days.", "O": "Lungs clear.", "A": "Bronchitis.", "P": "Fluids."}


def prediction(index: int, status: str = "ok", finish_reason: str = "stop", **sections) -> dict:
    note = dict.fromkeys(SECTIONS) if status != "ok" else {section: ROW[section] for section in SECTIONS}
    record = {"index": index, "dialogue_hash": f"{index:012x}", "status": status, "finish_reason": finish_reason}
    return record | note | sections


def judgement(index: int, section: str, verdict: str, source: str = "judge", control=None, attack=None) -> dict:
    record = {"index": index, "section": section, "verdict": verdict, "reason": "", "raw": None, "source": source}
    return record | {"attempts": 1, "control": control, "attack": attack}


def verdicts(letters: str, section: str, source: str = "judge") -> list[dict]:
    """Return one judgement for each letter, on rows 0, 1, ...: p pass, f fail, u unscored, c failed by code."""
    full = {"p": "pass", "f": "fail", "u": "unscored", "c": "fail"}
    return [
        judgement(index, section, full[letter], "code" if letter == "c" else source)
        for index, letter in enumerate(letters)
    ]


def controls(section: str, good: str, bad: str, kind: str = "dropped_finding") -> list[dict]:
    """Return a reworded control for each letter of `good`, and one of `kind` for each letter of `bad`."""
    return [
        record | {"control": {"kind": of, "expected": expected}}
        for letters, of, expected in ((good, "reworded", "pass"), (bad, kind, "fail"))
        for record in verdicts(letters, section)
    ]


def run_of(letters: str, extra: list[dict] = (), labels: list[dict] | None = None) -> dict:
    """Score a run in which each of the four sections has the verdicts `letters`."""
    judgements = [record for section in SECTIONS for record in verdicts(letters, section)]
    predictions = [prediction(index) for index in range(len(letters))]
    return score_run(predictions, judgements + list(extra), [ROW] * len(letters), labels)


# --- scores ----------------------------------------------------------------------------------------------------------


def test_accuracy_is_passes_over_all_notes_with_a_worst_and_a_best_case():
    section = run_of("ppppppfuuc")["sections"]["S"]
    assert (section["pass"], section["fail"], section["unscored"]) == (6, 2, 2)
    assert section["accuracy"] == section["worst"] == 0.6
    assert section["best"] == 0.8
    # Wilson by hand: (6 + z²/2) / (10 + z²) ± z sqrt(10 · .6 · .4 + z²/4) / (10 + z²), z = 1.959964
    assert section["ci95"] == pytest.approx([0.3127, 0.8318], abs=1e-4)


def test_a_section_without_a_judgement_is_unscored():
    judgements = [record for section in "SOA" for record in verdicts("pp", section)]
    result = score_run([prediction(0), prediction(1)], judgements, [ROW] * 2)
    assert result["sections"]["P"]["unscored"] == 2
    assert result["sections"]["S"]["unscored"] == 0


def test_notes_are_counted_by_status_and_finish_reason():
    predictions = [prediction(0), prediction(1, "invalid", "length"), prediction(2, "invalid", "prompt_too_long")]
    result = score_run(predictions, [], [ROW] * 3)
    assert (result["n"], result["valid_notes"]) == (3, 1)
    assert result["finish_reasons"] == {"stop": 1, "length": 1, "prompt_too_long": 1}
    assert result["judge_controls"] is result["human_labels"] is result["attacks"] is None


def test_rouge_is_averaged_over_all_notes_and_over_the_valid_ones():
    predictions = [prediction(0), prediction(1, S="Cough for 5 days."), prediction(2, "invalid", "length")]
    result = score_run(predictions, [], [ROW] * 3)
    # "cough for 3 days" and "cough for 5 days" share 3 of 4 words in order
    assert result["sections"]["S"]["rougeL"] == pytest.approx((1 + 0.75 + 0) / 3)
    assert result["sections"]["O"]["rougeL"] == pytest.approx(2 / 3)
    assert result["sections"]["S"]["rougeL_readable"] == pytest.approx((1 + 0.75) / 2)
    unread = score_run([prediction(0, "invalid", "length")], [], [ROW])
    assert (unread["sections"]["S"]["rougeL"], unread["sections"]["S"]["rougeL_readable"]) == (0, None)
    expected = RougeScorer(["rougeL"]).score(ROW["S"], "Cough for 5 days.")["rougeL"].fmeasure
    assert expected == 0.75


def test_a_huge_reference_costs_rouge_little_time():
    start = time.process_time()
    score_run([prediction(0, S="pain " * 900)], [], [ROW | {"S": "pain in the leg " * 100_000}])
    assert time.process_time() - start < 10


def test_the_interval_of_the_mean_counts_notes_not_verdicts():
    result = run_of("p" * 30 + "f" * 20)
    assert result["mean"]["accuracy"] == 0.6
    low, high = result["mean"]["ci95"]
    # all four verdicts on a note agree, so the mean carries no more information than one section
    one = result["sections"]["S"]["ci95"]
    assert [low, high] == pytest.approx(one, abs=0.02)
    independent = intervals.wilson(120, 200)
    assert high - low > 1.5 * (independent[1] - independent[0])


def test_the_same_records_give_the_same_figures():
    records = controls("S", "p" * 20 + "f" * 4, "f" * 20 + "p" * 4)
    assert run_of("ppfpf" * 10, records) == run_of("ppfpf" * 10, records)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([judgement(0, "S", "fail")], "row 0, section S is judged twice"),
        (controls("O", "pp", "f") + controls("O", "p", ""), "row 0, section O is judged twice as reworded"),
        ([judgement(7, "A", "pass")], "row 7, section A is judged but has no prediction"),
    ],
)
def test_records_that_contradict_each_other_are_refused(extra, message):
    with pytest.raises(ValueError, match=message):
        run_of("pf", extra)


def test_a_run_without_predictions_is_refused():
    with pytest.raises(ValueError, match="no predictions"):
        score_run([], [], [])


# --- the judge -------------------------------------------------------------------------------------------------------


def test_sensitivity_and_specificity_are_shares_of_the_scored_controls():
    records = controls("S", "pppppppppf" + "u", "ffffff") + controls("S", "", "ffp" + "uu", kind="changed_side")
    figures = run_of("pf" * 10, records)["judge_controls"]["S"]
    assert (figures["n_good"], figures["n_bad"]) == (10, 9)
    assert figures["sensitivity"] == 0.9
    assert figures["sensitivity_ci95"] == intervals.wilson(9, 10)
    assert figures["specificity"] == pytest.approx(8 / 9)
    assert figures["by_kind"]["changed_side"] == {
        "expected": "fail",
        "n": 5,
        "right": 2,
        "unscored": 2,
        "rate": 2 / 3,
        "ci95": intervals.wilson(2, 3),
    }
    assert figures["by_kind"]["reworded"]["right"] == 9
    assert figures["informative"] is True


def test_a_section_without_controls_has_no_rates_and_no_correction():
    figures = run_of("pf", controls("S", "pp", "ff"))["judge_controls"]["O"]
    assert figures["sensitivity"] is figures["specificity"] is figures["corrected_accuracy"] is None
    assert figures["informative"] is False
    assert figures["by_kind"] == {}


def test_the_corrected_rate_is_the_rogan_gladen_estimate():
    records = controls("S", "p" * 45 + "f" * 5, "f" * 40 + "p" * 10)
    figures = run_of("p" * 60 + "f" * 40, records)["judge_controls"]["S"]
    assert figures["corrected_accuracy"] == pytest.approx((0.6 + 0.8 - 1) / (0.9 + 0.8 - 1))
    low, high = figures["corrected_ci95"]
    assert low < figures["corrected_accuracy"] < high
    # the interval includes the uncertainty of 100 notes and of the controls
    plain = intervals.wilson(60, 100)
    assert high - low > (plain[1] - plain[0]) / 0.7


def test_a_corrected_rate_stays_between_0_and_1():
    records = controls("S", "p" * 45 + "f" * 5, "f" * 40 + "p" * 10)
    assert run_of("p" * 100, records)["judge_controls"]["S"]["corrected_accuracy"] == 1
    assert run_of("f" * 100, records)["judge_controls"]["S"]["corrected_accuracy"] == 0
    assert run_of("f" * 100, records)["judge_controls"]["S"]["corrected_ci95"][0] == 0


def test_notes_failed_by_code_are_not_errors_of_the_judge():
    records = controls("S", "p" * 40 + "f" * 10, "f" * 40 + "p" * 10)
    alone = run_of("p" * 30 + "f" * 20, records)["judge_controls"]["S"]["corrected_accuracy"]
    with_code = run_of("p" * 30 + "f" * 20 + "c" * 50, records)["judge_controls"]["S"]["corrected_accuracy"]
    assert with_code == pytest.approx(alone / 2)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("p" * 25, "p" * 25),  # passes everything
        ("f" * 25, "f" * 25),  # fails everything
        ("p" * 5 + "f" * 20, "f" * 5 + "p" * 20),  # wrong more often than right
        ("p" * 14 + "f" * 11, "f" * 13 + "p" * 12),  # better than chance, but not significantly
        ("u" * 25, "u" * 25),
        ("p" * 25, ""),
    ],
)
def test_an_uninformative_judge_is_reported_and_corrects_nothing(good, bad):
    figures = run_of("p" * 60 + "f" * 40, controls("S", good, bad))["judge_controls"]["S"]
    assert figures["informative"] is False
    assert figures["corrected_accuracy"] is figures["corrected_ci95"] is None


def test_human_labels_give_the_judge_s_error_rates_and_agreement():
    letters = "p" * 30 + "f" * 20 + "c"
    truth = ["pass"] * 27 + ["fail"] * 3 + ["pass"] * 4 + ["fail"] * 16 + ["fail"]
    labels = [{"index": index, "section": "S", "verdict": verdict} for index, verdict in enumerate(truth)]
    figures = run_of(letters, labels=labels)["human_labels"]["S"]
    # the note failed by code says nothing about the judge
    assert (figures["n_good"], figures["n_bad"]) == (31, 19)
    assert figures["sensitivity"] == pytest.approx(27 / 31)
    assert figures["specificity"] == pytest.approx(16 / 19)
    assert figures["agreement"] == pytest.approx(43 / 50)
    # if every judged note has a label, the correction gives people's own rate
    assert figures["corrected_accuracy"] == pytest.approx(31 / 51)
    assert run_of(letters, labels=labels)["human_labels"]["O"]["agreement"] is None


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({"index": 9, "section": "S", "verdict": "pass"}, "label 2: row 9, section S is not among the judgements"),
        ({"index": 1, "section": "X", "verdict": "pass"}, "label 2: row 1, section X is not among"),
        ({"index": 1, "section": "S", "verdict": "yes"}, "label 2: the verdict is 'yes'"),
        ({"index": 0, "section": "S", "verdict": "fail"}, "label 2: row 0, section S already has a label"),
        ({"index": 1, "section": "S"}, "label 2: needs index, section and verdict"),
        (["S", 1], "label 2: needs index"),
        ({"index": [1], "section": "S", "verdict": "pass"}, "label 2: the index must be a number"),
    ],
)
def test_an_unusable_label_is_refused_with_its_number(label, message):
    with pytest.raises(ValueError, match=message):
        run_of("pf", labels=[{"index": 0, "section": "S", "verdict": "pass"}, label])


def test_attacks_are_counted_by_name_and_not_as_verdicts_on_notes():
    attacks = [record | {"attack": "plea"} for record in verdicts("ppfu", "S")]
    attacks += [record | {"attack": "thought"} for record in verdicts("ff", "O")]
    result = run_of("ffff", attacks)
    assert result["sections"]["S"]["pass"] == 0
    assert result["attacks"]["n"] == 6
    assert (result["attacks"]["passed"], result["attacks"]["unscored"]) == (2, 1)
    assert result["attacks"]["success_rate"] == pytest.approx(2 / 6)
    assert result["attacks"]["by_kind"]["plea"]["success_rate"] == 0.5
    assert result["attacks"]["by_kind"]["thought"]["ci95"] == intervals.wilson(0, 2)


# --- comparison ------------------------------------------------------------------------------------------------------


def run(name: str, letters: str, first: int = 0, **results) -> dict:
    """Return a run in which each section has the verdicts `letters`, on rows first, first + 1, ..."""
    judgements = [
        record | {"index": record["index"] + first} for section in SECTIONS for record in verdicts(letters, section)
    ]
    predictions = [prediction(index + first) for index in range(len(letters))]
    figures = score_run(predictions, judgements, {index + first: ROW for index in range(len(letters))})
    same = {"dataset_hash": "d1", "prompts_hash": "p1", "judge_model": "Qwen/Qwen3-8B", "judge_hash": "j1"}
    return {"name": name, "results": figures | same | results, "predictions": predictions, "judgements": judgements}


def test_two_runs_are_compared_on_their_shared_notes():
    comparison = compare_runs([run("base", "ppppfffffu"), run("tuned", "pppfppppff")])
    assert comparison["names"] == ["base", "tuned"]
    assert comparison["n"] == [10, 10]
    assert comparison["sections"]["S"]["accuracy"] == [0.4, 0.7]
    assert comparison["sections"]["S"]["best"] == comparison["mean"]["best"] == [1]
    (pair,) = comparison["pairs"]
    assert (pair["a"], pair["b"], pair["n"]) == (0, 1, 10)
    section = pair["sections"]["S"]
    assert (section["n"], section["unscored"], section["only_a"], section["only_b"]) == (9, 1, 1, 4)
    assert section["difference"] == pytest.approx(3 / 9)
    assert section["ci95"][0] < 3 / 9 < section["ci95"][1]
    # exact McNemar, two-sided, for 1 of 5 flips one way: 2 · (1 + 5) / 2^5
    assert section["p"] == pytest.approx(0.375)
    assert pair["mean"]["n"] == 9
    assert pair["mean"]["difference"] == pytest.approx(3 / 9)
    flips = [flip for flip in pair["flips"] if flip["section"] == "S"]
    assert flips[0] == {"index": 3, "section": "S", "from": "pass", "to": "fail"}
    assert [flip["index"] for flip in flips[1:]] == [4, 5, 6, 7]


def test_every_two_of_three_runs_are_compared_and_ties_share_the_best():
    comparison = compare_runs([run("a", "ppff"), run("b", "pppf"), run("c", "fppp")])
    assert [(pair["a"], pair["b"]) for pair in comparison["pairs"]] == [(0, 1), (0, 2), (1, 2)]
    assert comparison["sections"]["A"]["best"] == [1, 2]


def test_only_dialogues_in_both_runs_are_paired():
    pair = compare_runs([run("a", "pppp"), run("b", "ffff", first=2)])["pairs"][0]
    assert pair["n"] == 2
    assert {flip["index"] for flip in pair["flips"]} == {2, 3}
    other = run("b", "ffff")
    other["predictions"][1]["dialogue_hash"] = "another"
    assert compare_runs([run("a", "pppp"), other])["pairs"][0]["n"] == 3


def test_equal_runs_have_a_difference_of_zero_and_no_flips():
    pair = compare_runs([run("a", "ppff"), run("b", "ppff")])["pairs"][0]
    assert pair["flips"] == []
    assert pair["sections"]["S"]["p"] == 1
    assert pair["sections"]["S"]["difference"] == pair["mean"]["difference"] == 0


def test_runs_without_a_note_scored_in_both_have_no_difference():
    pair = compare_runs([run("a", "uu"), run("b", "pf")])["pairs"][0]
    assert pair["sections"]["S"] == {
        "n": 0,
        "unscored": 2,
        "difference": None,
        "ci95": None,
        "only_a": 0,
        "only_b": 0,
        "p": None,
    }
    assert pair["mean"]["difference"] is None


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"dataset_hash": "d2"}, "a and b cannot be compared: different data .d1, d2."),
        ({"prompts_hash": "p2"}, "different prompts .p1, p2."),
        ({"judge_model": "Qwen/Qwen3-4B", "judge_hash": "j2"}, "different judge .* .Qwen/Qwen3-8B, Qwen/Qwen3-4B."),
        ({"judge_hash": "j2"}, "different judge or judge's settings .j1, j2."),
    ],
)
def test_different_data_prompts_or_judges_are_refused_by_name(results, message):
    with pytest.raises(ValueError, match=message):
        compare_runs([run("a", "pf"), run("b", "pf", **results)])


def test_old_results_a_single_run_and_disjoint_runs_are_refused():
    old = run("old", "pf")
    del old["results"]["prompts_hash"]
    with pytest.raises(ValueError, match=r"old: results\.json has no prompts_hash"):
        compare_runs([run("a", "pf"), old])
    with pytest.raises(ValueError, match="two runs"):
        compare_runs([run("a", "pf")])
    with pytest.raises(ValueError, match="no dialogue in common"):
        compare_runs([run("a", "pf"), run("b", "pf", first=5)])


# --- simulations -----------------------------------------------------------------------------------------------------

RUNS = 2000
NOTES = 250  # the test split of the dataset


def coverage(bounds: list[list[float]], truth: float) -> float:
    return float(np.mean([low <= truth <= high for low, high in bounds]))


@pytest.mark.parametrize("rate", [0.1, 0.356, 0.528, 0.736, 0.9])
def test_wilson_intervals_cover_the_true_pass_rate_in_93_to_97_percent_of_runs(rate):
    rng = np.random.default_rng(1)
    interval = cache(lambda passes: intervals.wilson(passes, NOTES))
    assert 0.93 <= coverage([interval(k) for k in rng.binomial(NOTES, rate, RUNS).tolist()], rate) <= 0.97


JUDGES = [(0.95, 0.95), (0.9, 0.8), (0.8, 0.9), (0.95, 0.65), (0.7, 0.75)]  # sensitivity, specificity
SETTINGS = [
    # good (and bad) controls, share of the judged notes that are good, share of notes failed by code
    *[(50, good, invalid) for good, invalid in ((0.3, 0.0), (0.6, 0.0), (0.85, 0.0), (0.9, 0.4))],
    (24, 0.6, 0.0),
    (100, 0.75, 0.02),
]


@pytest.mark.parametrize(("judge", "setting"), [*product(JUDGES, SETTINGS)])
def test_corrected_intervals_cover_the_true_rate_in_93_to_97_percent_of_runs(judge, setting, monkeypatch):
    (sensitivity, specificity), (n_controls, good_share, invalid_share) = judge, setting
    monkeypatch.setattr(trust, "_posterior", cache(trust._posterior))  # equal counts give equal draws
    rng = np.random.default_rng([n_controls, *(int(100 * share) for share in (*judge, good_share, invalid_share))])
    by_code = rng.binomial(NOTES, invalid_share, RUNS)
    good = rng.binomial(NOTES - by_code, good_share)
    passed = rng.binomial(good, sensitivity) + rng.binomial(NOTES - by_code - good, 1 - specificity)
    good_passed = rng.binomial(n_controls, sensitivity, RUNS)
    bad_failed = rng.binomial(n_controls, specificity, RUNS)
    bounds = [
        trust.correct((p, NOTES - c), (c, NOTES), (g, n_controls), (b, n_controls))[1]
        for p, c, g, b in np.stack([passed, by_code, good_passed, bad_failed], axis=1).tolist()
    ]
    assert 0.93 <= coverage(bounds, good_share * (1 - invalid_share)) <= 0.97


@pytest.mark.parametrize("notes", [12, 25, NOTES])
@pytest.mark.parametrize("rate", [0.3, 0.7, 0.9])
def test_bootstrap_intervals_cover_the_true_mean_in_93_to_98_percent_of_runs(rate, notes, monkeypatch):
    monkeypatch.setattr(intervals, "DRAWS", 2000)  # for speed
    # Each note has its own chance of a pass (beta with the mean `rate`), so its four verdicts are correlated.
    rng = np.random.default_rng(2)
    chance = rng.beta(2 * rate, 2 * (1 - rate), (RUNS, notes))
    bounds = [intervals.bootstrap_mean(passes) for passes in rng.binomial(4, chance).tolist()]
    assert 0.93 <= coverage(bounds, rate) <= 0.98


@pytest.mark.parametrize("passed", range(5))
def test_notes_with_equal_counts_still_give_an_interval(passed):
    low, high = intervals.bootstrap_mean([passed] * 12)
    assert low <= passed / 4 <= high
    # if all passed, the mean is drawn from Beta(12.5, 0.5)
    if passed in (0, 4):
        assert high - low == pytest.approx(1 - scipy.stats.beta(12.5, 0.5).ppf(0.025), abs=0.01)
    else:
        assert 0.1 < high - low < 0.3


def test_a_single_verdict_changes_the_interval_of_the_mean_only_little():
    passed, nearly = intervals.bootstrap_mean([4] * 12), intervals.bootstrap_mean([4] * 11 + [3])
    assert nearly[0] < passed[0] and nearly[1] - nearly[0] == pytest.approx(passed[1] - passed[0], abs=0.03)


def test_equal_runs_still_have_an_interval_around_zero():
    low, high = intervals.bootstrap_mean([0] * 12, floor=-4)
    assert -low == pytest.approx(high, abs=0.01)
    assert 0.1 < high < 0.3


@pytest.mark.parametrize(("both", "only_a", "only_b"), [(0.5, 0.05, 0.2), (0.3, 0.15, 0.15), (0.7, 0.02, 0.1)])
def test_newcombe_intervals_cover_the_true_difference_in_93_to_97_percent_of_runs(both, only_a, only_b):
    rng = np.random.default_rng(3)
    tables = rng.multinomial(NOTES, [both, only_a, only_b, 1 - both - only_a - only_b], RUNS).tolist()
    assert 0.93 <= coverage([intervals.newcombe(*table) for table in tables], only_b - only_a) <= 0.97


def test_the_order_of_the_records_changes_no_figure():
    texts = ["Cough for 3 days.", "Cough.", "No cough for 3 days.", "Fever and a cough."]
    predictions = [prediction(index, S=texts[index % 4]) for index in range(40)]
    judgements = [record for section in SECTIONS for record in verdicts("pfupc" * 8, section)]
    judgements += controls("S", "ppppp", "fffpf")
    rows = [ROW] * 40
    figures = score_run(iter(predictions), iter(judgements), rows)
    assert repr(score_run(iter(predictions[::-1]), iter(judgements[::-1]), rows)) == repr(figures)


def test_25000_notes_are_scored_in_seconds_without_rouge(monkeypatch):
    n = 25_000
    monkeypatch.setattr(scores, "_rouge_l", lambda: lambda reference, text: 0.0)
    start = time.process_time()
    run_of("ppfpf" * (n // 5), controls("S", "p" * 50, "f" * 50))
    assert time.process_time() - start < 15
