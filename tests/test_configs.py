"""Test that arctic_training's own code loads the YAMLs, and that they differ only where intended."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, rows
from datasets import Dataset

from training import preview

FULL, LORA = ROOT / "Qwen3-1.7B-config.yaml", ROOT / "Qwen3-1.7B-LoRA-config.yaml"
RUN_FOLDERS = {FULL: "./ckpt/Qwen3-1.7B-finetuned", LORA: "./ckpt/Qwen3-1.7B-LoRA"}
VARIANTS = sorted((ROOT / "configs").glob("*.yaml"))
CONFIGS = [FULL, LORA, *VARIANTS, *sorted((ROOT / "demo").glob("*.yaml"))]

# Load each YAML as `arctic_training` does, with a local model. The code may register its classes only once.
LOAD = """
import json, os, sys
from pathlib import Path
import yaml
from arctic_training.config.trainer import get_config

model, *paths = sys.argv[1:]
loaded = {}
for number, path in enumerate(map(Path, paths)):
    config = yaml.safe_load(path.read_text())
    code = (path.parent / config.pop("code")).resolve()
    config["model"]["name_or_path"] = model
    config = get_config({**config, **({} if number else {"code": str(code)})})
    loaded[path.name] = config.model_dump(serialize_as_any=True)

def spelled(value):  # as written in the YAML
    return os.path.relpath(value) if isinstance(value, Path) else getattr(value, "name", str(value)).lower()

Path("loaded.json").write_text(json.dumps(loaded, default=spelled))
"""


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def flat(value: object, prefix: str = "") -> dict[str, object]:
    """Return the leaves of nested dicts and lists by dotted name, in file order."""
    if not isinstance(value, dict | list):
        return {prefix: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return {name: leaf for key, part in pairs for name, leaf in flat(part, f"{prefix}.{key}".strip(".")).items()}


def checkpoints(config: dict) -> dict[str, dict]:
    return {entry["type"]: entry for entry in config["checkpoint"]}


@pytest.fixture(scope="module")
def loaded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("configs")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    command = [sys.executable, "-c", LOAD, tiny_model, *CONFIGS]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "loaded.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_arctic_training_loads_each_yaml_and_keeps_every_value(loaded, path):
    config = flat(loaded[path.name])
    wanted = {
        key: os.path.normpath(value) if isinstance(value, str) and value.startswith("./") else value
        for key, value in flat(read(path)).items()
        if key not in ("code", "model.name_or_path")
    }
    differing = {key: (value, config.get(key)) for key, value in wanted.items() if config.get(key) != value}
    assert not differing


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_code_path_in_the_yaml_is_train_py(path):
    assert (path.parent / read(path)["code"]).resolve() == ROOT / "train.py"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_all_files_of_a_run_are_in_its_own_folder(path):
    config = read(path)
    folder = Path(checkpoints(config)["export"]["output_dir"])
    assert Path(checkpoints(config)["resume"]["output_dir"]) == folder / "resume"
    assert Path(config["kill_switch_path"]).parent == folder
    assert Path(config["train_log_metrics_path"]) == folder / "train-log.jsonl"


def test_no_two_runs_share_a_folder():
    folders = [checkpoints(read(path))["export"]["output_dir"] for path in CONFIGS]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("path", RUN_FOLDERS, ids=lambda path: path.name)
def test_the_checkpoint_is_written_to_the_folder_named_in_the_readme(path):
    assert checkpoints(read(path))["export"]["output_dir"] == RUN_FOLDERS[path]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_settings_that_determine_the_packs_are_explicit(path):
    config = read(path)
    data = config["data"]
    assert {"max_length", "num_proc", "best_fit_packing", "cache_dir"} <= data.keys() and "seed" in config
    assert not Path(data["cache_dir"]).is_absolute()
    assert [source["split"] for source in data["sources"] + data["eval_sources"]] == ["train", "validation"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_run_validates_warms_up_and_resumes_automatically(path):
    config = read(path)
    assert config["eval_interval"] > 0
    assert config["scheduler"]["name"] == "cosine" and config["scheduler"]["warmup_ratio"] > 0
    assert checkpoints(config)["export"]["save_end_of_training"] is True
    assert checkpoints(config)["resume"]["auto_resume"] is True
    assert "save_every_n_steps" in checkpoints(config)["resume"]


def test_both_qwen_yamls_have_the_same_key_order():
    full, lora = list(flat(read(FULL))), list(flat(read(LORA)))
    assert [key for key in lora if not key.startswith("model.peft_config")] == full


PLACES = {"checkpoint.0.output_dir", "checkpoint.1.output_dir", "train_log_metrics_path", "kill_switch_path"}


def differing(one: Path, other: Path) -> set[str]:
    settings, others = flat(read(one)), flat(read(other))
    return {key for key in settings.keys() | others.keys() if settings.get(key) != others.get(key)}


def test_the_qwen_yamls_differ_only_in_adapter_rate_and_folder():
    adapter = {key for key in flat(read(LORA)) if key.startswith("model.peft_config")}
    assert differing(FULL, LORA) == adapter | PLACES | {"optimizer.learning_rate"}


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.name)
def test_a_variant_changes_memory_use_but_no_learning_setting(path):
    base = LORA if "LoRA" in path.name else FULL
    memory = {"data.max_length", "model.disable_activation_checkpoint", "optimizer.type", "code"}
    memory |= {"eval_interval", "checkpoint.1.save_every_n_steps"}  # counted in steps; shorter packs give more steps
    changed = {key for key in differing(base, path) - PLACES if not key.startswith("deepspeed.")}
    assert changed <= memory and "optimizer.type" in changed


def test_the_24_gb_variant_recomputes_layers_and_offloads_the_optimizer():
    variant = flat(read(ROOT / "configs/Qwen3-1.7B-24GB.yaml"))
    assert variant["model.disable_activation_checkpoint"] is False
    assert variant["deepspeed.zero_optimization.offload_optimizer.device"] == "cpu"
    assert variant["optimizer.type"] == "cpu_adam"


def test_the_adapter_settings_are_supported_by_vllm():
    adapter = read(LORA)["model"]["peft_config"]
    assert adapter["peft_type"] == "Lora"
    assert not {"modules_to_save", "use_dora"} & adapter.keys()
    assert adapter["r"] <= 64


@pytest.mark.parametrize(
    ("checkpoint", "unfinished", "status"),
    [("global_step_48", False, 0), ("global_step_48.incomplete", False, 1), ("global_step_48", True, 1)],
)
def test_the_demo_retrains_after_a_killed_or_stopped_run(tmp_path, checkpoint, unfinished, status):
    (tmp_path / checkpoint).mkdir()
    if unfinished:
        (tmp_path / "resume").mkdir()
    (tmp_path / checkpoint / "model.safetensors").touch()
    (function,) = re.findall(r"^trained\(\) .*", (ROOT / "demo/run.sh").read_text(), re.MULTILINE)
    assert subprocess.run(["bash", "-c", f'{function}\ntrained "$0"', tmp_path], timeout=60).returncode == status


def test_the_preview_skips_other_yamls_and_rejects_invalid_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preview, "ROOT", tmp_path)
    (tmp_path / "a-config.yaml").write_text("data: {max_length: 100}")
    for name, text in {"b": "data: {}", "c": "- x", "d": ""}.items():
        (tmp_path / f"{name}-config.yaml").write_text(text)
    assert preview.yaml_limits() == {"a-config.yaml": 100}
    (tmp_path / "e-config.yaml").write_text("data: [")
    monkeypatch.setattr(preview, "load_split", lambda *_: Dataset.from_list(rows(4)))
    assert preview.main(["--model", "m"]) == 2
    assert f"error: {tmp_path / 'e-config.yaml'} is not valid YAML" in capsys.readouterr().err


def test_the_preview_counts_the_rows_that_each_yaml_would_drop(monkeypatch, capsys):
    """Expect both YAMLs to keep a row of 16,384 tokens and to drop one of 16,385."""
    for path in (FULL, LORA):
        assert preview.yaml_limits()[path.name] == read(path)["data"]["max_length"]
    lengths = iter([8192, 8193, 16384, 16385] * 2)
    monkeypatch.setattr("training.tokens.load_tokenizer", lambda _: None)
    monkeypatch.setattr(
        "training.tokens.encode_example", lambda *_: dict.fromkeys(("input_ids", "labels"), [0] * next(lengths))
    )
    monkeypatch.setattr(preview, "load_split", lambda *_: Dataset.from_list(rows(4)))
    assert preview.main(["--model", "m"]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "rows: 4",
        f"  max_length 16,384 ({LORA.name}) would drop 1",
        f"  max_length 16,384 ({FULL.name}) would drop 1",
    ]
    assert preview.main(["--model", "m", "--max_length", "8193"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["rows: 4", "  max_length 8,193 (as given) would drop 2"]
