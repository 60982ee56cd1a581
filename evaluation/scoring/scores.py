"""Score one run: pass rates with intervals, ROUGE-L, and the checks of its judge.

All rates are 0 to 1. The same records give the same figures, in whatever order they come.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable

from common.dataset import Rows
from evaluation.run.records import Judgement, Prediction
from evaluation.scoring import trust
from evaluation.scoring.intervals import bootstrap_mean, wilson
from evaluation.scoring.judgements import sort_judgements
from prompts import SECTIONS


def score_run(
    predictions: Iterable[Prediction],
    judgements: Iterable[Judgement],
    rows: Rows,
    human_labels: list[dict] | None = None,
) -> dict:
    """Compute all figures of a run.

    predictions, judgements: the records in any order, controls and attacks among the judgements. Both are read once,
        and no text of a note or verdict is kept. A section without a judgement counts as unscored.
    rows: the dataset; `rows[prediction["index"]]` holds dialogue, S, O, A, P.
    human_labels: [{"index", "section", "verdict": "pass" or "fail"}], people's verdicts on the same notes.

    Returns
      n, valid_notes: counts; finish_reasons: {reason: count}
      sections: {S: {pass, fail, unscored: counts; accuracy: pass / n; ci95: Wilson; worst, best: accuracy if all
          unscored failed / passed; rougeL: mean F-measure over all n, without stemming, 0 for an invalid note;
          rougeL_readable: the same over the valid notes, None without any}}
      mean: {accuracy, ci95}: mean over the sections, bootstrap over whole notes
      judge_controls: None without controls, else {S: figures of `trust.check_against_controls`}
      human_labels: None without labels, else {S: figures of `trust.check_against_people`}
      attacks: None without attacks, else the figures of `trust.count_attacks`
    Raises ValueError for records that contradict each other and for labels that match no judgement.
    """
    indices, valid, finish_reasons, rouge = read_notes(predictions, rows)
    n = len(indices)
    notes, controls, attacks = sort_judgements(judgements, set(indices))
    verdicts = {
        section: [notes.get(index, {}).get(section, ("unscored", ""))[0] for index in indices] for section in SECTIONS
    }
    passes = [note.count("pass") for note in zip(*verdicts.values(), strict=True)]
    return {
        "n": n,
        "valid_notes": valid,
        "finish_reasons": dict(sorted(finish_reasons.items())),
        "sections": {section: _section_figures(verdicts[section], rouge[section], valid) for section in SECTIONS},
        "mean": {"accuracy": sum(passes) / (len(SECTIONS) * n), "ci95": bootstrap_mean(passes)},
        "judge_controls": trust.check_against_controls(controls, notes, n) if controls else None,
        "human_labels": trust.check_against_people(human_labels, notes, n) if human_labels else None,
        "attacks": trust.count_attacks(attacks) if attacks else None,
    }


def read_notes(
    predictions: Iterable[Prediction], rows: Rows
) -> tuple[list[int], int, Counter[str], dict[str, list[float]]]:
    """Return (indices, number of valid notes, finish reasons, ROUGE-L of each section in the order of the indices).

    Raises ValueError if there is no prediction.
    """
    indices, valid, finish_reasons = [], 0, Counter()
    rouge = {section: [] for section in SECTIONS}
    rouge_l = _rouge_l()
    for prediction in predictions:
        row, is_valid = rows[prediction["index"]], prediction["status"] == "ok"
        indices.append(prediction["index"])
        finish_reasons[prediction["finish_reason"]] += 1
        valid += is_valid
        for section in SECTIONS:
            rouge[section].append(rouge_l(row[section], prediction[section]) if is_valid else 0.0)
    if not indices:
        raise ValueError("there are no predictions to score")
    return indices, valid, finish_reasons, rouge


def _section_figures(verdicts: list[str], rouge: list[float], valid: int) -> dict:
    n, count = len(verdicts), Counter(verdicts)
    total_rouge = math.fsum(rouge)  # the same in any order; invalid notes add 0
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
    """Return a function of (reference, prediction) that gives ROUGE-L's F-measure, in about 1 ms for 80 words.

    The library's time and memory grow with the product of the lengths, so only the first 20,000 characters count.
    It recognizes only the letters a-z and digits: text in another script scores 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return lambda reference, prediction: scorer.score(reference[:20_000], prediction[:20_000])["rougeL"].fmeasure
