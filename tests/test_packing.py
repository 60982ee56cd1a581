"""Test that packs are full, mix samples of all lengths, and depend only on the seed."""

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.packing import best_fit_packs, shuffled_packs


def dialogues(count: int = 1000) -> list[int]:
    draw = random.Random(0)
    return [int(draw.gauss(1300, 250)) for _ in range(count)]


def spread(packs: list[list[int]], lengths: list[int]) -> float:
    """Return the mean over packs of the standard deviation of sample lengths."""
    return statistics.fmean(statistics.pstdev(lengths[index] for index in pack) for pack in packs)


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(0, 3))
def test_every_sample_is_in_exactly_one_pack_and_no_pack_overflows(lengths, seed):
    packs = shuffled_packs(lengths, 100, (seed,))
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in pack) <= 100 for pack in packs)


@pytest.mark.parametrize("capacity", [8192, 16384])
def test_shuffled_packs_are_as_full_as_sorted_ones_within_one_percent(capacity):
    lengths = dialogues()
    shuffled, by_length = shuffled_packs(lengths, capacity, (1,)), best_fit_packs(lengths, capacity)
    assert len(shuffled) <= 1.01 * len(by_length)
    assert sum(lengths) / (capacity * len(shuffled)) > 0.97


def test_shuffled_packs_mix_lengths_but_sorted_packs_do_not():
    lengths = dialogues()
    assert spread(best_fit_packs(lengths, 8192), lengths) < 0.4 * statistics.pstdev(lengths)
    assert spread(shuffled_packs(lengths, 8192, (1,)), lengths) > 0.8 * statistics.pstdev(lengths)


def test_packs_hold_about_the_same_number_of_samples():
    lengths = dialogues()
    counts = [len(pack) for pack in shuffled_packs(lengths, 8192, (1,))]
    assert min(counts) >= 4 and max(counts) <= 8
    assert statistics.pstdev(counts) < 0.7 < statistics.pstdev(map(len, best_fit_packs(lengths, 8192)))


def test_the_same_seed_gives_the_same_packs_and_another_seed_others():
    lengths = dialogues(200)
    first, again, other = (shuffled_packs(lengths, 8192, seed) for seed in ((1, 0), (1, 0), (1, 1)))
    assert first == again
    assert {frozenset(pack) for pack in first} != {frozenset(pack) for pack in other}


def test_the_order_of_packs_does_not_depend_on_their_length():
    lengths = dialogues(3000)
    packs = shuffled_packs(lengths, 8192, (5,))
    sizes = [sum(lengths[index] for index in pack) for pack in packs]
    half = len(sizes) // 2
    assert statistics.fmean(sizes[:half]) == pytest.approx(statistics.fmean(sizes[half:]), rel=0.01)
