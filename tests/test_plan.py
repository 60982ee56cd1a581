"""Test the plan of a run: the same packs per step on any number of processes, and correct token counts."""

import pytest
from datasets import Dataset

from training.plan import PackSampler, RowSizes, RunPlan, SharedPacks

LENGTHS = [20 + 7 * row % 31 for row in range(50)]
SIZES = RowSizes(LENGTHS, [length // 4 for length in LENGTHS])


def make_plan(capacity: int | None = 100, **settings) -> RunPlan:
    return RunPlan(SIZES, capacity, **{"seed": 1, "epochs": 2, "accumulation": 1, "processes": 1} | settings)


def seen(plan: RunPlan) -> list[list[list[int]]]:
    """Return the packs of each step, as the samplers of all processes yield them."""
    dealt = []
    for process in range(plan.processes):
        sampler, packs = PackSampler(plan, process), []
        for epoch in range(plan.epochs):
            sampler.start(epoch, 0)
            packs += sampler
        dealt.append(packs)
    micro_batches = list(zip(*dealt, strict=True))
    count = plan.accumulation
    return [
        [pack for micro_batch in micro_batches[first : first + count] for pack in micro_batch]
        for first in range(0, len(micro_batches), count)
    ]


@pytest.mark.parametrize(("accumulation", "processes"), [(4, 1), (2, 2), (1, 4), (3, 1), (1, 3), (5, 3)])
def test_a_step_has_the_same_packs_however_it_is_split(accumulation, processes):
    plan = make_plan(accumulation=accumulation, processes=processes)
    together = make_plan(accumulation=accumulation * processes)
    assert seen(plan) == seen(together) == [together.step_packs(step) for step in range(together.steps)]
    assert len(seen(plan)) == plan.steps == plan.total_packs // (accumulation * processes)
    assert plan.left_over == plan.total_packs % (accumulation * processes)


@pytest.mark.parametrize("capacity", [100, None])
def test_each_epoch_has_every_row_once_in_new_packs(capacity):
    plan = make_plan(capacity)
    sampler, epochs = PackSampler(plan, 0), []
    for epoch in range(2):
        sampler.start(epoch, 0)
        epochs.append(list(sampler))
    assert all(sorted(row for pack in packs for row in pack) == list(range(50)) for packs in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("capacity", [100, None])
def test_the_seed_determines_the_order_and_content_of_packs(capacity):
    plans = [make_plan(capacity, seed=seed) for seed in (1, 1, 2)]
    first, again, other = ([plan.pack(position) for position in range(plan.total_packs)] for plan in plans)
    assert first == again != other


@pytest.mark.parametrize("done", [0, 1, 5, 17])
def test_a_resumed_run_trains_on_the_remaining_packs(done):
    plan = make_plan(accumulation=2)
    micro_batch = done * plan.accumulation
    rest, sampler = [], PackSampler(plan, 0)
    for epoch in range(plan.epoch_of(micro_batch), plan.epochs):
        sampler.start(epoch, micro_batch)
        rest += sampler
    assert rest == [pack for step in range(done, plan.steps) for pack in plan.step_packs(step)]


def test_token_counts_of_a_step_are_the_sums_over_its_rows():
    plan = make_plan(accumulation=2, processes=2)
    for step in range(plan.steps):
        taken = [row for pack in plan.step_packs(step) for row in pack]
        assert plan.labelled(step) == sum(SIZES.labelled[row] for row in taken)
        assert plan.tokens(step) == sum(LENGTHS[row] for row in taken)


def test_more_iterations_than_the_epochs_hold_add_further_epochs():
    plan = make_plan(train_iters=70)
    assert plan.steps == len(seen(plan)) == 70 and plan.epochs > 2 and plan.left_over == 0
    few = make_plan(train_iters=3)
    assert few.steps == len(seen(few)) == 3 and few.epochs == 1


def test_rows_are_repeated_to_reach_the_minimum_iterations():
    plan = make_plan(epochs=1, min_iterations=70, accumulation=2)
    counts = [0] * 50
    for step in seen(plan):
        for pack in step:
            for row in pack:
                counts[row] += 1
    assert plan.steps >= 70 and min(counts) >= 7


def test_row_sizes_count_tokens_and_labels():
    labels = [[-100, -100, 5], [-100, 7, 8, 9], [-100]]
    dataset = Dataset.from_dict({"input_ids": labels, "labels": labels})
    assert RowSizes.of(dataset) == RowSizes([3, 4, 1], [1, 3, 0])
    assert RowSizes.of(dataset.select([2, 0])) == RowSizes([1, 3], [0, 1])


@pytest.mark.parametrize(("packs", "processes"), [(1, 2), (3, 2), (4, 2), (5, 4), (2, 1)])
def test_each_validation_pack_counts_once_and_processes_get_equal_shares(packs, processes):
    shares = [SharedPacks([[number] for number in range(packs)], process, processes) for process in range(processes)]
    assert len({len(list(share)) for share in shares}) == 1
    counted = [pack for share in shares for batch, pack in enumerate(share) if share.counts(batch)]
    assert sorted(counted) == [[number] for number in range(packs)]
