"""LoRA layers with fewer passes over the activations than PEFT's, and the same results.

PEFT computes a layer's output, the adapter's output, its scaled copy and their sum, one after the other, and reads the
input anew for each of q, k and v. Here the adapter's part is added inside the matrix product (BLAS's beta), and layers
with the same input share what is computed from it.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import Linear

# Layers that a decoder calls with the same input, in the order in which it calls them.
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class AdaptedLinears(torch.autograd.Function):
    """y_i = x W_i^T + s x A_i^T B_i^T for layers i with one input x; gradients for x, A_i and B_i.

    Takes s, x (..., features) and, for each layer, W (out, features), A (rank, features), B (out, rank), one after the
    other; returns a tuple of y_i (..., out).
    """

    @staticmethod
    def forward(ctx, scale: float, x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        bases, downs, ups = weights[0::3], weights[1::3], weights[2::3]
        tokens = x.flatten(0, -2)
        down = _joined(downs, 0)
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
        of_low = _joined([gradient @ up for gradient, up in zip(gradients, ups, strict=True)], 1).mul_(ctx.scale)
        of_x = None
        if ctx.needs_input_grad[1]:
            of_x = gradients[0] @ bases[0]
            for gradient, base in zip(gradients[1:], bases[1:], strict=True):
                of_x.addmm_(gradient, base)
            of_x = of_x.addmm_(of_low, down).view_as(x)
        of_downs = (of_low.T @ tokens).split(ranks)
        of_ups = [gradient.T @ part for gradient, part in zip(gradients, low.split(ranks, dim=1), strict=True)]
        of_weights = [(None, *pair) for pair in zip(of_downs, of_ups, strict=True)]
        return None, of_x, *(gradient for triple in of_weights for gradient in triple)


def _joined(parts: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


class _Group:
    """Adapted layers with one input: the call of the first computes all, the others hand out what is ready."""

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
            raise RuntimeError("this model does not call its layers as training/lora.py expects: set fused_lora: false")
        output, self.outputs[index] = self.outputs[index], None
        if index == len(self.layers) - 1:
            self.input = None  # activations live no longer than the graph that needs them
        return output


def fuse(model: "PeftModel") -> int:
    """Give the LoRA layers of `model` the forward above; return how many got it. The others keep PEFT's.

    Weights, names and what is saved stay as they are. Left out: layers with dropout, a bias, DoRA and other variants.
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
