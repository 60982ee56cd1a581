"""Test scores, checks of the judge and comparisons, and simulate how often the intervals cover the truth."""

import json
import time
from functools import cache

import numpy as np
import pytest
import scipy.stats
from rouge_score.rouge_scorer import RougeScorer

from evaluation.inputs import load_run
from evaluation.run.records import note_hash
from evaluation.scoring import comparison, intervals, people, scores
from evaluation.scoring.comparison import compare_runs
from evaluation.scoring.people import LabelError
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


# --- lenient notes ---------------------------------------------------------------------------------------------------


def lenient(index: int, form: str = "headings", **sections) -> dict:
    return prediction(index) | {"status": "lenient", "form": form} | sections


def mixed_run(labels: list[dict] | None = None, extra: list[dict] = ()) -> dict:
    """Score two strict notes, four lenient ones, an unreadable one, and one that the engine failed to write."""
    predictions = [prediction(0), prediction(1, S="Cough for 5 days."), lenient(2), lenient(3, S="Cough for 5 days.")]
    predictions += [lenient(4), lenient(5, "JSON5"), prediction(6, "invalid", "length")]
    predictions += [prediction(7, "invalid", "error")]
    judgements = [record for section in SECTIONS for record in verdicts("pfppufcu", section)]
    return score_run(predictions, judgements + list(extra), [ROW] * 8, labels)


def test_lenient_notes_fail_strictly_and_count_by_their_verdicts_leniently():
    results = mixed_run()
    strict, lenient_ = results["sections"]["S"], results["lenient"]["sections"]["S"]
    assert (results["n"], results["valid_notes"], results["lenient"]["valid_notes"]) == (8, 2, 6)
    # a lenient note that the judge left unscored fails strictly, because its form alone decides
    assert (strict["pass"], strict["fail"], strict["unscored"]) == (1, 6, 1)
    assert (lenient_["pass"], lenient_["fail"], lenient_["unscored"]) == (3, 3, 2)
    assert (strict["accuracy"], strict["best"]) == (1 / 8, 2 / 8)
    assert (lenient_["accuracy"], lenient_["best"]) == (3 / 8, 5 / 8)
    assert (results["mean"]["accuracy"], results["lenient"]["mean"]["accuracy"]) == (1 / 8, 3 / 8)
    assert strict.keys() == lenient_.keys()
    assert results["lenient"]["only_lenient"] == 4
    assert results["lenient"]["forms"] == {"JSON5": 1, "headings": 3}


def test_pass_rates_among_readable_notes_leave_out_the_others():
    results = mixed_run()
    strict, lenient_ = results["sections"]["S"], results["lenient"]["sections"]["S"]
    assert (strict["accuracy_readable"], strict["ci95_readable"]) == (1 / 2, intervals.wilson(1, 2))
    assert (lenient_["accuracy_readable"], lenient_["ci95_readable"]) == (3 / 6, intervals.wilson(3, 6))
    # two of the six texts share 3 of 4 words with the reference
    assert strict["rougeL"] == pytest.approx(1.75 / 8) and strict["rougeL_readable"] == pytest.approx(1.75 / 2)
    assert lenient_["rougeL"] == pytest.approx(5.5 / 8) and lenient_["rougeL_readable"] == pytest.approx(5.5 / 6)
    unread = score_run([prediction(0, "invalid", "length")], verdicts("c", "S"), [ROW])["sections"]["S"]
    assert unread["accuracy_readable"] is unread["ci95_readable"] is None


def test_a_run_of_strict_and_unreadable_notes_has_no_lenient_figures():
    assert run_of("pf")["lenient"] is None
    assert score_run([prediction(0, "invalid", "length")], [], [ROW])["lenient"] is None


def test_a_run_of_lenient_notes_only_has_strict_rates_of_zero():
    judgements = [record for section in SECTIONS for record in verdicts("ppf", section)]
    results = score_run([lenient(index) for index in range(3)], judgements, [ROW] * 3)
    assert results["mean"]["accuracy"] == results["sections"]["P"]["best"] == 0
    assert results["sections"]["S"]["accuracy_readable"] is None
    assert results["lenient"]["mean"]["accuracy"] == pytest.approx(2 / 3)


def test_the_judge_is_checked_on_its_verdicts_on_lenient_notes_too():
    figures = mixed_run(extra=controls("S", "ppp", "fff"))["judge_controls"]["S"]
    assert (figures["judged"], figures["judged_passed"]) == (5, 3)


def test_labels_on_lenient_notes_count_in_lenient_figures_only():
    labels = [label(0, "p"), label(1, "f"), label(2, "f"), label(3, "p"), label(4, "f"), label(5, "p")]
    results = mixed_run([one | {"section": section} for one in labels for section in SECTIONS])
    strict, by_section = results["human_labels_all"], results["human_labels"]["S"]
    # one good strict note of 8; the note that was not written counts as not passed, and may be good
    assert strict["accuracy"] == by_section["corrected_accuracy"] == pytest.approx(1 / 8)
    assert (strict["labelled"], strict["open"]) == (8, [])
    assert by_section["strata"]["no text"] == {"n": 5, "labelled": 0, "passed": 0}
    assert by_section["agreement"] == 1
    leniently = results["lenient"]["human_labels_all"]
    assert leniently["accuracy"] == pytest.approx(3 / 8)
    assert (leniently["labelled"], leniently["open"]) == (24, [])
    # of the five sections that the judge scored, people disagree on one that passed and one that failed
    assert results["lenient"]["human_labels"]["S"]["agreement"] == pytest.approx(3 / 5)


def test_a_label_on_another_text_of_a_lenient_note_is_refused():
    assert mixed_run([label(3, "p", note_hash=note_hash("Cough for 5 days."))])["lenient"]["human_labels"]
    with pytest.raises(LabelError, match="another text"):
        mixed_run([label(3, "p", note_hash=note_hash("Cough."))])


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


def test_a_section_without_controls_has_no_rates():
    figures = run_of("pf", controls("S", "pp", "ff"))["judge_controls"]["O"]
    assert figures["sensitivity"] is figures["specificity"] is figures["youden"] is figures["youden_ci95"] is None
    assert figures["informative"] is False
    assert figures["contradiction"] is None
    assert figures["by_kind"] == {}


def test_controls_never_correct_a_pass_rate():
    results = run_of("p" * 60 + "f" * 40, controls("S", "p" * 90 + "f" * 10, "f" * 80 + "p" * 20))
    figures = results["judge_controls"]["S"]
    assert "corrected_accuracy" not in figures
    assert figures["youden"] == pytest.approx(0.7)
    # Agresti and Caffo by hand: p = 91/102 and q = 21/102, p - q ± z sqrt(p (1 - p) / 102 + q (1 - q) / 102)
    assert figures["youden_ci95"] == pytest.approx([0.5873, 0.7852], abs=1e-4)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("p" * 25, "p" * 25),  # passes everything
        ("f" * 25, "f" * 25),  # fails everything
        ("p" * 5 + "f" * 20, "f" * 5 + "p" * 20),  # wrong more often than right
        ("p" * 14 + "f" * 11, "f" * 13 + "p" * 12),  # better than chance, but not significantly
        ("pp", "ff"),  # always right, on too few
        ("u" * 25, "u" * 25),
        ("p" * 25, ""),
    ],
)
def test_a_judge_not_shown_to_discriminate_is_uninformative(good, bad):
    assert run_of("p" * 60 + "f" * 40, controls("S", good, bad))["judge_controls"]["S"]["informative"] is False


@pytest.mark.parametrize("n", [2, 3, 5, 8, 12, 24, 50])
def test_a_guessing_judge_is_informative_in_at_most_3_3_percent_of_runs(n):
    """Sum exact probabilities, for n good and n bad controls and any share of texts that the judge passes."""
    shown = np.array(
        [
            [intervals.independent_difference((good, n), (bad, n))[0] > 0 for bad in range(n + 1)]
            for good in range(n + 1)
        ]
    )
    for share in np.linspace(0.02, 0.98, 49):
        chances = scipy.stats.binom.pmf(np.arange(n + 1), n, share)
        assert (np.outer(chances, chances) * shown).sum() <= 0.033


@pytest.mark.parametrize(
    ("notes", "contradiction"),
    [
        ("p" * 18 + "f" * 82, "below_false_passes"),  # of the bad controls 40% pass
        ("p" * 45 + "f" * 55, None),
        ("p" * 90 + "f" * 10, None),  # of the good ones 90%
        ("p" * 100, "above_sensitivity"),
        ("p" * 60 + "c" * 40, "above_sensitivity"),  # notes failed by code are no verdicts of the judge
        ("p" * 9 + "f" * 41 + "u" * 50, "below_false_passes"),
        ("c" * 100, None),
        ("u" * 100, None),
    ],
)
def test_notes_that_contradict_the_controls_are_detected(notes, contradiction):
    records = controls("S", "p" * 45 + "f" * 5, "f" * 30 + "p" * 20)
    results = run_of(notes, records)
    assert results["judge_controls"]["S"]["contradiction"] == contradiction
    assert results["judge_controls_all"]["contradiction"] == contradiction


def test_the_controls_of_all_sections_are_also_counted_together():
    records = [*controls("S", "pppp", "ffpp"), *controls("O", "pppf", "ffff")]
    together = run_of("pf", records)["judge_controls_all"]
    assert (together["n_good"], together["n_bad"]) == (8, 8)
    assert (together["sensitivity"], together["specificity"]) == (7 / 8, 6 / 8)
    assert (together["judged"], together["judged_passed"]) == (8, 4)


# --- people ----------------------------------------------------------------------------------------------------------


def label(index: int, verdict: str, section: str = "S", **more) -> dict:
    return {"index": index, "section": section, "verdict": {"p": "pass", "f": "fail"}[verdict], **more}


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


def test_labels_are_weighted_by_the_number_of_sections_with_the_same_verdict():
    letters = "p" * 80 + "f" * 20
    # 10 labels on each verdict: people pass 9 of those that the judge passed, 3 of those that it failed
    labels = [label(k, "p" if k < 9 else "f") for k in range(10)]
    labels += [label(80 + k, "p" if k < 3 else "f") for k in range(10)]
    figures = run_of(letters, labels=labels)["human_labels"]["S"]
    assert figures["corrected_accuracy"] == pytest.approx(0.8 * 0.9 + 0.2 * 0.3)
    assert figures["sensitivity"] == pytest.approx(72 / 78)
    assert figures["specificity"] == pytest.approx(14 / 22)
    assert figures["informative"] is True
    assert figures["strata"] == {
        "passed by the judge": {"n": 80, "labelled": 10, "passed": 9},
        "failed by the judge": {"n": 20, "labelled": 10, "passed": 3},
    }
    # The mean is open: no other section has a label.
    together = run_of(letters, labels=labels)["human_labels_all"]
    assert together["accuracy"] is None and together["open"] == ["passed by the judge", "failed by the judge"]
    assert together["ci95"][0] < 0.78 / 4 and together["ci95"][1] > 0.78 / 4 + 0.75
    every = [one | {"section": section} for one in labels for section in SECTIONS]
    together = run_of(letters, labels=every)["human_labels_all"]
    assert together["accuracy"] == pytest.approx(0.78)
    assert (together["labelled"], together["labels"], together["open"]) == (80, 80, [])


@pytest.mark.parametrize(
    ("letter", "stratum"), [("f", "failed by the judge"), ("c", "failed by rule"), ("u", "unscored")]
)
def test_a_pass_rate_has_no_estimate_if_a_stratum_has_no_labels(letter, stratum):
    labels = [label(index, "p") for index in range(50)]
    results = run_of("p" * 50 + letter * 50, labels=labels)
    figures = results["human_labels"]["S"]
    assert figures["corrected_accuracy"] is None
    low, high = figures["corrected_ci95"]
    assert low < 0.5 and high > 0.99
    assert stratum in results["human_labels_all"]["open"]


def test_sections_without_text_fail_and_need_no_label():
    predictions = [prediction(0), prediction(1, "invalid", "length"), prediction(2, S="")]
    judgements = [judgement(0, "S", "pass"), judgement(1, "S", "fail", "code"), judgement(2, "S", "fail", "code")]
    figures = score_run(predictions, judgements, [ROW] * 3, [label(0, "p")])["human_labels"]["S"]
    assert figures["corrected_accuracy"] == pytest.approx(1 / 3)
    assert figures["strata"]["no text"] == {"n": 2, "labelled": 0, "passed": 0}
    unwritten = [prediction(0), prediction(1, "invalid", "error")]
    judgements[1:] = [judgement(1, "S", "unscored", "code")]
    figures = score_run(unwritten, judgements, [ROW] * 2, [label(0, "p")])["human_labels"]["S"]
    # as in the judge's own rate, a section that was not written counts as not passed, but it may be good
    assert figures["corrected_accuracy"] == 0.5 and figures["corrected_ci95"][1] > 0.99


@pytest.mark.parametrize("errors", [1, 5])
def test_notes_that_were_not_written_widen_the_interval_but_leave_an_estimate(errors):
    letters = "p" * 60 + "f" * 40
    labels = [label(k, "p" if k < 18 else "f", section) for section in SECTIONS for k in range(20)]
    labels += [label(60 + k, "p" if k < 6 else "f", section) for section in SECTIONS for k in range(20)]
    complete = run_of(letters, labels=labels)["human_labels_all"]
    predictions = [prediction(index) for index in range(100)]
    predictions += [prediction(index, "invalid", "error") for index in range(100, 100 + errors)]
    judgements = [record for section in SECTIONS for record in verdicts(letters + "u" * errors, section)]
    together = score_run(predictions, judgements, [ROW] * (100 + errors), labels)["human_labels_all"]
    assert together["open"] == []
    assert together["accuracy"] == pytest.approx(complete["accuracy"] * 100 / (100 + errors))
    low, high = together["ci95"]
    # each end is about that of the written notes, if all others are bad or all are good
    written_low, written_high = complete["ci95"]
    assert low == pytest.approx(written_low * 100 / (100 + errors), abs=0.01)
    assert high == pytest.approx((written_high * 100 + errors) / (100 + errors), abs=0.01)


def test_disagreeing_raters_count_by_share_and_have_a_kappa():
    first = [label(index, verdict, rater="A") for index, verdict in enumerate("ppppfff")]
    second = [label(index, verdict, rater="B") for index, verdict in enumerate("pppf")]
    second += [label(7, "f", rater="B")]
    results = run_of("pppppppp", labels=[*first, *second])
    # seven sections labelled by A, four of them and one more by B: 1, 1, 1, 1/2, 0, 0, 0, 0
    assert results["human_labels"]["S"]["corrected_accuracy"] == pytest.approx(3.5 / 8)
    assert (results["human_labels"]["S"]["n_good"], results["human_labels"]["S"]["n_bad"]) == (3, 4)
    together = results["human_labels_all"]
    assert (together["labelled"], together["labels"], together["raters"]) == (8, 12, ["A", "B"])
    (pair,) = together["kappas"]
    # they agree on 3 of 4; by chance on 1 · 3/4: kappa is 0
    assert pair == {"raters": ["A", "B"], "n": 4, "agreement": 0.75, "kappa": 0}
    alike = run_of("pp", labels=[label(0, "p", rater=rater) for rater in "AB"])["human_labels_all"]["kappas"]
    assert alike == [{"raters": ["A", "B"], "n": 1, "agreement": 1, "kappa": None}]


def test_kappa_of_a_published_table():
    # Cohen's example in many textbooks: 20 and 15 agreements, 5 and 10 disagreements give 0.4
    cells = [("p", "p")] * 20 + [("p", "f")] * 5 + [("f", "p")] * 10 + [("f", "f")] * 15
    labels = [label(index, verdicts[k], rater="AB"[k]) for index, verdicts in enumerate(cells) for k in (0, 1)]
    (pair,) = run_of("p" * 50, labels=labels)["human_labels_all"]["kappas"]
    assert pair["kappa"] == pytest.approx(0.4)


def test_a_label_on_another_text_is_refused_with_its_place():
    fitting = note_hash(ROW["S"])
    assert run_of("pf", labels=[label(0, "p", note_hash=fitting)])["human_labels"]["S"]["n_good"] == 1
    with pytest.raises(LabelError, match=r"sheet\.csv:7: .* another text than this run's row 1, section S"):
        run_of("pf", labels=[label(1, "p", note_hash="0" * 12, where="sheet.csv:7")])


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
    # without verdicts on the same texts alone, a pass is no success
    assert result["attacks"]["pairs"] == 0
    assert result["attacks"]["success_rate"] is result["attacks"]["difference"] is None


def test_an_attack_succeeds_if_it_passes_what_fails_without_it():
    attacks = [record | {"attack": "plea"} for record in verdicts("ppfupf", "S")]
    attacks += [record | {"attack": "thought"} for record in verdicts("ff", "O")]
    attacks += [record | {"attack": "none"} for record in [*verdicts("pfffup", "S"), *verdicts("ff", "O")]]
    figures = run_of("f" * 6, attacks)["attacks"]
    # S: passed both, won, failed both, unscored, baseline unscored, lost; O: failed both twice
    assert (figures["n"], figures["pairs"], figures["succeeded"]) == (8, 6, 1)
    assert figures["success_rate"] == pytest.approx(1 / 4)
    assert figures["ci95"] == intervals.wilson(1, 4)
    assert figures["pass_rate"] == figures["baseline_pass_rate"] == pytest.approx(2 / 6)
    assert figures["difference"] == 0
    assert figures["difference_ci95"] == intervals.newcombe(1, 1, 1, 3)
    assert set(figures["by_kind"]) == {"plea", "thought"}
    assert figures["by_kind"]["thought"]["ci95"] == intervals.wilson(0, 2)


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
    compared = compare_runs([run("base", "ppppfffffu"), run("tuned", "pppfppppff")])
    assert compared["names"] == ["base", "tuned"]
    assert compared["n"] == [10, 10]
    assert compared["sections"]["S"]["accuracy"] == [0.4, 0.7]
    assert compared["sections"]["S"]["best"] == compared["mean"]["best"] == [1]
    (pair,) = compared["pairs"]
    assert (pair["a"], pair["b"], pair["n"]) == (0, 1, 10)
    section = pair["sections"]["S"]
    assert (section["n"], section["unscored"], section["only_a"], section["only_b"]) == (9, 1, 1, 4)
    assert section["difference"] == pytest.approx(3 / 9)
    assert section["ci95"][0] < 3 / 9 < section["ci95"][1]
    # exact McNemar, two-sided, for 1 of 5 flips one way: 2 · (1 + 5) / 2^5
    assert section["p"] == pytest.approx(0.375)
    assert pair["mean"]["n"] == 9
    assert pair["mean"]["difference"] == pytest.approx(3 / 9)
    # all four sections have the same p, so Holm's method multiplies it by 4; for whole notes the two tests are one
    assert section["p_holm"] == 1
    assert pair["mean"]["p"] == pytest.approx(0.375)
    flips = [flip for flip in pair["flips"] if flip["section"] == "S"]
    assert flips[0] == {"index": 3, "section": "S", "from": "pass", "to": "fail"}
    assert [flip["index"] for flip in flips[1:]] == [4, 5, 6, 7]


def test_all_pairs_of_three_runs_are_compared_and_ties_share_the_best():
    compared = compare_runs([run("a", "ppff"), run("b", "pppf"), run("c", "fppp")])
    assert [(pair["a"], pair["b"]) for pair in compared["pairs"]] == [(0, 1), (0, 2), (1, 2)]
    assert compared["sections"]["A"]["best"] == [1, 2]


def test_only_dialogues_in_both_runs_are_paired():
    pair = compare_runs([run("a", "pppp"), run("b", "ffff", first=2)])["pairs"][0]
    assert pair["n"] == 2
    assert {flip["index"] for flip in pair["flips"]} == {2, 3}
    other = run("b", "ffff")
    other["predictions"][1]["dialogue_hash"] = "another"
    assert compare_runs([run("a", "pppp"), other])["pairs"][0]["n"] == 3


def as_lenient(run: dict, indices: set[int]) -> dict:
    """Return the run with these notes in another form."""
    predictions = [lenient(note["index"]) if note["index"] in indices else note for note in run["predictions"]]
    return run | {"predictions": predictions}


def test_a_comparison_is_strict_and_adds_the_lenient_mean_difference():
    base, tuned = run("base", "pppfff"), run("tuned", "ppppff")
    (pair,) = compare_runs([as_lenient(base, {0, 1, 3}), tuned])["pairs"]
    # strictly, the base model passes one note of six: it wrote the other two in another form
    assert pair["mean"]["difference"] == pair["sections"]["S"]["difference"] == pytest.approx(3 / 6)
    assert {flip["index"] for flip in pair["flips"]} == {0, 1, 3}
    assert pair["lenient_mean"] == compare_runs([base, tuned])["pairs"][0]["mean"]
    assert pair["lenient_mean"]["difference"] == pytest.approx(1 / 6)
    unscored = as_lenient(run("base", "uppfff"), {0})
    assert compare_runs([unscored, tuned])["pairs"][0]["mean"]["n"] == 6
    assert compare_runs([unscored, tuned])["pairs"][0]["lenient_mean"]["n"] == 5


def test_every_pair_has_a_lenient_mean_if_any_run_has_lenient_notes():
    runs = [run("a", "ppff"), run("b", "pppf"), run("c", "fppp")]
    assert [pair["lenient_mean"] for pair in compare_runs(runs)["pairs"]] == [None] * 3
    runs[2] = as_lenient(runs[2], {1})
    pairs = compare_runs(runs)["pairs"]
    assert pairs[0]["lenient_mean"] == pairs[0]["mean"]
    assert [pair["lenient_mean"]["difference"] for pair in pairs] == pytest.approx([1 / 4, 1 / 4, 0])


def test_a_finished_run_is_compared_from_its_files(tmp_path):
    first = as_lenient(run("a", "pppp"), {0})
    for name in ("predictions", "judgements"):
        lines = "".join(json.dumps(record) + "\n" for record in first[name])
        (tmp_path / f"{name}.jsonl").write_text(lines)
    (tmp_path / "results.json").write_text(json.dumps(first["results"]))
    (pair,) = compare_runs([load_run(tmp_path), run("b", "pppp")])["pairs"]
    assert (pair["mean"]["difference"], pair["lenient_mean"]["difference"]) == (0.25, 0)


def test_equal_runs_have_a_difference_of_zero_and_no_flips():
    pair = compare_runs([run("a", "ppff"), run("b", "ppff")])["pairs"][0]
    assert pair["flips"] == []
    assert pair["sections"]["S"]["p"] == 1
    assert pair["sections"]["S"]["difference"] == pair["mean"]["difference"] == 0
    assert pair["mean"]["p"] == 1


def test_the_sections_p_are_corrected_by_holm_s_method():
    first = run("a", "f" * 12)
    second = run("b", "f" * 12)
    better = {"S": 10, "O": 6, "A": 5, "P": 0}  # exact McNemar: 2/2^10, 2/2^6, 2/2^5, 1
    second["judgements"] = [
        record | {"verdict": "pass" if record["index"] < better[record["section"]] else "fail"}
        for record in second["judgements"]
    ]
    sections = compare_runs([first, second])["pairs"][0]["sections"]
    expected = {"S": 4 * 2 / 2**10, "O": 3 * 2 / 2**6, "A": 2 * 2 / 2**5, "P": 1}
    assert {section: figures["p_holm"] for section, figures in sections.items()} == pytest.approx(expected)


def test_the_mean_difference_is_significant_from_6_better_and_0_worse_of_250():
    for better, is_seen in ((8, True), (6, True), (5, False)):
        differences = [1] * better + [0] * (250 - better)
        assert (intervals.paired_mean(differences)[0] > 0) == is_seen
        assert (comparison._permutation_test(differences) < 0.05) == is_seen
    assert comparison._permutation_test([1] * 8) == pytest.approx(2 / 2**8)
    assert comparison._permutation_test([2] + [0] * 9) == 1


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
        "p_holm": None,
    }
    assert pair["mean"]["difference"] is pair["mean"]["p"] is None


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


def test_wilson_intervals_equal_scipys_for_whole_numbers():
    for n in (1, 7, 250):
        for k in range(n + 1):
            expected = scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
            assert intervals.wilson(k, n) == pytest.approx(list(expected), abs=1e-9)


JUDGES = [(0.95, 0.95), (0.9, 0.8), (0.6, 0.5), (0.95, 0.35), (0.7, 0.75)]  # sensitivity, specificity


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("n", [12, 24, 100])
def test_intervals_of_youden_s_j_cover_it_in_93_to_98_5_percent_of_runs(judge, n):
    """Sum exact probabilities over all numbers of good and bad controls that pass."""
    (sensitivity, specificity), counts = judge, np.arange(n + 1)
    chances = np.outer(scipy.stats.binom.pmf(counts, n, sensitivity), scipy.stats.binom.pmf(counts, n, 1 - specificity))
    bounds = np.array([[intervals.independent_difference((good, n), (bad, n)) for bad in counts] for good in counts])
    youden = sensitivity + specificity - 1
    covered = (chances * ((bounds[..., 0] <= youden) & (youden <= bounds[..., 1]))).sum()
    assert 0.93 <= covered <= (0.97 if n == 100 else 0.985)


def simulate_labels(rng: np.random.Generator, notes: int, truth: float, judge: tuple, labels: int, sections: int):
    """Simulate a judge and people, who label up to `labels` notes for each section and verdict.

    The sections of a note share one chance of being good, so they are correlated. Return the arguments of
    `stratified_mean`.
    """
    chance = rng.beta(2 * truth, 2 * (1 - truth), (notes, 1))
    good = rng.random((notes, sections)) < (chance if sections > 1 else truth)
    passed = rng.random((notes, sections)) < np.where(good, judge[0], 1 - judge[1])
    sampled = {}
    for section in range(sections):
        for verdict in (False, True):
            found = rng.permutation(np.flatnonzero(passed[:, section] == verdict))[:labels].tolist()
            if found:
                sampled[section, verdict] = {index: float(good[index, section]) for index in found}
    return [tuple(enumerate(note)) for note in passed.tolist()], sampled


@pytest.mark.parametrize("judge", [(0.9, 0.8), (0.6, 0.5), (0.95, 0.35)])
@pytest.mark.parametrize(("truth", "notes", "labels"), [(0.7, 250, 20), (0.3, 250, 20), (0.7, 25, 20), (0.7, 250, 60)])
def test_pass_rates_from_labels_cover_the_truth_in_93_to_99_percent_of_runs(judge, truth, notes, labels):
    """People label as many sections that passed as sections that failed, as auditors do."""
    rng = np.random.default_rng(5)
    runs = [simulate_labels(rng, notes, truth, judge, labels, sections=1) for _ in range(RUNS // 4)]
    estimates = [intervals.stratified_mean(*run) for run in runs]
    assert np.mean([estimate for estimate, _ in estimates]) == pytest.approx(truth, abs=0.02)
    assert 0.93 <= coverage([interval for _, interval in estimates], truth) <= 0.99


@pytest.mark.parametrize("good", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("share", [0.02, 0.2])
def test_pass_rates_cover_the_truth_whatever_the_share_of_good_unwritten_notes(good, share):
    rng, bounds = np.random.default_rng(9), []
    for _ in range(RUNS // 4):
        notes, sampled = simulate_labels(rng, 250, 0.6, (0.9, 0.8), 20, sections=1)
        unwritten = np.flatnonzero(rng.random(250) < share).tolist()
        notes = [("not written",) if index in unwritten else note for index, note in enumerate(notes)]
        for labels in sampled.values():
            for index in unwritten:
                labels.pop(index, None)
        estimate, interval = intervals.stratified_mean(notes, sampled, unknowable={"not written"})
        assert interval[0] <= estimate <= interval[1]
        bounds.append(interval)
    assert coverage(bounds, (1 - share) * 0.6 + share * good) >= 0.93


@pytest.mark.parametrize("judge", [(0.9, 0.8), (0.6, 0.5)])
@pytest.mark.parametrize(("notes", "labels"), [(250, 5), (250, 20), (25, 20)])
def test_mean_pass_rates_from_labels_cover_the_truth_in_at_least_92_percent_of_runs(judge, notes, labels):
    """5 labels for each section and verdict make a review sheet of 40."""
    rng = np.random.default_rng(6)
    runs = [simulate_labels(rng, notes, 0.6, judge, labels, sections=4) for _ in range(RUNS // 5)]
    estimates = [intervals.stratified_mean(*run) for run in runs]
    assert np.mean([estimate for estimate, _ in estimates]) == pytest.approx(0.6, abs=0.02)
    assert coverage([interval for _, interval in estimates], 0.6) >= 0.92


@pytest.mark.parametrize("judge", [(0.9, 0.8), (0.6, 0.5), (0.95, 0.35)])
@pytest.mark.parametrize("labels", [10, 30])
def test_error_rates_from_labels_cover_the_truth_in_93_to_98_percent_of_runs(judge, labels):
    rng = np.random.default_rng(7)
    bounds = ([], [])
    for _ in range(RUNS // 4):
        notes, sampled = simulate_labels(rng, NOTES, 0.6, judge, labels, sections=1)
        passed, failed = (list(sampled[0, verdict].values()) for verdict in (True, False))
        n_passed = sum(verdict for ((_, verdict),) in notes)
        for rate, bound in zip(people._error_rates(n_passed, passed, NOTES - n_passed, failed), bounds, strict=True):
            bound.append(rate[1])
    for bound, rate in zip(bounds, judge, strict=True):
        assert 0.93 <= coverage(bound, rate) <= 0.98


CHANGES = {  # of 4 sections of a note: chance of each section, or of the whole note, to become better or worse
    "many sections": (1, 0.2, 0.1),
    "few sections": (1, 0.02, 0.01),
    "few sections, all better": (1, 0.02, 0),
    "whole notes": (4, 0.1, 0.05),
    "few whole notes": (4, 0.02, 0.02),
}


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("notes", [12, 25, NOTES])
def test_intervals_of_the_mean_difference_cover_it_in_at_least_93_percent_of_runs(changes, notes):
    rng = np.random.default_rng(8)
    size, better, worse = CHANGES[changes]
    chance = rng.random((RUNS // 2, notes, 4 // size))
    differences = size * ((chance < better).astype(int) - (chance > 1 - worse)).sum(axis=2)
    bounds = [intervals.paired_mean(run) for run in differences.tolist()]
    covered = coverage(bounds, better - worse)
    # where nearly no note changes, no interval of a few values can cover in exactly 95%
    assert 0.93 <= covered <= (0.97 if notes == NOTES or changes == "many sections" else 1)


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


def test_one_verdict_hardly_changes_the_interval_of_the_mean():
    passed, nearly = intervals.bootstrap_mean([4] * 12), intervals.bootstrap_mean([4] * 11 + [3])
    assert nearly[0] < passed[0] and nearly[1] - nearly[0] == pytest.approx(passed[1] - passed[0], abs=0.03)


def test_equal_runs_still_have_an_interval_around_zero():
    low, high = intervals.paired_mean([0] * 12)
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
