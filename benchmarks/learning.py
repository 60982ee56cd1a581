"""Show that both recipes learn: fine-tune a small model with each, and compare its notes with the untrained model's.

The recipes are the YAMLs for Qwen3-1.7B with another model, one pack length, and the changes in --full and --lora.
Input: a model folder and a JSONL file of dialogues and notes. The first rows are for training (10% of them for
validation), the last for the test. Output: one line of JSON per model, with the number of readable notes and the
ROUGE-L of each section on the test rows. No judge is needed.

    python benchmarks/learning.py --model demo/build/SmolLM2-135M-Instruct --data rows.jsonl
    python benchmarks/learning.py --model ... --data ... --lora optimizer.learning_rate=1e-3 model.peft_config.r=32
    python benchmarks/learning.py --model ... --data ... --only base
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from train_throughput import append, gpus, hardware, override  # noqa: E402

from common.dataset import load_split  # noqa: E402
from evaluation.scoring import scores  # noqa: E402

CONFIGS = {"full": ROOT / "Qwen3-1.7B-config.yaml", "LoRA": ROOT / "Qwen3-1.7B-LoRA-config.yaml"}


def split(data: Path, train_rows: int, test_rows: int, folder: Path) -> Path:
    """Preprocess the first rows of `data` for training and the last for the test. Return the dataset's folder."""
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    if len(lines) < train_rows + test_rows:
        sys.exit(f"error: {data} has {len(lines)} rows, fewer than {train_rows} and {test_rows}")
    source = folder / "source"
    source.mkdir(parents=True, exist_ok=True)
    (source / "train.jsonl").write_text("".join(lines[:train_rows]), encoding="utf-8")
    (source / "test.jsonl").write_text("".join(lines[-test_rows:]), encoding="utf-8")
    dataset = folder / "soap_dataset"
    preprocess = [sys.executable, ROOT / "preprocess_data.py", "--dataset", source, "--output_dir", dataset]
    subprocess.run(preprocess, check=True)
    return dataset


def train(name: str, args: argparse.Namespace, dataset: Path) -> tuple[Path, float]:
    """Fine-tune with one of the project's YAMLs. Return the checkpoint folder and the wall seconds, including start-up.

    Raises RuntimeError if the training fails.
    """
    config = yaml.safe_load(CONFIGS[name].read_text())
    output = args.work_dir / name
    config["code"] = str(ROOT / "train.py")
    config["model"]["name_or_path"] = str(args.model)
    config["data"] |= {"max_length": args.max_length, "cache_dir": str(args.work_dir / "tokens")}
    config["data"]["sources"][0]["name_or_path"] = str(dataset)
    del config["data"]["eval_sources"]
    config |= {"eval_interval": 0, "checkpoint": [config["checkpoint"][0] | {"output_dir": str(output)}]}
    config |= {"train_log_metrics_path": str(output / "train-log.jsonl"), "kill_switch_path": str(output / "stop")}
    for setting in args.full if name == "full" else args.lora:
        dotted, _, text = setting.partition("=")
        override(config, dotted, yaml.safe_load(text))
    output.mkdir(parents=True, exist_ok=True)
    path = args.work_dir / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    began = time.monotonic()
    with path.with_suffix(".log").open("w") as log:
        command = ["arctic_training", str(path), "--master_port", str(args.master_port)]
        environment = os.environ | gpus(1)
        if subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode:
            raise RuntimeError(f"training failed; see {log.name}")
    return output, time.monotonic() - began


def write_notes(name: str, args: argparse.Namespace, dataset: Path, *model: str) -> list[dict]:
    """Return the predictions of a model, or of a model and an adapter, on the test rows.

    Raises RuntimeError if eval.py fails.
    """
    run = args.work_dir / "results" / name
    where = ["--dataset_path", str(dataset), "--output_dir", str(run), "--stage", "generate", "--overwrite"]
    sizes = ["--max_model_len", str(args.max_length), "--engine_args", args.engine_args]
    command = [sys.executable, str(ROOT / "eval.py"), *model, *where, *sizes]
    if status := subprocess.run(command, check=False).returncode:
        raise RuntimeError(f"eval.py ended with status {status}")
    return [json.loads(line) for line in (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def summary(name: str, predictions: list[dict], rows: list[dict], seconds: float | None) -> dict:
    """Return a model's result: seconds of training, readable notes, and the mean ROUGE-L of each section."""
    notes = scores.read_notes(predictions, rows)
    means = {
        f"ROUGE-L {section}": round(sum(rouge[i] for i in notes.strict) / len(rows), 3)
        for section, rouge in notes.rouge.items()
    }
    training = {"training s": seconds and round(seconds)}
    return {"model": name, **training, "readable notes": f"{len(notes.strict)} of {len(rows)}", **means}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model to fine-tune")
    parser.add_argument("--data", type=Path, required=True, help="JSONL file that preprocess_data.py can read")
    parser.add_argument("--train_rows", type=int, default=400, help="train on the first N rows (default: %(default)s)")
    parser.add_argument("--test_rows", type=int, default=100, help="test on the last N rows (default: %(default)s)")
    parser.add_argument("--max_length", type=int, default=8192, help="tokens in a pack (default: %(default)s)")
    parser.add_argument("--full", nargs="+", default=[], metavar="KEY=VALUE", help="changes to the full YAML")
    parser.add_argument("--lora", nargs="+", default=[], metavar="KEY=VALUE", help="changes to the LoRA YAML")
    models = ["base", *CONFIGS]
    parser.add_argument("--only", nargs="+", choices=models, default=models, help="models to evaluate (default: all)")
    parser.add_argument("--master_port", type=int, default=29500, help="DeepSpeed's port (default: %(default)s)")
    parser.add_argument("--engine_args", default="{}", help="arguments for vLLM as JSON, as in eval.py")
    parser.add_argument(
        "--work_dir", type=Path, default=ROOT / "benchmarks/build/learning", help="new folder (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="append the results to this JSONL file")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    args.model, args.work_dir = args.model.resolve(), args.work_dir.resolve()
    if args.work_dir.exists() and any(args.work_dir.iterdir()):  # an older run's checkpoints could be mistaken for new
        sys.exit(f"error: {args.work_dir} is not empty; remove it, or give another --work_dir")
    dataset = split(args.data, args.train_rows, args.test_rows, args.work_dir)
    rows = list(load_split(dataset, "test"))
    changes = {"base": [], "full": args.full, "LoRA": args.lora}
    machine, failed = hardware(), False
    for name in args.only:
        try:
            checkpoints, seconds = (args.model, None) if name == "base" else train(name, args, dataset)
            model = [str(args.model), "--lora_path", str(checkpoints)] if name == "LoRA" else [str(checkpoints)]
            predictions = write_notes(name, args, dataset, *model)
        except RuntimeError as error:
            print(f"error: {name}: {error}", file=sys.stderr, flush=True)
            failed = True
            continue
        result = summary(name, predictions, rows, seconds)
        result |= {"changes": " ".join(changes[name]), "machine": machine}
        print(json.dumps(result), flush=True)
        append(args.output, result)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
