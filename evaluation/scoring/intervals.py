"""95% intervals [low, high] for shares, differences of shares, and the mean over the sections.

The same counts always give the same interval.
"""

import math
from collections import Counter

import numpy as np

from prompts import SECTIONS

Interval = list[float]

DRAWS = 10_000  # from each distribution; with other draws an interval's ends would move by about 0.2% of probability


def wilson(successes: int, n: int) -> Interval:
    """Return Wilson's score interval for the share successes / n, n > 0."""
    from scipy.stats import binomtest

    return [float(end) for end in binomtest(successes, n).proportion_ci(method="wilson")]


def newcombe(both: int, only_a: int, only_b: int, neither: int) -> Interval:
    """Return the interval for the difference (only_b - only_a) / n of two shares of the same n > 0 notes.

    Method 10 of Newcombe, Statistics in Medicine 17:2635 (1998): Wilson's intervals of the two shares, combined by
    their correlation, which is corrected for continuity. SciPy has no interval for paired shares.
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


def bootstrap_mean(passes: list[int], floor: int = 0) -> Interval:
    """Return the Bayesian bootstrap's interval for the mean accuracy, or for a difference of two.

    passes: for each note the number of sections passed, `floor` to 4. Whole notes are weighted, because the verdicts
    on one note are correlated.
    The weights are drawn from a Dirichlet distribution (Rubin 1981, doi:10.1214/aos/1176345338), with half a note added
    at both extremes, as in Jeffreys' prior: even if all notes have the same count, others are possible.
    """
    top, count = len(SECTIONS), Counter(passes)
    values = np.arange(floor, top + 1)
    notes = np.array([count[value] for value in values.tolist()], dtype=float)
    notes[[0, -1]] += 0.5
    means = np.random.default_rng(0).dirichlet(notes, size=DRAWS) @ values / top
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    estimate = sum(passes) / (len(passes) * top)
    return [min(low, estimate), max(high, estimate)]
