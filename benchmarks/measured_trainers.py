"""The stock trainer and ours, each with a stopwatch: `code:` of the configurations that train_throughput.py runs.

After each step a line goes to the file that MEASURE_LOG names: seconds since the line before (all that a user waits
for; the first counts from MEASURE_START, the launch), tokens without padding, the sum of squared sample lengths, and
the highest memory so far in bytes.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from arctic_training.trainer.sft_trainer import SFTTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train import SOAPTrainer


def measured(step: Callable) -> Callable:
    state = {"time": float(os.environ["MEASURE_START"]), "peak_allocated": 0, "peak_reserved": 0}

    def measured_step(self: SFTTrainer, batch: dict) -> None:
        lengths = [length for row in batch["packed_sample_seqlens"] for length in row]
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
        state["time"] = now
        with Path(os.environ["MEASURE_LOG"]).open("a") as log:
            log.write(json.dumps(record) + "\n")

    return measured_step


class MeasuredSFTTrainer(SFTTrainer):
    name = "measured_sft"
    step = measured(SFTTrainer.step)


class MeasuredSOAPTrainer(SOAPTrainer):
    name = "measured_soap"
    step = measured(SOAPTrainer.step)
