"""Plan which packs each step trains on. Every process computes the same plan, without communication."""

import random
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pyarrow as pa
from datasets import Dataset

from training.packing import shuffled_packs
from training.tokens import IGNORE_INDEX


@dataclass(frozen=True)
class RowSizes:
    """The number of tokens, and of labelled tokens, in each row of a tokenized dataset."""

    tokens: list[int]
    labelled: list[int]

    @classmethod
    def of(cls, rows: Dataset) -> "RowSizes":
        tokens, labelled = [], []
        for batch in rows.select_columns("labels").with_format("arrow").iter(1000):
            for labels in batch["labels"].chunks:
                lengths = pa.compute.list_value_length(labels).to_numpy(zero_copy_only=False)
                counted = np.concatenate([[0], np.cumsum(labels.flatten().to_numpy() != IGNORE_INDEX)])
                ends = np.cumsum(lengths)
                tokens += lengths.tolist()
                labelled += (counted[ends] - counted[ends - lengths]).tolist()
        return cls(tokens, labelled)


@dataclass
class RunPlan:
    """The packs of all epochs as one sequence, cut into steps, micro-batches and processes.

    Micro-batch m of process r is pack m x processes + r of the sequence. So a step has the same packs, however it is
    split into processes and accumulated micro-batches. An epoch may end within a step. Packs at the end that do not
    fill a step are dropped.
    """

    version: ClassVar[int] = 2  # of the pack order; a run cannot resume with another version

    sizes: RowSizes
    capacity: int | None  # tokens; None: one row per pack
    seed: int
    epochs: int
    accumulation: int
    processes: int
    train_iters: int = 0  # steps, over as many epochs as needed
    min_iterations: int = 0  # minimum steps per epoch; rows are repeated to reach it
    _packs: list[list[list[int]]] = field(default_factory=list)  # by epoch
    _ends: list[int] = field(default_factory=list)  # by epoch, in packs

    def __post_init__(self) -> None:
        wanted = self.train_iters * self.packs_per_step
        while self.total_packs < wanted if wanted else len(self._packs) < self.epochs:
            self._packs.append(self._pack_epoch(len(self._packs)))
            self._ends.append(self.total_packs + len(self._packs[-1]))
        self.epochs = len(self._packs)

    def _pack_epoch(self, epoch: int) -> list[list[int]]:
        packs: list[list[int]] = []
        rounds = 0
        while not packs or len(packs) < self.min_iterations * self.packs_per_step:
            seed = (self.seed, epoch, rounds)
            rounds += 1
            if self.capacity:
                packs += shuffled_packs(self.sizes.tokens, self.capacity, seed)
            else:
                count = len(self.sizes.tokens)
                packs += [[row] for row in random.Random(repr(seed)).sample(range(count), count)]
        return packs

    @property
    def packs_per_step(self) -> int:
        return self.accumulation * self.processes

    @property
    def total_packs(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def packs_per_epoch(self) -> int:
        """Return the packs in the first epoch; others may have a few more or fewer."""
        return len(self._packs[0]) if self._packs else 0

    @property
    def steps(self) -> int:
        """Return the optimizer steps of the whole run, the length of the learning-rate schedule."""
        return self.train_iters or self.total_packs // self.packs_per_step

    @property
    def left_over(self) -> int:
        """Return the number of packs at the end that do not fill another step."""
        return 0 if self.train_iters else self.total_packs % self.packs_per_step

    def pack(self, position: int) -> list[int]:
        """Return the row numbers of the pack at a position of the sequence."""
        epoch = bisect_right(self._ends, position)
        return self._packs[epoch][position - self._start(epoch)]

    def step_packs(self, step: int) -> list[list[int]]:
        """Return the packs of a step; steps count from 0."""
        first = step * self.packs_per_step
        return [self.pack(position) for position in range(first, first + self.packs_per_step)]

    def labelled(self, step: int) -> int:
        """Count the labelled tokens of a step over all its micro-batches and processes."""
        return sum(self.sizes.labelled[row] for pack in self.step_packs(step) for row in pack)

    def tokens(self, step: int) -> int:
        """Count the tokens of a step, without padding, over all its micro-batches and processes."""
        return sum(self.sizes.tokens[row] for pack in self.step_packs(step) for row in pack)

    def epoch_of(self, micro_batch: int) -> int:
        """Return the epoch of the first process's pack in a micro-batch."""
        return min(bisect_right(self._ends, micro_batch * self.processes), len(self._ends) - 1)

    def micro_batches(self, epoch: int) -> range:
        """Return the numbers of an epoch's micro-batches, the same for every process."""
        bounds = (-(-position // self.processes) for position in (self._start(epoch), self._ends[epoch]))
        return range(*(min(bound, self.steps * self.accumulation) for bound in bounds))

    def _start(self, epoch: int) -> int:
        return self._ends[epoch - 1] if epoch else 0


class PackSampler:
    """Batch sampler of one process: yields the row numbers of its packs in the epoch set by `start`."""

    def __init__(self, plan: RunPlan, process: int) -> None:
        self.plan, self.process = plan, process
        self.start(0, 0)

    def start(self, epoch: int, micro_batch: int) -> None:
        """Set the epoch and micro-batch at which the next iteration starts."""
        numbers = self.plan.micro_batches(epoch)
        self.numbers = range(max(numbers.start, micro_batch), numbers.stop)

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[list[int]]:
        for number in self.numbers:
            yield self.plan.pack(number * self.plan.processes + self.process)


class SharedPacks:
    """Batch sampler of one process's share of packs; every process gets the same number.

    If the packs do not divide evenly, the last processes repeat the first pack. All processes must run the same number
    of forward passes, because ZeRO-3 gathers the model's shards in each. `counts` identifies the repeats.
    """

    def __init__(self, packs: list[list[int]], process: int, processes: int) -> None:
        self.packs, self.process, self.processes = packs, process, processes

    def __len__(self) -> int:
        return -(-len(self.packs) // self.processes)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(len(self)):
            yield self.packs[batch * self.processes + self.process] if self.counts(batch) else self.packs[0]

    def counts(self, batch: int) -> bool:
        """Return whether a batch of this process counts, that is, is not a repeat."""
        return batch * self.processes + self.process < len(self.packs)
