"""Time training: the reference recipe against our two YAMLs, on the same rows and the same model shape.

Runs `arctic_training` once for each configuration, as a user would, and reads each iteration's wall time, tokens and
memory. Checkpoints and validation are off in all of them. Needs a soap_dataset and a model folder; random weights do.

    python benchmarks/train_throughput.py --model /tmp/Qwen3-1.7B
    python benchmarks/train_throughput.py --model /tmp/Qwen3-1.7B --only full LoRA --iterations 100
    python benchmarks/train_throughput.py --only full --set data.max_length=16384 --name 16Ki
    python benchmarks/train_throughput.py --only full --uncomment "24 GB" --memory_gb 24
    python benchmarks/train_throughput.py --only full LoRA --num_gpus 2
"""

import argparse
import json
import os
import platform
import re
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
FULL_DATASET_ROWS, EPOCHS = 9250, 2


def override(config: dict, dotted: str, value: object) -> None:
    *parents, key = dotted.split(".")
    for parent in parents:
        config = config.setdefault(parent, {})
    config[key] = value


def commented_block(text: str, words: str) -> dict:
    """The sections that stand in a YAML's comment, below the sentence that holds `words`."""
    comments = re.findall(r"(?:^#.*\n)+", text, re.MULTILINE)
    blocks = [re.search(r"^# \w+:$.*", comment, re.MULTILINE | re.DOTALL) for comment in comments if words in comment]
    blocks = list(filter(None, blocks))
    if len(blocks) != 1:
        sys.exit(f"error: {len(blocks)} commented blocks have the words {words!r}: --only names the YAML that has one")
    return yaml.safe_load(re.sub(r"^# ", "", blocks[0].group(), flags=re.MULTILINE))


def benchmark_config(path: Path, args: argparse.Namespace) -> dict:
    """The YAML's own settings, but for what is run on, how long, and what is written."""
    text = path.read_text()
    config = yaml.safe_load(text)
    if args.uncomment:
        config |= commented_block(text, args.uncomment)
    config["type"] = "measured_" + config["type"]
    config["code"] = str(ROOT / "benchmarks/measured_trainers.py")
    config["model"]["name_or_path"] = config.setdefault("tokenizer", {})["name_or_path"] = args.model
    for source in config["data"]["sources"]:
        source["name_or_path"] = str(args.dataset_path)
    config["data"].pop("eval_sources", None)
    config["data"]["cache_dir"] = str(args.work_dir / "tokens")
    config |= {"checkpoint": [], "eval_interval": 0, "train_iters": args.warmup + args.iterations, "epochs": 1}
    config["train_log_metrics_path"] = str(args.work_dir / f"{config['type']}-metrics.jsonl")  # trainers differ in it
    config["kill_switch_path"] = str(args.work_dir / "stop")
    for setting in args.set:
        dotted, _, text = setting.partition("=")
        override(config, dotted, yaml.safe_load(text))
    return config


def model_flops_per_token(config: dict, mean_attended: float, trained: bool) -> float:
    """FLOPs of forward and backward for one token, without recomputation.

    Each weight of a matrix product costs 2 forward and 4 backward (2 where the weight itself is frozen); the attention
    of a token over the `mean_attended` tokens before it costs 4 x layers x heads x head_dim x attended forward, twice
    that backward. The output head counts, the input embedding, a table, does not.
    """
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    weights = layers * (attention + 3 * hidden * config["intermediate_size"]) + hidden * config["vocab_size"]
    attended = 12 * layers * heads * head_dim * mean_attended
    return (6 if trained else 4) * weights + attended


def gpus(count: int) -> dict[str, str]:
    """The environment variable that leaves the first `count` visible GPUs to DeepSpeed, which would take them all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else map(str, range(count))
    return {"CUDA_VISIBLE_DEVICES": ",".join(list(names)[:count])}


def run(name: str, args: argparse.Namespace) -> list[dict]:
    """Train; return one record a step, as measured_trainers.py writes them, with the tokens of all processes."""
    path = args.work_dir / f"{name.replace(' ', '-')}.yaml"
    path.write_text(yaml.safe_dump(benchmark_config(CONFIGS[name], args), sort_keys=False))
    log, output = path.with_suffix(""), path.with_suffix(".log")
    logs = [log.with_suffix(f".{rank}.jsonl") for rank in range(args.num_gpus)]
    for stale in logs:
        stale.unlink(missing_ok=True)
    environment = os.environ | gpus(args.num_gpus) | {"MEASURE_LOG": str(log), "MEASURE_START": str(time.time())}
    if args.memory_gb:
        environment["MEASURE_MEMORY_GB"] = str(args.memory_gb)
    with output.open("w") as out:
        command = ["arctic_training", str(path), "--master_port", str(args.master_port)]
        code = subprocess.run(command, env=environment, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        print(f"error: {name} ended with status {code}; its last lines, from {output}:", file=sys.stderr)
        print("\n".join(output.read_text().splitlines()[-30:]), file=sys.stderr)
        return []
    return joined([[json.loads(line) for line in log.read_text().splitlines()] for log in logs])


def joined(processes: list[list[dict]]) -> list[dict]:
    """The first process's record of each step, with the tokens of all."""
    steps = zip(*processes, strict=True)
    return [step[0] | {key: sum(record[key] for record in step) for key in ("tokens", "squares")} for step in steps]


def summary(name: str, records: list[dict], args: argparse.Namespace) -> dict:
    steady = records[args.warmup :]
    seconds, tokens = sum(r["seconds"] for r in steady), sum(r["tokens"] for r in steady)
    attended = sum(r["squares"] for r in steady) / tokens / 2
    shape = json.loads((Path(args.model) / "config.json").read_text())
    flops = model_flops_per_token(shape, attended, trained="LoRA" not in name) * tokens
    rate = tokens / seconds
    return {
        "run": name + (f" ({args.name})" if args.name else ""),
        "gpus": args.num_gpus,
        "iterations": len(steady),
        "tokens_per_step": round(tokens / len(steady)),
        "median_s": round(statistics.median(r["seconds"] for r in steady), 3),
        "tokens_per_s": round(rate),
        "mfu": round(flops / seconds / PEAK_FLOPS / args.num_gpus, 3),
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
    """Add a line of JSON to the file, if there is to be one, at once: what comes next may fail."""
    if output:
        with output.open("a") as out:
            out.write(json.dumps(result) + "\n")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-1.7B", help="model folder (default: %(default)s)")
    parser.add_argument("--dataset_path", type=Path, default=Path("soap_dataset"), help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="runs (default: all)")
    parser.add_argument("--iterations", type=int, default=60, help="timed iterations (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=10, help="untimed ones before them (default: %(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change settings in every run")
    parser.add_argument("--uncomment", metavar="WORDS", help="take the YAML's commented block with these words")
    parser.add_argument("--memory_gb", type=float, help="let the process have no more GPU memory (default: all)")
    parser.add_argument("--num_gpus", type=int, default=1, help="GPUs of this machine to use (default: %(default)s)")
    parser.add_argument("--name", help="what to call the runs in the table, besides their configuration")
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
    print(f"{machine}; {versions}; {args.tokens_per_row:.0f} tokens a row")
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
