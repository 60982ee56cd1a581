"""Test that the image of the Dockerfile gets every file that the demo needs, and no data. Nothing is built here."""

import fnmatch
import re
import subprocess

from conftest import ROOT

KEPT_OUT = ("visit.txt", "notes.csv", "soap_dataset/train/data.arrow", "results/run/predictions.jsonl", ".git/config")
KEPT_OUT += ("ckpt/model/model.safetensors", "demo/build/ckpt/model.safetensors", ".venv/bin/python", ".env")


def is_in_image(path: str) -> bool:
    """Return whether .dockerignore lets a path into the build: the last pattern that matches it or a parent decides."""
    included = True
    parts = path.split("/")
    prefixes = ["/".join(parts[: k + 1]) for k in range(len(parts))]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if line and not line.startswith("#"):
            names = parts if "**/" in line else prefixes
            if any(fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for name in names):
                included = line.startswith("!")
    return included


def test_the_image_has_every_module_and_file_of_the_demo():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    needed = [
        path
        for path in tracked
        if not path.startswith(("tests/", "benchmarks/", "docs/", ".")) and not path.endswith((".md", "Dockerfile"))
    ]
    assert len(needed) > 80
    assert [path for path in needed if not is_in_image(path)] == []


def test_the_image_gets_no_data():
    assert [path for path in KEPT_OUT if is_in_image(path)] == []


def test_the_image_runs_targets_of_the_makefile():
    targets = re.findall(r"RUN make (\w+)|\"make\", \"(\w+)\"", (ROOT / "Dockerfile").read_text())
    makefile = (ROOT / "Makefile").read_text()
    names = {first or second for first, second in targets}
    assert names == {"install", "demo"}
    assert all(re.search(rf"^{name}:", makefile, re.M) for name in names)
