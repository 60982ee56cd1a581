"""What the README tells people to type exists."""

import functools
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()
TEXT = "\n".join(page.read_text() for page in PAGES)
COMMANDS = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", TEXT.replace("\\\n", " "), re.DOTALL)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))
OPTION = r"(?<![\w-])--[a-z][\w-]*"


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


@functools.cache
def options_of(script: str) -> set[str]:
    command = [sys.executable, str(ROOT / script), "--help"]
    return set(re.findall(OPTION, subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def test_every_option_in_a_command_is_an_option_of_its_script():
    checked = 0
    for command in [*COMMANDS, *INLINE]:
        script = re.search(r"[\w/.]+\.py", command)
        for option in re.findall(OPTION, command) if script else ():
            assert option in options_of(script[0]), command
            checked += 1
    assert checked >= 10


def test_every_option_in_the_text_is_an_option_of_some_script():
    scripts = {script for text in (*COMMANDS, *INLINE) for script in re.findall(r"[\w/.]+\.py", text)}
    ours = set().union(*(options_of(script) for script in scripts if (ROOT / script).exists()))
    # Options of ours have underscores; those with dashes are vLLM's.
    named = {option for text in INLINE for option in re.findall(OPTION, text) if "-" not in option[2:]}
    assert len(named) >= 3
    assert sorted(named - ours) == []


def slugs(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_linked_files_and_headings_exist():
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text())]
    assert len(links) >= 5
    for page, link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in slugs(target), link


def test_no_placeholder_is_left():
    assert re.findall(r"@[A-Z_]+@", TEXT) == []
