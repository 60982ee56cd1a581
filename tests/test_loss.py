"""Test that chunked cross-entropy equals ordinary cross-entropy."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from training.loss import _ROWS, chunked_cross_entropy


@pytest.mark.parametrize("tokens", [1, _ROWS, _ROWS + 1, 3 * _ROWS - 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_equal_those_of_one_chunk(tokens, dtype):
    torch.manual_seed(tokens)
    logits = (4 * torch.randn(tokens, 50)).to(dtype).requires_grad_()
    targets = torch.randint(50, (tokens,))
    expected = cross_entropy(logits.float(), targets)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    loss = chunked_cross_entropy(logits, targets)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


class _DoubledView(torch.autograd.Function):
    """Return a view, as a fused LoRA layer does."""

    @staticmethod
    def forward(ctx, states: torch.Tensor) -> torch.Tensor:
        return (2 * states).view(1, *states.shape)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return 2 * gradient[0]


def test_logits_may_be_a_view_of_another_functions_output():
    states = torch.randn(5, 50, requires_grad=True)
    targets = torch.randint(50, (5,))
    (expected,) = torch.autograd.grad(cross_entropy(2 * states, targets), states)
    (gradient,) = torch.autograd.grad(chunked_cross_entropy(_DoubledView.apply(states)[0], targets), states)
    torch.testing.assert_close(gradient, expected)
