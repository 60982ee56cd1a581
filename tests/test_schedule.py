"""Test the learning rate: at least one warm-up step, then the peak, and no step at rate 0."""

from types import SimpleNamespace

import pytest
import torch
from arctic_training.scheduler.hf_factory import HFSchedulerConfig

from training.schedule import SOAPSchedulerFactory


def rates(steps: int, ratio: float, name: str = "cosine") -> list[float]:
    """Return the rate that the optimizer uses in each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    trainer = SimpleNamespace(training_horizon=steps, optimizer=optimizer)
    scheduler = SOAPSchedulerFactory(trainer, HFSchedulerConfig(name=name, warmup_ratio=ratio))()
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


@pytest.mark.parametrize(("steps", "ratio", "warmup"), [(13, 0.1, 1), (4, 0.05, 1), (100, 0.05, 5), (20, 0.0, 0)])
def test_the_warm_up_has_its_share_of_the_steps_and_at_least_one(steps, ratio, warmup):
    used = rates(steps, ratio)
    assert used[: warmup + 1] == pytest.approx([2.0 * (step + 1) / (warmup + 1) for step in range(warmup + 1)])
    assert used[warmup:] == sorted(used[warmup:], reverse=True)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant_with_warmup", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 13])
def test_no_step_has_a_rate_of_zero(name, steps):
    assert min(rates(steps, 0.05, name)) > 0


def test_the_cosine_ends_one_step_before_zero():
    used = rates(10, 0.0)
    assert used[-1] == pytest.approx(1.0 + torch.cos(torch.tensor(torch.pi * 9 / 10)).item(), rel=1e-5)
