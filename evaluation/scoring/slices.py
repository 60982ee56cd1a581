"""Score groups of dialogues that share a value of a dataset's column, and test whether the groups differ."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from evaluation.scoring.intervals import DRAWS, share_of
from evaluation.scoring.judgements import NoteVerdicts, mean_rate
from evaluation.scoring.statements import NoteStatements, count_passes, mean_figures, strict_statements
from prompts import SECTIONS

SMALLEST_GROUP, MOST_GROUPS = 5, 20  # smaller groups, and those beyond the most frequent, are pooled


def score_slices(
    column: str,
    values: Sequence[str],
    indices: Iterable[int],
    readable: set[int],
    notes: NoteVerdicts,
    statements: NoteStatements | None,
    measure: str,
) -> dict:
    """Return results.json's "slices", by strict reading. The order of `indices` changes no figure.

    column: its name; values: its value in each row; indices: all dialogues of the run; readable: the readable notes
    notes: verdicts, in which lenient notes have failed; statements: None if not all were asked
    measure: verdicts or statements, by which the groups are tested

    Returns
      column, measure: as given
      groups: from `group_by_value`, and for each
          n, valid_notes: numbers of dialogues and readable notes; readable: {share, ci95: Wilson} of the latter
          verdicts: {accuracy, ci95} as in a run's mean; statements: None, or a run's mean by statements
      p: from `heterogeneity` of the sections passed by `measure`; None if there is only one group
    """
    groups, passes = [], []
    for group, members in group_by_value(values, indices):
        valid = sum(index in readable for index in members)
        share, ci95 = share_of(valid, len(members))
        of_notes = {"verdicts": [_count_passed(notes, index) for index in members]}
        group |= {"n": len(members), "valid_notes": valid, "readable": {"share": share, "ci95": ci95}}
        group |= {"verdicts": mean_rate(of_notes["verdicts"]), "statements": None}
        if statements is not None:
            table = strict_statements(statements, members, readable)
            group["statements"], of_notes["statements"] = mean_figures(table), count_passes(table)
        groups.append(group)
        passes.append(of_notes[measure])
    return {"column": column, "measure": measure, "groups": groups, "p": heterogeneity(passes)}


def group_by_value(values: Sequence[str], indices: Iterable[int]) -> list[tuple[dict, list[int]]]:
    """Return ({value, pooled}, its indices in ascending order) for each group, the largest first.

    A group has the same value, and pooled is 1. If two or more values are in fewer than SMALLEST_GROUP dialogues or
    beyond the MOST_GROUPS most frequent ones, the last group pools them: value is None, and pooled their number.
    """
    members = defaultdict(list)
    for index in sorted(indices):
        members[values[index]].append(index)
    in_order = sorted(members, key=lambda value: (-len(members[value]), value))
    large = [value for value in in_order[:MOST_GROUPS] if len(members[value]) >= SMALLEST_GROUP]
    rare = in_order[len(large) :]
    if len(rare) == 1:  # a single rare value keeps its name
        large, rare = in_order, []
    groups = [({"value": value, "pooled": 1}, members[value]) for value in large]
    if rare:
        pool = sorted(index for value in rare for index in members[value])
        groups.append(({"value": None, "pooled": len(rare)}, pool))
    return groups


def _count_passed(notes: NoteVerdicts, index: int) -> int:
    verdicts = notes.get(index, {})
    return sum(verdicts.get(section, ("unscored", ""))[0] == "pass" for section in SECTIONS)


def heterogeneity(passes: Sequence[Sequence[int]]) -> float | None:
    """Return p of a permutation test of whether the mean of `passes` differs between groups; None for a single group.

    passes: for each group, the number of sections passed in each of its notes, 0 to 4.
    The statistic is Welch's sum of squares between the groups (1951, Biometrika 38:330). Its weights, size / variance,
    keep a small group with a wide spread from passing for a difference of means (Chung and Romano 2013,
    doi:10.1214/13-AOS1090). Each variance includes half a note with 0 and half a note with 4, as in `bootstrap_mean`.
    Assigning the notes to the groups at random gives a random table (group, number passed) with the same margins, of
    which 9,999 are drawn; p is at least 0.0001. It is exact if the groups have the same distribution.
    """
    from scipy.stats import random_table

    if len(passes) < 2:
        return None
    scores = np.arange(len(SECTIONS) + 1)
    table = np.array([np.bincount(group, minlength=len(scores)) for group in passes])
    sizes = table.sum(axis=1)
    made_up = np.where((scores == 0) | (scores == len(SECTIONS)), 0.5, 0)

    def between(tables: np.ndarray) -> np.ndarray:
        smoothed = (tables + made_up) / (sizes[:, None] + 1)
        weights = sizes / (smoothed @ scores**2 - (smoothed @ scores) ** 2)
        means = tables @ scores / sizes
        center = (weights * means).sum(axis=-1, keepdims=True) / weights.sum(axis=-1, keepdims=True)
        return (weights * (means - center) ** 2).sum(axis=-1)

    drawn = random_table(sizes, table.sum(axis=0)).rvs(DRAWS - 1, random_state=np.random.default_rng(0))
    as_far = between(drawn) >= between(table) - 1e-9  # equal tables may differ by rounding
    return (1 + int(as_far.sum())) / DRAWS
