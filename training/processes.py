"""Collective operations over the processes of a run, one per GPU. Every process must make each call."""

import torch

from training.transfer import AsyncNumbers


class StepTotals:
    """A step's summed loss, and whether any process saw the stop file, over all processes.

    The reduction overlaps with the backward pass; `read` waits only for the forward passes.
    """

    def __init__(self, loss_sum: torch.Tensor, stop: bool) -> None:
        """`loss_sum`: cross-entropy summed over this process's labelled tokens of the step, a 0-dimensional tensor."""
        totals = torch.stack([loss_sum.detach().double(), loss_sum.new_full((), stop, dtype=torch.float64)])
        if torch.distributed.get_world_size() == 1:
            self.numbers = AsyncNumbers(totals)
            return
        work = torch.distributed.all_reduce(totals, async_op=True)
        with torch.cuda.stream(self._stream(totals)):  # only this stream waits for the other processes
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


def sum_over_processes(numbers: list[float], device: torch.device) -> list[float]:
    """Return the sums of `numbers` over all processes."""
    totals = torch.tensor(numbers, dtype=torch.float64, device=device)
    if torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(totals)
    return totals.tolist()
