"""Check a run on two GPUs: the same losses as on one GPU at the same batch, and as without a kill and a resume.

Trains a model of the given one's shape, with fewer layers and random weights, three times at once: on one GPU with two
packs accumulated, on two GPUs, and on two GPUs with a kill after a random step and a second start. Prints a table. The
exit status is 1 if the losses differ by more than rounding. Needs a soap_dataset and a model folder without weights.

    python benchmarks/two_gpus.py --model /tmp/Qwen3-1.7B
    python benchmarks/two_gpus.py --model /tmp/Qwen3-1.7B --config configs/Qwen3-1.7B-ZeRO3.yaml
"""

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from train_throughput import override  # noqa: E402

TIMEOUT = 280  # seconds for each start


def cut_model(source: Path, layers: int, target: Path) -> None:
    """Write a model of `source`'s shape with fewer layers and random weights, and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(source)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def write_config(name: str, accumulation: int, args: argparse.Namespace) -> Path:
    """Write the YAML of a run into the working folder; return its path."""
    config = yaml.safe_load(args.config.read_text())
    folder = args.work_dir / name
    for source in (*config["data"]["sources"], *config["data"]["eval_sources"]):
        source["name_or_path"] = str(args.dataset_path)
    for checkpoint in config["checkpoint"]:
        checkpoint["output_dir"] = str(folder / "resume" if checkpoint["type"] == "resume" else folder)
        if checkpoint["type"] == "resume":
            checkpoint["save_every_n_steps"] = args.save_every
    changes = {
        "code": str(ROOT / "train.py"),
        "model.name_or_path": str(args.work_dir / "model"),
        "data.cache_dir": str(args.work_dir / "tokens"),
        "data.max_length": 8192,
        "train_iters": args.steps,
        "epochs": 100,  # `train_iters` ends the run
        "eval_interval": args.steps,
        "gradient_accumulation_steps": accumulation,
        "train_log_metrics_path": str(folder / "train-log.jsonl"),
        "kill_switch_path": str(folder / "stop"),
    }
    changes |= {dotted: yaml.safe_load(text) for dotted, _, text in (pair.partition("=") for pair in args.set)}
    for dotted, value in changes.items():
        override(config, dotted, value)
    path = args.work_dir / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def start(config: Path, processes: int) -> subprocess.Popen:
    """Start a run in its own process group, one process per GPU; its output is appended to a .log file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = ["arctic_training", str(config), "--num_gpus", str(processes), "--master_port", port]
    with config.with_suffix(".log").open("a") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)


def read_log(config: Path) -> tuple[dict[int, float], float]:
    """Return the loss of each logged step, and the last validation loss (NaN if there is none)."""
    path = config.with_suffix("") / "train-log.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    lines = [json.loads(line) for line in whole.splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    validation = [line["validation_loss"] for line in lines if "validation_loss" in line]
    return losses, validation[-1] if validation else float("nan")


def kill_after(process: subprocess.Popen, config: Path, step: int) -> None:
    """Kill all processes of a run once it has logged a step. Raises RuntimeError if the run ends before."""
    deadline = time.monotonic() + TIMEOUT
    while max(read_log(config)[0], default=0) < step:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the run ended before step {step}")
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def largest_difference(losses: dict[int, float], expected: dict[int, float]) -> float:
    """Return the largest relative difference of a step's loss; infinity if the steps differ."""
    if losses.keys() != expected.keys():
        return float("inf")
    return max(abs(loss - expected[step]) / expected[step] for step, loss in losses.items())


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with a model's config.json and tokenizer")
    parser.add_argument("--config", type=Path, default=ROOT / "Qwen3-1.7B-config.yaml", help="default: %(default)s")
    parser.add_argument("--dataset_path", type=Path, default=Path("soap_dataset"), help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=4, help="layers of the cut (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="steps of each run (default: %(default)s)")
    parser.add_argument("--save_every", type=int, default=20, help="steps between resume states (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=0.01, help="largest relative difference (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="chooses the step of the kill (default: a different one each time)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change settings in every run")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "benchmarks/build/two_gpus", help="must not exist")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    args.dataset_path, args.work_dir = args.dataset_path.resolve(), args.work_dir.resolve()
    if args.work_dir.exists():
        print(f"error: {args.work_dir} exists; remove it, or give another --work_dir", file=sys.stderr)
        return 2
    args.work_dir.mkdir(parents=True)
    cut_model(args.model, args.layers, args.work_dir / "model")
    one, two, killed = (write_config(name, 1 + (name == "one"), args) for name in ("one", "two", "killed"))
    processes = {one: start(one, 1), two: start(two, 2)}
    kill_step = random.Random(args.seed).randint(args.save_every + 1, args.steps - args.save_every)
    try:
        kill_after(start(killed, 2), killed, kill_step)
        processes[killed] = start(killed, 2)
        statuses = {config: process.wait(TIMEOUT) for config, process in processes.items()}
    except RuntimeError as error:
        statuses = {killed: str(error)}
    finally:
        for process in processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    for config, status in statuses.items():
        if status:
            print(f"error: {config.stem}: status {status}; its last lines:", file=sys.stderr)
            print("\n".join(config.with_suffix(".log").read_text().splitlines()[-20:]), file=sys.stderr)
    return 1 if any(statuses.values()) else print_table(one, two, killed, kill_step, args)


def print_table(one: Path, two: Path, killed: Path, kill_step: int, args: argparse.Namespace) -> int:
    """Print how the runs compare; return the exit status."""
    resumed = re.findall(r"resumed at step (\d+) of", killed.with_suffix(".log").read_text())
    expected, validation = read_log(two)
    resumed_at = resumed[-1] if resumed else "none"
    rows = [
        ("2 GPUs", expected, validation),
        ("1 GPU, 2 packs accumulated", *read_log(one)),
        (f"2 GPUs, killed after step {kill_step}, resumed at {resumed_at}", *read_log(killed)),
    ]
    print("| run | steps | first loss | last loss | validation loss | largest difference of a step |")
    print("|---|---|---|---|---|---|")
    passed = len(resumed) == 1
    for name, losses, validated in rows:
        difference = largest_difference(losses, expected)
        passed &= difference <= args.limit and abs(validated - validation) <= args.limit * validation
        ends = f"{losses[1]:.5f} | {losses[max(losses)]:.5f}"
        print(f"| {name} | {len(losses)} | {ends} | {validated:.5f} | {difference:.4%} |")
    print("passed" if passed else f"FAILED: resumed {len(resumed)} times, or a difference above {args.limit:.1%}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
