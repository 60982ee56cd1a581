"""Run trainings side by side for headline.py: several recipes, settings and seeds, each in its own folder.

A recipe is one of the shipped YAMLs. A training's folder holds config.yaml, exports, train-log.jsonl, train.log (its
output) and, once it is complete, finished.json. Its `type` is that of measured_trainers.py, which only adds the
measurement of memory.
"""

import contextlib
import hashlib
import itertools
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import yaml
from train_throughput import ROOT, override

from common.errors import UserError
from evaluation.engines.models import Model

RECIPES = {"full": ROOT / "Qwen3-1.7B-config.yaml", "LoRA": ROOT / "Qwen3-1.7B-LoRA-config.yaml"}
FINISHED = "finished.json"
LONGEST_NAME = 120  # characters; a file system allows 255 bytes, and eval.py puts the model's name before it


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
        name = re.sub(r"[^\w.=]+", "-", f"{self.label} seed{self.seed}")
        if len(name) <= LONGEST_NAME:
            return name
        return f"{name[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


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


def make_slots(gpus: int, per_gpu: int, master_port: int) -> list[Slot]:
    """Return `per_gpu` slots on each of the first `gpus` visible GPUs, with consecutive ports. Raises UserError."""
    if min(gpus, per_gpu) < 1:
        raise UserError(f"--gpus {gpus} --per_gpu {per_gpu}: give at least 1 of each")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(k) for k in range(gpus)]
    if len(names) < gpus:
        raise UserError(f"--gpus {gpus}: CUDA_VISIBLE_DEVICES has only {len(names)}")
    in_turn = itertools.product(range(per_gpu), names[:gpus])  # fill all GPUs before any gets a second training
    return [Slot(gpu, master_port + k) for k, (_, gpu) in enumerate(in_turn)]


def grid(spec: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return (recipe, changes) for each combination in a spec such as "full: epochs=1,2 optimizer.learning_rate=1e-5".

    A value may be a list: "LoRA: model.peft_config.target_modules=[q_proj,v_proj],[q_proj]" has two. Raises UserError.
    """
    recipe, _, settings = spec.partition(":")
    choices = []
    for setting in settings.split():
        key, _, values = setting.partition("=")
        choices.append([f"{key}={value}" for value in split_values(values)])
    if recipe not in RECIPES or not all(choices) or not choices:
        example = 'such as "full: epochs=1,2"'
        raise UserError(f'--grid "{spec}": give a recipe and values without spaces, {example}')
    return [(recipe, changes) for changes in itertools.product(*choices)]


def split_values(text: str) -> list[str]:
    """Split at the commas that are not within a YAML list, mapping or string; none if the text is not YAML values."""
    try:
        values = yaml.compose(f"[{text}]").value
    except yaml.YAMLError:
        return []
    return [text[value.start_mark.index - 1 : value.end_mark.index - 1] for value in values]


def make_config(training: Training, model: str, dataset: Path, folder: Path, export: bool) -> dict:
    """Return the recipe's settings for this model, dataset, seed and folder. Without `export`, no model is saved.

    Raises UserError for a change that is not KEY=VALUE, is not YAML, or has a key within a value that holds no keys.
    """
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
    output_dirs = {"export": folder, "resume": folder / "resume"}
    checkpoints = [part | {"output_dir": str(output_dirs[part["type"]])} for part in config["checkpoint"]]
    config["checkpoint"] = checkpoints if export else []
    config |= {"train_log_metrics_path": str(folder / "train-log.jsonl"), "kill_switch_path": str(folder / "stop")}
    for change in training.changes:
        key, separator, value = change.partition("=")
        try:
            if not separator:
                raise ValueError("no value")
            override(config, key, yaml.safe_load(value))
        except (yaml.YAMLError, ValueError, TypeError, AttributeError):
            advice = "give KEY=VALUE with a key of the YAML and a value in YAML"
            raise UserError(f"{training.recipe}: {change} cannot be set; {advice}, such as epochs=1") from None
    return config


def check(trainings: Sequence[Training]) -> None:
    """Raise UserError if a training's changes cannot be made, or if two trainings are the same."""
    for training in trainings:
        make_config(training, "model", Path("dataset"), Path("folder"), export=False)
    names = Counter(training.name for training in trainings)
    if twice := [name for name, count in names.items() if count > 1]:
        raise UserError(f"{twice[0]} would be trained twice; give each seed, number of rows and setting once")


def train(training: Training, config: dict, fingerprint: str, folder: Path, slot: Slot) -> Result:
    """Run a training, or resume it, unless it is finished. `fingerprint` is the model's. Raises UserError."""
    text = f"# fingerprint of the model: {fingerprint}\n{yaml.safe_dump(config, sort_keys=False)}"
    path, log, measured = folder / "config.yaml", folder / "train.log", folder / "memory"
    if path.exists() and path.read_text() != text:
        advice = "remove it, or give another --work_dir"
        raise UserError(f"{folder} holds a training of another model or with other settings; {advice}")
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
    # A call that resumes after the last step takes no step, so it measures no memory.
    memory = max((record["peak_reserved"] for record in read_lines(Path(f"{measured}.0.jsonl"))), default=0)
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


def end(processes: Collection[psutil.Process], patience: float = 20.0) -> None:
    """Terminate the processes; after `patience` seconds, kill those that are left."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(processes, patience)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def train_all(
    trainings: Sequence[Training], model: Model, dataset: Path, work_dir: Path, slots: Sequence[Slot], export: bool
) -> dict[Training, Result]:
    """Run all trainings, one for each slot at a time; return the results of those that succeed.

    A training that fails, for whatever reason, is named on stderr. The others continue. KeyboardInterrupt ends those
    that run. Raises UserError before the first training starts; see `check`.
    """
    check(trainings)
    others = psutil.Process().children(recursive=True)
    free: queue.Queue[Slot] = queue.Queue()
    for slot in slots:
        free.put(slot)
    interrupted = threading.Event()

    def run(training: Training) -> Result | None:
        folder = work_dir / training.name
        slot = free.get()
        try:
            if interrupted.is_set():
                return None
            config = make_config(training, model.name, dataset, folder, export)
            result = train(training, config, model.fingerprint, folder, slot)
            print(f"finished {training.name}: {result.steps} steps in {result.seconds:.0f} s", flush=True)
            return result
        except (UserError, OSError) as error:
            if not interrupted.is_set():
                print(f"error: {error}", file=sys.stderr, flush=True)
            return None
        except Exception as error:  # such as a damaged log; hours of other trainings must not be lost to it
            print(f"error: {training.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            return None
        finally:
            free.put(slot)

    with ThreadPoolExecutor(len(slots)) as pool:
        try:
            results = list(pool.map(run, trainings))
        except KeyboardInterrupt:
            interrupted.set()
            end(set(psutil.Process().children(recursive=True)).difference(others))
            raise
    return {training: result for training, result in zip(trainings, results, strict=True) if result}
