"""Score a run by statements: shares covered and supported, and a pass where the worst statement is good enough.

A statement counts as yes if its log odds reach a threshold. A section passes if all its statements do. The threshold
is fitted to one half of the controls; the other half measures the sensitivity and specificity that result.
"""

import itertools
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from evaluation.run.records import QUESTIONS, Judgement, Statement, StatementRecord, record_key
from evaluation.scoring import trust
from evaluation.scoring.intervals import (
    auc,
    auc_difference,
    auc_interval,
    clustered_share,
)
from evaluation.scoring.judgements import mean_rate, verdict_rates
from prompts import SECTIONS


class Answers(NamedTuple):
    """Numbers of statements: all, those with yes, and those without an answer."""

    n: int
    yes: int
    unscored: int

    @property
    def answered(self) -> int:
        return self.n - self.unscored


class SectionStatements(NamedTuple):
    """One section's answers at a threshold, and its verdict: pass, fail or unscored."""

    covered: Answers
    supported: Answers
    verdict: str


NoteStatements = dict[int, dict[str, SectionStatements]]  # index -> section -> statements of the model's note


class Statements(NamedTuple):
    """The statements of a run, without their texts.

    controls, attacks: the records as they are on the disk. fitted: the controls that the threshold was fitted
    to, as (index, section, kind).
    """

    threshold: float
    fitted: frozenset[tuple[int, str, str]]
    notes: NoteStatements
    controls: list[StatementRecord]
    attacks: list[StatementRecord]


class ScoredControl(NamedTuple):
    """The scores that two instruments give a control: 1 or 0 for the verdict, the statements' lowest log odds."""

    kind: str
    expected: str
    verdict: float
    statements: float


INSTRUMENTS = ("verdict", "statements")


def read_statements(records: Iterable[StatementRecord], threshold: float | None = None) -> Statements:
    """Read the records of statements.jsonl, twice: the threshold depends on controls anywhere in the file.

    threshold: log odds; if None, it is fitted to the controls.
    Raises ValueError for two records of the same case.
    """
    known = sorted(
        (record for record in records if record["control"] or record["attack"]),
        key=lambda record: [str(part) for part in record_key(record)],
    )
    controls = [record for record in known if record["control"]]
    fitted: list[tuple[int, str, str]] = []
    if threshold is None:
        threshold, fitted = fit_threshold(controls)
    notes: NoteStatements = {}
    for record in records:
        if record["control"] or record["attack"]:
            continue
        sections = notes.setdefault(record["index"], {})
        if record["section"] in sections:
            raise ValueError(f"row {record['index']}, section {record['section']} has its statements twice")
        sections[sys.intern(record["section"])] = at_threshold(record, threshold)
    attacks = [record for record in known if record["attack"]]
    return Statements(threshold, frozenset(fitted), notes, controls, attacks)


def score_statements(statements: Statements, indices: Sequence[int], readable: set[int]) -> dict:
    """Return results.json's "statements": the figures of `statement_figures` and the checks of the judge.

    threshold: log odds; fitted_on: number of controls that it was fitted to, 0 if it is the default
    judge_controls, judge_controls_all: as in `trust.check_against_controls`, with the statements' verdicts on the other
        controls; None without any
    attacks: None without attacks, else as in `trust.count_attacks`
    """
    threshold = statements.threshold
    verdicts = {
        index: {section: (cell.verdict, "judge" if cell.supported.n else "code") for section, cell in sections.items()}
        for index, sections in statements.notes.items()
        if index in readable
    }
    unused = [
        as_verdict(record, threshold) for record in statements.controls if control_key(record) not in statements.fitted
    ]
    by_section, together = trust.check_against_controls(unused, verdicts) if unused else (None, None)
    attacks = [as_verdict(record, threshold) for record in statements.attacks]
    return {
        "threshold": threshold,
        "fitted_on": len(statements.fitted),
        **statement_figures(statements.notes, indices, readable),
        "judge_controls": by_section,
        "judge_controls_all": together,
        "attacks": trust.count_attacks(attacks) if attacks else None,
    }


def compare_instruments(statements: Statements, verdicts: Iterable[Judgement]) -> dict | None:
    """Return which of the two instruments tells good controls from bad ones better; None without such controls.

    verdicts: the controls' records in judgements.jsonl. Only controls with a verdict and with answers on all statements
    count, so that both instruments see the same texts. A verdict scores 1 or 0, statements their worst log odds.
    Returns
      n_good, n_bad: numbers of controls
      verdict, statements: {auc, ci95}
      difference, difference_ci95: AUC of the statements minus that of the verdicts
      better: "statements" or "verdict" if that interval excludes 0, else None
      by_kind: {kind: {n, verdict, statements: AUC against all controls of the other expected verdict}}
    """
    passed = {
        control_key(record): float(record["verdict"] == "pass")
        for record in verdicts
        if record["verdict"] != "unscored"
    }
    scored = [
        ScoredControl(record["control"]["kind"], record["control"]["expected"], passed[control_key(record)], score)
        for record in statements.controls
        if control_key(record) in passed and (score := worst_log_odds(record)) is not None
    ]
    good, bad = ([control for control in scored if control.expected == expected] for expected in ("pass", "fail"))
    if not good or not bad:
        return None

    def scores(instrument: str, *groups: list[ScoredControl]) -> tuple[list[float], ...]:
        return tuple([getattr(control, instrument) for control in group] for group in groups)

    by_verdict, by_statements = (scores(instrument, good, bad) for instrument in INSTRUMENTS)
    difference, interval = auc_difference(by_verdict, by_statements)
    by_kind = {}
    for kind, expected in dict.fromkeys((control.kind, control.expected) for control in scored):
        own = [control for control in scored if control.kind == kind]
        groups = (own, bad) if expected == "pass" else (good, own)
        by_kind[kind] = {"n": len(own)} | {name: auc(*scores(name, *groups)) for name in INSTRUMENTS}
    areas = {"verdict": auc(*by_verdict), "statements": auc(*by_statements)}
    return {
        "n_good": len(good),
        "n_bad": len(bad),
        **{name: {"auc": area, "ci95": auc_interval(area, len(good), len(bad))} for name, area in areas.items()},
        "difference": difference,
        "difference_ci95": interval,
        "better": "statements" if interval[0] > 0 else "verdict" if interval[1] < 0 else None,
        "by_kind": by_kind,
    }


def control_key(record: StatementRecord | Judgement) -> tuple[int, str, str]:
    """Return (index, section, kind) of a control."""
    return record["index"], record["section"], record["control"]["kind"]


def worst_log_odds(record: StatementRecord) -> float | None:
    """Return the lowest log odds of a section's statements; None if one has no answer, or if there are none."""
    scores = [statement["log_odds"] for statement in (*record["covered"], *record["supported"])]
    return None if None in scores else min(scores, default=None)


def fit_threshold(records: Iterable[StatementRecord]) -> tuple[float, list[tuple[int, str, str]]]:
    """Return (threshold, the controls that it was fitted to as (index, section, kind)), or (0, []).

    records: controls. The threshold is fitted to those of every other dialogue, so that no dialogue is in both halves.
    It maximises Youden's J, midway between two neighbouring scores; of equal maxima, the one nearest to 0. The result
    is (0, []) if that half lacks good or bad controls, or if all their scores are equal.
    """
    scored = [(record, score) for record in records if (score := worst_log_odds(record)) is not None]
    fitting = set(sorted({record["index"] for record, _ in scored})[::2])
    half = [(record, score) for record, score in scored if record["index"] in fitting]
    good = [score for record, score in half if record["control"]["expected"] == "pass"]
    bad = [score for record, score in half if record["control"]["expected"] == "fail"]
    scores = sorted({*good, *bad})
    if not good or not bad or len(scores) < 2:
        return 0.0, []

    def youden(threshold: float) -> float:
        passed = [sum(score >= threshold for score in group) / len(group) for group in (good, bad)]
        return passed[0] - passed[1]

    middles = [(low + high) / 2 for low, high in itertools.pairwise(scores)]
    threshold = max(middles, key=lambda middle: (youden(middle), -abs(middle)))
    return threshold, [control_key(record) for record, _ in half]


def at_threshold(record: StatementRecord, threshold: float) -> SectionStatements:
    """Return a record's answers and verdict.

    One statement below the threshold fails the section. Otherwise one without an answer leaves it unscored.
    """
    covered, supported = (_answers(record[key], threshold) for key in QUESTIONS)
    if record["status"] == "unscored":
        return SectionStatements(Answers(covered.n, 0, covered.n), supported, "unscored")
    if record["status"] == "missing":
        return SectionStatements(Answers(covered.n, 0, 0), supported, "fail")
    below = covered.n - covered.yes - covered.unscored + supported.n - supported.yes - supported.unscored
    verdict = "fail" if below else "unscored" if covered.unscored + supported.unscored else "pass"
    return SectionStatements(covered, supported, verdict)


def _answers(statements: Sequence[Statement], threshold: float) -> Answers:
    scores = [statement["log_odds"] for statement in statements]
    return Answers(len(scores), sum(s is not None and s >= threshold for s in scores), scores.count(None))


def as_verdict(record: StatementRecord, threshold: float) -> Judgement:
    """Return the statements' verdict on a section in the form of a Judgement, without texts."""
    return {
        **{key: record[key] for key in ("index", "section", "control", "attack")},
        "verdict": at_threshold(record, threshold).verdict,
        "source": "judge" if record["status"] == "asked" else "code",
    }


def unreadable(section: SectionStatements) -> SectionStatements:
    """Return the statements of a section whose note counts as unreadable: all of the reference is missing.

    Nothing is known about a note that the engine did not write.
    """
    if section.verdict == "unscored" and not section.supported.n:
        return section
    return SectionStatements(Answers(section.covered.n, 0, 0), Answers(0, 0, 0), "fail")


def statement_figures(notes: NoteStatements, indices: Sequence[int], readable: set[int]) -> dict:
    """Return {"sections", "mean"} of results.json's "statements".

    indices: all dialogues of the run; a section without a record is unscored. readable: those whose note counts.
    sections: {S: {covered, supported: {n, yes, unscored, share: yes / answered, ci95}; pass, fail, unscored, accuracy:
        pass / number of dialogues, ci95: Wilson, worst, best}}; a share is None without an answer. The intervals of
        shares treat whole notes as the units, because the answers on one note are correlated.
    mean: {covered, supported: {share, ci95}: mean of the sections' shares; accuracy, ci95}
    """
    table = strict_statements(notes, indices, readable)
    figures = {}
    for place, section in enumerate(SECTIONS):
        column = [row[place] for row in table]
        figures[section] = {
            **{name: _share([getattr(cell, name) for cell in column]) for name in QUESTIONS},
            **verdict_rates(cell.verdict for cell in column),
        }
    return {"sections": figures, "mean": mean_figures(table)}


def strict_statements(
    notes: NoteStatements, indices: Sequence[int], readable: set[int]
) -> list[list[SectionStatements]]:
    """Return the statements of S, O, A and P of each note in `indices`; those not in `readable` miss everything."""
    nothing = SectionStatements(Answers(0, 0, 0), Answers(0, 0, 0), "unscored")
    table = []
    for index in indices:
        sections = [notes.get(index, {}).get(section, nothing) for section in SECTIONS]
        table.append(sections if index in readable else [unreadable(section) for section in sections])
    return table


def mean_figures(table: Sequence[Sequence[SectionStatements]]) -> dict:
    """Return the means over the sections, as in `statement_figures`. table: from `strict_statements`."""
    return {
        **{name: _mean_share(table, name) for name in QUESTIONS},
        **mean_rate(count_passes(table)),
    }


def count_passes(table: Sequence[Sequence[SectionStatements]]) -> list[int]:
    """Return the number of sections of each note that pass by statements, 0 to 4."""
    return [sum(cell.verdict == "pass" for cell in row) for row in table]


def _share(answers: Sequence[Answers]) -> dict:
    share, interval = clustered_share([[(cell.yes, cell.answered)] for cell in answers])
    return {
        **{name: sum(getattr(cell, name) for cell in answers) for name in Answers._fields},
        "share": share,
        "ci95": interval,
    }


def _mean_share(table: Sequence[Sequence[SectionStatements]], name: str) -> dict:
    counts = [[(getattr(cell, name).yes, getattr(cell, name).answered) for cell in row] for row in table]
    share, interval = clustered_share(counts)
    return {"share": share, "ci95": interval}
