"""Score one run: pass rates with intervals, ROUGE-L, and the checks of its judge.

All rates are 0 to 1. The order of the records changes no figure.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from common.dataset import Rows
from evaluation.run.records import Judgement, Prediction, StatementRecord, note_hash
from evaluation.scoring import people, trust
from evaluation.scoring.intervals import share_of
from evaluation.scoring.judgements import (
    NoteVerdicts,
    SectionKey,
    fail_by_form,
    mean_rate,
    sort_judgements,
    verdict_rates,
)
from evaluation.scoring.slices import score_slices
from evaluation.scoring.statement_labels import check_statements, read_labels
from evaluation.scoring.statements import (
    NoteStatements,
    compare_instruments,
    read_statements,
    score_statements,
    statement_figures,
)
from prompts import SECTIONS


def score_run(
    predictions: Iterable[Prediction],
    judgements: Iterable[Judgement],
    rows: Rows,
    human_labels: list[dict] | None = None,
    statements: Iterable[StatementRecord] = (),
    by: tuple[str, Sequence[str]] | None = None,
) -> dict:
    """Compute all figures of a run.

    predictions, judgements: the records in any order; the judgements include controls and attacks. Both are read once,
        and the texts of notes and verdicts are not kept. A section without a judgement counts as unscored.
    rows: the dataset; `rows[prediction["index"]]` holds dialogue, S, O, A, P.
    human_labels: people's verdicts on the same notes, as for `people.read_labels`, or their answers on its statements,
        as for `statement_labels.read_labels`.
    statements: the answers on statements, in any order; read twice. They are scored if all sections have them.
    by: a column of the dataset as (name, value of each row), by which to score groups of dialogues.

    Returns
      n, valid_notes: counts; finish_reasons: {reason: count}
      sections: {S: {pass, fail, unscored: counts; accuracy: pass / n; ci95: Wilson; worst, best: accuracy if all
          unscored failed / passed; rougeL: mean F-measure over all n, without stemming, 0 for an unreadable note;
          accuracy_readable, ci95_readable, rougeL_readable: the same over the readable notes, None if there are none}}
      mean: {accuracy, ci95}: mean over the sections, bootstrap over whole notes
      lenient: None if no note is lenient, else {only_lenient: number of lenient notes; forms: {form: their number};
          valid_notes: ok and lenient notes; sections, mean, human_labels, human_labels_all, statements (its sections
          and mean): like the figures of these names outside, which are strict, so lenient notes fail in all sections}
      statements: None without statements, else `statements.score_statements`
      instruments: None without statements or controls, else `statements.compare_instruments`
      judge_controls, judge_controls_all: None without controls, else `trust.check_against_controls`, on all verdicts
          that the judge gave, those on lenient notes included
      human_labels, human_labels_all: None without verdicts by people, else `people.check_against_people`
      statement_labels: None without answers by people, else `statement_labels.check_statements`
      attacks: None without attacks, else `trust.count_attacks`
      slices: None without `by`, else `slices.score_slices`; tested by statements where these tell more
    Raises ValueError for records that contradict each other, LabelError for labels that do not fit the run.
    """
    texts = read_notes(predictions, rows, _labelled_sections(human_labels or []))
    notes, controls, attacks = sort_judgements(judgements, set(texts.indices))
    verdicts, on_statements = split_labels(human_labels or [])
    labels = people.read_labels(verdicts, notes, texts.hashes) if verdicts else None
    by_controls = trust.check_against_controls(controls, notes) if controls else (None, None)
    answers = read_statements(statements)
    by_people = None
    if on_statements:
        by_people = check_statements(*read_labels(on_statements, statements), answers.threshold)
    is_asked = sum(map(len, answers.notes.values())) == len(SECTIONS) * len(texts.indices)
    of_statements = answers.notes if is_asked else None
    instruments = compare_instruments(answers, controls) if is_asked else None
    slices = None
    if by:
        strict_notes = fail_by_form(notes, set(texts.forms))
        measure = "statements" if instruments and instruments["better"] == "statements" else "verdicts"
        slices = score_slices(*by, texts.indices, texts.strict, strict_notes, of_statements, measure)
    return {
        "n": len(texts.indices),
        "valid_notes": len(texts.strict),
        "finish_reasons": dict(sorted(texts.finish_reasons.items())),
        **note_figures(texts, notes, texts.strict, labels),
        "lenient": _lenient_figures(texts, notes, labels, of_statements) if texts.forms else None,
        "judge_controls": by_controls[0],
        "judge_controls_all": by_controls[1],
        "attacks": trust.count_attacks(attacks) if attacks else None,
        "statements": score_statements(answers, texts.indices, texts.strict) if is_asked else None,
        "statement_labels": by_people,
        "instruments": instruments,
        "slices": slices,
    }


def _labelled_sections(labels: list[dict]) -> set[SectionKey]:
    """Return the sections that labels name; `people.read_labels` reports those that name none."""
    return {
        (label["index"], label["section"])
        for label in labels
        if isinstance(label, dict) and isinstance(label.get("index"), int) and isinstance(label.get("section"), str)
    }


def split_labels(labels: list[dict]) -> tuple[list[dict], list[dict]]:
    """Return (verdicts on sections, answers on statements)."""
    verdicts, answers = [], []
    for label in labels:
        (answers if isinstance(label, dict) and "answer" in label else verdicts).append(label)
    return verdicts, answers


class NoteTexts(NamedTuple):
    """The data on the notes that scoring keeps."""

    indices: list[int]
    strict: set[int]  # notes in the JSON form
    forms: dict[int, str]  # index -> form of each lenient note
    finish_reasons: Counter[str]
    rouge: dict[str, dict[int, float]]  # section -> index -> ROUGE-L of each strict or lenient note
    without_text: set[SectionKey]
    hashes: dict[SectionKey, str]


def read_notes(predictions: Iterable[Prediction], rows: Rows, to_hash: Iterable[SectionKey] = ()) -> NoteTexts:
    """Read the notes once, and compute the `note_hash` of the sections in `to_hash`.

    Raises ValueError if there are no predictions.
    """
    to_hash = set(to_hash)
    texts = NoteTexts([], set(), {}, Counter(), {section: {} for section in SECTIONS}, set(), {})
    rouge_l = _rouge_l()
    for prediction in predictions:
        index, status = prediction["index"], prediction["status"]
        texts.indices.append(index)
        texts.finish_reasons[prediction["finish_reason"]] += 1
        if status == "ok":
            texts.strict.add(index)
        elif status == "lenient":
            texts.forms[index] = prediction["form"]
        for section in SECTIONS:
            text = (prediction[section] or "") if status in ("ok", "lenient") else ""
            if status in ("ok", "lenient"):
                texts.rouge[section][index] = rouge_l(rows[index][section], text)
            if not text.strip():
                texts.without_text.add((index, section))
            if (index, section) in to_hash:
                texts.hashes[index, section] = note_hash(text)
    if not texts.indices:
        raise ValueError("there are no predictions to score")
    return texts


def note_figures(texts: NoteTexts, notes: NoteVerdicts, readable: set[int], labels: people.Labels | None) -> dict:
    """Return {sections, mean, human_labels, human_labels_all} if only the notes in `readable` count as readable.

    The lenient notes that are not in `readable` fail in all sections, and people's labels on them are left out.
    """
    unread = texts.forms.keys() - readable
    notes = fail_by_form(notes, unread)
    verdicts = {
        section: {index: notes.get(index, {}).get(section, ("unscored", ""))[0] for index in texts.indices}
        for section in SECTIONS
    }
    passes = [sum(verdicts[section][index] == "pass" for section in SECTIONS) for index in texts.indices]
    by_people = None, None
    if labels:
        labels = {
            rater: {key: passed for key, passed in own.items() if key[0] not in unread} for rater, own in labels.items()
        }
        without_text = texts.without_text | {(index, section) for index in unread for section in SECTIONS}
        by_people = people.check_against_people(labels, notes, sorted(texts.indices), without_text)
    return {
        "sections": {
            section: _section_figures(verdicts[section], texts.rouge[section], readable) for section in SECTIONS
        },
        "mean": mean_rate(passes),
        "human_labels": by_people[0],
        "human_labels_all": by_people[1],
    }


def _lenient_figures(
    texts: NoteTexts, notes: NoteVerdicts, labels: people.Labels | None, statements: NoteStatements | None
) -> dict:
    readable = texts.strict | texts.forms.keys()
    return {
        "only_lenient": len(texts.forms),
        "forms": dict(sorted(Counter(texts.forms.values()).items())),
        "valid_notes": len(readable),
        **note_figures(texts, notes, readable, labels),
        "statements": None if statements is None else statement_figures(statements, texts.indices, readable),
    }


def _section_figures(verdicts: dict[int, str], rouge: dict[int, float], readable: set[int]) -> dict:
    accuracy, ci95 = share_of(sum(verdicts[index] == "pass" for index in readable), len(readable))
    total_rouge = math.fsum(rouge[index] for index in readable)  # exact, so independent of the order
    return {
        **verdict_rates(verdicts.values()),
        "accuracy_readable": accuracy,
        "ci95_readable": ci95,
        "rougeL": total_rouge / len(verdicts),
        "rougeL_readable": total_rouge / len(readable) if readable else None,
    }


def _rouge_l() -> Callable[[str, str], float]:
    """Return a function that computes ROUGE-L's F-measure of (reference, prediction), in about 1 ms for 80 words.

    The library's time and memory grow with the product of the lengths, so only the first 20,000 characters count.
    It sees only the letters a-z and digits, so text in another script scores 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return lambda reference, prediction: scorer.score(reference[:20_000], prediction[:20_000])["rougeL"].fmeasure
