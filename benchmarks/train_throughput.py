"""Time training: the reference recipe against our two YAMLs, on the same rows and the same model shape.

Runs `arctic_training` once per configuration, as a user would, and reads each iteration's wall time, tokens and memory.
Checkpoints and validation are off in all runs. Needs a soap_dataset and a model folder; random weights are enough.

    python benchmarks/train_throughput.py --model /tmp/Qwen3-1.7B
    python benchmarks/train_throughput.py --model /tmp/Qwen3-1.7B --only full LoRA --iterations 100
    python benchmarks/train_throughput.py --only full --set data.max_length=16384 --name 16Ki
    python benchmarks/train_throughput.py --only configs/Qwen3-1.7B-24GB.yaml --memory_gb 24
    python benchmarks/train_throughput.py --only full LoRA --num_gpus 2
    python benchmarks/train_throughput.py --only full --profile
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {
    "reference full": ROOT / "benchmarks/reference-config.yaml",
    "reference LoRA": ROOT / "benchmarks/reference-LoRA-config.yaml",
    "full": ROOT / "Qwen3-1.7B-config.yaml",
    "LoRA": ROOT / "Qwen3-1.7B-LoRA-config.yaml",
}
PEAK_FLOPS = 798e12  # bf16, measured on an H100 80GB HBM3 with an 8192 x 8192 x 8192 product of random matrices
NOMINAL_FLOPS = 989e12  # from the card's data sheet
FULL_DATASET_ROWS, EPOCHS = 9250, 2


def override(config: dict, dotted: str, value: object) -> None:
    *parents, key = dotted.split(".")
    for parent in parents:
        config = config.setdefault(parent, {})
    config[key] = value


def benchmark_config(path: Path, args: argparse.Namespace) -> dict:
    """Return the YAML's settings with another model, dataset, duration and output location."""
    config = yaml.safe_load(path.read_text())
    config["type"] = "measured_" + config["type"]
    config["code"] = str(ROOT / "benchmarks/measured_trainers.py")
    config["model"]["name_or_path"] = config.setdefault("tokenizer", {})["name_or_path"] = args.model
    for source in config["data"]["sources"]:
        source["name_or_path"] = str(args.dataset_path)
    config["data"].pop("eval_sources", None)
    config["data"]["cache_dir"] = str(args.work_dir / "tokens")
    config |= {
        "checkpoint": [],
        "eval_interval": 0,
        "train_iters": args.warmup + args.iterations + 4 * args.profile,
        "epochs": 1,
    }
    config["train_log_metrics_path"] = str(
        args.work_dir / f"{config['type']}-metrics.jsonl"
    )  # the two trainers write different formats
    config["kill_switch_path"] = str(args.work_dir / "stop")
    for setting in args.set:
        dotted, _, text = setting.partition("=")
        override(config, dotted, yaml.safe_load(text))
    return config


def executed_flops(shape: dict, config: dict, totals: dict[str, int]) -> float:
    """Return forward and backward FLOPs for `totals`: tokens, labelled tokens and summed squared sample lengths.

    Each weight of a matrix product costs 2 FLOPs per token forward and 4 backward (2 if the weight is frozen). Causal
    attention costs 2 x layers x heads x head_dim x length^2 per sample forward, and twice that backward. The output
    head runs only on labelled tokens in our trainer, and on all tokens in the stock one. Not counted: the input
    embedding (a table lookup), recomputation (activation checkpointing) and wasted work (padding, attention between
    samples).
    """
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    head_dim = shape.get("head_dim") or hidden // heads
    weights = layers * (hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * shape["intermediate_size"])
    frozen = "peft_config" in config["model"]
    headed = totals["labelled"] if config["type"].endswith("soap") else totals["tokens"]
    products = (4 if frozen else 6) * (weights * totals["tokens"] + hidden * shape["vocab_size"] * headed)
    return products + 6 * layers * heads * head_dim * totals["squares"]


def gpus(count: int) -> dict[str, str]:
    """Return the environment variable that limits DeepSpeed to the first `count` visible GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else map(str, range(count))
    return {"CUDA_VISIBLE_DEVICES": ",".join(list(names)[:count])}


def config_file(name: str, args: argparse.Namespace) -> Path:
    """Return the path of a run's YAML; its logs are written beside it."""
    return args.work_dir / f"{Path(name).stem.replace(' ', '-')}.yaml"


def run(name: str, args: argparse.Namespace) -> list[dict]:
    """Train; return one record per step, as measured_trainers.py writes it, with the tokens of all processes."""
    path = config_file(name, args)
    path.write_text(yaml.safe_dump(benchmark_config(CONFIGS.get(name) or Path(name), args), sort_keys=False))
    log, output = path.with_suffix(""), path.with_suffix(".log")
    logs = [Path(f"{log}.{rank}.jsonl") for rank in range(args.num_gpus)]
    for stale in logs:
        stale.unlink(missing_ok=True)
    environment = os.environ | gpus(args.num_gpus) | {"MEASURE_LOG": str(log), "MEASURE_START": str(time.time())}
    if args.profile:
        environment |= {
            "MEASURE_PROFILE": str(path.with_suffix(".profile.txt")),
            "MEASURE_PROFILE_FROM": str(args.warmup + args.iterations),
        }
    if args.memory_gb:
        environment["MEASURE_MEMORY_GB"] = str(args.memory_gb)
    with output.open("w") as out:
        command = ["arctic_training", str(path), "--master_port", str(args.master_port)]
        if args.no_launcher:
            command = [sys.executable, str(ROOT / "train.py"), str(path)]
        code = subprocess.run(command, env=environment, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        print(f"error: {name} ended with status {code}; its last lines, from {output}:", file=sys.stderr)
        print("\n".join(output.read_text().splitlines()[-30:]), file=sys.stderr)
        return []
    return joined([[json.loads(line) for line in log.read_text().splitlines()] for log in logs])


def joined(processes: list[list[dict]]) -> list[dict]:
    """Return the first process's record of each step, with token counts summed over all processes."""
    steps = zip(*processes, strict=True)
    summed = [key for key in ("tokens", "squares", "labelled") if key in processes[0][0]]
    return [step[0] | {key: sum(record[key] for record in step) for key in summed} for step in steps]


def summary(name: str, records: list[dict], args: argparse.Namespace) -> dict:
    steady = records[args.warmup : args.warmup + args.iterations]
    totals = {key: sum(record[key] for record in steady) for key in ("tokens", "squares", "labelled")}
    seconds, tokens = sum(record["seconds"] for record in steady), totals["tokens"]
    shape = json.loads((Path(args.model) / "config.json").read_text())
    config = yaml.safe_load(config_file(name, args).read_text())
    flops = executed_flops(shape, config, totals) / seconds / args.num_gpus
    rate = tokens / seconds
    return {
        "run": Path(name).stem + (f" ({args.name})" if args.name else ""),
        "gpus": args.num_gpus,
        "iterations": len(steady),
        "tokens_per_step": round(tokens / len(steady)),
        "median_s": round(statistics.median(r["seconds"] for r in steady), 3),
        "tokens_per_s": round(rate),
        "mfu_measured": round(flops / PEAK_FLOPS, 3),
        "mfu_nominal": round(flops / NOMINAL_FLOPS, 3),
        "allocated_gb": round(records[-1]["peak_allocated"] / 1e9, 1),
        "reserved_gb": round(records[-1]["peak_reserved"] / 1e9, 1),
        "slowest_s": round(max(r["seconds"] for r in steady), 3),
        "first_step_s": round(records[0]["seconds"], 1),
        "full_dataset_min": round(FULL_DATASET_ROWS * EPOCHS * args.tokens_per_row / rate / 60, 1),
        "start": {part: round(seconds, 1) for part, seconds in records[0]["start"].items()},
    }


def mean_tokens_per_row(args: argparse.Namespace) -> float:
    from datasets import load_from_disk
    from transformers import AutoTokenizer

    sys.path.insert(0, str(ROOT))
    from prompts import SECTIONS, training_messages
    from training.tokens import encode_example

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = load_from_disk(str(args.dataset_path))["train"]
    lengths = (
        len(encode_example(tokenizer, training_messages(r["dialogue"], {k: r[k] for k in SECTIONS}))["input_ids"])
        for r in rows
    )
    return statistics.fmean(lengths)


def hardware() -> str:
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, no GPU"


def append(output: Path | None, result: dict) -> None:
    """Append a line of JSON to the file, if one is given, at once, because a later run may fail."""
    if output:
        with output.open("a") as out:
            out.write(json.dumps(result) + "\n")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-1.7B", help="model folder (default: %(default)s)")
    parser.add_argument("--dataset_path", type=Path, default=Path("soap_dataset"), help="default: %(default)s")
    parser.add_argument(
        "--only",
        nargs="+",
        default=list(CONFIGS),
        metavar="RUN",
        help=f"{', '.join(CONFIGS)}, or YAML files (default: these four)",
    )
    parser.add_argument("--iterations", type=int, default=60, help="timed iterations (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=10, help="untimed iterations before them (default: %(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change settings in every run")
    parser.add_argument("--profile", action="store_true", help="trace 3 more iterations, after the timed ones")
    parser.add_argument("--no_launcher", action="store_true", help="start with `python train.py`, on one GPU")
    parser.add_argument("--memory_gb", type=float, help="GPU memory limit per process, in GB (default: none)")
    parser.add_argument("--num_gpus", type=int, default=1, help="GPUs of this machine to use (default: %(default)s)")
    parser.add_argument("--name", help="label for the runs in the table, added to the configuration")
    parser.add_argument("--master_port", type=int, default=29500, help="DeepSpeed's port (default: %(default)s)")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "benchmarks/build", help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="append the results to this JSONL file")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    args.work_dir = args.work_dir.resolve()
    args.dataset_path = args.dataset_path.resolve()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    args.tokens_per_row = mean_tokens_per_row(args)
    machine = hardware()
    versions = {package: version(package) for package in ("torch", "deepspeed", "arctic_training", "transformers")}
    print(f"{machine}; {versions}; {args.tokens_per_row:.0f} tokens per row")
    results = []
    for name in args.only:
        records = run(name, args)
        if len(records) > args.warmup:
            results.append(summary(name, records, args))
            print(json.dumps(results[-1]), flush=True)
            append(args.output, {**results[-1], "machine": machine, **versions})
    print_table(results)
    return 0 if len(results) == len(args.only) else 1


def print_table(results: list[dict]) -> None:
    if not results:
        return
    columns = [column for column in results[0] if column != "start"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for result in results:
        print("| " + " | ".join(str(result[column]) for column in columns) + " |")
    print("\nFrom the launch to the end of the first step, in seconds:\n")
    for result in results:
        print(f"- {result['run']}: " + ", ".join(f"{part} {seconds}" for part, seconds in result["start"].items()))


if __name__ == "__main__":
    sys.exit(main())
