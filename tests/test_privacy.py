"""Test that patients' text stays private: no connection leaves the machine, no log or other user gets the text."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT
from test_tokens import QWEN3_LIKE
from test_train import BIN, MAX_LENGTH, write_config

WATCH = ROOT / "tests" / "network_watch"
SECRET = "My diary lies under the heliotrope."


def watched(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder`, and watch its network use and that of all its child processes."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "VLLM_"))}
    environment |= {"PYTHONPATH": str(WATCH), "NETWORK_WATCH": str(folder), "HF_HOME": str(folder / "hub")}
    environment |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, umask=0o022
    )


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_the_watch_records_exactly_the_addresses_beyond_this_machine(tmp_path: Path):
    code = (
        "import contextlib, socket\n"
        "for host in ('192.0.2.1', '127.0.0.1', 'localhost', 'nobody.invalid'):\n"
        "    with contextlib.suppress(OSError): socket.create_connection((host, 9), timeout=0.1)\n"
        "with contextlib.suppress(OSError):\n"
        "    socket.socket(type=socket.SOCK_DGRAM).sendto(b'statistics', ('192.0.2.2', 9))\n"
    )
    assert (
        watched(
            tmp_path, sys.executable, "-c", f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {code!r}])"
        ).returncode
        == 0
    )
    assert len(lines(tmp_path / "processes")) == 2
    hosts = [line.split()[1] for line in lines(tmp_path / "addresses")]
    assert set(hosts) == {"192.0.2.1", "192.0.2.2", "nobody.invalid"}


class WholeRun(NamedTuple):
    folder: Path
    output: str


@pytest.fixture(scope="module")
def whole_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    """Preprocess, train on and evaluate the demo's dialogues, with SECRET in each dialogue and note."""
    folder = tmp_path_factory.mktemp("whole_run")
    demo = [json.loads(line) for line in (ROOT / "demo" / "dialogues.jsonl").read_text().splitlines()]
    assert len(demo) >= 120
    secret = [
        row | {"dialogue": f"{row['dialogue']}\nPatient: {SECRET}", "soap": f"{row['soap']} {SECRET}"} for row in demo
    ]
    (folder / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in secret))
    shutil.copytree(tiny_model, folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(QWEN3_LIKE)
    config = write_config(folder, folder / "model", "train", epochs=1)
    config.write_text(config.read_text().replace(f"max_length: {MAX_LENGTH}", "max_length: 2048"))
    trained = folder / "train"
    evaluation = ["--max_new_tokens", "100", "--judge_controls", "2", "--limit", "16", "--output_dir", "run"]
    output = ""
    for command in (
        [sys.executable, ROOT / "preprocess_data.py", "--dataset", "notes.jsonl"],
        [BIN / "arctic_training", config],
        [sys.executable, ROOT / "eval.py", trained, "--judge_model", "model", *evaluation],
    ):
        done = watched(folder, *command)
        output += done.stdout + done.stderr
        assert done.returncode == 0, output[-3000:]
    return WholeRun(folder, output)


@pytest.mark.slow
def test_a_whole_run_makes_no_connection_beyond_this_machine(whole_run: WholeRun):
    processes = lines(whole_run.folder / "processes")
    for name in ("preprocess_data.py", "arctic_training_run", "eval.py", "evaluation.engines.vllm_worker"):
        assert any(name in process for process in processes), f"{name} was not watched"
    assert lines(whole_run.folder / "addresses") == []


@pytest.mark.slow
def test_only_the_user_can_read_the_files_of_a_whole_run(whole_run: WholeRun):
    written = [whole_run.folder / name for name in ("soap_dataset", "tokens", "train", "run")]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for top in written for path in (top, *top.rglob("*"))}
    assert len(modes) >= 30
    wrong = {path: oct(mode) for path, mode in modes.items() if mode != (0o700 if path.is_dir() else 0o600)}
    assert wrong == {}


@pytest.mark.slow
def test_only_the_data_the_report_and_the_statements_contain_patients_text(whole_run: WholeRun):
    files = [path for path in whole_run.folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"generate.log", "judge.log", "train-log.jsonl", "manifest.json"}
    holding = {path.relative_to(whole_run.folder) for path in files if SECRET.encode() in path.read_bytes()}
    assert {path.parts[0] for path in holding} == {"notes.jsonl", "soap_dataset", "run"}
    assert sorted(path.name for path in holding if path.parts[0] == "run") == ["report.html", "statements.jsonl"]
    assert SECRET not in whole_run.output
