"""AdamW's update as one Triton kernel, which reads and writes each number once."""

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def launch(
    weights: torch.Tensor,
    gradients: torch.Tensor,
    master: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    scale: torch.Tensor,
    *numbers: float,
) -> None:
    """Update `master`, `mean` and `square` (float32) in place, and `weights` (any floating dtype) from `master`.

    All tensors are flat and have the same size, except `scale`, a 0-dimensional tensor on the same device. `numbers`
    are the learning rate, beta1, beta2, eps, the weight decay, 1 - beta1^t and sqrt(1 - beta2^t). Gradients are
    multiplied by `scale`; elements whose scaled gradient is NaN stay unchanged.
    """
    count = weights.numel()
    _adamw[(triton.cdiv(count, _BLOCK),)](
        weights, gradients, master, mean, square, scale, *map(float, numbers), count, BLOCK=_BLOCK
    )


@triton.jit(do_not_specialize=["rate", "beta1", "beta2", "eps", "decay", "correction1", "correction2"])
def _adamw(
    weights,
    gradients,
    master,
    mean,
    square,
    scale,
    rate,
    beta1,
    beta2,
    eps,
    decay,
    correction1,
    correction2,
    count,
    BLOCK: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(scale)
    inside = places < count
    gradient = tl.load(gradients + places, mask=inside).to(tl.float32) * factor
    inside = inside & (gradient == gradient)  # NaN: no change
    weight = tl.load(master + places, mask=inside)
    m = tl.load(mean + places, mask=inside)
    v = tl.load(square + places, mask=inside)
    m = m + (gradient - m) * (1 - beta1)
    v = v + (gradient * gradient - v) * (1 - beta2)
    direction = m / correction1 / (tl.sqrt(v) / correction2 + eps) + decay * weight
    weight = weight - rate * direction
    tl.store(mean + places, m, mask=inside)
    tl.store(square + places, v, mask=inside)
    tl.store(master + places, weight, mask=inside)
    tl.store(weights + places, weight.to(weights.dtype.element_ty), mask=inside)
