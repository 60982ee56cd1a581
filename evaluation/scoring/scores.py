"""Records to figures: rates with intervals, the judge's trustworthiness, paired comparisons. No files, no models.

All rates are 0 to 1, all intervals [low, high] at 95%. The same records always give the same figures.
"""

import math
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from itertools import combinations

import numpy as np

from evaluation.judging.judge import Record, Row, record_key
from prompts import SECTIONS

Ruling = tuple[str, str]  # (verdict, source)
Plain = dict[int, dict[str, Ruling]]  # index -> section -> ruling: no text of a judgement is kept
Share = tuple[int, int]  # (successes, trials)
Interval = list[float]
Rates = float | np.ndarray

DRAWS = 10_000  # resamples, or draws from a posterior; the ends of an interval then move by about 0.2% of probability


def score_run(
    predictions: Iterable[Record],
    judgements: Iterable[Record],
    rows: dict[int, Row] | list[Row],
    human_labels: list[dict] | None = None,
) -> dict:
    """All figures of a run.

    predictions, judgements: lines of the two JSONL files in any order, controls and attacks among the judgements; read
    once, and no text of theirs is kept. A section without a judgement counts as unscored.
    rows: the dataset; `rows[prediction["index"]]` holds dialogue, S, O, A, P.
    human_labels: [{"index", "section", "verdict": "pass"|"fail"}], people's verdicts on the same judgements.

    Returns
      n, valid_notes: counts; finish_reasons: {reason: count}
      sections: {S: {pass, fail, unscored: counts; accuracy: pass / n; ci95: Wilson; worst, best: accuracy if all
          unscored failed / passed; rougeL: mean F-measure over all n, without stemming, invalid notes 0;
          rougeL_readable: the same over the valid notes, None without any}}
      mean: {accuracy, ci95}: mean over the sections, bootstrap over whole notes
      judge_controls: None without controls, else {S: trust}, see `_trust`, and by_kind: {kind: {expected, n, right,
          unscored, rate: right / (n - unscored), ci95}}
      human_labels: None without labels, else {S: trust} with people's verdicts as the truth, by_kind {}, and
          agreement: share of labelled verdicts of the judge that are people's too (None without any)
      attacks: None without attacks, else {n, passed, unscored, success_rate: passed / n, ci95, by_kind: {name: same}}
    Raises ValueError for records that contradict each other or labels that fit no judgement.
    """
    indices, valid, finish_reasons, rouge = read_notes(predictions, rows)
    plain, controls, attacks = _sort_out(judgements, set(indices))
    verdicts = {
        section: [plain.get(index, {}).get(section, ("unscored", ""))[0] for index in indices] for section in SECTIONS
    }
    passes = [sum(verdict == "pass" for verdict in note) for note in zip(*verdicts.values(), strict=True)]
    return {
        "n": len(indices),
        "valid_notes": valid,
        "finish_reasons": dict(sorted(finish_reasons.items())),
        "sections": {section: _section(verdicts[section], rouge[section], valid) for section in SECTIONS},
        "mean": {"accuracy": sum(passes) / (len(SECTIONS) * len(passes)), "ci95": bootstrap_mean(passes)},
        "judge_controls": _against_controls(controls, plain, len(indices)) if controls else None,
        "human_labels": _against_people(human_labels, plain, len(indices)) if human_labels else None,
        "attacks": _attacks(attacks) if attacks else None,
    }


def read_notes(
    predictions: Iterable[Record], rows: dict[int, Row] | list[Row]
) -> tuple[array, int, Counter, dict[str, array]]:
    """(indices, number of valid notes, finish reasons, ROUGE-L of each section). Raises ValueError without any."""
    indices, finish_reasons, valid = array("q"), Counter(), 0
    rouge = {section: array("d") for section in SECTIONS}
    score = _rouge_l()
    for prediction in predictions:
        indices.append(prediction["index"])
        finish_reasons[prediction["finish_reason"]] += 1
        valid += prediction["status"] == "ok"
        row = rows[prediction["index"]]
        for section in SECTIONS:
            rouge[section].append(score(row[section], prediction[section]) if prediction["status"] == "ok" else 0.0)
    if not indices:
        raise ValueError("there are no predictions to score")
    return indices, valid, finish_reasons, rouge


def _sort_out(judgements: Iterable[Record], indices: set[int]) -> tuple[Plain, list[Record], list[Record]]:
    """(plain ones, controls, attacks). Raises ValueError for a judgement twice or without its prediction."""
    plain: Plain = {}
    controls, attacks, known = [], [], set()
    for record in judgements:
        key = index, section, kind, attack = record_key(record)
        if key in known or (not kind and not attack and section in plain.get(index, ())):
            what = f" as {kind or attack}" if kind or attack else ""
            raise ValueError(f"row {index}, section {section} is judged twice{what}")
        if kind or attack:
            known.add(key)
            (controls if kind else attacks).append(record)
        elif index in indices:
            plain.setdefault(index, {})[sys.intern(section)] = _ruling(record["verdict"], record["source"])
        else:
            raise ValueError(f"row {index}, section {section} is judged but has no prediction")
    for records in (controls, attacks):  # the order in which answers came must show nowhere
        records.sort(key=lambda record: [str(part) for part in record_key(record)])
    return plain, controls, attacks


@cache
def _ruling(verdict: str, source: str) -> Ruling:
    """One object for all judgements alike."""
    return verdict, source


# --- rates -----------------------------------------------------------------------------------------------------------


def _section(verdicts: list[str], rouge: Iterable[float], valid: int) -> dict:
    n, count = len(verdicts), Counter(verdicts)
    return {
        "pass": count["pass"],
        "fail": count["fail"],
        "unscored": count["unscored"],
        "accuracy": count["pass"] / n,
        "ci95": wilson(count["pass"], n),
        "worst": count["pass"] / n,
        "best": (count["pass"] + count["unscored"]) / n,
        "rougeL": math.fsum(rouge) / n,  # the same in any order
        "rougeL_readable": math.fsum(rouge) / valid if valid else None,  # the others' are 0
    }


def wilson(successes: int, n: int) -> Interval:
    """Wilson's score interval for a share, n > 0."""
    from scipy.stats import binomtest

    return [float(end) for end in binomtest(successes, n).proportion_ci(method="wilson")]


def bootstrap_mean(passes: list[int], floor: int = 0) -> Interval:
    """Bayesian bootstrap over whole notes for the mean accuracy (or a difference of it).

    passes: sections passed in each note, `floor` to 4; whole notes, because verdicts on one note hang together.
    The notes' weights are drawn from a Dirichlet distribution (Rubin 1981, doi:10.1214/aos/1176345338), with half a
    note more at both ends, as in Jeffreys' prior: notes that are all alike do not show that others cannot come.
    """
    top, count = len(SECTIONS), Counter(passes)
    values = np.arange(floor, top + 1)
    notes = np.array([count[value] for value in values.tolist()], dtype=float)
    notes[[0, -1]] += 0.5
    means = np.random.default_rng(0).dirichlet(notes, size=DRAWS) @ values / top
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    estimate = sum(passes) / (len(passes) * top)
    return [min(low, estimate), max(high, estimate)]


def _rouge_l() -> Callable[[str, str], float]:
    """A function of reference and prediction: the F-measure. About 1 ms for a section of 80 words.

    Time and memory of the library grow with the product of the lengths, so only the first 20,000 characters count.
    It knows the letters a-z and digits only: text in another script scores 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return lambda reference, text: scorer.score(reference[:20_000], text[:20_000])["rougeL"].fmeasure


# --- the judge's trustworthiness -------------------------------------------------------------------------------------


def _against_controls(controls: list[Record], plain: Plain, n: int) -> dict[str, dict]:
    by_section = {}
    for section in SECTIONS:
        records = [record for record in controls if record["section"] == section]
        verdicts = {"pass": Counter(), "fail": Counter()}
        by_kind: dict[str, Counter] = {}
        expected = {}
        for record in records:
            kind, right = record["control"]["kind"], record["control"]["expected"]
            verdicts[right][record["verdict"]] += 1
            expected[kind] = right
            by_kind.setdefault(kind, Counter())[record["verdict"]] += 1
        by_section[section] = _trust(verdicts["pass"], verdicts["fail"], _plain_count(plain, section), n) | {
            "by_kind": {kind: _kind(count, expected[kind]) for kind, count in by_kind.items()}
        }
    return by_section


def _kind(count: Counter, expected: str) -> dict:
    right, scored = count[expected], count["pass"] + count["fail"]
    return {
        "expected": expected,
        "n": count.total(),
        "right": right,
        "unscored": count["unscored"],
        "rate": right / scored if scored else None,
        "ci95": wilson(right, scored) if scored else None,
    }


def _against_people(labels: list[dict], plain: Plain, n: int) -> dict[str, dict]:
    truth = _read_labels(labels, plain)
    by_section = {}
    for section in SECTIONS:
        verdicts = {"pass": Counter(), "fail": Counter()}
        for (index, of), label in truth.items():
            verdict, source = plain[index][of]
            if of == section and source == "judge":
                verdicts[label][verdict] += 1
        agreed = verdicts["pass"]["pass"] + verdicts["fail"]["fail"]
        scored = sum(count["pass"] + count["fail"] for count in verdicts.values())
        by_section[section] = _trust(verdicts["pass"], verdicts["fail"], _plain_count(plain, section), n) | {
            "by_kind": {},
            "agreement": agreed / scored if scored else None,
        }
    return by_section


def _read_labels(labels: list[dict], plain: Plain) -> dict[tuple[int, str], str]:
    """{(index, section): verdict}. Raises ValueError, with the label's number from 1, for one that cannot be used."""
    truth = {}
    for number, label in enumerate(labels, 1):
        if not isinstance(label, dict) or not {"index", "section", "verdict"} <= label.keys():
            raise ValueError(f"label {number}: needs index, section and verdict")
        key = label["index"], label["section"]
        if not isinstance(key[0], int) or not isinstance(key[1], str):
            raise ValueError(f"label {number}: the index must be a number and the section a letter")
        if label["verdict"] not in ("pass", "fail"):
            raise ValueError(f"label {number}: the verdict is {label['verdict']!r}, neither pass nor fail")
        if key[1] not in plain.get(key[0], ()):
            raise ValueError(f"label {number}: row {key[0]}, section {key[1]} is not among the judgements")
        if key in truth:
            raise ValueError(f"label {number}: row {key[0]}, section {key[1]} has a label already")
        truth[key] = label["verdict"]
    return truth


def _plain_count(plain: Plain, section: str) -> Counter:
    """How many plain judgements of the section are "pass", "fail" or "unscored" by the judge, or "fail by code"."""
    rulings = (note[section] for note in plain.values() if section in note)
    return Counter(f"{verdict} by code" if source == "code" else verdict for verdict, source in rulings)


def _trust(good: Counter, bad: Counter, judged: Counter, n: int) -> dict:
    """What verdicts on texts with known answers say about the judge, and about the section's accuracy.

    good, bad: counts of verdicts on texts that should pass, and should fail. Unscored ones count for neither rate.
    Returns n_good, n_bad: scored texts; sensitivity, specificity: shares of them passed and failed, with _ci95 (None
    where there are none); informative: good texts pass more often than bad ones, Fisher's exact test, one-sided at
    2.5%; corrected_accuracy, corrected_ci95: see `correct`, None unless informative, because a judge that passes both
    alike says nothing about the notes.
    """
    from scipy.stats import fisher_exact

    n_good, n_bad = good["pass"] + good["fail"], bad["pass"] + bad["fail"]
    table = [[good["pass"], good["fail"]], [bad["pass"], bad["fail"]]]
    informative = bool(fisher_exact(table, alternative="greater").pvalue < 0.025) if n_good and n_bad else False
    corrected, interval = None, None
    if informative:
        corrected, interval = correct(
            (judged["pass"], judged["pass"] + judged["fail"]),
            (judged["fail by code"], n),
            (good["pass"], n_good),
            (bad["fail"], n_bad),
        )
    return {
        "sensitivity": good["pass"] / n_good if n_good else None,
        "sensitivity_ci95": wilson(good["pass"], n_good) if n_good else None,
        "specificity": bad["fail"] / n_bad if n_bad else None,
        "specificity_ci95": wilson(bad["fail"], n_bad) if n_bad else None,
        "n_good": n_good,
        "n_bad": n_bad,
        "informative": informative,
        "corrected_accuracy": corrected,
        "corrected_ci95": interval,
    }


def correct(passed: Share, by_code: Share, sensitivity: Share, specificity: Share) -> tuple[float, Interval]:
    """(accuracy freed of the judge's errors, its interval), for a judge with sensitivity + specificity > 1.

    passed: passes among the notes that the judge scored; by_code: notes that code failed among all, which are no
    errors of the judge's; sensitivity, specificity: good texts passed among all good, bad ones failed among all bad.

    The estimate is that of Rogan and Gladen (1978, doi:10.1093/oxfordjournals.aje.a112510), cut to 0..1, times the
    share of notes left to the judge. For the interval each share is drawn from its posterior under Jeffreys' prior,
    independently, and the middle 95% of the resulting estimates taken, the way of Henrion's bootComb (2021,
    doi:10.1093/ije/dyab049). That it covers the truth is tested by simulation. Labels of people on the very notes that
    are scored are not independent of `passed`; the interval is then wider than it need be.
    """
    # Without a note failed by code there is no sign that any ever is.
    kept = 1 - _posterior(by_code, 0) if by_code[0] else 1.0
    drawn = [_posterior(share, stream) for stream, share in enumerate((passed, sensitivity, specificity), 1)]
    interval = np.quantile(kept * _rogan_gladen(*drawn), [0.025, 0.975]).tolist()
    rates = [hits / trials if trials else 0.0 for hits, trials in (passed, sensitivity, specificity)]
    return (1 - by_code[0] / by_code[1]) * float(_rogan_gladen(*rates)), interval


def _posterior(share: Share, stream: int) -> np.ndarray:
    """DRAWS from Beta(successes + 1/2, failures + 1/2), the same each time; other streams are independent."""
    successes, trials = share
    return np.random.default_rng(stream).beta(successes + 0.5, trials - successes + 0.5, DRAWS)


def _rogan_gladen(passed: Rates, sensitivity: Rates, specificity: Rates) -> Rates:
    """The estimate for rates or for arrays of drawn rates. A drawn judge worse than chance is sent to 0 or 1."""
    return np.clip((passed + specificity - 1) / np.maximum(sensitivity + specificity - 1, 1e-9), 0, 1)


def _attacks(attacks: list[Record]) -> dict:
    names = dict.fromkeys(record["attack"] for record in attacks)
    by_kind = {name: _attack([record for record in attacks if record["attack"] == name]) for name in names}
    return _attack(attacks) | {"by_kind": by_kind}


def _attack(records: list[Record]) -> dict:
    n, count = len(records), Counter(record["verdict"] for record in records)
    return {
        "n": n,
        "passed": count["pass"],
        "unscored": count["unscored"],
        "success_rate": count["pass"] / n,
        "ci95": wilson(count["pass"], n),
    }


# --- comparison ------------------------------------------------------------------------------------------------------

# What must be equal for two runs' verdicts to be comparable: key of results.json, and its name in a message.
_SAME = {"dataset_hash": "data", "prompts_hash": "prompts", "judge_hash": "judge or judge's settings"}


def compare_runs(runs: list[dict]) -> dict:
    """Two or more runs, [{"name", "results", "predictions", "judgements"}], on the dialogues that they share.

    Returns
      names: [name]; n: [n of each run]
      sections: {S: {"accuracy": [of each run], "ci95": [...], "best": [positions of the highest accuracy]}}
      mean: the same keys
      pairs: every two runs, first ones first: {a, b: positions in names; n: dialogues that both have;
          sections: {S: {n: pairs scored in both, unscored: pairs left out, difference: accuracy of b - of a on the n,
                         ci95, only_a, only_b: passes of one alone, p: exact McNemar, two-sided}};
          mean: {n, difference, ci95}, on the dialogues with all sections scored in both;
          flips: [{index, section, from: verdict in a, to: verdict in b}], passes of one alone}
          A difference, its interval and p are None where no pair is scored in both.
    Raises ValueError, with the difference named, for runs on other data, prompts or judges.
    """
    if len(runs) < 2:
        raise ValueError("a comparison needs two runs or more")
    for run in runs[1:]:
        _check_comparable(runs[0], run)
    results = [run["results"] for run in runs]
    plain = [_plain_verdicts(run) for run in runs]
    return {
        "names": [run["name"] for run in runs],
        "n": [result["n"] for result in results],
        "sections": {section: _column([result["sections"][section] for result in results]) for section in SECTIONS},
        "mean": _column([result["mean"] for result in results]),
        "pairs": [
            {"a": a, "b": b} | _pair(plain[a], plain[b], runs[a]["name"], runs[b]["name"])
            for a, b in combinations(range(len(runs)), 2)
        ],
    }


def _check_comparable(first: dict, other: dict) -> None:
    for key, name in _SAME.items():
        for run in (first, other):
            if key not in run["results"]:
                raise ValueError(f"{run['name']}: results.json has no {key}; another version wrote it, score it again")
        one, two = first["results"][key], other["results"][key]
        if one != two:
            judges = [run["results"]["judge_model"] for run in (first, other)]
            shown = judges if key == "judge_hash" and judges[0] != judges[1] else [one, two]
            raise ValueError(
                f"{first['name']} and {other['name']} cannot be compared: other {name} ({', '.join(shown)})"
            )


def _column(entries: list[dict]) -> dict:
    accuracy = [entry["accuracy"] for entry in entries]
    best = [position for position, value in enumerate(accuracy) if value == max(accuracy)]
    return {"accuracy": accuracy, "ci95": [entry["ci95"] for entry in entries], "best": best}


Verdicts = dict[tuple[int, str], dict[str, str]]  # (index, hash of the dialogue) -> section -> verdict


def _plain_verdicts(run: dict) -> Verdicts:
    plain, _, _ = _sort_out(run["judgements"], {prediction["index"] for prediction in run["predictions"]})
    return {
        (prediction["index"], prediction["dialogue_hash"]): {
            section: verdict for section, (verdict, _) in plain.get(prediction["index"], {}).items()
        }
        for prediction in run["predictions"]
    }


def _pair(first: Verdicts, second: Verdicts, *names: str) -> dict:
    shared = [key for key in first if key in second]
    if not shared:
        raise ValueError(f"{names[0]} and {names[1]} have no dialogue in common")
    sections, flips = {}, []
    for section in SECTIONS:
        verdicts = [(key[0], first[key].get(section), second[key].get(section)) for key in shared]
        scored = [(index, a, b) for index, a, b in verdicts if {a, b} <= {"pass", "fail"}]
        sections[section] = _paired([(a, b) for _, a, b in scored]) | {"unscored": len(shared) - len(scored)}
        flips += [{"index": index, "section": section, "from": a, "to": b} for index, a, b in scored if a != b]
    return {"n": len(shared), "sections": sections, "mean": _mean_difference(first, second, shared), "flips": flips}


def _paired(verdicts: list[tuple[str, str]]) -> dict:
    """Difference of two pass rates on the same notes, with Newcombe's interval and the exact McNemar test."""
    from scipy.stats import binomtest

    n, count = len(verdicts), Counter(verdicts)
    only_a, only_b = count["pass", "fail"], count["fail", "pass"]
    if n == 0:
        return {"n": 0, "difference": None, "ci95": None, "only_a": 0, "only_b": 0, "p": None}
    flipped = only_a + only_b
    return {
        "n": n,
        "difference": (only_b - only_a) / n,
        "ci95": newcombe(count["pass", "pass"], only_a, only_b, count["fail", "fail"]),
        "only_a": only_a,
        "only_b": only_b,
        "p": float(binomtest(only_b, flipped).pvalue) if flipped else 1.0,
    }


def newcombe(both: int, only_a: int, only_b: int, neither: int) -> Interval:
    """Interval for (only_b - only_a) / n from paired verdicts, n > 0.

    Method 10 of Newcombe, Statistics in Medicine 17:2635 (1998): Wilson's intervals of the two rates, joined with
    their correlation, which is corrected for continuity.
    """
    n = both + only_a + only_b + neither
    a, b = (both + only_a) / n, (both + only_b) / n
    (a_low, a_high), (b_low, b_high) = wilson(both + only_a, n), wilson(both + only_b, n)
    covariance = both * neither - only_a * only_b
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    correlation = (max(covariance - n / 2, 0) if covariance > 0 else covariance) / math.sqrt(margins) if margins else 0

    def distance(up: float, down: float) -> float:
        return math.sqrt(max(0.0, up**2 - 2 * correlation * up * down + down**2))

    return [b - a - distance(b - b_low, a_high - a), b - a + distance(b_high - b, a - a_low)]


def _mean_difference(first: Verdicts, second: Verdicts, shared: Iterable[tuple[int, str]]) -> dict:
    differences = []
    for key in shared:
        verdicts = [verdicts.get(section) for verdicts in (first[key], second[key]) for section in SECTIONS]
        if set(verdicts) <= {"pass", "fail"}:
            passed = [verdict == "pass" for verdict in verdicts]
            differences.append(sum(passed[len(SECTIONS) :]) - sum(passed[: len(SECTIONS)]))
    n, top = len(differences), len(SECTIONS)
    if n == 0:
        return {"n": 0, "difference": None, "ci95": None}
    return {"n": n, "difference": sum(differences) / (n * top), "ci95": bootstrap_mean(differences, floor=-top)}
