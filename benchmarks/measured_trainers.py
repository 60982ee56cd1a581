"""The stock trainer and ours, each with a stopwatch: `code:` of the configurations that train_throughput.py runs.

After each step every process adds a line to a file of its own, MEASURE_LOG with `.<rank>.jsonl`: seconds since the
line before (all that a user waits for; the first counts from MEASURE_START, the launch), tokens without padding, the
sum of squared sample lengths, and the highest memory so far in bytes. The first line also tells how many seconds each
part of the start took. With MEASURE_MEMORY_GB the process gets no more GPU memory than that.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
from arctic_training.data.sft_factory import SFTDataFactory
from arctic_training.model.factory import ModelFactory
from arctic_training.trainer.sft_trainer import SFTTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train import SOAPTrainer
from training import settings

LAUNCH = float(os.environ["MEASURE_START"])
start_parts = {"launch and imports": time.time() - LAUNCH}

if limit := os.environ.get("MEASURE_MEMORY_GB"):
    torch.cuda.set_per_process_memory_fraction(float(limit) * 1e9 / torch.cuda.get_device_properties(0).total_memory)


def timed(part: str, owner: object, name: str) -> None:
    """Have each call of `owner.name` add its seconds to a part of the start."""
    function = getattr(owner, name)

    def timed_function(*args: object, **kwargs: object) -> object:
        began = time.time()
        try:
            return function(*args, **kwargs)
        finally:
            start_parts[part] = start_parts.get(part, 0.0) + time.time() - began

    setattr(owner, name, timed_function)


timed("operators", settings, "compile_operators")
timed("data", SFTDataFactory, "__call__")  # which ours calls
timed("model", ModelFactory, "__call__")
timed("engine", deepspeed, "initialize")


def measured(step: Callable) -> Callable:
    state = {"time": LAUNCH, "peak_allocated": 0, "peak_reserved": 0}

    def measured_step(self: SFTTrainer, batch: dict) -> None:
        lengths = [length for row in batch["packed_sample_seqlens"] for length in row]
        began = time.time()
        step(self, batch)
        if torch.cuda.is_available():
            # arctic_training resets torch's peaks whenever it logs, so they are gathered here
            state["peak_allocated"] = max(state["peak_allocated"], torch.cuda.max_memory_allocated())
            state["peak_reserved"] = max(state["peak_reserved"], torch.cuda.max_memory_reserved())
        now = time.time()
        record = {
            "seconds": now - state["time"],
            "tokens": sum(lengths),
            "squares": sum(length * length for length in lengths),
            "peak_allocated": state["peak_allocated"],
            "peak_reserved": state["peak_reserved"],
        }
        if state["time"] == LAUNCH:
            parts = start_parts | {"first step": now - began}
            record["start"] = parts | {"rest": now - LAUNCH - sum(parts.values())}
        state["time"] = now
        with Path(f"{os.environ['MEASURE_LOG']}.{self.global_rank}.jsonl").open("a") as log:
            log.write(json.dumps(record) + "\n")

    return measured_step


class MeasuredSFTTrainer(SFTTrainer):
    name = "measured_sft"
    step = measured(SFTTrainer.step)


class MeasuredSOAPTrainer(SOAPTrainer):
    name = "measured_soap"
    step = measured(SOAPTrainer.step)
