"""Test MixedAdamW: AdamW updates of float32 master weights, in one process and in several."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from training import mixed_adamw
from training.mixed_adamw import MixedAdamW

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95)}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)


def make_model(dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = torch.nn.Linear(7, 300), torch.nn.Tanh(), torch.nn.Linear(300, 5), torch.nn.Linear(5, 1, bias=False)
    return torch.nn.Sequential(*layers).to(dtype)


def groups(model: torch.nn.Module) -> list[dict]:
    parameters = list(model.parameters())
    return [{"params": parameters[:3], "weight_decay": 0.1}, {"params": parameters[3:], "weight_decay": 0.0}]


def loss(model: torch.nn.Module, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    inputs = torch.randn(11, 7, generator=generator).to(next(model.parameters()).dtype)
    return 5 * model(inputs).float().square().mean()


def train(model: torch.nn.Module, steps: int, max_norm: float = 0.0, accumulated: int = 1) -> MixedAdamW:
    optimizer = MixedAdamW(groups(model), **SETTINGS)
    optimizer.attach(accumulated, max_norm)
    for step in range(steps):
        for part in range(accumulated):
            optimizer.begin_backward(first=part == 0, last=part == accumulated - 1)
            (loss(model, step * accumulated + part) / accumulated).backward()
        optimizer.step()
    return optimizer


def train_as_torch(model: torch.nn.Module, steps: int, max_norm: float, accumulated: int) -> list[float]:
    """Train like `train` with PyTorch's AdamW; return the norms before clipping."""
    optimizer, norms = torch.optim.AdamW(groups(model), **SETTINGS), []
    for step in range(steps):
        for part in range(accumulated):
            (loss(model, step * accumulated + part) / accumulated).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf")).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


@pytest.mark.parametrize("bucket", [10, 700, 10**9])
@pytest.mark.parametrize(("max_norm", "accumulated"), [(0.0, 1), (0.5, 1), (0.5, 3)])
def test_float32_weights_and_norm_equal_those_of_pytorchs_adamw(monkeypatch, bucket, max_norm, accumulated):
    monkeypatch.setattr(mixed_adamw, "BUCKET", bucket)
    model, reference = make_model(), make_model()
    optimizer = train(model, 4, max_norm, accumulated)
    norms = train_as_torch(reference, 4, max_norm, accumulated)
    assert max_norm == 0 or max(norms) > max_norm, "no gradient needed clipping"
    assert optimizer.gradient_norm.item() == pytest.approx(norms[-1], rel=1e-5)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_updates_below_bfloat16_rounding_accumulate_in_master_weights():
    model = make_model(torch.bfloat16)
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = MixedAdamW(groups(model), lr=1e-5, betas=(0.9, 0.95))
    optimizer.attach(1, 1.0)
    for step in range(120):
        optimizer.begin_backward(first=True, last=True)
        loss(model, step).backward()
        optimizer.step()
        if step == 0:
            assert optimizer.buckets[0].master.ne(optimizer.buckets[0].own_weights.float()).any()
    moved = [(now != then).float().mean().item() for now, then in zip(model.parameters(), before, strict=True)]
    assert min(moved[0], moved[2]) > 0.3
    for bucket in optimizer.buckets:
        assert bucket.own_weights.equal(bucket.master.to(torch.bfloat16))


def test_gradients_of_several_micro_batches_are_summed_in_float32():
    model, exact = make_model(torch.bfloat16), make_model(torch.bfloat16).float()
    optimizer = MixedAdamW(groups(model), **SETTINGS)
    optimizer.attach(64, 0.0)
    for part in range(64):
        optimizer.begin_backward(first=part == 0, last=part == 63)
        loss(model, part).backward()
        loss(exact, part).backward()
    optimizer.step()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in exact.parameters()])
    assert all(bucket.gradients.dtype == torch.float32 for bucket in optimizer.buckets)
    assert optimizer.gradient_norm.item() == pytest.approx(norm.item(), rel=2e-3)


def test_a_step_with_a_non_finite_gradient_changes_nothing():
    model = make_model()
    optimizer = train(model, 2, 1.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moments = [bucket.mean.clone() for bucket in optimizer.buckets]
    optimizer.begin_backward(first=True, last=True)
    (loss(model, 9) * float("inf")).backward()
    optimizer.step()
    assert not optimizer.gradient_norm.isfinite()
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(bucket.mean.equal(moment) for bucket, moment in zip(optimizer.buckets, moments, strict=True))


def test_a_restored_optimizer_continues_like_an_uninterrupted_one():
    model, uninterrupted = make_model(torch.bfloat16), make_model(torch.bfloat16)
    train(uninterrupted, 5, 1.0)
    first = train(model, 3, 1.0)
    resumed = make_model(torch.bfloat16)
    resumed.load_state_dict(model.state_dict())
    optimizer = MixedAdamW(groups(resumed), **SETTINGS)
    optimizer.attach(1, 1.0)
    optimizer.load_state_dict(first.state_dict())
    optimizer.load_process_state(first.process_state())
    for step in (3, 4):
        optimizer.begin_backward(first=True, last=True)
        loss(resumed, step).backward()
        optimizer.step()
    assert all(a.equal(b) for a, b in zip(resumed.parameters(), uninterrupted.parameters(), strict=True))


def test_weights_without_a_gradient_raise_an_error():
    model = make_model()
    optimizer = MixedAdamW(groups(model), **SETTINGS)
    optimizer.attach(1, 1.0)
    optimizer.begin_backward(first=True, last=True)
    model[0](torch.ones(1, 7)).sum().backward()
    with pytest.raises(RuntimeError, match="does not depend on all trained weights"):
        optimizer.step()


KERNEL = """
import torch
from training.adamw_kernel import launch
torch.manual_seed(0)
for dtype in (torch.bfloat16, torch.float32):
    gradient, master, mean, square = torch.randn(3000).to(dtype), *torch.randn(3, 3000)
    square.abs_()
    weights, expected = master.to(dtype), torch.nn.Parameter(master.clone())
    optimizer = torch.optim.AdamW([expected], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizer.state[expected] = {"step": torch.tensor(4.0), "exp_avg": mean.clone(), "exp_avg_sq": square.clone()}
    expected.grad = gradient.float() / 2
    optimizer.step()
    numbers = 1e-2, 0.9, 0.95, 1e-8, 0.1, 1 - 0.9**5, (1 - 0.95**5) ** 0.5
    launch(weights, gradient, master, mean, square, torch.tensor(0.5), *numbers)
    torch.testing.assert_close(master, expected.data)
    torch.testing.assert_close(mean, optimizer.state[expected]["exp_avg"])
    torch.testing.assert_close(square, optimizer.state[expected]["exp_avg_sq"])
    torch.testing.assert_close(weights.float(), master, rtol=2**-7, atol=0)  # the interpreter truncates to bfloat16
    before = master.clone()
    launch(weights, gradient, master, mean, square, torch.tensor(float("nan")), *numbers)
    assert master.equal(before)
"""


def test_the_kernel_equals_pytorchs_adamw(tmp_path: Path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    (tmp_path / "kernel.py").write_text(KERNEL)
    done = subprocess.run([sys.executable, "kernel.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_kernel_equals_the_cpu_implementation(dtype):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    model, reference = make_model(dtype).cuda(), make_model(dtype)
    optimizer = MixedAdamW(groups(model), **SETTINGS)
    optimizer.attach(1, 0.5)
    expected = MixedAdamW(groups(reference), **SETTINGS)
    expected.attach(1, 0.5)
    for step in range(3):
        for one, other in zip(optimizer.buckets, expected.buckets, strict=True):
            gradients = torch.randn(one.gradients.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
            one.gradients.copy_(gradients)
            other.gradients.copy_(gradients)
            one.missing = other.missing = 0
        optimizer.step()
        expected.step()
    assert optimizer.gradient_norm.item() == pytest.approx(expected.gradient_norm.item(), rel=1e-4)
    for one, other in zip(optimizer.buckets, expected.buckets, strict=True):
        torch.testing.assert_close(one.master.cpu(), other.master, rtol=1e-4, atol=1e-5)
        assert one.own_weights.equal(one.master.to(dtype))


SPREAD = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
import test_mixed_adamw as one
torch.distributed.init_process_group("gloo")
rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
one.mixed_adamw.BUCKET = 700
model = one.make_model()
optimizer = one.MixedAdamW(one.groups(model), **one.SETTINGS)
optimizer.attach(1, 0.5)
for step in range(4):
    optimizer.begin_backward(first=True, last=True)
    one.loss(model, step * processes + rank).backward()
    optimizer.step()
held = sum(bucket.master.numel() for bucket in optimizer.buckets)
if rank == 0:
    torch.save({"weights": model.state_dict(), "norm": optimizer.gradient_norm, "held": held}, "spread.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_like_one_and_hold_half_the_state_each(tmp_path: Path):
    (tmp_path / "spread.py").write_text(SPREAD)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "spread.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command.append(str(Path(__file__).parent))
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    spread, reference = torch.load(tmp_path / "spread.pt"), make_model()
    norms = train_as_torch(reference, 4, 0.5, accumulated=2)
    assert spread["norm"].item() == pytest.approx(norms[-1], rel=1e-5)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(spread["weights"][name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert spread["held"] < 0.8 * sum(value.numel() for value in reference.parameters())
