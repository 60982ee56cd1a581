"""Test that each script answers --help quickly, without heavy libraries, and reports a mistake in one line."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    "preprocess_data.py",
    "train.py",
    "eval.py",
    "write_note.py",
    "export.py",
    "demo/get_model.py",
    "benchmarks/train_throughput.py",
]
SCRIPTS += ["benchmarks/two_gpus.py", "benchmarks/eval_walltime.py", "benchmarks/eval_scaling.py"]


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_within_a_second_and_without_heavy_libraries(script):
    code = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = set(sys.modules) & {'torch', 'vllm', 'datasets', 'transformers', 'scipy', 'arctic_training'}\n"
        "assert not heavy, heavy"
    )
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        result = run("-c", code, script)
        seconds.append(time.perf_counter() - began)
        assert result.returncode == 0, result.stderr
        assert "usage:" in result.stdout
    assert min(seconds) < 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train.py", "--dataset_path", "nowhere"], "run `python preprocess_data.py` first"),
        (["train.py", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["eval.py", "no/such/model", "--dataset_path", "nowhere"], "preprocess_data.py"),
        (["preprocess_data.py", "--dataset", "nowhere.jsonl"], "nowhere.jsonl"),
        (["eval.py"], "no model given"),
    ],
)
def test_a_mistake_gets_one_line_and_status_2(arguments, words, tmp_path):
    result = run(str(ROOT / arguments[0]), *arguments[1:], cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert words in result.stderr
