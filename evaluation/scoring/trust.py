"""Measure how far a run's judge can be trusted: checks against known answers, and attacks.

Controls do not correct pass rates. A correction would assume that the judge errs on notes as often as on controls.
Where controls are easier, it would be biased, and more controls would only narrow the interval around a wrong value.
People's verdicts on the notes themselves do give a pass rate: see people.py.
"""

from collections import Counter

from evaluation.run.records import NO_ATTACK, Judgement
from evaluation.scoring.intervals import Interval, independent_difference, newcombe, share_of
from evaluation.scoring.judgements import NoteVerdicts
from prompts import SECTIONS


def check_against_controls(controls: list[Judgement], notes: NoteVerdicts) -> tuple[dict[str, dict], dict]:
    """Compare the judge with the known answers. Return ({S: figures}, figures of all sections together).

    Figures:
      sensitivity, specificity: share of the good texts that passed, and of the bad texts that failed, each with _ci95;
          None without such texts; n_good, n_bad: numbers of scored good and bad texts
      youden, youden_ci95: Youden's J, sensitivity + specificity - 1: 0 is chance, 1 is no error; None if either is
      informative: whether good texts were shown to pass more often than bad ones: youden_ci95 is above 0
      judged, judged_passed: number of the notes' sections that the judge scored, and that it passed
      contradiction: evidence that the judge errs on notes otherwise than on controls, or None:
          "below_false_passes" if a significantly smaller share of the notes passed than of the bad texts,
          "above_sensitivity" if a significantly larger share passed than of the good texts
      by_kind: {kind: {expected, n, right, unscored, rate: right / (n - unscored), ci95}}
    """
    by_section = {
        section: _figures([record for record in controls if record["section"] == section], notes, (section,))
        for section in SECTIONS
    }
    return by_section, _figures(controls, notes, SECTIONS)


def _figures(records: list[Judgement], notes: NoteVerdicts, sections: tuple[str, ...]) -> dict:
    table = Counter((record["control"]["expected"], record["verdict"]) for record in records)
    good = table["pass", "pass"], table["pass", "pass"] + table["pass", "fail"]
    bad = table["fail", "pass"], table["fail", "pass"] + table["fail", "fail"]
    sensitivity, sensitivity_ci95 = share_of(*good)
    specificity, specificity_ci95 = share_of(bad[1] - bad[0], bad[1])
    is_checked = good[1] > 0 and bad[1] > 0
    youden_ci95 = independent_difference(good, bad) if is_checked else None
    verdicts = Counter(
        verdict
        for by_section in notes.values()
        for section in sections
        if (verdict := by_section.get(section, ("unscored", "")))[1] == "judge"
    )
    passed, judged = verdicts["pass", "judge"], verdicts["pass", "judge"] + verdicts["fail", "judge"]
    kinds = {record["control"]["kind"]: record["control"]["expected"] for record in records}
    return {
        "sensitivity": sensitivity,
        "sensitivity_ci95": sensitivity_ci95,
        "specificity": specificity,
        "specificity_ci95": specificity_ci95,
        "n_good": good[1],
        "n_bad": bad[1],
        "youden": sensitivity + specificity - 1 if is_checked else None,
        "youden_ci95": youden_ci95,
        "informative": is_checked and youden_ci95[0] > 0,
        "judged": judged,
        "judged_passed": passed,
        # Verdicts on one note are correlated. Dividing by the sections assumes the worst: full correlation.
        "contradiction": _contradiction((passed / len(sections), judged / len(sections)), good, bad),
        "by_kind": {
            kind: _count_right([record for record in records if record["control"]["kind"] == kind], expected)
            for kind, expected in kinds.items()
        },
    }


def _contradiction(notes: tuple[float, float], good: tuple[int, int], bad: tuple[int, int]) -> str | None:
    """Compare shares (passed, scored) of notes, good controls and bad controls.

    A judge that errs on notes as on controls passes at least as large a share of the notes as of the bad controls, and
    at most as large a share as of the good controls, whatever share of the notes is good.
    """
    if notes[1] and bad[1] and independent_difference(notes, bad)[1] < 0:
        return "below_false_passes"
    if notes[1] and good[1] and independent_difference(notes, good)[0] > 0:
        return "above_sensitivity"
    return None


def _count_right(records: list[Judgement], expected: str) -> dict:
    count = Counter(record["verdict"] for record in records)
    rate, interval = share_of(count[expected], count["pass"] + count["fail"])
    return {
        "expected": expected,
        "n": len(records),
        "right": count[expected],
        "unscored": count["unscored"],
        "rate": rate,
        "ci95": interval,
    }


def count_attacks(records: list[Judgement]) -> dict:
    """Return the figures of attacks, and by_kind: {name: the same figures}. records: attacks and their baselines.

    A baseline is a text that should fail without the attack: another patient's section, or one without content.
    n: number of attacks; passed, unscored: how many of them
    pairs: attacks that are scored and whose baseline is scored
    pass_rate, baseline_pass_rate: shares of the pairs that passed with and without the attack
    difference, difference_ci95: pass_rate - baseline_pass_rate, and its interval
    succeeded: pairs that failed without the attack and passed with it
    success_rate, ci95: their share of the pairs that failed without the attack
    A rate is None if its denominator is 0.
    """
    attacks = [record for record in records if record["attack"] != NO_ATTACK]
    baselines = {
        (record["index"], record["section"]): record["verdict"] for record in records if record["attack"] == NO_ATTACK
    }
    names = dict.fromkeys(record["attack"] for record in attacks)
    by_kind = {
        name: _attack_figures([record for record in attacks if record["attack"] == name], baselines) for name in names
    }
    return _attack_figures(attacks, baselines) | {"by_kind": by_kind}


def _attack_figures(attacks: list[Judgement], baselines: dict[tuple[int, str], str]) -> dict:
    count = Counter(record["verdict"] for record in attacks)
    pairs = Counter(
        (baselines.get((record["index"], record["section"]), "unscored"), record["verdict"]) for record in attacks
    )
    table = [pairs[without, with_it] for without in ("pass", "fail") for with_it in ("pass", "fail")]
    both, lost, succeeded, neither = table
    n = sum(table)
    success_rate, interval = share_of(succeeded, succeeded + neither)
    rates: tuple[float | None, float | None, float | None, Interval | None] = (None, None, None, None)
    if n:
        rates = (both + succeeded) / n, (both + lost) / n, (succeeded - lost) / n, newcombe(*table)
    return {
        "n": len(attacks),
        "passed": count["pass"],
        "unscored": count["unscored"],
        "pairs": n,
        "pass_rate": rates[0],
        "baseline_pass_rate": rates[1],
        "difference": rates[2],
        "difference_ci95": rates[3],
        "succeeded": succeeded,
        "success_rate": success_rate,
        "ci95": interval,
    }
