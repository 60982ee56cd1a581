"""95% intervals [low, high] for shares, differences of shares, and means over the sections.

The same counts always give the same interval. tests/test_scoring.py simulates each interval's coverage.
"""

import math
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence

import numpy as np

from prompts import SECTIONS

Interval = list[float]

DRAWS = 10_000  # the share of them outside an end of an interval has a standard error of 0.16%
_Z = 1.959963984540054  # a standard normal variable is within -_Z.._Z with 95% probability


def wilson(successes: float, n: float) -> Interval:
    """Return Wilson's score interval for the share successes / n, n > 0.

    Between integers, as for a section that one of two raters passed, the interval is wider than necessary.
    """
    share, weight = successes / n, _Z**2 / n
    half = _Z * math.sqrt(share * (1 - share) / n + weight / (4 * n)) / (1 + weight)
    center = (share + weight / 2) / (1 + weight)
    return [center - half if successes else 0.0, center + half if successes < n else 1.0]


def share_of(successes: int, n: int) -> tuple[float, Interval] | tuple[None, None]:
    """Return (successes / n, Wilson's interval), or (None, None) if n is 0."""
    return (successes / n, wilson(successes, n)) if n else (None, None)


def newcombe(both: int, only_a: int, only_b: int, neither: int) -> Interval:
    """Return the interval for the difference (only_b - only_a) / n of two shares of the same n > 0 notes.

    Method 10 of Newcombe, Statistics in Medicine 17:2635 (1998): Wilson's intervals of the two shares, combined by
    their correlation, which is corrected for continuity. SciPy has no interval for paired shares.
    """
    n = both + only_a + only_b + neither
    first, second = ((passed / n, wilson(passed, n)) for passed in (both + only_a, both + only_b))
    covariance = both * neither - only_a * only_b
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    correlation = (max(covariance - n / 2, 0) if covariance > 0 else covariance) / math.sqrt(margins) if margins else 0
    return _combine(first, second, correlation)


def _combine(first: tuple[float, Interval], second: tuple[float, Interval], correlation: float) -> Interval:
    """Return the interval for second - first, from each (estimate, interval) and the correlation of the estimates."""
    (a, (a_low, a_high)), (b, (b_low, b_high)) = first, second

    def distance(up: float, down: float) -> float:
        return math.sqrt(max(0.0, up**2 - 2 * correlation * up * down + down**2))

    return [b - a - distance(b - b_low, a_high - a), b - a + distance(b_high - b, a - a_low)]


def independent_difference(a: tuple[float, float], b: tuple[float, float]) -> Interval:
    """Return the interval for a - b, two shares (successes, trials) of different texts.

    Agresti and Caffo, The American Statistician 54:280 (2000): one success and one failure are added to both.
    """
    (p, n), (q, m) = (((successes + 1) / (trials + 2), trials + 2) for successes, trials in (a, b))
    half = _Z * math.sqrt(p * (1 - p) / n + q * (1 - q) / m)
    return [max(-1.0, p - q - half), min(1.0, p - q + half)]


def bootstrap_mean(passes: list[int]) -> Interval:
    """Return the Bayesian bootstrap's interval for the mean accuracy.

    passes: for each note, the number of sections passed, 0 to 4. Whole notes are weighted, because the verdicts on one
        note are correlated.
    The weights are drawn from a Dirichlet distribution (Rubin 1981, doi:10.1214/aos/1176345338). Half a note is added
    with 0 and half a note with 4 sections passed, as in Jeffreys' prior, so that equal counts still give an interval.
    """
    top, count = len(SECTIONS), Counter(passes)
    values = np.arange(top + 1)
    notes = np.array([count[value] for value in values.tolist()], dtype=float)
    notes[[0, -1]] += 0.5
    means = np.random.default_rng(0).dirichlet(notes, size=DRAWS) @ values / top
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    estimate = sum(passes) / (len(passes) * top)
    return [min(low, estimate), max(high, estimate)]


def paired_mean(differences: Sequence[float], top: float = len(SECTIONS)) -> Interval:
    """Return the interval for the mean difference of two runs' accuracies on the same notes, -1 to 1.

    differences: for each note, sections passed in the second run minus those passed in the first, -4 to 4; or any other
    difference from -top to top.

    This is Student's t interval on whole notes. Its variance includes one made-up note, half better and half worse,
    whose squared change is the mean over the changed notes and one that changed by `top`. Without it, the
    interval would be a point if no note changed, and too narrow if few did. Agresti and Min (doi:10.1002/sim.1781) add
    such observations for a single section.
    """
    from scipy.stats import t

    n = len(differences)
    changed = [difference**2 for difference in differences if difference]
    made_up = (sum(changed) + top**2) / (len(changed) + 1)
    mean_square, mean = (sum(changed) + made_up) / (n + 1), sum(differences) / (n + 1)
    half = float(t.ppf(0.975, n)) * math.sqrt((mean_square - mean**2) / (n + 1))
    estimate = sum(differences) / n
    return [max(-1.0, (estimate - half) / top), min(1.0, (estimate + half) / top)]


def clustered_share(counts: Sequence[Sequence[tuple[int, int]]]) -> tuple[float, Interval] | tuple[None, None]:
    """Return (share, interval) of yes among statements, as the mean over the groups; (None, None) without statements.

    counts: for each note, one (yes, all) per group, such as a section. A group's share is the ratio of its totals. A
        group without any statement is left out.
    Whole notes are the units. The interval is Wilson's at the effective sample size (Korn and Graubard 1998, Survey
    Methodology 24:193): as many independent statements as give the linearized variance of the ratios, corrected for
    the degrees of freedom. Where that variance is 0, because all answers are equal, it is the number of notes.
    """
    from scipy.stats import t

    table = np.asarray(counts, dtype=float)  # notes, groups, (yes, all)
    totals = table.sum(axis=0)
    groups = totals[:, 1] > 0
    table, totals = table[:, groups], totals[groups]
    table = table[table[..., 1].any(axis=1)]  # the notes with statements
    notes, k = len(table), int(groups.sum())
    if not k:
        return None, None
    shares = totals[:, 0] / totals[:, 1]
    share = float(shares.mean())
    effects = ((table[..., 0] - shares * table[..., 1]) / totals[:, 1]).sum(axis=1) / k
    variance = notes / max(1, notes - 1) * float((effects**2).sum())  # 0 for a single note
    n = float(notes)
    if variance > 0:
        independent = min(share * (1 - share) / variance, float(totals[:, 1].sum()))
        n = independent * (_Z / float(t.ppf(0.975, notes - 1))) ** 2
    return share, wilson(share * n, n)


def auc(good: Sequence[float], bad: Sequence[float]) -> float:
    """Return the probability that a good text scores higher than a bad one; ties count half. Both are non-empty."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(good, bad).statistic) / (len(good) * len(bad))


def auc_interval(area: float, n_good: float, n_bad: float) -> Interval:
    """Return the interval for an AUC: method 5 of Newcombe, Statistics in Medicine 25:559 (2006).

    The bounds are the areas whose standard error (Hanley and McNeil 1982, doi:10.1148/radiology.143.1.7063747, with
    equal sample sizes in its terms for ties) puts the estimate 1.96 standard errors away.
    """
    from scipy.optimize import brentq

    size = (n_good + n_bad) / 2 - 1

    def distance(true: float) -> float:
        spread = true * (1 - true) * (1 + size * ((1 - true) / (2 - true) + true / (1 + true))) / (n_good * n_bad)
        return (area - true) ** 2 - _Z**2 * spread

    inside = min(max(area, 1e-9), 1 - 1e-9)  # at 0 and 1 the spread is 0, so they would solve the equation, too
    low = brentq(distance, 0, inside) if area > 0 else 0.0
    high = brentq(distance, inside, 1) if area < 1 else 1.0
    return [float(low), float(high)]


def auc_difference(
    first: tuple[Sequence[float], Sequence[float]], second: tuple[Sequence[float], Sequence[float]]
) -> tuple[float, Interval]:
    """Return (AUC of `second` - AUC of `first`, interval) of two scores of the same texts.

    first, second: each (scores of the good texts, scores of the bad texts), in the same order of texts.
    The interval combines those of the two areas by their correlation (MOVER; Newcombe 1998), which DeLong's components
    give (1988, doi:10.2307/2531595).
    """
    sizes = len(first[0]), len(first[1])
    areas = [auc(*scores) for scores in (first, second)]
    covariance = np.zeros((2, 2))
    for side, n in enumerate(sizes):
        parts = [_placements(scores[side], scores[1 - side]) for scores in (first, second)]
        if n > 1:
            covariance += np.cov(parts) / n
    spread = math.sqrt(covariance[0, 0] * covariance[1, 1])
    correlation = covariance[0, 1] / spread if spread else 0.0
    first_area, second_area = ((area, auc_interval(area, *sizes)) for area in areas)
    return areas[1] - areas[0], _combine(first_area, second_area, correlation)


def _placements(scores: Sequence[float], others: Sequence[float]) -> np.ndarray:
    """Return, for each score, the share of the others that it exceeds; ties count half."""
    ordered = np.sort(np.asarray(others, dtype=float))
    below, up_to = (np.searchsorted(ordered, scores, side) for side in ("left", "right"))
    return (below + up_to) / (2 * len(ordered))


def clustered_auc(
    notes: Sequence[tuple[Sequence[float], Sequence[float]]],
) -> tuple[float, Interval] | tuple[None, None]:
    """Return (AUC, interval) of scores whose notes are the units; (None, None) without good or without bad statements.

    notes: for each note, (scores of its good statements, scores of its bad ones).
    The standard error is Obuchowski's for clustered data (Biometrics 53:567, 1997). The interval is Newcombe's (see
    `auc_interval`) with the numbers of statements reduced until Hanley and McNeil's standard error is as large, and
    widened by the degrees of freedom.
    """
    from scipy.stats import t

    good, bad = ([score for note in notes for score in note[side]] for side in (0, 1))
    if not good or not bad:
        return None, None
    area = auc(good, bad)
    effects = []
    for own_good, own_bad in notes:
        of_good = float((_placements(own_good, bad) - area).sum()) / len(good)
        of_bad = float((1 - _placements(own_bad, good) - area).sum()) / len(bad)
        effects.append(of_good + of_bad)
    clusters = len(notes)
    variance = clusters / max(1, clusters - 1) * math.fsum(effect**2 for effect in effects)
    size = (len(good) + len(bad)) / 2 - 1
    simple = area * (1 - area) * (1 + size * ((1 - area) / (2 - area) + area / (1 + area))) / (len(good) * len(bad))
    shrink = min(1.0, simple / variance) if variance > 0 else min(1.0, clusters / (len(good) + len(bad)))
    shrink *= (_Z / float(t.ppf(0.975, max(1, clusters - 1)))) ** 2
    return area, auc_interval(area, max(1, shrink * len(good)), max(1, shrink * len(bad)))


Stratum = Hashable


def stratified_mean(
    notes: Sequence[tuple[Stratum, ...]],
    labels: Mapping[Stratum, Mapping[int, float]],
    known: Mapping[Stratum, float] | None = None,
    unknowable: Collection[Stratum] = (),
) -> tuple[float | None, Interval]:
    """Return (estimate, interval) of the mean over all notes and their sections, of which only a sample has labels.

    notes: for each note, the strata of its sections. All notes have the same number of sections.
    labels: {stratum: {position of the note in `notes`: label, 0 to 1}}, a random sample within each stratum.
    known: strata whose sections all have the same, known value.
    unknowable: strata that nobody can label. The estimate counts them as 0; the interval allows for any mean of them.
    Any other stratum without labels is open: the estimate is None, and the interval allows for any mean of it, too.

    Each stratum's mean is weighted by the number of its sections (post-stratification). The interval is Wilson's at the
    effective sample size: as many independent sections as give the estimate's variance (Korn and Graubard 1998, Survey
    Methodology 24:193). By linearization, that variance has three parts: within the strata (from their means under
    Jeffreys' prior, so that equal labels do not give 0), between the notes, which are a sample too, and the covariance
    of labels on one note.
    """
    known = known or {}
    size = Counter(stratum for strata in notes for stratum in strata)
    weights = {stratum: number / size.total() for stratum, number in size.items()}
    given = known.keys() | set(unknowable)
    sampled = [stratum for stratum in size if stratum not in given and labels.get(stratum)]
    is_open = len(sampled) + len(size.keys() & given) < len(size)

    means, smoothed, within, parts = {}, {}, 0.0, {}
    for stratum in sampled:
        values = labels[stratum]
        n, total = len(values), math.fsum(values.values())
        means[stratum], smoothed[stratum] = total / n, (total + 0.5) / (n + 1)
        within += weights[stratum] ** 2 * smoothed[stratum] * (1 - smoothed[stratum]) / max(1, n - 1)
        for position, label in values.items():
            parts.setdefault(position, []).append(weights[stratum] * (label - means[stratum]) / n)

    def bound(of_open: float, side: int) -> tuple[float, float]:
        """Return (mean, low or high end of the interval) if the open strata have the mean `of_open`."""
        of_strata = dict.fromkeys(size, of_open) | dict(known) | means
        mean = min(1.0, math.fsum(weights[stratum] * of_strata[stratum] for stratum in size))
        of_notes = [(math.fsum(of_strata[s] for s in note) / len(note) - mean) / len(notes) for note in notes]
        covariance = math.fsum(
            2 * of_notes[position] * math.fsum(of_note) + math.fsum(of_note) ** 2 - math.fsum(x**2 for x in of_note)
            for position, of_note in parts.items()
        )
        variance = within + math.fsum(deviation**2 for deviation in of_notes) + max(0.0, covariance)
        if variance == 0:  # everything is known
            return mean, mean
        likely = math.fsum(weights[stratum] * (of_strata | smoothed)[stratum] for stratum in size)
        n = likely * (1 - likely) / variance
        return mean, wilson(mean * n, n)[side]

    (mean, low), (_, high) = bound(0.0, 0), bound(1.0, 1)
    return None if is_open else mean, [low, high]
