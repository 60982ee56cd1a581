"""Test that native RMSNorm matches Liger's, and replaces only the intended layers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_train import free_port

from training import norms


class LigerRMSNorm(torch.nn.Module):
    """A layer with the attributes of Liger's, whose kernel needs a GPU; this one computes the same in float32."""

    def __init__(self, size: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(size) + 0.5)
        self.variance_epsilon, self.offset = 1e-6, offset

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        wide = states.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight.float()).to(states.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_rms_norm_has_the_same_output_and_gradients(dtype):
    torch.manual_seed(0)
    layer = LigerRMSNorm(2048).to(dtype)
    results = []
    for native in (False, True):
        assert norms.use_native(torch.nn.Sequential(layer)) == 1 if native else True
        states = torch.randn(1, 9, 2048, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        layer.zero_grad()
        output = layer(states)
        output.float().square().sum().backward()
        results.append((output, states.grad, layer.weight.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_short_rows_and_layers_with_an_offset_are_not_replaced():
    model = torch.nn.Sequential(LigerRMSNorm(128), LigerRMSNorm(2048, offset=1.0), torch.nn.LayerNorm(2048))
    assert norms.use_native(model) == 0


SHARDED = """
import deepspeed
import torch
from test_norms import LigerRMSNorm
from training import norms, operators

operators.compile_operators("none")  # on a CPU: no shared memory
deepspeed.init_distributed("gloo")
config = {"train_batch_size": 1, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
torch.manual_seed(0)
with deepspeed.zero.Init(config_dict_or_path=config):
    model = torch.nn.Sequential(LigerRMSNorm(2048), LigerRMSNorm(128))
assert [weight.numel() for weight in model.parameters()] == [0, 0]
config["optimizer"] = {"type": "Adam", "params": {"torch_adam": True}}
engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
results = []
for native in (False, True):
    assert not native or norms.use_native(model) == 1
    states = torch.randn(1, 9, 2048, generator=torch.Generator().manual_seed(1)).requires_grad_()
    output = model[0](states)
    engine.backward(output.square().sum())
    results.append((output, states.grad))
for expected, found in zip(*results):
    torch.testing.assert_close(found, expected)
"""


def test_weights_sharded_by_zero_3_count_with_their_whole_size(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", SHARDED]
    subprocess.run(command, env=os.environ | environment, cwd=tmp_path, check=True, timeout=120)
