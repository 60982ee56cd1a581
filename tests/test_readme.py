"""What the README tells people to type exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]


def test_the_original_commands_are_there():
    for command in (
        "pip install -r requirements.txt",
        "python preprocess_data.py",
        "arctic_training Qwen3-1.7B-config.yaml",
        "arctic_training Qwen3-1.7B-LoRA-config.yaml",
        "python eval.py ./ckpt/Qwen3-1.7B-finetuned",
        "python eval.py Qwen/Qwen3-1.7B --lora_path ./ckpt/Qwen3-1.7B-LoRA",
    ):
        assert command in COMMANDS


def test_every_file_that_a_command_names_exists():
    named = {word for command in COMMANDS for word in re.findall(r"[\w./-]+\.(?:py|yaml|txt)", command)}
    assert len(named) >= 6
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_make_target_exists():
    targets = {a or b for a, b in re.findall(r"^make (\w+)|`make (\w+)", README, re.MULTILINE)}
    assert {"demo", "test"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    assert [target for target in sorted(targets) if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


@pytest.mark.parametrize("script", ["eval.py", "preprocess_data.py", "train.py"])
def test_every_option_in_the_readme_is_an_option_of_a_script(script):
    help_text = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, check=True
    ).stdout
    used = {option for command in COMMANDS if script in command for option in re.findall(r"--\w+", command)}
    assert [option for option in sorted(used) if option not in help_text] == []


def test_linked_files_exist():
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_no_placeholder_is_left():
    assert re.findall(r"@[A-Z_]+@", README) == []
