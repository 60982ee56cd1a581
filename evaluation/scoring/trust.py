"""How far a run's judge can be trusted: checks against known answers and people, the corrected accuracy, attacks."""

from collections import Counter

import numpy as np

from evaluation.run.records import Judgement
from evaluation.scoring.intervals import DRAWS, Interval, wilson
from evaluation.scoring.judgements import NoteVerdicts
from prompts import SECTIONS

Share = tuple[int, int]  # (successes, trials)
Rates = float | np.ndarray
# (right verdict, judge's verdict) -> how many texts
VerdictTable = Counter[tuple[str, str]]


def check_against_controls(controls: list[Judgement], notes: NoteVerdicts, n: int) -> dict[str, dict]:
    """Compare the judge with the known answers: {S: figures of `_trust`, and by_kind}, for a run of n notes.

    by_kind: {kind: {expected, n, right, unscored, rate: right / (n - unscored), ci95}}.
    """
    figures = {}
    for section in SECTIONS:
        records = [record for record in controls if record["section"] == section]
        table = Counter((record["control"]["expected"], record["verdict"]) for record in records)
        kinds = {record["control"]["kind"]: record["control"]["expected"] for record in records}
        figures[section] = _trust(table, notes, section, n) | {
            "by_kind": {
                kind: _count_right([record for record in records if record["control"]["kind"] == kind], expected)
                for kind, expected in kinds.items()
            }
        }
    return figures


def _count_right(records: list[Judgement], expected: str) -> dict:
    count = Counter(record["verdict"] for record in records)
    rate, interval = _share(count[expected], count["pass"] + count["fail"])
    return {
        "expected": expected,
        "n": len(records),
        "right": count[expected],
        "unscored": count["unscored"],
        "rate": rate,
        "ci95": interval,
    }


def check_against_people(labels: list[dict], notes: NoteVerdicts, n: int) -> dict[str, dict]:
    """Compare the judge with people's verdicts as the truth: {S: figures of `_trust`, by_kind {} and agreement}.

    agreement: share of the judge's labelled verdicts that agree with people's, None without any.
    Raises ValueError, with the label's number from 1, for a label that cannot be used.
    """
    truth = _read_labels(labels, notes)
    figures = {}
    for section in SECTIONS:
        labelled = [(label, *notes[index][section]) for (index, key), label in truth.items() if key == section]
        table = Counter((label, verdict) for label, verdict, source in labelled if source == "judge")
        agreed = table["pass", "pass"] + table["fail", "fail"]
        agreement, _ = _share(agreed, agreed + table["pass", "fail"] + table["fail", "pass"])
        figures[section] = _trust(table, notes, section, n) | {"by_kind": {}, "agreement": agreement}
    return figures


def _read_labels(labels: list[dict], notes: NoteVerdicts) -> dict[tuple[int, str], str]:
    """Return {(index, section): verdict}."""
    truth = {}
    for number, label in enumerate(labels, 1):
        if not isinstance(label, dict) or not {"index", "section", "verdict"} <= label.keys():
            raise ValueError(f"label {number}: needs index, section and verdict")
        index, section, verdict = label["index"], label["section"], label["verdict"]
        if not isinstance(index, int) or not isinstance(section, str):
            raise ValueError(f"label {number}: the index must be a number and the section a letter")
        if verdict not in ("pass", "fail"):
            raise ValueError(f"label {number}: the verdict is {verdict!r}, neither pass nor fail")
        if section not in notes.get(index, ()):
            raise ValueError(f"label {number}: row {index}, section {section} is not among the judgements")
        if (index, section) in truth:
            raise ValueError(f"label {number}: row {index}, section {section} already has a label")
        truth[index, section] = verdict
    return truth


def _trust(table: VerdictTable, notes: NoteVerdicts, section: str, n: int) -> dict:
    """Compute the judge's error rates in a section, and the section's accuracy corrected for them.

    table: verdicts on texts whose right verdict is known. Unscored ones are left out of both rates.
    Returns sensitivity, specificity: shares of the texts to pass that passed and of those to fail that failed, each
    with _ci95, None without such texts; n_good, n_bad: their numbers; informative: whether texts to pass pass more
    often than texts to fail, by Fisher's exact test, one-sided at 2.5%; corrected_accuracy, corrected_ci95: see
    `correct`, None unless informative, because the verdicts then say nothing about the notes.
    """
    from scipy.stats import fisher_exact

    counts = [[table[right, verdict] for verdict in ("pass", "fail")] for right in ("pass", "fail")]
    (good_passed, good_failed), (bad_passed, bad_failed) = counts
    n_good, n_bad = good_passed + good_failed, bad_passed + bad_failed
    sensitivity, sensitivity_ci95 = _share(good_passed, n_good)
    specificity, specificity_ci95 = _share(bad_failed, n_bad)
    informative = bool(fisher_exact(counts, alternative="greater").pvalue < 0.025)  # p is 1 if either side is empty
    accuracy, interval = None, None
    if informative:
        judged = Counter(verdicts[section] for verdicts in notes.values() if section in verdicts)
        passed, failed = judged["pass", "judge"], judged["fail", "judge"]
        accuracy, interval = correct(
            (passed, passed + failed), (judged["fail", "code"], n), (good_passed, n_good), (bad_failed, n_bad)
        )
    return {
        "sensitivity": sensitivity,
        "sensitivity_ci95": sensitivity_ci95,
        "specificity": specificity,
        "specificity_ci95": specificity_ci95,
        "n_good": n_good,
        "n_bad": n_bad,
        "informative": informative,
        "corrected_accuracy": accuracy,
        "corrected_ci95": interval,
    }


def _share(successes: int, n: int) -> tuple[float, Interval] | tuple[None, None]:
    return (successes / n, wilson(successes, n)) if n else (None, None)


def correct(passed: Share, failed_by_code: Share, sensitivity: Share, specificity: Share) -> tuple[float, Interval]:
    """Return (accuracy corrected for the judge's errors, its interval), if sensitivity + specificity > 1.

    passed: passes among the notes that the judge scored; failed_by_code: notes failed by code among all, about which
    the judge cannot err; sensitivity: texts passed among those to pass; specificity: texts failed among those to fail.

    The estimate is that of Rogan and Gladen (1978, doi:10.1093/oxfordjournals.aje.a112510), clipped to 0..1, times the
    share of notes left to the judge. For the interval, each share is drawn independently from its posterior under
    Jeffreys' prior, and the middle 95% of the resulting estimates are taken, as in Henrion's bootComb (2021,
    doi:10.1093/ije/dyab049). A simulation in the tests confirms its coverage. People's labels on the scored notes
    themselves are not independent of `passed`, which makes the interval wider than necessary.
    """
    # If no note was failed by code, nothing suggests that any ever is.
    left_to_judge = 1 - _posterior(failed_by_code, 0) if failed_by_code[0] else 1.0
    drawn = [_posterior(share, stream) for stream, share in enumerate((passed, sensitivity, specificity), 1)]
    interval = np.quantile(left_to_judge * _rogan_gladen(*drawn), [0.025, 0.975]).tolist()
    rates = [hits / trials if trials else 0.0 for hits, trials in (passed, sensitivity, specificity)]
    return (1 - failed_by_code[0] / failed_by_code[1]) * float(_rogan_gladen(*rates)), interval


def _posterior(share: Share, stream: int) -> np.ndarray:
    """Draw from Beta(successes + 1/2, failures + 1/2). Each `stream` is independent, and the same every time."""
    successes, trials = share
    return np.random.default_rng(stream).beta(successes + 0.5, trials - successes + 0.5, DRAWS)


def _rogan_gladen(passed: Rates, sensitivity: Rates, specificity: Rates) -> Rates:
    """Return the estimate for rates or arrays of drawn rates. If a drawn judge is worse than chance, it is 0 or 1."""
    return np.clip((passed + specificity - 1) / np.maximum(sensitivity + specificity - 1, 1e-9), 0, 1)


def count_attacks(attacks: list[Judgement]) -> dict:
    """Return {n, passed, unscored, success_rate: passed / n, ci95, by_kind: {name: the same}}."""
    names = dict.fromkeys(record["attack"] for record in attacks)
    by_kind = {name: _count_passes([record for record in attacks if record["attack"] == name]) for name in names}
    return _count_passes(attacks) | {"by_kind": by_kind}


def _count_passes(attacks: list[Judgement]) -> dict:
    n, count = len(attacks), Counter(record["verdict"] for record in attacks)
    return {
        "n": n,
        "passed": count["pass"],
        "unscored": count["unscored"],
        "success_rate": count["pass"] / n,
        "ci95": wilson(count["pass"], n),
    }
