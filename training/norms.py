"""RMSNorm over the hidden size by PyTorch's own operator, in place of Liger's: its call takes a third of Python's time.

Liger's remains for the short rows of query and key norms, a row of which is too little work for a block of threads.
"""

from functools import partial

import torch

LEAST_ROW = 1024  # numbers


def use_native(model: torch.nn.Module) -> int:
    """Have Liger's RMSNorm layers with long rows computed by `torch.nn.functional.rms_norm`; return how many.

    Both compute in float32. Layers with an offset, as Gemma's, keep theirs. Weights and their names stay.
    """
    changed = 0
    for module in model.modules():
        if type(module).__name__ == "LigerRMSNorm" and not module.offset and module.weight.numel() >= LEAST_ROW:
            module.forward = partial(_normalize, module)
            changed += 1
    return changed


def _normalize(module: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(states, module.weight.shape, module.weight, module.variance_epsilon)
