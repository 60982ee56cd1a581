"""Test which exports are kept: that of the best step, and that of the best step in the saved state."""

import json

import pytest

from training.best import BestStep


def validate(best: BestStep, losses: dict[int, float], saved: tuple[int, ...] = ()) -> set[int]:
    """Record validations, save states after some of them; return the steps whose exports exist."""
    there = set(best.exported)
    for step, loss in losses.items():
        if best.record_validation(step, loss):
            there.add(step)
            best.record_export(there.remove)
        if step in saved:
            best.keep_only_best(there.remove)
    return there


def test_only_the_export_of_the_step_with_the_lowest_loss_is_kept():
    best = BestStep()
    assert validate(best, {2: 0.9, 4: 0.7, 6: 0.8, 8: 0.7}) == {4}
    assert (best.step, best.loss, best.without_improvement) == (4, 0.7, 2)


def test_the_best_export_of_a_saved_state_is_kept_until_the_next_state():
    best = BestStep()
    assert validate(best, {2: 0.9, 4: 0.8, 6: 0.7}, saved=(2,)) == {2, 6}
    best.keep_only_best(lambda _: None)
    assert best.exported == [6]


def test_a_run_resumed_after_a_kill_repeats_its_decisions():
    best, course = BestStep(), {4: 0.8, 6: 0.85, 8: 0.7, 10: 0.75}
    validate(best, {2: 0.9}, saved=(2,))
    state = json.loads(json.dumps(best.as_state()))
    validate(best, course)
    resumed = BestStep.from_state(state)
    assert resumed.step == 2
    validate(resumed, course)
    assert resumed == best


def test_the_first_best_step_replaces_a_stopped_runs_export():
    best, removed = BestStep(), []
    best.record_interim_export(5)
    best.keep_only_best(removed.append)
    assert removed == []
    resumed = BestStep.from_state(best.as_state())
    resumed.record_validation(6, 0.9)
    resumed.record_export(removed.append)
    assert removed == [5] and resumed.exported == [6]


@pytest.mark.parametrize(("losses", "expected"), [([float("nan"), 0.9], 2), ([0.9, float("nan")], 1)])
def test_a_nan_loss_is_worse_than_any_number(losses, expected):
    best = BestStep()
    validate(best, dict(enumerate(losses, 1)))
    assert best.step == expected
