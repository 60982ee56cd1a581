"""Estimate pass rates, the judge's errors and the raters' agreement from people's verdicts on a sample of the notes.

People often label as many sections that passed as sections that failed, whatever their numbers in the run. So the share
that people pass is estimated within each stratum (the sections with the same verdict by judge or rule) and weighted by
the stratum's size. The estimate is valid if the labelled sections are a random sample within each stratum.

Sections that the engine failed to write cannot be labelled, and they are no random sample, because long dialogues fail
more often. As in the judge's pass rate, they count as not passed in the estimate; its interval allows for any share.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import combinations

import numpy as np

from evaluation.scoring.intervals import DRAWS, Interval, independent_difference, stratified_mean
from evaluation.scoring.judgements import (
    FAILED,
    NO_TEXT,
    NOT_WRITTEN,
    PASSED,
    STRATA,
    NoteVerdicts,
    SectionKey,
    stratum_of,
)
from prompts import SECTIONS


class LabelError(ValueError):
    """A label that cannot be used; the message begins with its file and row, or its number."""


Labels = dict[str, dict[SectionKey, bool]]  # rater ("" if unknown) -> section -> whether the rater passes it


def read_labels(labels: Iterable[dict], notes: NoteVerdicts, hashes: dict[SectionKey, str]) -> Labels:
    """Check labels against the run, and return them by rater. Raises LabelError.

    labels: {"index", "section", "verdict", and optionally "note_hash", "rater", "where"}.
    hashes: `note_hash` of the run's sections, at least of those with labels.
    """
    by_rater: Labels = {}
    for number, label in enumerate(labels, 1):
        where = label.get("where", f"label {number}") if isinstance(label, dict) else f"label {number}"
        if not isinstance(label, dict) or not {"index", "section", "verdict"} <= label.keys():
            raise LabelError(f"{where}: needs index, section and verdict")
        index, section, verdict = label["index"], label["section"], label["verdict"]
        rater, expected = label.get("rater") or "", label.get("note_hash")
        if type(index) is not int or not isinstance(section, str):
            raise LabelError(f"{where}: the index must be a number and the section a letter")
        if not isinstance(rater, str):
            raise LabelError(f"{where}: the rater must be a text")
        if verdict not in ("pass", "fail"):
            raise LabelError(f"{where}: the verdict is {verdict!r}, neither pass nor fail")
        if section not in notes.get(index, ()):
            raise LabelError(f"{where}: row {index}, section {section} is not among the judgements")
        if expected and expected != hashes.get((index, section)):
            raise LabelError(f"{where}: the label is on another text than this run's row {index}, section {section}")
        own = by_rater.setdefault(rater, {})
        if (index, section) in own:
            by = f" by {rater}" if rater else ""
            raise LabelError(f"{where}: row {index}, section {section} already has a label{by}")
        own[index, section] = verdict == "pass"
    return by_rater


def check_against_people(
    labels: Labels, notes: NoteVerdicts, indices: list[int], without_text: set[SectionKey]
) -> tuple[dict[str, dict], dict]:
    """Return ({S: figures}, figures of all sections together). People's labels count as the truth.

    indices: all dialogues of the run; without_text: their sections that have no text.

    Figures of a section, None where a stratum that they need has no label:
      corrected_accuracy, corrected_ci95: share of sections that people would pass, from `stratified_mean`. The interval
          is never None; it allows for any mean of a stratum without a label, and of the sections that the engine failed
          to write, which count as not passed in corrected_accuracy.
      strata: {one of STRATA: {n, labelled, passed: by people; with several raters, the sum of their shares}}
      sensitivity, specificity: of the sections that the judge scored, the share that it passed of those that people
          would pass, and the share that it failed of those that people would fail; each with _ci95
      n_good, n_bad: labelled sections, scored by the judge, that most raters passed or failed
      informative: whether people pass a larger share of the sections that the judge passed than of those that it
          failed: the interval of the difference is above 0
      agreement: share of the labelled sections, scored by the judge, on which people and judge agree
    Figures of all sections together:
      accuracy, ci95: like corrected_accuracy and corrected_ci95, for the mean over the sections
      labelled: number of labelled sections; labels: number of labels; raters: their names; kappas: from `_kappas`
      open: the strata without a label in some section, of those that can be labelled
    """
    shares = _shares(labels)
    strata = {
        (index, section): stratum_of(
            notes.get(index, {}).get(section, ("unscored", "")), (index, section) not in without_text
        )
        for index in indices
        for section in SECTIONS
    }
    sampled: dict[str, dict[str, dict[int, float]]] = {section: defaultdict(dict) for section in SECTIONS}
    for position, index in enumerate(indices):
        for section in SECTIONS:
            if (index, section) in shares:
                sampled[section][strata[index, section]][position] = shares[index, section]
    by_section = {
        section: _section_figures([strata[index, section] for index in indices], sampled[section])
        for section in SECTIONS
    }
    notes_strata = [tuple((section, strata[index, section]) for section in SECTIONS) for index in indices]
    all_labels = {(section, name): values for section in SECTIONS for name, values in sampled[section].items()}
    accuracy, interval = stratified_mean(
        notes_strata, all_labels, {(s, NO_TEXT): 0.0 for s in SECTIONS}, {(s, NOT_WRITTEN) for s in SECTIONS}
    )
    unlabelled = {name for _, name in set().union(*notes_strata) - all_labels.keys()} - {NO_TEXT, NOT_WRITTEN}
    return by_section, {
        "accuracy": accuracy,
        "ci95": interval,
        "labelled": len(shares),
        "labels": sum(map(len, labels.values())),
        "raters": sorted(filter(None, labels)),
        "kappas": _kappas(labels),
        "open": [stratum for stratum in STRATA if stratum in unlabelled],
    }


def _shares(labels: Labels) -> dict[SectionKey, float]:
    """Return the share of raters who pass each labelled section, such as 1/2 if two disagree.

    Each section counts once, however many raters it has.
    """
    verdicts = defaultdict(list)
    for by_rater in labels.values():
        for key, passed in by_rater.items():
            verdicts[key].append(passed)
    return {key: sum(passed) / len(passed) for key, passed in verdicts.items()}


def _section_figures(strata: list[str], labels: dict[str, dict[int, float]]) -> dict:
    """Return the figures of a section. strata: of each note; labels: {stratum: {position of the note: share}}."""
    size = Counter(strata)
    accuracy, interval = stratified_mean([(stratum,) for stratum in strata], labels, {NO_TEXT: 0.0}, {NOT_WRITTEN})
    passed, failed = (list(labels.get(stratum, {}).values()) for stratum in (PASSED, FAILED))
    sensitivity, specificity = _error_rates(size[PASSED], passed, size[FAILED], failed)
    judged = [*passed, *failed]
    difference = [0.0, 0.0]
    if passed and failed:
        difference = independent_difference((sum(passed), len(passed)), (sum(failed), len(failed)))
    return {
        "sensitivity": sensitivity and sensitivity[0],
        "sensitivity_ci95": sensitivity and sensitivity[1],
        "specificity": specificity and specificity[0],
        "specificity_ci95": specificity and specificity[1],
        "n_good": sum(share > 0.5 for share in judged),
        "n_bad": sum(share < 0.5 for share in judged),
        "informative": difference[0] > 0,
        "corrected_accuracy": accuracy,
        "corrected_ci95": interval,
        "agreement": (sum(passed) + len(failed) - sum(failed)) / len(judged) if judged else None,
        "strata": {
            stratum: {
                "n": size[stratum],
                "labelled": len(labels.get(stratum, {})),
                "passed": math.fsum(labels.get(stratum, {}).values()),
            }
            for stratum in STRATA
            if size[stratum]
        },
    }


Rate = tuple[float, Interval] | None


def _error_rates(n_passed: int, passed: list[float], n_failed: int, failed: list[float]) -> tuple[Rate, Rate]:
    """Return (sensitivity, specificity) of the judge on the n_passed + n_failed sections that it scored.

    passed, failed: people's verdicts on samples of the two strata. Raw shares would depend on how many of each stratum
        were labelled, so each sample is weighted to its stratum's size (Begg and Greenes 1983, doi:10.2307/2530820).
    Intervals: the middle 95% of 10,000 draws of the strata's sizes and shares from their posteriors under Jeffreys'
    prior. Both are None if a stratum has no label; one is None if people passed none, or failed none.
    """
    if (n_passed and not passed) or (n_failed and not failed) or not (passed or failed):
        return None, None
    rng = np.random.default_rng(0)
    size = rng.beta(n_passed + 0.5, n_failed + 0.5, DRAWS)
    of_passed, of_failed = (
        rng.beta(math.fsum(labels) + 0.5, len(labels) - math.fsum(labels) + 0.5, DRAWS) for labels in (passed, failed)
    )
    good_passed = n_passed * math.fsum(passed) / max(1, len(passed))
    good_failed = n_failed * math.fsum(failed) / max(1, len(failed))
    bad_passed, bad_failed = n_passed - good_passed, n_failed - good_failed
    rates = []
    for right, wrong, drawn_right, drawn_wrong in (
        (good_passed, good_failed, size * of_passed, (1 - size) * of_failed),
        (bad_failed, bad_passed, (1 - size) * (1 - of_failed), size * (1 - of_passed)),
    ):
        interval = np.quantile(drawn_right / (drawn_right + drawn_wrong), [0.025, 0.975]).tolist()
        rates.append((right / (right + wrong), interval) if right + wrong > 0 else None)
    return rates[0], rates[1]


def _kappas(labels: Labels) -> list[dict]:
    """Return [{raters: [a, b], n: sections that both labelled, agreement, kappa}] for each pair of raters with n > 0.

    kappa: Cohen's (1960, doi:10.1177/001316446002000104), None if both gave all sections the same verdict.
    """
    kappas = []
    for a, b in combinations(sorted(labels), 2):
        first, second = labels[a], labels[b]
        both = [key for key in first if key in second]
        if not both:
            continue
        n = len(both)
        observed = sum(first[key] == second[key] for key in both) / n
        p, q = (sum(rater[key] for key in both) / n for rater in (first, second))
        chance = p * q + (1 - p) * (1 - q)
        kappa = (observed - chance) / (1 - chance) if chance < 1 else None
        kappas.append({"raters": [a or "no name", b or "no name"], "n": n, "agreement": observed, "kappa": kappa})
    return kappas
