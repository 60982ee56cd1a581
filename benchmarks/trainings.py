"""Run trainings side by side for headline.py: several recipes, settings and seeds, each in its own folder.

A recipe is one of the shipped YAMLs. A training's folder holds config.yaml, exports, train-log.jsonl, train.log (its
output) and, once it is complete, finished.json. Its `type` is that of measured_trainers.py, which only adds the
measurement of memory.
"""

import itertools
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml
from train_throughput import ROOT, override

from common.errors import UserError

RECIPES = {"full": ROOT / "Qwen3-1.7B-config.yaml", "LoRA": ROOT / "Qwen3-1.7B-LoRA-config.yaml"}
FINISHED = "finished.json"


@dataclass(frozen=True)
class Training:
    """One training. `label` names its settings.

    changes: to the YAML, as KEY=VALUE with dotted keys and VALUE as YAML. rows: to draw from the training split at
    random, the same for all seeds; None for all.
    """

    recipe: str
    label: str
    seed: int
    changes: tuple[str, ...] = ()
    rows: int | None = None

    @property
    def name(self) -> str:
        """The name of the training's folder."""
        return re.sub(r"[^\w.=]+", "-", f"{self.label} seed{self.seed}")


class Slot(NamedTuple):
    """A place for one training at a time: a GPU, as in CUDA_VISIBLE_DEVICES, and a port for DeepSpeed."""

    gpu: str
    port: int


class Result(NamedTuple):
    """A finished training. `seconds` is the wall time of the call that finished it; `gpu_gb` is 0 without a GPU."""

    folder: Path
    seconds: float
    gpu_gb: float  # peak memory that PyTorch reserved, in 1e9 bytes
    resumed: bool  # earlier calls trained a part of it
    validations: list[tuple[int, float]]  # (step, loss)
    steps: int

    @property
    def best(self) -> tuple[int, float]:
        """The step with the lowest validation loss, and that loss. The run must have validated."""
        return min(self.validations, key=lambda validation: validation[1])


def slots(gpus: int, per_gpu: int, master_port: int) -> list[Slot]:
    """Return `per_gpu` slots on each of the first `gpus` visible GPUs, with consecutive ports. Raises UserError."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(k) for k in range(gpus)]
    if len(names) < gpus:
        raise UserError(f"--gpus {gpus}: CUDA_VISIBLE_DEVICES has only {len(names)}")
    places = itertools.product(range(per_gpu), names[:gpus])  # fill all GPUs before any gets a second training
    return [Slot(gpu, master_port + k) for k, (_, gpu) in enumerate(places)]


def grid(spec: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return (recipe, changes) for each combination in a spec such as "full: epochs=1,2 optimizer.learning_rate=1e-5".

    Raises UserError.
    """
    recipe, _, settings = spec.partition(":")
    if recipe not in RECIPES or any("=" not in setting for setting in settings.split()):
        raise UserError(f'--grid "{spec}": give a recipe and values, such as "full: epochs=1,2"')
    pairs = [setting.partition("=") for setting in settings.split()]
    choices = [[f"{key}={value}" for value in values.split(",")] for key, _, values in pairs]
    return [(recipe, changes) for changes in itertools.product(*choices)]


def make_config(training: Training, model: str, dataset: Path, folder: Path, export: bool) -> dict:
    """Return the recipe's settings for this model, dataset, seed and folder. Without `export`, no model is saved."""
    config = yaml.safe_load(RECIPES[training.recipe].read_text())
    config["type"] = "measured_" + config["type"]
    config["code"] = str(ROOT / "benchmarks/measured_trainers.py")
    config["model"]["name_or_path"] = model
    for key in ("sources", "eval_sources"):
        config["data"][key][0]["name_or_path"] = str(dataset)
    if training.rows:
        config["data"]["sources"][0]["sample_count"] = training.rows
    config["data"]["cache_dir"] = str(folder / "tokens")
    config["seed"] = training.seed
    places = {"export": folder, "resume": folder / "resume"}
    checkpoints = [part | {"output_dir": str(places[part["type"]])} for part in config["checkpoint"]]
    config["checkpoint"] = checkpoints if export else []
    config |= {"train_log_metrics_path": str(folder / "train-log.jsonl"), "kill_switch_path": str(folder / "stop")}
    for change in training.changes:
        key, _, value = change.partition("=")
        override(config, key, yaml.safe_load(value))
    return config


def train(training: Training, config: dict, folder: Path, slot: Slot) -> Result:
    """Run a training, or resume it, unless it is finished. Raises UserError."""
    text = yaml.safe_dump(config, sort_keys=False)
    path, log, measured = folder / "config.yaml", folder / "train.log", folder / "memory"
    if path.exists() and path.read_text() != text:
        raise UserError(f"{folder} holds a training with other settings; remove it, or give another --work_dir")
    if (folder / FINISHED).exists():
        return read_result(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    resumed = any(folder.glob("resume/*/complete.json"))
    began = time.monotonic()
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": slot.gpu}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment |= {"MEASURE_LOG": str(measured), "MEASURE_START": str(time.time())}
    with log.open("a") as stream:
        command = ["arctic_training", path, "--master_port", str(slot.port)]
        status = subprocess.run(command, env=environment, stdout=stream, stderr=stream, check=False).returncode
    steps = read_lines(folder / "train-log.jsonl")
    if status or not steps:
        raise UserError(f"{training.name} ended with status {status}; see {log}")
    memory = max(record["peak_reserved"] for record in read_lines(Path(f"{measured}.0.jsonl")))
    result = {"seconds": round(time.monotonic() - began, 1), "gpu_gb": round(memory / 1e9, 1), "resumed": resumed}
    draft = folder / f"{FINISHED}.new"
    draft.write_text(json.dumps(result))
    draft.rename(folder / FINISHED)
    return read_result(folder)


def read_result(folder: Path) -> Result:
    """Return the result of a finished training."""
    log = read_lines(folder / "train-log.jsonl")
    validations = [(line["step"], line["validation_loss"]) for line in log if "validation_loss" in line]
    steps = max(line["step"] for line in log)
    return Result(folder, **json.loads((folder / FINISHED).read_text()), validations=validations, steps=steps)


def read_lines(path: Path) -> list[dict]:
    """Return the records of a JSONL file, none if it does not exist, without a last line cut short by a kill."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def train_all(
    trainings: Iterable[Training], model: str, dataset: Path, work_dir: Path, places: Sequence[Slot], export: bool
) -> dict[Training, Result]:
    """Run all trainings, one for each slot at a time; return the results of those that succeed.

    A training that fails is named on stderr. The others continue.
    """
    free: queue.Queue[Slot] = queue.Queue()
    for slot in places:
        free.put(slot)
    interrupted = threading.Event()

    def run(training: Training) -> Result | None:
        folder = work_dir / training.name
        slot = free.get()
        try:
            if interrupted.is_set():
                return None
            result = train(training, make_config(training, model, dataset, folder, export), folder, slot)
            print(f"finished {training.name}: {result.steps} steps in {result.seconds:.0f} s", flush=True)
            return result
        except (UserError, OSError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return None
        finally:
            free.put(slot)

    trainings = list(trainings)
    with ThreadPoolExecutor(len(places)) as pool:
        try:
            results = list(pool.map(run, trainings))
        except KeyboardInterrupt:
            interrupted.set()
            raise
    return {training: result for training, result in zip(trainings, results, strict=True) if result}
