"""Copies between CPU and GPU that neither waits for: a step's cost is Python's and the GPU's time, not their sum."""

import torch


def to_device_unwaited(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors of `batch` on `device`; what follows on the GPU's queue finds them there."""
    if device.type == "cuda":
        batch = {key: value.pin_memory() for key, value in batch.items()}  # else the copy waits for the queue
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


class AsyncNumbers:
    """Numbers that the GPU is still to compute. `read` waits for them alone, not for what was queued after them."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self.copy = numbers.detach().to("cpu", non_blocking=True)
        self.copied = None
        if numbers.is_cuda:
            self.copied = torch.cuda.Event()
            self.copied.record()

    def read(self) -> list[float]:
        if self.copied:
            self.copied.synchronize()
        return self.copy.flatten().tolist()
