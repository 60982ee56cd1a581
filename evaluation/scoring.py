"""Records to figures: rates with intervals, the judge's trustworthiness, paired comparisons. No files, no models."""

from evaluation.judge import Record, Row


def score_run(
    predictions: list[Record],
    judgements: list[Record],
    rows: list[Row],
    human_labels: list[dict] | None = None,
) -> dict:
    """All figures of a run.

    predictions, judgements: lines of the two JSONL files, controls and attacks among the judgements.
    rows: the dataset; `rows[prediction["index"]]` holds dialogue, S, O, A, P.
    human_labels: [{"index", "section", "verdict": "pass"|"fail"}], people's verdicts on the same judgements.

    Returns
      n, valid_notes: counts; finish_reasons: {reason: count}
      sections: {S: {pass, fail, unscored: counts; accuracy: pass / n; ci95: Wilson; worst, best: accuracy if all
          unscored failed / passed; rougeL: mean F-measure over all n, invalid notes 0}}
      mean: {accuracy, ci95}: mean over the sections, bootstrap over whole notes
      judge_controls: None without controls, else {S: trust}, trust = {sensitivity, sensitivity_ci95, specificity,
          specificity_ci95 (None where n_good or n_bad is 0), n_good, n_bad, by_kind: {kind: {expected, n, right,
          unscored, rate, ci95}}, informative: bool, corrected_accuracy, corrected_ci95 (None unless informative)}
      human_labels: None without labels, else {S: trust} with people's verdicts as the truth, by_kind {}, and
          agreement: share of labelled judgements where judge and people agree
      attacks: None without attacks, else {n, passed, unscored, success_rate, ci95, by_kind: {name: {the same}}}
    All rates are 0 to 1, all intervals [low, high] at 95%.
    Raises ValueError for records that contradict each other or labels that fit no judgement.
    """
    raise NotImplementedError


def compare_runs(runs: list[dict]) -> dict:
    """Two or more runs, [{"name", "results", "predictions", "judgements"}], on the dialogues that they share.

    Returns
      names: [name]; n: [n of each run]
      sections: {S: {"accuracy": [of each run], "ci95": [...], "best": [positions of the highest accuracy]}}
      mean: the same keys
      pairs: every two runs, first ones first: {a, b: positions in names; n: dialogues that both have;
          sections: {S: {n: pairs scored in both, unscored: pairs left out, difference: accuracy of b - of a on the n,
                         ci95, only_a, only_b: passes of one alone, p: exact McNemar, two-sided}};
          mean: {n, difference, ci95};
          flips: [{index, section, from: verdict in a, to: verdict in b}]}
    Raises ValueError, with the difference named, for runs on other data, prompts or judges.
    """
    raise NotImplementedError
