"""What the processes of a run, one a GPU, tell each other. Every process must make each of these calls."""

import torch

from training.transfer import AsyncNumbers


class StepTotals:
    """A step's summed loss, and whether a process saw the stop file, over all processes.

    They travel while the GPU runs the backward pass; `read` waits for no more than the forward passes.
    """

    def __init__(self, loss_sum: torch.Tensor, stop: bool) -> None:
        """`loss_sum`: cross-entropy summed over this process's labelled tokens of the step, a tensor of no axes."""
        totals = torch.stack([loss_sum.detach().double(), loss_sum.new_full((), stop, dtype=torch.float64)])
        if torch.distributed.get_world_size() == 1:
            self.numbers = AsyncNumbers(totals)
            return
        work = torch.distributed.all_reduce(totals, async_op=True)
        with torch.cuda.stream(self._stream(totals)):  # which waits for the other processes, not the GPU's main queue
            work.wait()
            self.numbers = AsyncNumbers(totals)

    def read(self) -> tuple[float, bool]:
        loss_sum, stops = self.numbers.read()
        return loss_sum, stops > 0

    @classmethod
    def _stream(cls, totals: torch.Tensor) -> "torch.cuda.Stream | None":
        if not totals.is_cuda:
            return None
        if not hasattr(cls, "stream"):
            cls.stream = torch.cuda.Stream()
        totals.record_stream(cls.stream)
        return cls.stream


def summed(numbers: list[float], device: torch.device) -> list[float]:
    """The sums of `numbers` over all processes."""
    totals = torch.tensor(numbers, dtype=torch.float64, device=device)
    if torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(totals)
    return totals.tolist()
