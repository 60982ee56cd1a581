"""Kill preprocessing, training and evaluation at random moments, restart them, and compare with uninterrupted runs.

Each job first runs once without interruption, which gives its duration and its reference result. It is then killed
with SIGKILL again and again, each time at a random moment within that duration, and restarted in the same folder. If
it finishes before the moment, its result is compared with the reference, and the next run starts in an empty folder.
Results must be identical except for times and dates; training losses may differ by 1 in 10,000.

test_kill_and_restart.py runs a short version.

    python tests/kill_and_restart.py
    python tests/kill_and_restart.py --kills 5 --only training
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARK = "KILL_AND_RESTART"  # environment variable of every process that this script starts

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # as in pytest


@dataclass(frozen=True)
class Job:
    """A job to kill. All its runs read from `place`; each run writes to its own `folder`, which is empty at first."""

    prepare: Callable[[Path, Path], None]  # (place, model)
    start: Callable[[Path, Path], subprocess.Popen]  # (place, folder)
    progress: Callable[[Path], int]  # number of finished pieces of work in `folder`
    result: Callable[[Path], Any]
    same: Callable[[Any, Any], bool] = lambda result, reference: result == reference


@dataclass
class Tally:
    seconds: float  # duration of the fastest uninterrupted run
    kills: int = 0
    at_work: int = 0  # kills of a run that had already written some work
    starts: int = 0
    compared: int = 0
    equal: int = 0
    left_running: int = 0  # processes that were still running 10 seconds after their run

    @property
    def good(self) -> bool:
        return self.equal == self.compared > 0 and not self.left_running


def run(place: Path, folder: Path, *command: str | Path) -> subprocess.Popen:
    with (folder / "output.log").open("a") as log:
        return subprocess.Popen([sys.executable, *command], cwd=place, stdout=log, stderr=log, start_new_session=True)


# --- preprocessing


def prepare_notes(place: Path, model: Path) -> None:
    from test_preprocess_data import source_rows, write_jsonl

    write_jsonl(str(place / "notes.jsonl"), source_rows(20_000))


def start_preprocessing(place: Path, folder: Path) -> subprocess.Popen:
    output = folder / "soap_dataset"
    return run(place, folder, ROOT / "preprocess_data.py", "--dataset", "notes.jsonl", "--output_dir", output)


def dataset(folder: Path) -> dict[str, bytes]:
    output = folder / "soap_dataset"
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


# --- training


def prepare_training(place: Path, model: Path) -> None:
    from conftest import rows, save_dataset
    from test_tokens import QWEN3_LIKE

    shutil.copytree(model, place / "model")
    (place / "model" / "chat_template.jinja").write_text(QWEN3_LIKE)
    save_dataset(place / "soap_dataset", {"train": rows(27), "validation": rows(31)[27:]})


def start_training(place: Path, folder: Path) -> subprocess.Popen:
    from test_train import start, write_config

    if not (folder / "soap_dataset").exists():
        (folder / "soap_dataset").symlink_to(place / "soap_dataset")
    return start(write_config(folder, place / "model", "train", epochs=30))


def losses(folder: Path) -> tuple[list[tuple], list[str]]:
    """Return the steps with their training and validation losses, and the names of the files that the run left."""
    records = map(json.loads, (folder / "train" / "train-log.jsonl").read_text().splitlines())
    names = sorted(path.name for path in (folder / "train").iterdir())
    return [(record["step"], record.get("loss"), record.get("validation_loss")) for record in records], names


def nearly_same(result: tuple, reference: tuple) -> bool:
    import pytest

    numbers = [[number for step in steps for number in step if number is not None] for steps, _ in (result, reference)]
    return result[1] == reference[1] and numbers[0] == pytest.approx(numbers[1], rel=1e-4)


# --- evaluation


def prepare_evaluation(place: Path, model: Path) -> None:
    from conftest import rows, save_dataset

    shutil.copytree(model, place / "model")
    save_dataset(place / "soap_dataset", {"test": rows(48)})


def start_evaluation(place: Path, folder: Path) -> subprocess.Popen:
    command = [ROOT / "eval.py", "model", "--judge_model", "model", "--output_dir", folder / "run"]
    return run(place, folder, *command, "--max_new_tokens", "100", "--judge_controls", "4")


def scores(folder: Path) -> tuple[list[list[str]], dict[str, Any]]:
    records = [sorted((folder / "run" / name).read_text().splitlines()) for name in RECORDS]
    results = json.loads((folder / "run" / "results.json").read_text())
    return records, {key: value for key, value in results.items() if key not in ("timings_s", "date")}


RECORDS = ("predictions.jsonl", "judgements.jsonl")
JOBS = {
    "preprocessing": Job(
        prepare_notes, start_preprocessing, lambda folder: count(folder.glob("soap_dataset.partial")), dataset
    ),
    "training": Job(
        prepare_training,
        start_training,
        lambda folder: lines(folder / "train" / "train-log.jsonl"),
        losses,
        nearly_same,
    ),
    "evaluation": Job(
        prepare_evaluation,
        start_evaluation,
        lambda folder: sum(lines(folder / "run" / name) for name in RECORDS),
        scores,
    ),
}


def count(items: Any) -> int:
    return sum(1 for _ in items)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


# --- killing


def marked() -> list[int]:
    """Return the ids of the processes that this script started, and of their children."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{MARK}=".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def wait_for_processes_to_end() -> int:
    """Wait up to 10 seconds for all runs' processes to end. Kill the others, and return their number."""
    deadline = time.monotonic() + 10
    while marked() and time.monotonic() < deadline:
        time.sleep(0.05)
    left = marked()
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return len(left)


def end_or_kill(process: subprocess.Popen, seconds: float | None) -> bool:
    """Wait for the run to end; after `seconds`, kill its process group. Return whether the run ended by itself."""
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False
    if status:
        raise RuntimeError(f"a run ended with status {status}")
    return True


def kill_and_restart(job: Job, place: Path, model: Path, kills: int, seed: int) -> Tally:
    """Kill runs of a job `kills` times, and compare every run that finishes with the uninterrupted one."""
    moments = random.Random(seed)
    os.environ[MARK] = "1"
    place.mkdir()
    job.prepare(place, model)

    def new_folder(name: str) -> Path:
        (place / name).mkdir()
        return place / name

    whole = new_folder("uninterrupted")
    began = time.monotonic()
    end_or_kill(job.start(place, whole), None)
    tally = Tally(time.monotonic() - began)
    reference = job.result(whole)
    number, finished = 0, True
    while tally.kills < kills or not finished:
        if finished:
            number += 1
            folder = new_folder(f"killed_{number}")
        from_the_start, began = finished, time.monotonic()
        moment = moments.uniform(0, tally.seconds) if tally.kills < kills else None
        finished = end_or_kill(job.start(place, folder), moment)
        tally.starts += 1
        if from_the_start and finished:  # perhaps the machine is less busy now
            tally.seconds = min(tally.seconds, time.monotonic() - began)
        tally.left_running += wait_for_processes_to_end()
        if finished:
            tally.compared += 1
            tally.equal += job.same(job.result(folder), reference)
        else:
            tally.kills += 1
            tally.at_work += job.progress(folder) > 0
    return tally


# --- command line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="number of kills for each job (default: %(default)s)")
    parser.add_argument("--only", choices=JOBS, nargs="+", default=list(JOBS), help="jobs to run (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    import conftest

    good = True
    with tempfile.TemporaryDirectory() as temporary:
        model = conftest.build_model(Path(temporary) / "tiny")
        print("| job | uninterrupted run | kills | at work | starts | compared | equal | left running |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for name in args.only:
            tally = kill_and_restart(JOBS[name], Path(temporary) / name, model, args.kills, args.seed)
            figures = (tally.kills, tally.at_work, tally.starts, tally.compared, tally.equal, tally.left_running)
            print(f"| {name} | {tally.seconds:.1f} s | {' | '.join(map(str, figures))} |", flush=True)
            good = good and tally.good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
