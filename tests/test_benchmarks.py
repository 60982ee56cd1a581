"""What benchmarks/ measures without a GPU runs."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def test_learning_starts_in_an_empty_folder_for_an_older_checkpoint_would_pass_for_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "LoRA/global_step_255").mkdir(parents=True)
    command = [sys.executable, str(ROOT / "benchmarks/learning.py"), "--model", "m", "--data", "d"]
    done = subprocess.run([*command, "--work_dir", str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path} is not empty: remove it, or give another --work_dir\n"


@pytest.mark.slow
def test_the_growth_of_an_evaluation_is_measured_through_pipes_and_through_http(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/eval_scaling.py"), "--output", str(tmp_path / "table.md")]
    command += ["--sizes", "10", "20", "--server_sizes", "10", "20"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    table = (tmp_path / "table.md").read_text()
    assert table in done.stdout
    for row in ("| 10 | engine |", "| 20 | engine |", "| 10 | server |", "| 20 | server |", "| 64 |"):
        assert table.count(row) == 1, row
