"""Compare runs on the dialogues that they have in common."""

from collections import Counter
from itertools import combinations

from evaluation.run.records import QUESTIONS
from evaluation.scoring.intervals import newcombe, paired_mean
from evaluation.scoring.judgements import fail_by_form, sort_judgements
from evaluation.scoring.statements import NoteStatements, statement_figures, strict_statements
from prompts import SECTIONS

# Keys of results.json that must be equal for verdicts to be comparable, with their names in a message.
_MUST_MATCH = {"dataset_hash": "data", "prompts_hash": "prompts", "judge_hash": "judge or judge's settings"}

# (index, hash of the dialogue) -> section -> verdict
Verdicts = dict[tuple[int, str], dict[str, str]]


def compare_runs(runs: list[dict]) -> dict:
    """Compare two or more runs, each {"name", "results", "predictions", "judgements"}.

    Returns
      names: [name]; n: [n of each run]
      sections: {S: {"accuracy": [of each run], "ci95": [...], "best": [positions of the highest accuracy]}}
      mean: the same keys
      pairs: every two runs, in order: {a, b: positions in names; n: dialogues in both;
          sections: {S: {n: dialogues scored in both, unscored: dialogues left out, difference: accuracy of b - of a
                         on the n, ci95, only_a, only_b: passes of one alone, p: exact McNemar, two-sided,
                         p_holm: p corrected for the four sections}};
          mean: {n, difference, ci95, p: paired permutation test, two-sided}, on the dialogues with all sections
              scored in both. This p is the main test and needs no correction;
          lenient_mean: the same keys, by lenient reading: with the judge's verdicts on lenient notes, which all other
              figures count as failed. None if no run has lenient notes;
          flips: [{index, section, from: verdict in a, to: verdict in b}], for each changed verdict}
          A difference, its interval, p and p_holm are None if no dialogue is scored in both.
      statements: None unless all runs have statements, otherwise
          threshold: the log odds from which a statement counts as yes, in all runs
          sections, mean, pairs: as above, by the statements' verdicts
          covered, supported: {sections: {S: {share, ci95: [of each run]}}, mean: {share, ci95}}
          pairs[k]["covered"], ["supported"]: {n: notes with such statements in both, difference: mean over these notes
              of the shares of b - those of a, each note's share being the mean over its sections, ci95 and p: paired t}
    Raises ValueError, naming the difference, if the data, prompts or judges differ.
    """
    if len(runs) < 2:
        raise ValueError("a comparison needs two runs or more")
    for run in runs[1:]:
        _check_comparable(runs[0], run)
    results = [run["results"] for run in runs]
    lenient = [_note_verdicts(run, is_strict=False) for run in runs]
    strict = [_note_verdicts(run, is_strict=True) for run in runs]
    has_lenient = any(prediction["status"] == "lenient" for run in runs for prediction in run["predictions"])
    return {
        "names": [run["name"] for run in runs],
        "n": [result["n"] for result in results],
        "sections": {section: _rates([result["sections"][section] for result in results]) for section in SECTIONS},
        "mean": _rates([result["mean"] for result in results]),
        "pairs": [
            {"a": a, "b": b}
            | _compare_pair(strict[a], strict[b], runs[a]["name"], runs[b]["name"])
            | {"lenient_mean": _mean_difference(_pair(lenient[a], lenient[b])) if has_lenient else None}
            for a, b in combinations(range(len(runs)), 2)
        ],
        "statements": compare_statements(runs),
    }


def compare_statements(runs: list[dict]) -> dict | None:
    """Compare runs by their statements, as `compare_runs` describes.

    Each run also has {"statements": NoteStatements, "threshold": theirs, the same in all runs}. Return None if one has
    no statements.
    """
    if not all(run["results"].get("statements") for run in runs):
        return None
    of_runs = [_strict_statements(run) for run in runs]
    scores = [statement_figures(notes, list(notes), set(notes)) for notes in of_runs]
    verdicts = [_statement_verdicts(run, notes) for run, notes in zip(runs, of_runs, strict=True)]
    names = [run["name"] for run in runs]
    pairs = []
    for a, b in combinations(range(len(runs)), 2):
        pair = {"a": a, "b": b} | _compare_pair(verdicts[a], verdicts[b], names[a], names[b])
        shared = [index for index, _ in verdicts[a].keys() & verdicts[b].keys()]
        for name in QUESTIONS:
            pair[name] = _share_difference(*(_note_shares(of_runs[side], name, shared) for side in (a, b)))
        pairs.append(pair)
    return {
        "threshold": runs[0]["threshold"],
        "sections": {section: _rates([score["sections"][section] for score in scores]) for section in SECTIONS},
        "mean": _rates([score["mean"] for score in scores]),
        "pairs": pairs,
        **{name: _shares(scores, name) for name in QUESTIONS},
    }


def _strict_statements(run: dict) -> NoteStatements:
    """Return the statements of all of a run's notes, by strict reading."""
    indices = [prediction["index"] for prediction in run["predictions"]]
    readable = {prediction["index"] for prediction in run["predictions"] if prediction["status"] == "ok"}
    table = strict_statements(run["statements"], indices, readable)
    return {index: dict(zip(SECTIONS, row, strict=True)) for index, row in zip(indices, table, strict=True)}


def _statement_verdicts(run: dict, notes: NoteStatements) -> Verdicts:
    return {
        (prediction["index"], prediction["dialogue_hash"]): {
            section: cell.verdict for section, cell in notes[prediction["index"]].items()
        }
        for prediction in run["predictions"]
    }


def _shares(scores: list[dict], name: str) -> dict:
    def of_runs(entries: list[dict]) -> dict:
        return {key: [entry[name][key] for entry in entries] for key in ("share", "ci95")}

    sections = {section: of_runs([score["sections"][section] for score in scores]) for section in SECTIONS}
    return {"sections": sections, "mean": of_runs([score["mean"] for score in scores])}


def _note_shares(notes: NoteStatements, name: str, indices: list[int]) -> dict[int, float]:
    """Return {index: mean over the note's sections of the share of yes}, for the notes with answers."""
    shares = {}
    for index in indices:
        answers = [getattr(cell, name) for cell in notes.get(index, {}).values()]
        if of_sections := [answer.yes / answer.answered for answer in answers if answer.answered]:
            shares[index] = sum(of_sections) / len(of_sections)
    return shares


def _share_difference(first: dict[int, float], second: dict[int, float]) -> dict:
    from scipy.stats import ttest_1samp

    differences = [second[index] - share for index, share in sorted(first.items()) if index in second]
    n = len(differences)
    if n < 2:
        return {"n": n, "difference": None, "ci95": None, "p": None}
    mean = sum(differences) / n
    if len(set(differences)) == 1:  # as when both runs are the same: t is undefined, so count the swaps of sides
        interval, p = paired_mean(differences, top=1), 1.0 if mean == 0 else 2.0 ** (1 - n)
        return {"n": n, "difference": mean, "ci95": interval, "p": p}
    test = ttest_1samp(differences, 0)
    low, high = map(float, test.confidence_interval())
    return {"n": n, "difference": mean, "ci95": [max(-1.0, low), min(1.0, high)], "p": float(test.pvalue)}


def _check_comparable(first: dict, other: dict) -> None:
    for key, name in _MUST_MATCH.items():
        for run in (first, other):
            if key not in run["results"]:
                raise ValueError(f"{run['name']}: results.json has no {key}; another version wrote it, score it again")
        values = [run["results"][key] for run in (first, other)]
        if values[0] != values[1]:
            judges = [run["results"]["judge_model"] for run in (first, other)]
            shown = judges if key == "judge_hash" and judges[0] != judges[1] else values
            raise ValueError(
                f"{first['name']} and {other['name']} cannot be compared: different {name} ({', '.join(shown)})"
            )


def _rates(figures: list[dict]) -> dict:
    accuracy = [entry["accuracy"] for entry in figures]
    best = [position for position, rate in enumerate(accuracy) if rate == max(accuracy)]
    return {"accuracy": accuracy, "ci95": [entry["ci95"] for entry in figures], "best": best}


def _note_verdicts(run: dict, is_strict: bool) -> Verdicts:
    """Return the verdicts on a run's notes; by strict reading, all sections of lenient notes fail."""
    notes, _, _ = sort_judgements(run["judgements"], {prediction["index"] for prediction in run["predictions"]})
    if is_strict:
        notes = fail_by_form(notes, {note["index"] for note in run["predictions"] if note["status"] == "lenient"})
    return {
        (prediction["index"], prediction["dialogue_hash"]): {
            section: verdict for section, (verdict, _) in notes.get(prediction["index"], {}).items()
        }
        for prediction in run["predictions"]
    }


def _compare_pair(first: Verdicts, second: Verdicts, first_name: str, second_name: str) -> dict:
    shared = [key for key in first if key in second]
    if not shared:
        raise ValueError(f"{first_name} and {second_name} have no dialogue in common")
    sections, flips = {}, []
    for section in SECTIONS:
        verdicts = [(key[0], first[key].get(section), second[key].get(section)) for key in shared]
        scored = [(index, a, b) for index, a, b in verdicts if {a, b} <= {"pass", "fail"}]
        sections[section] = _paired_figures([(a, b) for _, a, b in scored]) | {"unscored": len(shared) - len(scored)}
        flips += [{"index": index, "section": section, "from": a, "to": b} for index, a, b in scored if a != b]
    for section, p in _holm({section: figures["p"] for section, figures in sections.items()}).items():
        sections[section]["p_holm"] = p
    mean = _mean_difference(_pair(first, second))
    return {"n": len(shared), "sections": sections, "mean": mean, "flips": flips}


def _pair(first: Verdicts, second: Verdicts) -> list[tuple[dict[str, str], dict[str, str]]]:
    """Return the verdicts of both runs on each dialogue that they share."""
    return [(first[key], second[key]) for key in first if key in second]


def _paired_figures(verdicts: list[tuple[str, str]]) -> dict:
    """Return the difference of two pass rates on the same dialogues, Newcombe's interval and McNemar's exact test."""
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
        "p": float(binomtest(only_b, flipped).pvalue) if flipped else 1.0,  # McNemar's exact test
    }


def _holm(p_values: dict[str, float | None]) -> dict[str, float | None]:
    """Correct p-values for multiple tests (Holm 1979, Scandinavian Journal of Statistics 6:65); None stays None.

    The probability that any section without a true difference gets a corrected p below 0.05 is at most 5%.
    """
    in_order = sorted((p, name) for name, p in p_values.items() if p is not None)
    corrected, largest = dict(p_values), 0.0
    for rank, (p, name) in enumerate(in_order):
        largest = max(largest, min(1.0, (len(in_order) - rank) * p))
        corrected[name] = largest
    return corrected


def _mean_difference(pairs: list[tuple[dict[str, str], dict[str, str]]]) -> dict:
    """Return the difference of the mean accuracies on the dialogues with all sections scored in both runs."""
    differences = [
        sum((b[section] == "pass") - (a[section] == "pass") for section in SECTIONS)
        for a, b in pairs
        if {verdicts.get(section) for verdicts in (a, b) for section in SECTIONS} <= {"pass", "fail"}
    ]
    n, top = len(differences), len(SECTIONS)
    if n == 0:
        return {"n": 0, "difference": None, "ci95": None, "p": None}
    return {
        "n": n,
        "difference": sum(differences) / (n * top),
        "ci95": paired_mean(differences),
        "p": _permutation_test(differences),
    }


def _permutation_test(differences: list[int]) -> float:
    """Return p for a mean difference of 0: how often swapping the runs on some notes gives one at least as far from 0.

    All swaps are counted if at most 13 notes changed. Otherwise 9,999 random ones are, and p is at least 0.0002.
    """
    import numpy as np
    from scipy.stats import permutation_test

    # Swapping unchanged notes has no effect. Sorting makes p independent of the order of the records.
    changed = sorted(difference for difference in differences if difference)
    if len(changed) < 2:
        return 1.0
    test = permutation_test(
        (changed,),
        lambda signed, axis: np.sum(signed, axis=axis),
        permutation_type="samples",
        vectorized=True,
        batch=1000,  # bounds the memory
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)
