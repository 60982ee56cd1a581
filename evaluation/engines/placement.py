"""Decide which engine runs on which GPU, and with how much memory.

Two engines share a GPU if both fit: the judge starts while the generator writes. Otherwise they run in turn.
"""

import math
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError

GIB = 1 << 30
# One engine's CUDA context, CUDA graphs and allocator slack, in addition to the sizes computed below.
_FIXED_BYTES = int(1.6 * GIB)
_SMALLEST_SHARED_CACHE = 4 * GIB  # with less, the two engines run in turn
_GENERATOR_SHARE = 0.6  # of the cache memory: notes are long, verdicts short
_CPU_CACHE = 4 * GIB
_NO_GPU = ("", "-1", "none", "void", "NoDevFiles")  # in CUDA_VISIBLE_DEVICES
_SEQUENCES = {"cuda": 256, "cpu": 64}


@dataclass(frozen=True)
class Gpu:
    """`id` is a value for CUDA_VISIBLE_DEVICES; sizes are in bytes."""

    id: str
    name: str
    total: int
    free: int


@dataclass(frozen=True)
class MemoryNeeds:
    """The memory that a model needs on a GPU, in bytes: for its weights, and for each token's cache and activations."""

    name: str
    weights: int
    cache_per_token: int
    activations_per_token: int
    logits: int
    heads: int
    max_model_len: int
    gpus: int = 0  # of each replica, if the user asks for a number; 0: the fewest that hold the model


@dataclass(frozen=True)
class Placement:
    """The replicas of an engine: the GPUs that each may see (CUDA_VISIBLE_DEVICES), and vLLM's arguments for them."""

    devices: tuple[str, ...]
    vllm_args: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Where generator and judge run (None: not at all), whether they run at once, and a line for the user."""

    generator: Placement | None
    judge: Placement | None
    together: bool
    summary: str


def memory_needs(
    name: str, config: dict[str, Any], weight_bytes: int, max_model_len: int, gpus: int = 0
) -> MemoryNeeds:
    """Return a model's memory needs from its config.json. If `weight_bytes` is 0, compute it from the shapes.

    Engines compute in 16 bits, even if the files hold 32. Raises UserError if the config lacks one of these shapes.
    """
    try:
        hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
        inner, vocab = config["intermediate_size"], config["vocab_size"]
    except KeyError as key:
        raise UserError(f"{name}: config.json has no {key}; only models built like Qwen3 are supported") from None
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    if not weight_bytes:
        attention = 2 * hidden * head_dim * (heads + kv_heads)
        embeddings = vocab * hidden * (1 if config.get("tie_word_embeddings") else 2)
        weight_bytes = 2 * (embeddings + layers * (attention + 3 * hidden * inner))
    elif "float32" in (config.get("dtype"), config.get("torch_dtype")):
        weight_bytes //= 2
    return MemoryNeeds(
        name,
        weights=weight_bytes,
        cache_per_token=4 * layers * kv_heads * head_dim,  # key and value, 2 bytes each
        activations_per_token=4 * (2 * inner + 4 * hidden),
        logits=3 * 4 * vocab * _SEQUENCES["cuda"],
        heads=kv_heads,
        max_model_len=max_model_len,
        gpus=gpus,
    )


def gpus_asked_for(vllm_args: dict[str, Any]) -> int:
    """Return over how many GPUs these arguments of vLLM split a replica; 0 if they do not say. Raises UserError."""
    if vllm_args.get("pipeline_parallel_size", 1) != 1:
        raise UserError("pipeline_parallel_size is not supported; split the model with tensor_parallel_size")
    width = vllm_args.get("tensor_parallel_size", 0)
    if "tensor_parallel_size" in vllm_args and not (isinstance(width, int) and width > 0):
        raise UserError(f"tensor_parallel_size is a number of GPUs, not {width}")
    return width


def plan_engines(
    gpus: list[Gpu],
    generator: MemoryNeeds | None,
    judge: MemoryNeeds | None,
    utilization: float,
    free_ram: int = 16 * GIB,
) -> Plan:
    """Decide where to run generator and judge; None for one that is not to run.

    `utilization` is the share of a GPU's memory that all its engines together should use. It is not a strict bound: the
    memory of CUDA and of CUDA graphs is estimated, and at 0.9 one engine alone took 0.915 of an H100 at its peak (two
    took 0.874). Raises UserError if a model fits nowhere.
    """
    if not gpus:
        placements = [model and _on_cpu(model, free_ram) for model in (generator, judge)]
        return Plan(*placements, False, "no GPU found: running on the CPU, one engine after the other")
    placements = [model and _on_gpus(gpus, model, utilization) for model in (generator, judge)]
    lines = [f"{m.name}: {_describe(p)}" for m, p in zip((generator, judge), placements, strict=True) if m]
    if generator and judge and all(p.vllm_args["tensor_parallel_size"] == 1 for p in placements):
        shared = _shared(gpus, generator, judge, utilization)
        if shared:
            return Plan(*shared, True, f"{'; '.join(lines)}; both at once")
    if generator and judge:
        lines.append("one after the other")
    return Plan(*placements, False, "; ".join(lines))


def find_gpus() -> list[Gpu]:
    """Return the NVIDIA GPUs that CUDA_VISIBLE_DEVICES allows; none without a driver.

    Raises UserError if the driver does not answer, or if the variable names an unknown GPU.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in _NO_GPU:
        return []
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except subprocess.TimeoutExpired:
        raise UserError(
            "nvidia-smi has not answered for 30 s; check the driver, or set CUDA_VISIBLE_DEVICES=-1"
        ) from None
    except (OSError, subprocess.CalledProcessError):
        return []
    return read_gpus(output, visible)


def read_gpus(output: str, visible: str | None) -> list[Gpu]:
    """Parse nvidia-smi's lines (index, uuid, name, MiB total, MiB free), in the order of CUDA_VISIBLE_DEVICES.

    Raises UserError if a GPU's memory is unknown, or if nvidia-smi does not list the variable's first entry.
    """
    lines = [[part.strip() for part in line.split(",")] for line in output.splitlines()]
    found = {name: line for line in lines for name in line[:2]}
    chosen = []
    for part in map(str.strip, [line[0] for line in lines] if visible is None else visible.split(",")):
        if part.startswith("MIG-") or (part not in found and not chosen and part not in _NO_GPU):
            raise UserError(
                f"CUDA_VISIBLE_DEVICES={visible}: nvidia-smi lists no GPU {part} (MIG slices cannot be used); give a "
                "number or UUID from `nvidia-smi -L`, or -1 for the CPU"
            )
        if part not in found:
            break  # like CUDA, ignore everything after an unknown entry
        index, _, name, total, free = found[part]
        if not (total.isdecimal() and free.isdecimal()):
            raise UserError(
                f"nvidia-smi reports {total}, {free} as the total and free memory of GPU {index}, {name}; "
                "leave it out of CUDA_VISIBLE_DEVICES"
            )
        chosen.append(Gpu(index, name, int(total) << 20, int(free) << 20))
    return chosen


def free_ram() -> int:
    """Return the bytes of memory that are available on this machine."""
    values = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    return int(values["MemAvailable"].split()[0]) << 10


def _computes_in_bfloat16() -> bool:
    """Return whether the CPU has bfloat16 instructions. Without them, bfloat16 is many times slower than float32."""
    flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _on_cpu(model: MemoryNeeds, free_ram: int) -> Placement:
    wide = 1 if _computes_in_bfloat16() else 2
    weights, cache_per_token = wide * model.weights, wide * model.cache_per_token
    full = cache_per_token * model.max_model_len * _SEQUENCES["cpu"]
    cache = min(full, _CPU_CACHE, (free_ram - weights) // 2)
    if cache < cache_per_token * model.max_model_len:
        raise UserError(
            f"{model.name} needs {_gb(weights + 2 * cache_per_token * model.max_model_len)} of memory, but only "
            f"{_gb(free_ram)} is free; try a smaller --max_model_len or a smaller model"
        )
    return Placement(
        ("",),
        {
            "dtype": "bfloat16" if wide == 1 else "float32",
            "enforce_eager": True,  # compiling for the CPU takes longer than a small run
            "max_model_len": model.max_model_len,
            "max_num_seqs": _SEQUENCES["cpu"],
            "kv_cache_memory_bytes": cache,
        },
    )


def _on_gpus(gpus: list[Gpu], model: MemoryNeeds, utilization: float) -> Placement:
    """Place a replica on each GPU if the model fits on one, else split it over the fewest GPUs that hold it.

    If the user asks for a number of GPUs, split it over that many.
    """
    batch = _batch_tokens(gpus)
    if model.gpus > len(gpus):
        raise UserError(f"{model.name} is to be split over {model.gpus} GPUs, but there are {len(gpus)}")
    widths = [model.gpus] if model.gpus else [w for w in (1, 2, 4, 8, 16) if w <= len(gpus) and model.heads % w == 0]
    for width in widths:
        wanted = model.weights // width + _overhead(model, batch) + model.cache_per_token * model.max_model_len // width
        if wanted <= min(_budget(gpu, utilization) for gpu in gpus):
            groups = [gpus[k : k + width] for k in range(0, len(gpus) - width + 1, width)]
            devices = tuple(",".join(gpu.id for gpu in group) for group in groups)
            share = min(min(utilization, gpu.free / gpu.total - 0.01) for gpu in gpus)
            return Placement(devices, _gpu_args(model, batch, share) | {"tensor_parallel_size": width})
    free = ", ".join(f"{_gb(gpu.free)} of {_gb(gpu.total)}" for gpu in gpus)
    raise UserError(
        f"{model.name} ({_gb(model.weights)} of weights) does not fit: free {free}, --gpu_memory_utilization "
        f"{utilization}; free the GPU, or try a smaller --max_model_len or a smaller model"
    )


def _shared(
    gpus: list[Gpu], generator: MemoryNeeds, judge: MemoryNeeds, utilization: float
) -> tuple[Placement, Placement] | None:
    """Place both on every GPU, each with a fixed cache; return None if that leaves too little cache."""
    batch = _batch_tokens(gpus)
    fixed = [model.weights + _overhead(model, batch) for model in (generator, judge)]
    cache = min(_budget(gpu, utilization) for gpu in gpus) - sum(fixed)
    caches = [int(cache * _GENERATOR_SHARE), int(cache * (1 - _GENERATOR_SHARE))]
    for model, bytes_ in zip((generator, judge), caches, strict=True):
        if bytes_ < max(_SMALLEST_SHARED_CACHE, model.cache_per_token * model.max_model_len):
            return None
    total = max(gpu.total for gpu in gpus)
    return tuple(
        Placement(
            tuple(gpu.id for gpu in gpus),
            # vLLM measures free memory when it starts, and the other engine's start would distort that. So pass the
            # cache's size; the share then only sets how much memory must be free.
            _gpu_args(model, batch, (size + bytes_) / total)
            | {"tensor_parallel_size": 1, "kv_cache_memory_bytes": bytes_},
        )
        for model, size, bytes_ in zip((generator, judge), fixed, caches, strict=True)
    )


def _gpu_args(model: MemoryNeeds, batch: int, share: float) -> dict[str, Any]:
    sizes = [1, 2, 4, 8, *range(16, 65, 16), *range(96, _SEQUENCES["cuda"] + 1, 32)]
    return {
        "max_model_len": model.max_model_len,
        "max_num_seqs": _SEQUENCES["cuda"],
        "max_num_batched_tokens": batch,
        "gpu_memory_utilization": math.floor(share * 1000) / 1000,
        # CUDA graphs for decoding, without torch.compile, whose cold start takes longer than it saves here.
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes},
    }


def _budget(gpu: Gpu, utilization: float) -> int:
    return int(min(gpu.total * utilization, gpu.free - 0.01 * gpu.total))


def _batch_tokens(gpus: list[Gpu]) -> int:
    """Return the prompt tokens of a step: enough to fill the GPU, fewer if activations would crowd out the cache."""
    return 8192 if min(gpu.total for gpu in gpus) >= 40 * GIB else 2048


def _overhead(model: MemoryNeeds, batch: int) -> int:
    return _FIXED_BYTES + batch * model.activations_per_token + model.logits


def _describe(placement: Placement) -> str:
    width = placement.vllm_args["tensor_parallel_size"]
    replicas = f"{len(placement.devices)} replica{'s' if len(placement.devices) > 1 else ''}"
    return f"{replicas} of {width} GPUs" if width > 1 else f"{replicas}, one GPU each"


def _gb(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
