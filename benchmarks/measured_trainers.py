"""Time the stock trainer and ours: the `code:` of the configurations that train_throughput.py runs.

After each step, every process appends a line to its own file, MEASURE_LOG plus `.<rank>.jsonl`: seconds since the
previous line (total wall time; the first counts from MEASURE_START, the launch), tokens without padding, labelled
tokens, the sum of squared sample lengths, and peak memory so far in bytes. The first line also has the seconds of each
part of the start. MEASURE_MEMORY_GB limits the GPU memory of the process. If MEASURE_PROFILE is set, a few steps from
MEASURE_PROFILE_FROM on are traced, and a summary is written to that file. For experiments, MEASURE_COMPILE compiles the
decoder layers, and MEASURE_LIGER_NORMS keeps Liger's norms.
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

from train import SOAPDataFactory, SOAPTrainer
from training import norms, settings, tokens

LAUNCH = float(os.environ["MEASURE_START"])


def process_start() -> float:
    """Return when the system started this process, in seconds as `time.time()`."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # since the machine's start
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


start_parts = {"launcher": process_start() - LAUNCH, "imports": time.time() - process_start()}

if limit := os.environ.get("MEASURE_MEMORY_GB"):
    torch.cuda.set_per_process_memory_fraction(float(limit) * 1e9 / torch.cuda.get_device_properties(0).total_memory)


def timed(part: str, owner: object, name: str) -> None:
    """Make each call of `owner.name` add its seconds to a part of the start."""
    function = getattr(owner, name)

    def timed_function(*args: object, **kwargs: object) -> object:
        began = time.time()
        try:
            return function(*args, **kwargs)
        finally:
            start_parts[part] = start_parts.get(part, 0.0) + time.time() - began

    setattr(owner, name, timed_function)


timed("operators", settings, "compile_operators")
timed("connection", deepspeed, "init_distributed")
timed("tokenizer", tokens, "load_tokenizer")
for factory in (SFTDataFactory, SOAPDataFactory):
    timed("data", factory, "__call__")
timed("model", ModelFactory, "__call__")
timed("engine", deepspeed, "initialize")
timed("check", SOAPTrainer, "_check_model")


KINDS = {  # of kernels, by words in their names; the first match counts
    "attention": ("flash",),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma"),
    "optimizer": ("adam", "multi_tensor"),
    "communication": ("nccl",),
    "norm, rope, swiglu": ("norm", "rope", "swiglu", "triton"),
    "copies and casts": ("copy", "memcpy", "catarray"),
    "cross-entropy": ("softmax", "nll"),
}


def profile(step: int, steps: int = 3) -> None:
    """Start the trace at step 0, end it after `steps` steps, and write a summary."""
    if step == 0:
        profile.trace = torch.profiler.profile()
        torch.cuda.synchronize()
        profile.trace.start()
        profile.began = time.time()
    if step != steps:
        return
    torch.cuda.synchronize()
    seconds = time.time() - profile.began
    profile.trace.stop()
    averages = profile.trace.key_averages()
    on_gpu = [event for event in averages if event.self_device_time_total and event.device_type.name == "CUDA"]
    # "#" and "nccl:" mark spans of kernels, such as an optimizer's.
    kernels = [event for event in on_gpu if "#" not in event.key and not event.key.startswith("nccl:")]
    sums = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in kernels:
        name = event.key.lower()
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")
        sums[kind] += event.self_device_time_total / 1e3 / steps
    lines = [f"{kind}: {milliseconds:.1f} ms" for kind, milliseconds in sums.items()]
    lines += [
        f"all kernels: {sum(sums.values()):.1f} ms",
        f"a step with the profiler on: {seconds / steps * 1e3:.1f} ms",
    ]
    for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:45]:
        lines.append(
            f"{event.self_device_time_total / 1e3 / steps:8.2f} ms {event.count / steps:7.1f} x {event.key[:110]}"
        )
    lines.append(averages.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))
    Path(os.environ["MEASURE_PROFILE"]).write_text("\n".join(lines) + "\n")


def measured(step: Callable) -> Callable:
    state = {"time": LAUNCH, "peak_allocated": 0, "peak_reserved": 0}

    def measured_step(self: SFTTrainer, batch: dict) -> None:
        lengths = [length for row in batch["packed_sample_seqlens"] for length in row]
        labelled = int((batch["labels"] != -100).sum())
        began = time.time()
        if os.environ.get("MEASURE_PROFILE") and self.global_rank == 0:
            profile(self.global_step - int(os.environ["MEASURE_PROFILE_FROM"]))
        step(self, batch)
        if torch.cuda.is_available():
            # arctic_training resets torch's peaks whenever it logs, so they are gathered here
            state["peak_allocated"] = max(state["peak_allocated"], torch.cuda.max_memory_allocated())
            state["peak_reserved"] = max(state["peak_reserved"], torch.cuda.max_memory_reserved())
        now = time.time()
        record = {
            "seconds": now - state["time"],
            "tokens": sum(lengths),
            "labelled": labelled,
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

    def __init__(self, *args: object, **kwargs: object) -> None:
        if os.environ.get("MEASURE_LIGER_NORMS"):
            norms.use_native = lambda _: 0
        super().__init__(*args, **kwargs)
        if os.environ.get("MEASURE_COMPILE"):
            for module in self.model_unwrapped.modules():
                if type(module).__name__.endswith("DecoderLayer"):
                    module.compile()
