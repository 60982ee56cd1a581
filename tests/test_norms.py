"""Test that native RMSNorm matches Liger's, and replaces only the intended layers."""

import pytest
import torch

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
