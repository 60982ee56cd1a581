"""What a run trains on, step by step: every process computes the same plan, so none has to tell it to another."""

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
    """Tokens of each row of a tokenized dataset, and how many of them are labelled."""

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

    Micro-batch m of process r is pack m x processes + r of the sequence: however a step is split into processes and
    accumulated micro-batches, it has the same packs. An epoch may end within a step. The packs at the end that are too
    few for a whole step are left out.
    """

    version: ClassVar[int] = 2  # of the order that it gives; a run cannot be resumed with another

    sizes: RowSizes
    capacity: int | None  # tokens; None: each row is a pack
    seed: int
    epochs: int
    accumulation: int
    processes: int
    train_iters: int = 0  # steps, in as many epochs as they take
    min_iterations: int = 0  # steps that an epoch has at least, by repeating its rows
    _packs: list[list[list[int]]] = field(default_factory=list)  # of each epoch
    _ends: list[int] = field(default_factory=list)  # of each epoch, in packs

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
    def packs_of_an_epoch(self) -> int:
        """Of the first one; another epoch may have a few more or less."""
        return len(self._packs[0]) if self._packs else 0

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run: the length of the learning-rate schedule."""
        return self.train_iters or self.total_packs // self.packs_per_step

    @property
    def left_over(self) -> int:
        """Packs at the end that are too few for another step."""
        return 0 if self.train_iters else self.total_packs % self.packs_per_step

    def pack(self, position: int) -> list[int]:
        """Row numbers of a pack of the sequence."""
        epoch = bisect_right(self._ends, position)
        return self._packs[epoch][position - self._start(epoch)]

    def step_packs(self, step: int) -> list[list[int]]:
        """Packs of step `step`, which counts from 0."""
        first = step * self.packs_per_step
        return [self.pack(position) for position in range(first, first + self.packs_per_step)]

    def labelled(self, step: int) -> int:
        """Labelled tokens of a step, of all its micro-batches and processes."""
        return sum(self.sizes.labelled[row] for pack in self.step_packs(step) for row in pack)

    def tokens(self, step: int) -> int:
        """Tokens of a step, of all its micro-batches and processes, without padding."""
        return sum(self.sizes.tokens[row] for pack in self.step_packs(step) for row in pack)

    def epoch_of(self, micro_batch: int) -> int:
        """The epoch that a micro-batch, of whose packs the first decides, belongs to."""
        return min(bisect_right(self._ends, micro_batch * self.processes), len(self._ends) - 1)

    def micro_batches(self, epoch: int) -> range:
        """The numbers of an epoch's micro-batches, which are the same for every process."""
        bounds = (-(-position // self.processes) for position in (self._start(epoch), self._ends[epoch]))
        return range(*(min(bound, self.steps * self.accumulation) for bound in bounds))

    def _start(self, epoch: int) -> int:
        return self._ends[epoch - 1] if epoch else 0


class PackSampler:
    """Batch sampler of one process: the row numbers of its packs of an epoch, from `start` on."""

    def __init__(self, plan: RunPlan, process: int) -> None:
        self.plan, self.process = plan, process
        self.start(0, 0)

    def start(self, epoch: int, micro_batch: int) -> None:
        """Have the next iteration begin at a micro-batch of an epoch."""
        numbers = self.plan.micro_batches(epoch)
        self.numbers = range(max(numbers.start, micro_batch), numbers.stop)

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[list[int]]:
        for number in self.numbers:
            yield self.plan.pack(number * self.plan.processes + self.process)


class SharedPacks:
    """Batch sampler of one process's share of packs, as many for each process.

    Where the packs do not come out even, the last processes get the first pack once more: all must make the same
    number of forward passes, as a model that is spread over them is put together in each. `counts` tells them apart.
    """

    def __init__(self, packs: list[list[int]], process: int, processes: int) -> None:
        self.packs, self.process, self.processes = packs, process, processes

    def __len__(self) -> int:
        return -(-len(self.packs) // self.processes)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(len(self)):
            yield self.packs[batch * self.processes + self.process] if self.counts(batch) else self.packs[0]

    def counts(self, batch: int) -> bool:
        """Whether a batch of this process is a pack of its own."""
        return batch * self.processes + self.process < len(self.packs)
