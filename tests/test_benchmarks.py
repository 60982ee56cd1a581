"""What benchmarks/ measures without a GPU runs."""

import subprocess
import sys
import time
from pathlib import Path

import eval_walltime
import pytest
import train_throughput
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


def test_a_benchmark_leaves_deepspeed_as_many_gpus_as_it_says_and_of_the_visible_ones(monkeypatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert train_throughput.gpus(2) == {"CUDA_VISIBLE_DEVICES": "0,1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert train_throughput.gpus(1) == {"CUDA_VISIBLE_DEVICES": "3"}


def test_a_step_of_several_processes_has_the_tokens_of_all_and_the_time_of_one() -> None:
    first = [{"seconds": 1.0, "tokens": 10, "squares": 50}, {"seconds": 2.0, "tokens": 20, "squares": 70}]
    second = [{"seconds": 1.5, "tokens": 1, "squares": 2}, {"seconds": 2.5, "tokens": 3, "squares": 4}]
    assert train_throughput.joined([first, second]) == [
        {"seconds": 1.0, "tokens": 11, "squares": 52},
        {"seconds": 2.0, "tokens": 23, "squares": 74},
    ]


def test_peak_memory_is_that_of_the_gpu_in_use(tmp_path: Path, monkeypatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$1 $2" = "-i 3" ] && echo 2048 || echo 9000\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    memory = eval_walltime.PeakMemory()
    memory.start()
    deadline = time.monotonic() + 30
    while not memory.peak and time.monotonic() < deadline:
        time.sleep(0.05)
    memory.over.set()
    assert memory.peak == 2.0
