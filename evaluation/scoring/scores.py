"""Score one run: pass rates with intervals, ROUGE-L, and the checks of its judge.

All rates are 0 to 1. The order of the records changes no figure.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from common.dataset import Rows
from evaluation.run.records import Judgement, Prediction, note_hash
from evaluation.scoring import people, trust
from evaluation.scoring.intervals import bootstrap_mean, wilson
from evaluation.scoring.judgements import SectionKey, sort_judgements
from prompts import SECTIONS


def score_run(
    predictions: Iterable[Prediction],
    judgements: Iterable[Judgement],
    rows: Rows,
    human_labels: list[dict] | None = None,
) -> dict:
    """Compute all figures of a run.

    predictions, judgements: the records in any order; the judgements include controls and attacks. Both are read once,
        and the texts of notes and verdicts are not kept. A section without a judgement counts as unscored.
    rows: the dataset; `rows[prediction["index"]]` holds dialogue, S, O, A, P.
    human_labels: people's verdicts on the same notes, as for `people.read_labels`.

    Returns
      n, valid_notes: counts; finish_reasons: {reason: count}
      sections: {S: {pass, fail, unscored: counts; accuracy: pass / n; ci95: Wilson; worst, best: accuracy if all
          unscored failed / passed; rougeL: mean F-measure over all n, without stemming, 0 for an invalid note;
          rougeL_readable: the same over the valid notes, None if there are none}}
      mean: {accuracy, ci95}: mean over the sections, bootstrap over whole notes
      judge_controls, judge_controls_all: None without controls, else `trust.check_against_controls`
      human_labels, human_labels_all: None without labels, else `people.check_against_people`
      attacks: None without attacks, else `trust.count_attacks`
    Raises ValueError for records that contradict each other, LabelError for labels that do not fit the run.
    """
    labelled = {
        (label["index"], label["section"])
        for label in human_labels or ()
        if isinstance(label, dict) and isinstance(label.get("index"), int) and isinstance(label.get("section"), str)
    }
    texts = read_notes(predictions, rows, labelled)
    n = len(texts.indices)
    notes, controls, attacks = sort_judgements(judgements, set(texts.indices))
    verdicts = {
        section: [notes.get(index, {}).get(section, ("unscored", ""))[0] for index in texts.indices]
        for section in SECTIONS
    }
    passes = [note.count("pass") for note in zip(*verdicts.values(), strict=True)]
    by_controls = by_people = None, None
    if controls:
        by_controls = trust.check_against_controls(controls, notes)
    if human_labels:
        labels = people.read_labels(human_labels, notes, texts.hashes)
        by_people = people.check_against_people(labels, notes, sorted(texts.indices), texts.without_text)
    return {
        "n": n,
        "valid_notes": texts.valid,
        "finish_reasons": dict(sorted(texts.finish_reasons.items())),
        "sections": {
            section: _section_figures(verdicts[section], texts.rouge[section], texts.valid) for section in SECTIONS
        },
        "mean": {"accuracy": sum(passes) / (len(SECTIONS) * n), "ci95": bootstrap_mean(passes)},
        "judge_controls": by_controls[0],
        "judge_controls_all": by_controls[1],
        "human_labels": by_people[0],
        "human_labels_all": by_people[1],
        "attacks": trust.count_attacks(attacks) if attacks else None,
    }


class NoteTexts(NamedTuple):
    """The data on the notes that scoring keeps. rouge: ROUGE-L of each section, in the order of the indices."""

    indices: list[int]
    valid: int
    finish_reasons: Counter[str]
    rouge: dict[str, list[float]]
    without_text: set[SectionKey]
    hashes: dict[SectionKey, str]


def read_notes(predictions: Iterable[Prediction], rows: Rows, to_hash: Iterable[SectionKey] = ()) -> NoteTexts:
    """Read the notes once, and compute the `note_hash` of the sections in `to_hash`.

    Raises ValueError if there are no predictions.
    """
    to_hash = set(to_hash)
    texts = NoteTexts([], 0, Counter(), {section: [] for section in SECTIONS}, set(), {})
    valid, rouge_l = 0, _rouge_l()
    for prediction in predictions:
        index, is_valid = prediction["index"], prediction["status"] == "ok"
        row = rows[index]
        texts.indices.append(index)
        texts.finish_reasons[prediction["finish_reason"]] += 1
        valid += is_valid
        for section in SECTIONS:
            text = (prediction[section] or "") if is_valid else ""
            texts.rouge[section].append(rouge_l(row[section], text) if is_valid else 0.0)
            if not text.strip():
                texts.without_text.add((index, section))
            if (index, section) in to_hash:
                texts.hashes[index, section] = note_hash(text)
    if not texts.indices:
        raise ValueError("there are no predictions to score")
    return texts._replace(valid=valid)


def _section_figures(verdicts: list[str], rouge: list[float], valid: int) -> dict:
    n, count = len(verdicts), Counter(verdicts)
    total_rouge = math.fsum(rouge)  # exact, so independent of the order; invalid notes add 0
    return {
        "pass": count["pass"],
        "fail": count["fail"],
        "unscored": count["unscored"],
        "accuracy": count["pass"] / n,
        "ci95": wilson(count["pass"], n),
        "worst": count["pass"] / n,
        "best": (count["pass"] + count["unscored"]) / n,
        "rougeL": total_rouge / n,
        "rougeL_readable": total_rouge / valid if valid else None,
    }


def _rouge_l() -> Callable[[str, str], float]:
    """Return a function that computes ROUGE-L's F-measure of (reference, prediction), in about 1 ms for 80 words.

    The library's time and memory grow with the product of the lengths, so only the first 20,000 characters count.
    It sees only the letters a-z and digits, so text in another script scores 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return lambda reference, prediction: scorer.score(reference[:20_000], prediction[:20_000])["rougeL"].fmeasure
