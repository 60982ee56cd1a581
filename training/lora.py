"""LoRA layers with the same results as PEFT's, but fewer passes over the activations.

PEFT computes a layer's output, the adapter's output, its scaled copy and their sum one after the other, and reads the
input again for each of q, k and v. Here the matrix product adds the adapter's part (BLAS's beta), and layers with the
same input share its down-projection.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import Linear

# Layers that a decoder calls with the same input, in call order.
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class AdaptedLinears(torch.autograd.Function):
    """y_i = x W_i^T + s x A_i^T B_i^T for layers i with one input x; gradients for x, A_i and B_i.

    The arguments are s, x (..., features) and, layer by layer, W (out, features), A (rank, features), B (out, rank).
    Returns a tuple of y_i (..., out).
    """

    @staticmethod
    def forward(ctx, scale: float, x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        bases, downs, ups = weights[0::3], weights[1::3], weights[2::3]
        tokens = x.flatten(0, -2)
        down = _concatenated(downs, 0)
        low = (tokens @ down.T).mul_(scale)  # (tokens, sum of ranks)
        lows = low.split([down.shape[0] for down in downs], dim=1)
        outputs = [(tokens @ base.T).addmm_(part, up.T) for base, part, up in zip(bases, lows, ups, strict=True)]
        ctx.scale = scale
        ctx.save_for_backward(x, low, down, *weights)
        return tuple(output.view(*x.shape[:-1], -1) for output in outputs)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, down, *weights = ctx.saved_tensors
        bases, downs, ups = weights[0::3], weights[1::3], weights[2::3]
        ranks = [down.shape[0] for down in downs]
        tokens, gradients = x.flatten(0, -2), [gradient.flatten(0, -2) for gradient in gradients]
        low_gradients = [gradient @ up for gradient, up in zip(gradients, ups, strict=True)]
        low_gradient = _concatenated(low_gradients, 1).mul_(ctx.scale)
        x_gradient = None
        if ctx.needs_input_grad[1]:
            x_gradient = gradients[0] @ bases[0]
            for gradient, base in zip(gradients[1:], bases[1:], strict=True):
                x_gradient.addmm_(gradient, base)
            x_gradient = x_gradient.addmm_(low_gradient, down).view_as(x)
        down_gradients = (low_gradient.T @ tokens).split(ranks)
        up_gradients = [gradient.T @ part for gradient, part in zip(gradients, low.split(ranks, dim=1), strict=True)]
        weight_gradients = [(None, *pair) for pair in zip(down_gradients, up_gradients, strict=True)]
        return None, x_gradient, *(gradient for triple in weight_gradients for gradient in triple)


def _concatenated(parts: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


class _Group:
    """Adapted layers with the same input: the first call computes all outputs, the later ones return theirs."""

    def __init__(self, layers: list["Linear"]) -> None:
        self.layers = layers
        self.input: torch.Tensor | None = None
        self.outputs: list[torch.Tensor] = []
        for index, layer in enumerate(layers):
            layer.forward = partial(self.output, index)

    def output(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if index == 0:
            weights = []
            for layer in self.layers:
                weights += [layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
            self.outputs = list(AdaptedLinears.apply(self.layers[0].scaling["default"], x, *weights))
            self.input = x
        elif x is not self.input:
            raise RuntimeError("the model calls its layers in an unexpected order: set `fused_lora: false`")
        output, self.outputs[index] = self.outputs[index], None
        if index == len(self.layers) - 1:
            self.input = None  # keep activations no longer than the autograd graph does
        return output


def fuse(model: "PeftModel") -> int:
    """Replace the forward of the LoRA layers in `model` with the one above; return how many layers changed.

    Layers with dropout, a bias, DoRA or another variant keep PEFT's forward. Weights, their names and saved files are
    unchanged.
    """
    from peft.tuners.lora import Linear

    fused = 0
    for parent in model.modules():
        layers = {name: child for name, child in parent.named_children() if isinstance(child, Linear) and _plain(child)}
        for names in _SAME_INPUT:
            group = [layers.pop(name) for name in names if name in layers]
            if len({layer.scaling["default"] for layer in group}) == 1:
                _Group(group)
                fused += len(group)
        for layer in layers.values():
            _Group([layer])
        fused += len(layers)
    return fused


def _plain(layer: "Linear") -> bool:
    base, down, up = layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]
    return (
        type(base) is torch.nn.Linear
        and base.bias is up.bias is None
        and down.weight.dtype == base.weight.dtype
        and not base.weight.requires_grad
        and isinstance(layer.lora_dropout["default"], torch.nn.Identity)
        and not layer.lora_variant
    )
