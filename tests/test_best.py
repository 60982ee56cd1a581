"""Which exports of best steps are kept: the best one, and the one that a saved state would go back to."""

import json

import pytest

from training.best import BestStep


def validate(best: BestStep, losses: dict[int, float], saved: tuple[int, ...] = ()) -> set[int]:
    """Run validations, and states saved after some of them; return the steps whose exports are there."""
    there = set(best.exported)
    for step, loss in losses.items():
        if best.record_validation(step, loss):
            there.add(step)
            best.record_export(there.remove)
        if step in saved:
            best.keep_only_best(there.remove)
    return there


def test_the_best_step_is_the_one_with_the_lowest_loss_and_its_export_alone_is_there():
    best = BestStep()
    assert validate(best, {2: 0.9, 4: 0.7, 6: 0.8, 8: 0.7}) == {4}
    assert (best.step, best.loss, best.without_improvement) == (4, 0.7, 2)


def test_the_export_that_a_saved_state_knows_as_the_best_stays_until_the_next_state():
    best = BestStep()
    assert validate(best, {2: 0.9, 4: 0.8, 6: 0.7}, saved=(2,)) == {2, 6}
    best.keep_only_best(lambda _: None)
    assert best.exported == [6]


def test_a_run_that_a_kill_sent_back_repeats_its_decisions():
    best, course = BestStep(), {4: 0.8, 6: 0.85, 8: 0.7, 10: 0.75}
    validate(best, {2: 0.9}, saved=(2,))
    state = json.loads(json.dumps(best.as_state()))
    validate(best, course)
    resumed = BestStep.from_state(state)
    assert resumed.step == 2
    validate(resumed, course)
    assert resumed == best


def test_what_a_stopped_run_exported_before_any_validation_goes_with_the_first_best_step():
    best, removed = BestStep(), []
    best.record_interim_export(5)
    best.keep_only_best(removed.append)
    assert removed == []
    resumed = BestStep.from_state(best.as_state())
    resumed.record_validation(6, 0.9)
    resumed.record_export(removed.append)
    assert removed == [5] and resumed.exported == [6]


@pytest.mark.parametrize(("losses", "expected"), [([float("nan"), 0.9], 2), ([0.9, float("nan")], 1)])
def test_a_loss_that_is_no_number_is_worse_than_any(losses, expected):
    best = BestStep()
    validate(best, dict(enumerate(losses, 1)))
    assert best.step == expected
