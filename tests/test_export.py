"""Test that an export is the evaluated model, that its card has only measured figures, and that tables are exact."""

import ast
import contextlib
import csv
import functools
import hashlib
import itertools
import json
import re
import shutil
import stat
import subprocess
from datetime import datetime
from pathlib import Path

import huggingface_hub
import pytest
from conftest import CHAT_TEMPLATE, LEARNED_NOTE, ROOT, build_tokenizer, chats, rows
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import export
import prompts
from common.chat_template import render_chat
from common.errors import UserError
from evaluation.engines import models
from evaluation.engines.base import Request
from evaluation.engines.vllm_engine import Engine, EngineSpec
from evaluation.report.results import write_results_json
from evaluation.run.manifest import Manifest
from evaluation.run.records import open_records
from evaluation.scoring.scores import score_run
from sharing import llama_cpp
from sharing.ollama import modelfile, ollama_template
from sharing.tables import export_tables, flatten
from sharing.writers import LocalModel

CHAT = prompts.note_messages(rows(1)[0]["dialogue"])
SMOL = ROOT / "demo" / "build" / "SmolLM2-135M-Instruct"


def reply(model: Path, adapter: Path | None = None, tokens: int = 60) -> str:
    return LocalModel(str(model), adapter and str(adapter), tokens).write(CHAT, lambda _: None).text


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tiny_model: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exports") / "soap"
    assert export.main([str(tiny_model), "--lora_path", str(tiny_adapter), "--output_dir", str(output)]) == 0
    return output


def test_the_exported_model_gives_the_same_greedy_reply(tiny_model, tiny_adapter, exported):
    expected = reply(tiny_model, tiny_adapter)
    assert reply(exported) == expected
    assert reply(tiny_model) != expected


def test_an_export_has_exactly_these_files(exported):
    expected = {"config.json", "generation_config.json", "model.safetensors", "Modelfile", "README.md"}
    expected |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
    assert files(exported) == expected
    assert files(exported.parent) == {"soap"}, "no draft remains"


@pytest.mark.slow
def test_vllm_writes_the_note_of_an_exported_checkpoint(tiny_model, tmp_path):
    assert export.main([str(tiny_model), "--output_dir", str(tmp_path / "soap")]) == 0
    arguments = {"enforce_eager": True, "max_model_len": 1024, "kv_cache_memory_bytes": 64 << 20}
    spec = EngineSpec(tmp_path / "soap", arguments, {"temperature": 0, "max_tokens": 200})
    with contextlib.closing(Engine("generator", spec, tmp_path / "log")) as engine:
        (answer,) = chats(engine, [Request(CHAT)])
    assert prompts.read_note(answer.text) == LEARNED_NOTE


@pytest.mark.slow
@pytest.mark.skipif(not SMOL.exists(), reason="needs `python demo/get_model.py`")
def test_an_export_of_a_real_model_writes_as_the_adapter_does(tmp_path):
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(1)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(SMOL), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    command = [str(SMOL), "--lora_path", str(tmp_path / "adapter"), "--dtype", "float32"]
    assert export.main([*command, "--output_dir", str(tmp_path / "soap")]) == 0

    tokenizer = AutoTokenizer.from_pretrained(SMOL)
    ids = tokenizer(render_chat(tokenizer, CHAT), add_special_tokens=False, return_tensors="pt")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(SMOL), tmp_path / "adapter")
    made = adapted.generate(**ids, do_sample=False, max_new_tokens=40)
    expected = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert reply(tmp_path / "soap", tokens=40) == expected
    assert reply(SMOL, tokens=40) != expected


def test_weights_are_in_the_type_that_was_asked_for(tiny_model, tmp_path):
    from safetensors.torch import load_file

    assert export.main([str(tiny_model), "--output_dir", str(tmp_path / "soap"), "--dtype", "float16"]) == 0
    tensors = load_file(tmp_path / "soap" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float16"}


# --- Ollama and llama.cpp --------------------------------------------------------------------------------------------

LLAMA_LIKE = (
    "{{ bos_token }}{% set date = strftime_now('%d %b %Y') if strftime_now is defined else 'none' %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}"
    "{% if m.role == 'system' %}Today: {{ date }} {{ '{{' }} x }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def ollama_prompt(text: str, dialogue: str) -> str:
    """Return the prompt that Ollama builds from a Modelfile: the template up to .Response, with values filled in."""
    template, system = (re.search(f'^{name} """(.*?)"""$', text, re.S | re.M)[1] for name in ("TEMPLATE", "SYSTEM"))
    template = "".join(c for c in template if c.isprintable() or c in "\n\t")  # Ollama drops other characters
    template = template[: template.index("{{ .Response }}")]
    values = {".System": system, ".Prompt": dialogue}
    return re.sub(r"\{\{ (.*?) \}\}", lambda match: values.get(match[1]) or ast.literal_eval(match[1]), template)


@pytest.mark.parametrize("template", [None, LLAMA_LIKE])
def test_ollama_builds_the_prompt_of_evaluation(template):
    tokenizer = build_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = template or tokenizer.chat_template
    text = modelfile(tokenizer, ["<|im_end|>"], 4096)
    assert ollama_prompt(text, CHAT[1]["content"]) == render_chat(tokenizer, CHAT)


# Characters that end a template, begin an action in it, or that Ollama drops; and others.
awkward = st.text(st.sampled_from('{}"`-/*%.\\ \n\t\u00a0\u200b\r\ufeff\u3000a\u00e9\U000e0001'), max_size=12)


@functools.cache
def one_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def template_around(before: str, between: str, after: str) -> str:
    """Return a chat template that writes these texts around the system and the user message."""
    first, second, third = (json.dumps(text, ensure_ascii=False) for text in (before, between, after))
    return f"{{{{ {first} + messages[0].content + {second} + messages[1].content + {third} }}}}"


@settings(max_examples=50, deadline=None)
@given(before=awkward, between=awkward, after=awkward)
def test_no_character_of_a_template_is_lost_in_the_modelfile(before, between, after):
    tokenizer = one_tokenizer()
    tokenizer.chat_template = template_around(before, between, after)
    text = modelfile(tokenizer, ["<|im_end|>"], 4096)
    assert ollama_prompt(text, CHAT[1]["content"]) == render_chat(tokenizer, CHAT)


# Ollama executes a template in this way, up to .Response, which is empty here.
GO = r"""
package main

import (
	"encoding/json"
	"os"
	"text/template"
)

func main() {
	var cases []struct{ Template, System, Prompt string }
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	for _, c := range cases {
		values := map[string]string{"System": c.System, "Prompt": c.Prompt}
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(c.Template))
		if err := parsed.Execute(os.Stdout, values); err != nil {
			panic(err)
		}
		os.Stdout.WriteString("\x00")
	}
}
"""


@pytest.mark.skipif(not shutil.which("go"), reason="needs Go: apt-get install golang-go")
def test_go_renders_the_templates_as_transformers_does(tmp_path):
    pieces = ["", "{", "{{", "{{{ x }}", '"""', '""""', "\u00a0\u200b\U000e0001", "\r\n\t", "`\\n`", "{{/* a */}} -}}"]
    templates = [CHAT_TEMPLATE, LLAMA_LIKE, *(template_around(*parts) for parts in itertools.permutations(pieces, 3))]
    cases, expected = [], []
    for template in templates:
        tokenizer = one_tokenizer()
        tokenizer.chat_template = template
        system, user = (message["content"] for message in CHAT)
        cases.append({"Template": ollama_template(tokenizer), "System": system, "Prompt": user})
        expected.append(render_chat(tokenizer, CHAT))
    (tmp_path / "render.go").write_text(GO)
    command = ["go", "run", str(tmp_path / "render.go")]
    result = subprocess.run(command, input=json.dumps(cases).encode(), capture_output=True, check=False)
    assert result.returncode == 0, result.stderr.decode()
    rendered = result.stdout.decode().split("\0")[:-1]
    assert len(rendered) == 722
    assert rendered == expected


def test_a_begin_token_that_ollama_adds_is_not_in_the_template():
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer()
    tokenizer.bos_token, tokenizer.chat_template = "<|endoftext|>", LLAMA_LIKE
    assert ollama_template(tokenizer).startswith("<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    assert ollama_template(tokenizer).startswith("<|im_start|>system")


def test_ollama_decodes_greedily_and_stops_at_the_end_of_the_note(exported):
    text = (exported / "Modelfile").read_text()
    assert "\nFROM ./model.gguf\n" in text
    parameters = re.findall(r"^PARAMETER (.*)$", text, re.M)
    assert parameters == ["temperature 0", "repeat_penalty 1", "num_ctx 4096", "num_predict 1024", 'stop "<|im_end|>"']


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, LLAMA_LIKE])
def test_programs_without_our_options_build_the_prompts_of_training(template, tiny_model, tmp_path):
    source = shutil.copytree(tiny_model, tmp_path / "model")
    (source / "chat_template.jinja").write_text(template)
    assert export.main([str(source), "--output_dir", str(tmp_path / "soap")]) == 0
    original, exported = (AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "soap"))
    expected = render_chat(original, CHAT)
    plain = {"tokenize": False, "add_generation_prompt": True}
    assert original.apply_chat_template(CHAT, **plain) != expected
    for options in ({}, {"enable_thinking": True}, {"strftime_now": datetime(2001, 2, 3).strftime}):
        assert exported.apply_chat_template(CHAT, **plain, **options) == expected
    assert render_chat(exported, CHAT) == expected


@pytest.mark.skipif(not SMOL.exists(), reason="needs `python demo/get_model.py`")
def test_the_demo_models_tokenizer_has_no_part_of_llama_2s():
    """llama.cpp's converter takes a tokenizer with byte fallback and a sequence of decoders for SentencePiece."""
    tokenizer = json.loads((SMOL / "tokenizer.json").read_text())
    assert not tokenizer["model"]["byte_fallback"]
    assert tokenizer["decoder"]["type"] == "ByteLevel"


CONVERTER = """
import sys
folder, *options = sys.argv[1:]
assert open(folder + "/config.json").read() and options[::2] == ["--outfile", "--outtype", "--model-name"]
open(options[1], "w").write(" ".join(options[3::2]))
"""


@pytest.mark.parametrize("given_as", ["file", "folder", "on PATH"])
def test_gguf_is_written_by_the_converter_of_the_user(given_as, tiny_model, tmp_path, monkeypatch):
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / llama_cpp.CONVERTER).write_text(CONVERTER)
    (folder / llama_cpp.CONVERTER).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder) if given_as == "on PATH" else "/nowhere")
    path = {"file": [str(folder / llama_cpp.CONVERTER)], "folder": [str(folder)], "on PATH": []}[given_as]
    assert export.main([str(tiny_model), "--output_dir", str(tmp_path / "soap"), "--gguf", *path]) == 0
    assert (tmp_path / "soap" / "model.gguf").read_text() == "bf16 soap"


@pytest.mark.parametrize(("dtype", "expected"), [("float32", "f32 notes"), ("float16", "f16 notes")])
def test_gguf_has_the_type_of_the_weights(dtype, expected, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    converter = tmp_path / llama_cpp.CONVERTER
    converter.write_text(CONVERTER)
    llama_cpp.write_gguf(converter, tmp_path, dtype, "notes")
    assert (tmp_path / "model.gguf").read_text() == expected


def test_a_failed_conversion_leaves_no_folder(tiny_model, tmp_path, capsys):
    converter = tmp_path / llama_cpp.CONVERTER
    converter.write_text("raise SystemExit('Model Tiny is not supported')")
    assert export.main([str(tiny_model), "--output_dir", str(tmp_path / "soap"), "--gguf", str(converter)]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert f"{converter} failed: Model Tiny is not supported; if the model is newer than that llama.cpp" in line
    assert files(tmp_path) == {converter.name}


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("import conversion", "conversion is not beside it; give the folder of llama.cpp's whole source"),
        ("import conversion.base", "conversion is not beside it; give the folder of llama.cpp's whole source"),
        ("import no_such_package", "this Python lacks its package no_such_package; install"),
        ("", "no message; if"),
    ],
)
def test_a_converter_that_cannot_start_is_explained(code, remedy, tmp_path):
    converter = tmp_path / llama_cpp.CONVERTER
    converter.write_text(code)
    with pytest.raises(UserError, match=re.escape(f"{converter} failed: {remedy}")):
        llama_cpp.write_gguf(converter, tmp_path, "bfloat16", "notes")


# --- the model card --------------------------------------------------------------------------------------------------

LOG = [
    {"step": 1, "epoch": 0, "loss": 2.0, "gradient_norm": 1.0, "lr": 1e-4, "tokens": 700, "seconds": 1.0},
    {"step": 2, "epoch": 0, "loss": 1.0, "gradient_norm": 1.0, "lr": 3e-4, "tokens": 600, "seconds": 1.0},
    {"step": 2, "validation_loss": 0.9375, "best": True},
    {"step": 3, "epoch": 1, "loss": 0.25, "gradient_norm": 1.0, "lr": 0.0, "tokens": 500, "seconds": 1.0},
    {"step": 3, "validation_loss": 1.25, "best": False},
]


@pytest.fixture
def checkpoint(tiny_model: Path, tmp_path: Path) -> Path:
    """Return a training's folder with an export of step 2 and its log."""
    folder = tmp_path / "ckpt" / "tiny-finetuned"
    shutil.copytree(tiny_model, folder / "global_step_2")
    (folder / "train-log.jsonl").write_text("\n".join(map(json.dumps, LOG)) + '\n{"step": 4, "lo')
    return folder


def save_run(folder: Path, model: Path, controls: bool) -> Path:
    """Save a run of eval.py on 6 dialogues, in which half of the sections passed."""
    folder.mkdir()
    data = rows(6)
    predictions, judgements, _ = open_records(folder)
    for index, row in enumerate(data):
        note = {section: row[section] for section in prompts.SECTIONS}
        hashed = hashlib.sha256(row["dialogue"].encode()).hexdigest()[:12]
        predictions.append(
            {"index": index, "dialogue_hash": hashed, "raw": prompts.write_note(note), "finish_reason": "stop",
             "status": "ok", "reason": None, **note, "prompt_tokens": 300, "output_tokens": 60}
        )  # fmt: skip
        for section in prompts.SECTIONS:
            record = {"index": index, "section": section, "reason": "", "raw": "", "source": "judge", "attempts": 1}
            record |= {"control": None, "attack": None}
            judgements.append(record | {"verdict": "pass" if index % 2 else "fail"})
            if controls:
                for kind, expected in (("reworded", "pass"), ("other_patient", "fail")):
                    judgements.append(record | {"verdict": expected, "control": {"kind": kind, "expected": expected}})
    generate = {"model": models.resolve_model(str(model)).fingerprint, "adapter": None}
    manifest = Manifest(folder / "manifest.json")
    manifest.identity.update({"generate": generate, "judge": {}, "data": {}})
    manifest.write()
    results = {"dataset": "/home/me/secret/soap_dataset", "model": str(model), "lora_path": None, "split": "test"}
    results |= {"judge_model": "Qwen/Qwen3-8B", "date": "2026-11-25T10:00:00", "dataset_hash": "0123456789ab"}
    results |= {"timings_s": {}, **score_run(predictions, judgements, data)}
    write_results_json(folder / "results.json", results)
    return folder


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_a_card_without_log_and_results_says_that_nothing_was_run(exported):
    card = card_of(exported)
    assert "Training log: not found" in card
    assert "Pass rates, ROUGE-L and checks of the judge: not run." in card
    assert "LoRA, rank 4, alpha 8" in card
    assert "Base model: not recorded" in card, "a local folder is no base model on the hub"
    assert not re.search(r"\d%", card)
    assert str(exported.parent.parent) not in card


def test_the_metadata_of_a_card_is_valid_for_the_hub(exported):
    card = ModelCard.load(exported / "README.md")
    assert card.data.library_name == "transformers" and "not-for-clinical-use" in card.data.tags
    assert card.data.base_model is None
    assert prompts.SYSTEM_PROMPT in card.text


def test_a_card_names_the_base_of_an_adapter_on_the_hub(tiny_model, tiny_adapter, tmp_path):
    adapter = shutil.copytree(tiny_adapter, tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "Qwen/Qwen3-1.7B"
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert export.main([str(tiny_model), "--lora_path", str(adapter), "--output_dir", str(tmp_path / "soap")]) == 0
    assert ModelCard.load(tmp_path / "soap" / "README.md").data.base_model == "Qwen/Qwen3-1.7B"


def test_a_card_has_the_figures_of_the_exported_step(checkpoint, tmp_path):
    assert export.main([str(checkpoint), "--output_dir", str(tmp_path / "soap")]) == 0
    card = card_of(tmp_path / "soap")
    for line in (
        "Exported: step 2 of 3; epochs of the run: 2",
        "1,300 tokens",
        "Highest learning rate: 0.0003",
        "before it: 1.5000 nats",
        "Validation loss at the exported step: 0.9375",
    ):
        assert line in card
    assert "1.2500" not in card


@pytest.mark.parametrize("controls", [True, False])
def test_a_card_has_the_rates_intervals_and_checks_of_its_run(controls, checkpoint, tmp_path):
    run = save_run(tmp_path / "run", checkpoint, controls)
    command = [str(checkpoint), "--results", str(run), "--output_dir", str(tmp_path / "soap")]
    assert export.main(command) == 0
    card = card_of(tmp_path / "soap")
    assert re.search(r"^\| S +\| 50\.0%.*18\.8-81\.2%", card, re.M)
    assert "6 dialogues of the split test of soap_dataset (hash 0123456789ab), on 2026-11-25" in card
    assert "Qwen3-8B" in card and "Verdicts of people: not run." in card
    assert ("Sensitivity (good sections passed)" in card) == controls
    assert ("Checks of the judge on known answers: not run." in card) == (not controls)
    assert "secret" not in card and str(tmp_path) not in card
    assert "rounded" not in card


def test_a_card_says_that_rounded_weights_were_not_evaluated(checkpoint, tmp_path):
    run = save_run(tmp_path / "run", checkpoint, False)
    command = [str(checkpoint), "--results", str(run), "--output_dir", str(tmp_path / "soap"), "--dtype", "float16"]
    assert export.main(command) == 0
    assert "The evaluated weights are bfloat16; rounded to float16, they were not run." in card_of(tmp_path / "soap")


def test_the_run_of_another_model_is_refused(checkpoint, tiny_adapter, tmp_path, capsys):
    run = save_run(tmp_path / "run", checkpoint, False)
    command = [str(checkpoint), "--lora_path", str(tiny_adapter), "--results", str(run)]
    assert export.main([*command, "--output_dir", str(tmp_path / "soap")]) == 2
    assert f"that run did not evaluate {tiny_adapter}" in capsys.readouterr().err
    assert not (tmp_path / "soap").exists()


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give either a model, or --records"),
        (["model", "--records", "run"], "give either a model, or --records"),
        (["./no-model"], "./no-model: no such folder"),
        (["./no-model", "--gguf", "/no/llama.cpp"], "--gguf: /no/llama.cpp does not exist"),
        (["./no-model", "--gguf"], "convert_hf_to_gguf.py is not on PATH"),
        (["./no-model", "--public"], "--public needs --push_to_hub"),
        (["--records", "./no-run"], "--records ./no-run: no such folder"),
        (["--records", "."], "has no records"),
        (["--records", ".", "--push_to_hub", "me/x"], "--push_to_hub is for a model and has no effect with --records"),
        (["--records", ".", "--gguf"], "--gguf is for a model and has no effect with --records"),
    ],
)
def test_a_mistake_gives_one_line_and_status_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert export.main([*arguments, "--output_dir", "out/soap"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "out" / "soap").exists()


def test_an_output_that_exists_is_not_touched(tiny_model, tmp_path, capsys):
    (tmp_path / "soap").mkdir()
    (tmp_path / "soap" / "mine").write_text("mine")
    assert export.main([str(tiny_model), "--output_dir", str(tmp_path / "soap")]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert files(tmp_path / "soap") == {"mine"}


@pytest.mark.parametrize("log", ["", "{}\n", "not JSON\n{}\n", json.dumps(LOG[3]) + "\n"])
def test_a_log_of_something_else_is_refused(log, checkpoint, tmp_path, capsys):
    (tmp_path / "log").write_text(log)
    command = [str(checkpoint), "--train_log", str(tmp_path / "log"), "--output_dir", str(tmp_path / "soap")]
    assert export.main(command) == 2
    assert str(tmp_path / "log") in capsys.readouterr().err.splitlines()[-1]


# --- hub -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch) -> list[tuple]:
    """Replace the hub's calls by a list of those made. The repository me/taken exists."""
    calls = []
    api = huggingface_hub.HfApi
    monkeypatch.setattr(api, "whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(api, "repo_exists", lambda self, repo: repo == "me/taken")
    monkeypatch.setattr(api, "create_repo", lambda self, repo, private: calls.append(("create", repo, private)))
    monkeypatch.setattr(
        api,
        "upload_folder",
        lambda self, repo_id, folder_path: calls.append(("upload", repo_id, files(folder_path))),
    )
    return calls


@pytest.mark.parametrize("public", [False, True])
def test_a_new_repository_is_private_unless_asked(public, hub, tiny_model, tmp_path):
    command = [str(tiny_model), "--output_dir", str(tmp_path / "soap"), "--push_to_hub", "me/soap-notes"]
    assert export.main(command + ["--public"] * public) == 0
    assert hub == [("create", "me/soap-notes", not public), ("upload", "me/soap-notes", files(tmp_path / "soap"))]
    assert "# soap-notes" in card_of(tmp_path / "soap")


def test_a_repository_that_exists_is_refused_before_the_export(hub, tiny_model, tmp_path, capsys):
    command = [str(tiny_model), "--output_dir", str(tmp_path / "soap"), "--push_to_hub", "me/taken"]
    assert export.main(command) == 2
    assert "me/taken exists" in capsys.readouterr().err
    assert not hub and not (tmp_path / "soap").exists()


def test_a_user_without_a_token_learns_it_before_the_export(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    command = [str(tiny_model), "--output_dir", str(tmp_path / "soap"), "--push_to_hub", "me/soap"]
    assert export.main(command) == 2
    assert "not logged in; run `huggingface-cli login`" in capsys.readouterr().err
    assert not (tmp_path / "soap").exists()


# --- records ---------------------------------------------------------------------------------------------------------


def test_records_become_tables_that_only_the_owner_can_read(checkpoint, tmp_path):
    run = save_run(tmp_path / "run", checkpoint, True)
    assert export.main(["--records", str(run), "--output_dir", str(tmp_path / "tables")]) == 0
    tables = tmp_path / "tables"
    assert files(tables) == {"judgements.csv", "judgements.parquet", "predictions.csv", "predictions.parquet"}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in tables.iterdir())
    table = parquet.read_table(tables / "predictions.parquet")
    kinds = {name: str(kind) for name, kind in zip(table.column_names, table.schema.types, strict=True)}
    numbers = {"index", "prompt_tokens", "output_tokens"}
    assert {name for name, kind in kinds.items() if kind == "int64"} == numbers
    assert {kind for name, kind in kinds.items() if name not in numbers} == {"string"}
    assert table.to_pylist() == list(open_records(run)[0])
    judgements = parquet.read_table(tables / "judgements.parquet").to_pylist()
    assert len(judgements) == 72 and judgements[1]["control_kind"] == "reworded"
    assert "control" not in judgements[0] and judgements[0]["control_kind"] is None


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=8),
    st.lists(st.text("ab", max_size=2), max_size=2),
    st.fixed_dictionaries({"kind": st.text("ab", max_size=2), "expected": st.none()}),
)


@given(records=st.lists(st.fixed_dictionaries({"index": st.integers(0, 9), "a": values, "b": values}), min_size=1))
def test_no_value_of_any_record_is_lost(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    (folder / "predictions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert export_tables(folder, folder) == {"predictions": len(records)}
    table = parquet.read_table(folder / "predictions.parquet")
    for record, row in zip(records, table.to_pylist(), strict=True):
        for name, value in flatten(record).items():
            if name not in row:
                assert value is None
            elif table.schema.field(name).type == "string" and not isinstance(value, str | None):
                assert json.loads(row[name]) == value
            else:
                assert row[name] == value
    with (folder / "predictions.csv").open(encoding="utf-8-sig", newline="") as file:
        cells = list(csv.DictReader(file))
    for row, cell in zip(table.to_pylist(), cells, strict=True):
        assert cell == {name: "" if value is None else str(value) for name, value in row.items()}
