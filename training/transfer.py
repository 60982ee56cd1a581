"""Copy between CPU and GPU asynchronously, so that Python's work overlaps with the GPU's."""

import torch


def to_device_async(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the tensors of `batch` on `device`; later work on the same CUDA stream sees the copies."""
    if device.type == "cuda":
        batch = {key: value.pin_memory() for key, value in batch.items()}  # avoids waiting for the stream
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


class AsyncNumbers:
    """Numbers that the GPU may not have computed yet. `read` waits for them, not for work queued after them."""

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
