"""Test with the real Trackio that it gets the figures of the log and connects to nobody.

Trackio is not among the project's packages, because it downgrades some of them.
"""

import contextlib
import json
import os
import shlex
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from training.trackers import PACKAGES

# Log a run of two steps and a validation, resume it, then start another run in the same folder.
THREE_STARTS = """
import sys
from pathlib import Path
from training.progress import Progress, StepRecord

for done in (0, 2, 0):
    progress = Progress(Path(sys.argv[1]) / "train-log.jsonl", done + 2, done, ["trackio"])
    for step in (done + 1, done + 2):
        progress.step(StepRecord(step=step, epoch=0, rate=1e-3, tokens=100, labelled=50, time=9.0), 3 / step, 1.0)
    progress.validation(done + 2, loss=0.5, best=True)
    progress.close()
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the packages that the error message names, in a folder for a child's PYTHONPATH."""
    folder = tmp_path_factory.mktemp("trackio") / "packages"
    install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--target", folder]
    subprocess.run([*install, *shlex.split(PACKAGES["trackio"])], check=True)
    return folder


@pytest.mark.slow
def test_trackio_gets_the_numbers_of_the_log_and_connects_to_nobody(packages, tmp_path):
    run, hub, watch = (tmp_path / name for name in ("first-run", "hub", "watch"))
    for folder in (run, hub, watch):
        folder.mkdir()
    (hub / "token").write_text("hf_secret")  # by default, Trackio asks the hub for the name of its owner
    places = [ROOT / "tests" / "network_watch", ROOT, packages]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRACKIO_"))}
    environment |= {"HF_HOME": str(hub), "NETWORK_WATCH": str(watch), "PYTHONPATH": os.pathsep.join(map(str, places))}
    subprocess.run([sys.executable, "-c", THREE_STARTS, run], env=environment, check=True, capture_output=True)
    assert (watch / "processes").exists() and not (watch / "addresses").exists()
    with contextlib.closing(sqlite3.connect(hub / "trackio" / "soap-notes.db")) as database:
        rows = list(database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id"))
    first, second = dict.fromkeys(name for name, _, _ in rows)
    assert first.startswith("first-run-") and second == f"first-run-{(run / 'trackio-id').read_text()}"
    assert [step for name, step, _ in rows if name == first] == [1, 2, 2, 3, 4, 4]
    *steps, validation = (json.loads(figures) for name, _, figures in rows if name == second)
    assert validation == {"validation_loss": 0.5}
    assert [figures.pop("loss") for figures in steps] == [3, 1.5]
    assert [set(figures) for figures in steps] == [{"epoch", "gradient_norm", "lr", "tokens", "seconds"}] * 2
