"""Test demo/demo.ipynb: it has the commands of demo/run.sh, and runs from top to bottom on a tiny model."""

import copy
import re
import shutil

import nbformat
import pytest
from conftest import ROOT
from test_tokens import QWEN3_LIKE

NOTEBOOK = ROOT / "demo" / "demo.ipynb"


@pytest.fixture(scope="module")
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def joined(shell: str) -> str:
    """Return shell text with continued lines joined."""
    return re.sub(r"\s*\\\n\s*", " ", shell)


def test_the_notebook_is_valid_and_has_no_outputs(notebook):
    nbformat.validate(notebook)
    assert notebook.nbformat == 4 and notebook.nbformat_minor >= 5  # has cell ids
    assert all(re.fullmatch(r"[a-z-]+", cell.id) for cell in notebook.cells)
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(codes) >= 10
    assert not any(cell.outputs or cell.execution_count for cell in codes)


def test_the_notebook_runs_each_command_of_the_demo(notebook):
    steps = joined((ROOT / "demo" / "run.sh").read_text()).partition('\nsay "')[2]
    commands = [line for line in steps.splitlines()[1:] if line and not line.startswith("say ")]
    cells = [joined(cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    assert len(commands) >= 6
    assert [command for command in commands if not any(command in cell for cell in cells)] == []


@pytest.fixture(scope="module")
def outputs(notebook, tiny_model, tmp_path_factory) -> dict[str, str]:
    """Run the notebook on a few rows, in a copy of the project with a tiny model. Return the output of each cell by id.

    The rows are the shortest, because the tiny tokenizer needs more tokens than the demo's.
    """
    from nbclient import NotebookClient

    folder = tmp_path_factory.mktemp("notebook") / "project"
    demo = folder / "demo"
    shutil.copytree(ROOT / "demo", demo, ignore=shutil.ignore_patterns("build", "__pycache__"))
    for path in ROOT.iterdir():
        if path.suffix == ".py" or (path / "__init__.py").exists():
            (folder / path.name).symlink_to(path)
    model = shutil.copytree(tiny_model, demo / "build" / "SmolLM2-135M-Instruct")
    (model / "chat_template.jinja").write_text(QWEN3_LIKE)  # can be trained on
    lines = sorted((demo / "dialogues.jsonl").read_text().splitlines(), key=len)[:16]
    (demo / "dialogues.jsonl").write_text("".join(f"{line}\n" for line in lines))
    for path in demo.glob("*.yaml"):
        text = re.sub(r"(sample_count|eval_interval): \d+", r"\1: 2", path.read_text())
        path.write_text(text.replace("max_length: 768", "max_length: 2048"))
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:  # train without the launcher, whose port another test may use
        cell.source = cell.source.replace("arctic_training demo/", "python train.py demo/")
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(demo)}})
    ran = client.execute()
    return {cell.id: text_of(cell.outputs) for cell in ran.cells if cell.cell_type == "code"}


def text_of(cell_outputs: list[nbformat.NotebookNode]) -> str:
    """Return the text of a cell's output, and the types of its data such as image/png."""
    return "".join(output.get("text", "") + "\n".join(output.get("data", {})) for output in cell_outputs)


NOTE_OR_REASON = r"^Subjective$|no note in the reply"
EXPECTED = {  # cell -> patterns
    "setup": [r"^base=demo/build/SmolLM2-135M-Instruct$"],
    "model": ["already exists"],
    "preprocess": [r"^ +16 kept$", r"^ +1 test$"],
    "example": ["^--- assistant ---$", "^tokens per row: "],
    "tokens": [r"<\|im_start\|>assistant$", "^[0-9]+ tokens, [0-9]+ of them in the loss"],
    "before": ["This is tennis elbow", NOTE_OR_REASON],
    "train-full": ["training: 100%"],
    "train-lora": ["training: 100%"],
    "loss": ["^SmolLM2-135M-finetuned: loss ", "SmolLM2-135M-LoRA: loss ", "image/png"],
    "after": [NOTE_OR_REASON],
    "evaluate": ["^HEADLINE: ", r"^\| Readable notes "],
    "compare": [r"^\| Readable notes ", r"^\| ROUGE-L, P "],
    "read": ["^DIALOGUE 0$", "^SUBJECTIVE\nReference: "],
    "judge": [r"^\| Known answers ", "Specificity"],
}


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(outputs):
    assert set(outputs) == set(EXPECTED)
    missing = [
        (cell, pattern, outputs[cell][-2000:])
        for cell, patterns in EXPECTED.items()
        for pattern in patterns
        if not re.search(pattern, outputs[cell], re.MULTILINE)
    ]
    assert missing == []
