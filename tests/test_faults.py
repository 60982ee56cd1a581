"""One table of bad input for the three scripts and the files between them.

Every row runs the real command in a copy of the same folder: notes.jsonl, soap_dataset, model, adapter, train.yaml,
run (a finished run of eval.py) and unfinished (a training run that was stopped after its second step).
"""

import fcntl
import json
import os
import random
import shlex
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import pytest
import yaml
from conftest import rows
from launcher import TRAINING, Launcher
from test_eval import Harness
from test_preprocess_data import GOOD, save, source_rows, write_csv, write_jsonl
from test_tokens import QWEN3_LIKE
from test_train import write_config


class Fault(NamedTuple):
    """`make` changes the folder; its return value replaces {} in the command.

    `words` must appear in the error line or, if the command should succeed (status 0), in the output. With `disk`, no
    file can grow beyond that many bytes.
    """

    command: str
    make: Callable[[], Any]
    words: str
    status: int = 2
    disk: int | None = None


# --- what spoils the folder


def put(path: str, content: bytes | str) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def add(path: str, content: bytes) -> str:
    return put(path, Path(path).read_bytes() + content)


def cut(path: str, keep: int) -> None:
    put(path, Path(path).read_bytes()[:keep])


def remove(*paths: str) -> None:
    for path in paths:
        Path(path).unlink()


def folder(*names: str) -> str:
    Path("folder").mkdir()
    for name in names:
        write_jsonl(f"folder/{name}", source_rows(4))
    return "folder"


def saved(cut_off: str, keep: int) -> str:
    save("saved", {"train": source_rows(5), "test": source_rows(8)[5:]})
    cut(f"saved/{cut_off}", keep)
    return "saved"


def link_to_itself() -> str:
    Path("loop").symlink_to("loop")
    return "loop"


def full(path: str) -> None:
    """Let the file end on a disk without room."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).symlink_to("/dev/full")


def close(path: str, mode: int) -> str:
    Path(path).chmod(mode)
    return path


def change(path: str, *changes: tuple[str, Any]) -> None:
    """Set values in a file of JSON or YAML, by their dotted names; None takes a key out."""
    values = yaml.safe_load(Path(path).read_text())
    for name, value in changes:
        place = values
        *parents, last = (int(part) if part.isdigit() else part for part in name.split("."))
        for parent in parents:
            place = place[parent]
        place[last] = value
        if value is None:
            del place[last]
    put(path, json.dumps(values))  # which is YAML, too


def rename_tensors(path: str) -> None:
    from safetensors.torch import load_file, save_file

    save_file({f"base_model.model.{name}": tensor for name, tensor in load_file(path).items()}, path)


def setting(name: str, value: Any) -> Callable[[], None]:
    return lambda: change("train.yaml", (name, value))


def dataset(*test: dict[str, Any]) -> str:
    return save("other", {"train": rows(2), "validation": rows(2), "test": list(test)})


def without(*columns: str) -> list[dict[str, str]]:
    return [{key: text for key, text in row.items() if key not in columns} for row in rows(2)]


def note_of(index: object) -> str:
    record = json.loads(Path("run/predictions.jsonl").read_text().splitlines()[0])
    return json.dumps(record | {"index": index}) + "\n"


held: list[IO] = []


def hold(path: str) -> None:
    """Lock a file as another run does, until the test is over."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lock = Path(path).open("a")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)
    held.append(lock)


def nothing() -> None:
    pass


# --- the table

SOURCE = "preprocess_data.py --dataset {} --output_dir soap_dataset"
NEW = "preprocess_data.py --dataset {} --output_dir new"  # for input that is taken
OUTPUT = "preprocess_data.py --dataset notes.jsonl --output_dir {}"
PREVIEW = "train.py"
TRAIN = f"{TRAINING} train.yaml"
RESUME = f"{TRAINING} unfinished.yaml"
EVAL = "eval.py model --judge_model model"
ADAPTER = f"{EVAL} --lora_path adapter"
RUN = f"{EVAL} --output_dir run --judge_controls 2"
REPORT = f"{RUN} --stage report"
SEVERAL = "eval.py --judge_model model --output_dir runs --judge_controls 2 model"
TABLE = "soap_dataset/train/data-00000-of-00001.arrow"
TEST_TABLE = "soap_dataset/test/data-00000-of-00001.arrow"
STRANGE = [
    "مريض: أشعر بألم",
    "\u202eabc\u202c",
    "Zoë 👩‍⚕️ e\u0301",
    "a\u2028b\x85c\x1cd",
    "\ufeffHi",
    "\U0010ffff\ue000",
]

STATE = "epoch_0_global_step_2"

FAULTS = {
    # preprocess_data.py: the source
    "missing file": Fault(SOURCE, lambda: "nothing.jsonl", "does not exist"),
    "missing folder": Fault(SOURCE, lambda: "./nothing", "does not exist"),
    "name of nobody's dataset": Fault(SOURCE, lambda: "nobody/nothing", "check the name and the network"),
    "name that the hub cannot have": Fault(SOURCE, lambda: "a b/c?", "check the name and the network"),
    "unreachable hub": Fault("preprocess_data.py", nothing, "dialogue-to-soap-summary (ConnectionError: "),
    "no name": Fault(SOURCE, lambda: "", "--dataset is empty"),
    "empty file": Fault(SOURCE, lambda: put("a.jsonl", b""), "has no rows"),
    "blank lines": Fault(SOURCE, lambda: put("a.jsonl", b"\n\n \n"), "has no rows"),
    "empty csv": Fault(SOURCE, lambda: put("a.csv", b""), "has no rows"),
    "csv of a header": Fault(SOURCE, lambda: put("a.csv", b"dialogue,soap\r\n"), "has no rows"),
    "empty list": Fault(SOURCE, lambda: put("a.json", b"[]"), "has no rows"),
    "one line that is cut off": Fault(SOURCE, lambda: put("a.jsonl", GOOD[:50]), "a.jsonl:1"),
    "list that is cut off": Fault(SOURCE, lambda: put("a.json", b"[" + GOOD[:50]), "not JSON, or cut off"),
    "deep list": Fault(SOURCE, lambda: put("a.json", b"[" * 100_000), "not JSON, or cut off"),
    "utf-16 jsonl": Fault(SOURCE, lambda: put("a.jsonl", GOOD.decode().encode("utf-16")), "not UTF-8"),
    "utf-16 json": Fault(SOURCE, lambda: put("a.json", GOOD.decode().encode("utf-16")), "not UTF-8"),
    "utf-16 csv": Fault(SOURCE, lambda: write_csv("a.csv", source_rows(3), encoding="utf-16"), "not UTF-8"),
    "NUL bytes": Fault(SOURCE, lambda: put("a.jsonl", b"\0" * 100_000), "NUL bytes"),
    "random bytes as jsonl": Fault(SOURCE, lambda: put("a.jsonl", random.Random(0).randbytes(9_999)), "no row to keep"),
    "random bytes as csv": Fault(SOURCE, lambda: put("a.csv", random.Random(0).randbytes(9_999)), "not UTF-8"),
    "random bytes as parquet": Fault(SOURCE, lambda: put("a.parquet", random.Random(0).randbytes(999)), "not Parquet"),
    "empty parquet": Fault(SOURCE, lambda: put("a.parquet", b""), "not Parquet"),
    "another kind of file": Fault(
        SOURCE, lambda: put("a.txt", GOOD), "not a .jsonl, .json, .csv, .parquet, .tsv, .ndjson file"
    ),
    "other columns": Fault(SOURCE, lambda: write_jsonl("a.jsonl", [{"text": "a"}]), "--dialogue_column"),
    "no headings": Fault(SOURCE, lambda: write_jsonl("a.jsonl", [{"dialogue": "a", "soap": "b"}]), "Subjective"),
    "two dialogues": Fault(SOURCE, lambda: write_jsonl("a.jsonl", source_rows(2)), "too few dialogues"),
    "empty folder": Fault(SOURCE, lambda: folder(), "a folder of such files"),
    "folder of other files": Fault(
        SOURCE, lambda: str(Path(put("folder/README.md", b"#")).parent), "a folder of such files"
    ),
    "files named by no split": Fault(SOURCE, lambda: folder("a.jsonl", "b.jsonl"), "contain exactly one split"),
    "file named by two splits": Fault(
        SOURCE, lambda: folder("train_test.jsonl", "test.jsonl"), "contain exactly one split"
    ),
    "no train": Fault(SOURCE, lambda: folder("val.jsonl", "test.jsonl"), "no train"),
    "train all held out": Fault(SOURCE, lambda: folder("train.jsonl", "test.jsonl"), "same dialogue in test"),
    "saved, no list of splits": Fault(SOURCE, lambda: saved("dataset_dict.json", 5), "cannot load saved"),
    "saved, cut-off state": Fault(SOURCE, lambda: saved("train/state.json", 20), "cannot load saved"),
    "saved, cut-off table": Fault(SOURCE, lambda: saved("train/data-00000-of-00001.arrow", 300), "cannot load saved"),
    "saved, empty table": Fault(SOURCE, lambda: saved("test/data-00000-of-00001.arrow", 0), "cannot load saved"),
    "loop of links": Fault(SOURCE, lambda: f"./{link_to_itself()}", "does not exist"),
    "source without permission": Fault(SOURCE, lambda: close("notes.jsonl", 0), "cannot read notes.jsonl: Permission"),
    "folder in the source without permission": Fault(
        SOURCE,
        lambda: close(folder("train.jsonl", "test/a.jsonl") + "/test", 0) and "folder",
        "cannot read folder/test: Permission",
    ),
    "long name": Fault(SOURCE, lambda: "./" + "x" * 300, "File name too long"),
    # preprocess_data.py: rows that are left out and counted, or kept
    "cut in mid-line": Fault(NEW, lambda: add("notes.jsonl", GOOD[:50]), "1 not JSON, or cut off", 0),
    "enormous row": Fault(
        NEW, lambda: add("notes.jsonl", b'{"dialogue": "' + b"x" * 20_000_000 + b'"}\n'), "than 500,000 characters", 0
    ),
    "NUL bytes between rows": Fault(NEW, lambda: add("notes.jsonl", b"\0" * 4096 + b"\n"), "1 NUL bytes", 0),
    "row of latin-1": Fault(NEW, lambda: add("notes.jsonl", b'{"dialogue": "caf\xe9"}\n'), "1 not UTF-8", 0),
    "half a character": Fault(NEW, lambda: add("notes.jsonl", b'{"dialogue": "\\ud83d"}\n'), "1 dialogue contains", 0),
    "every row twice": Fault(NEW, lambda: write_jsonl("a.jsonl", source_rows(20) * 2), "20 same as an earlier row", 0),
    "every script": Fault(
        NEW,
        lambda: write_jsonl("a.jsonl", [row | {"dialogue": text} for text in STRANGE for row in rows(3)]),
        "0 dropped",
        0,
    ),
    # preprocess_data.py: the output and the options
    "a file": Fault(OUTPUT, lambda: put("there", b"mine"), "was not written by this script"),
    "below a file": Fault(OUTPUT, lambda: put("there", b"mine") + "/soap_dataset", "Not a directory"),
    "a folder of mine": Fault(OUTPUT, lambda: str(Path(put("mine/letter.txt", b"mine")).parent), "was not written by"),
    "another maker's dataset": Fault(
        OUTPUT, lambda: save("saved", {"train": rows(3)}), "was not written by this script"
    ),
    "this folder": Fault(OUTPUT, lambda: ".", "was not written by this script"),
    "the root": Fault(OUTPUT, lambda: "/", "was not written by this script"),
    "where no file can be": Fault(OUTPUT, lambda: "/proc/soap_dataset", "No such file or directory"),
    "a long name": Fault(OUTPUT, lambda: "x" * 300, "File name too long"),
    "a loop of links": Fault(OUTPUT, link_to_itself, "cannot write loop"),
    "output without permission": Fault(OUTPUT, lambda: close(folder(), 0o500) + "/new", "Permission denied"),
    "full disk": Fault(SOURCE, lambda: write_jsonl("a.jsonl", source_rows(500)), "File too large", disk=50_000),
    "two runs at once": Fault(OUTPUT, lambda: hold("soap_dataset.partial/lock") or "soap_dataset", "another run is"),
    "no share for train": Fault(f"{SOURCE} --test_fraction 0.9", lambda: "notes.jsonl", "must each be above 0"),
    "share of nothing": Fault(f"{SOURCE} --test_fraction 0", lambda: "notes.jsonl", "must each be above 0"),
    "share below nothing": Fault(f"{SOURCE} --validation_fraction=-1", lambda: "notes.jsonl", "must each be above 0"),
    "share that is no number": Fault(f"{SOURCE} --test_fraction nan", lambda: "notes.jsonl", "must each be above 0"),
    "share without end": Fault(f"{SOURCE} --test_fraction inf", lambda: "notes.jsonl", "must each be above 0"),
    "share in words": Fault(f"{SOURCE} --test_fraction half", lambda: "notes.jsonl", "invalid float value: 'half'"),
    # train.py: the preview
    "no dataset": Fault(f"{PREVIEW} --dataset_path nowhere", nothing, "run `python preprocess_data.py` first"),
    "a file as dataset": Fault(f"{PREVIEW} --dataset_path notes.jsonl", nothing, "python preprocess_data.py"),
    "cut-off table": Fault(PREVIEW, lambda: cut(TABLE, 300), "soap_dataset cannot be read"),
    "cut-off list of splits": Fault(PREVIEW, lambda: cut("soap_dataset/dataset_dict.json", 5), "cannot be read"),
    "absent split": Fault(f"{PREVIEW} --split dev", nothing, "no split dev (it has: train, validation"),
    "row beyond the end": Fault(f"{PREVIEW} --index 99", nothing, "train has rows 0 to 15"),
    "missing column": Fault(
        f"{PREVIEW} --dataset_path other", lambda: save("other", {"train": without("P")}), "no column P of text"
    ),
    "column of numbers": Fault(
        f"{PREVIEW} --dataset_path other", lambda: save("other", {"train": [rows(1)[0] | {"A": 7}]}), "no column A of"
    ),
    "row with a hole": Fault(
        f"{PREVIEW} --dataset_path other --split test",
        lambda: dataset(*rows(2), rows(1)[0] | {"P": None}),
        "row 2: P is",
    ),
    "preview of no model": Fault(f"{PREVIEW} --model nobody/nothing", nothing, "nobody/nothing: no such folder, and"),
    "preview, no template": Fault(f"{PREVIEW} --model model", lambda: remove("model/chat_template.jinja"), "template"),
    "preview, cut-off tokenizer": Fault(
        f"{PREVIEW} --model model", lambda: cut("model/tokenizer.json", 999), "model has no tokenizer"
    ),
    # arctic_training: the YAML
    "unknown setting": Fault(TRAIN, setting("lerning_rate", 1), "lerning_rate: Extra inputs are not permitted"),
    "unknown setting of data": Fault(TRAIN, setting("data.max_lenght", 9), "data.max_lenght: Extra inputs"),
    "words for a number": Fault(TRAIN, setting("epochs", "many"), "epochs: Input should be a valid integer"),
    "steps of nothing": Fault(TRAIN, setting("gradient_accumulation_steps", 0), "gradient_accumulation_steps: Input"),
    "rate in words": Fault(TRAIN, setting("optimizer.learning_rate", "fast"), "optimizer.learning_rate: "),
    "unknown optimizer": Fault(TRAIN, setting("optimizer.type", "adamm"), "adamm is not a registered OptimizerFactory"),
    "unknown schedule": Fault(TRAIN, setting("scheduler.name", "cosinus"), "cosinus is not a valid SchedulerType"),
    "unknown checkpoint": Fault(
        TRAIN, setting("checkpoint.0.type", "exprt"), "(choose from ['deepspeed', 'huggingface'"
    ),
    "no model at all": Fault(TRAIN, setting("model", None), "model: Field required"),
    "no steps between losses": Fault(TRAIN, setting("eval_interval", 0), "`eval_interval` must be set"),
    "two ways to pack": Fault(TRAIN, setting("data.pack_samples", True), "exclude each other"),
    "unknown adapter": Fault(TRAIN, setting("model.peft_config", {"peft_type": "Lorra"}), "PEFT type Lorra"),
    "adapter of no layer": Fault(
        TRAIN, setting("model.peft_config", {"peft_type": "Lora", "target_modules": ["no_proj"]}), "no_proj"
    ),
    "adapter of a layer that is mistyped": Fault(
        TRAIN,
        setting("model.peft_config", {"peft_type": "Lora", "target_modules": ["q_proj", "v_porj"]}),
        "target_modules: 'v_porj' matches no module",
    ),
    "adapter setting that is mistyped": Fault(
        TRAIN, setting("model.peft_config", {"peft_type": "Lora", "lora_alfa": 8}), "did you mean lora_alpha?"
    ),
    "prompt tuning": Fault(
        TRAIN,
        setting("model.peft_config", {"peft_type": "PromptTuning", "num_virtual_tokens": 8}),
        "set `peft_type: Lora`",
    ),
    "DoRA": Fault(TRAIN, setting("model.peft_config", {"peft_type": "Lora", "use_dora": True}), "a DoRA adapter"),
    "PiSSA": Fault(
        TRAIN,
        setting("model.peft_config", {"peft_type": "Lora", "init_lora_weights": "pissa"}),
        "model.peft_config: init_lora_weights 'pissa' is not true, false, gaussian",
    ),
    "adapter of a changed config": Fault(
        TRAIN,
        lambda: change(
            "train.yaml", ("model.peft_config", {"peft_type": "Lora"}), ("model.hf_config_kwargs", {"rope_theta": 5})
        ),
        "`model.hf_config_kwargs`",
    ),
    "adapter of a quantised model": Fault(
        TRAIN,
        lambda: (
            setting("model.peft_config", {"peft_type": "Lora"})(),
            change("model/config.json", ("quantization_config", {"quant_method": "fp8"})),
        ),
        "model is quantised",
    ),
    "too short for any row": Fault(TRAIN, setting("data.max_length", 16), "No data left after filtering"),
    # arctic_training: the files
    "wrong model name": Fault(
        TRAIN, setting("model.name_or_path", "no such model?"), "no such model? cannot be loaded as a model"
    ),
    "model off an unreachable hub": Fault(
        TRAIN, setting("model.name_or_path", "nobody/nothing"), "nobody/nothing cannot be loaded as a model"
    ),
    "model of no kind": Fault(
        TRAIN, lambda: remove("model/config.json"), "model cannot be loaded as a model (Unrecognized"
    ),
    "cut-off config": Fault(TRAIN, lambda: cut("model/config.json", 99), "model/config.json"),
    "no tokenizer": Fault(
        TRAIN, lambda: remove("model/tokenizer.json", "model/tokenizer_config.json"), "model has no tokenizer"
    ),
    "no template": Fault(TRAIN, lambda: remove("model/chat_template.jinja"), "model has no tokenizer with a chat"),
    "template that is none": Fault(
        TRAIN, lambda: put("model/chat_template.jinja", "{% for %}"), "Expected an expression"
    ),
    "no weights": Fault(TRAIN, lambda: remove("model/model.safetensors"), "model.safetensors"),
    "cut-off weights": Fault(TRAIN, lambda: cut("model/model.safetensors", 5_000), "weights is damaged"),
    "training without data": Fault(TRAIN, lambda: shutil.rmtree("soap_dataset"), "python preprocess_data.py"),
    "training on an absent split": Fault(TRAIN, setting("data.sources.0.split", "dev"), "has no split dev ("),
    "training on a cut-off table": Fault(TRAIN, lambda: cut(TABLE, 300), "soap_dataset cannot be read"),
    "cache that is a file": Fault(TRAIN, setting("data.cache_dir", "notes.jsonl"), "notes.jsonl"),
    "checkpoints into a file": Fault(TRAIN, setting("checkpoint.0.output_dir", "notes.jsonl"), "notes.jsonl"),
    "log below a file": Fault(TRAIN, setting("train_log_metrics_path", "notes.jsonl/log"), "notes.jsonl"),
    "checkpoints without permission": Fault(
        TRAIN, lambda: (close(folder(), 0o500), change("train.yaml", ("checkpoint.0.output_dir", "folder/x"))), "folder"
    ),
    "log that is another file": Fault(TRAIN, setting("train_log_metrics_path", "notes.jsonl"), "not a training log"),
    "resume states among other files": Fault(TRAIN, setting("checkpoint.1.output_dir", "."), "data: 16 rows, 0", 0),
    "stale kill switch": Fault(TRAIN, lambda: put("train/stop", b""), "the kill switch train/stop exists"),
    "two trainings at once": Fault(TRAIN, lambda: hold("train/train-log.jsonl"), "another run is writing"),
    "disk too full for a resume state": Fault(
        TRAIN, lambda: full(f"train/resume/{STATE}/mp_rank_00_model_states.pt"), "make room on the disk"
    ),
    "resume state that is cut off": Fault(
        RESUME, lambda: cut(f"unfinished/resume/{STATE}/mp_rank_00_model_states.pt", 5_000), "unfinished/resume"
    ),
    "resume state half written": Fault(
        RESUME, lambda: remove(f"unfinished/resume/{STATE}/complete.json"), "data: 16 rows, 0 longer", 0
    ),
    "resume state of another run": Fault(RESUME, lambda: change("unfinished.yaml", ("seed", 7)), "a different seed ("),
    "list of a resume state cut off": Fault(
        RESUME, lambda: cut(f"unfinished/resume/{STATE}/complete.json", 9), f"{STATE} is damaged"
    ),
    # eval.py: the call
    "no model": Fault("eval.py", nothing, "no model given"),
    "one model twice": Fault("eval.py model model --judge_model model", nothing, "two runs would share the folder"),
    "one adapter twice": Fault(f"{ADAPTER} --lora_path adapter", nothing, "two runs would share the folder"),
    "no number of dialogues": Fault(f"{EVAL} --limit 0", nothing, "argument --limit: 0 is not within 1"),
    "a list for an object": Fault(f"{EVAL} --engine_args []", nothing, "argument --engine_args: not a JSON object"),
    "half an object": Fault(f"{EVAL} --sampling_args {{", nothing, "argument --sampling_args: "),
    "a length that the model has not": Fault(f"{EVAL} --max_model_len 5000", nothing, "supports at most 4096"),
    "an address that is none": Fault(f"{EVAL} --api_base localhost", nothing, "not a server's address"),
    "a served model with an adapter": Fault(f"{ADAPTER} --api_base http://localhost/v1", nothing, "served"),
    "labels for two runs": Fault(f"{ADAPTER} --lora_path other --human_labels labels", nothing, "on one run's notes"),
    # eval.py: dataset and labels
    "evaluation without data": Fault(EVAL, lambda: shutil.rmtree("soap_dataset"), "preprocess_data.py"),
    "a file to evaluate on": Fault(f"{EVAL} --dataset_path notes.jsonl", nothing, "preprocess_data.py"),
    "an empty folder to evaluate on": Fault(f"{EVAL} --dataset_path {{}}", folder, "cannot be read"),
    "evaluation on an absent split": Fault(f"{EVAL} --split dev", nothing, "no split dev (it has: train, validation"),
    "evaluation on a cut-off table": Fault(EVAL, lambda: cut(TEST_TABLE, 300), "soap_dataset cannot be read"),
    "evaluation without a column": Fault(
        f"{EVAL} --dataset_path {{}}", lambda: save("other", {"test": without("P")}), "no column P of text"
    ),
    "a dialogue that is missing": Fault(
        f"{EVAL} --dataset_path {{}}", lambda: dataset(*rows(2), rows(1)[0] | {"dialogue": None}), "row 2: dialogue is"
    ),
    "a section that is missing": Fault(
        f"{EVAL} --dataset_path {{}}", lambda: dataset(rows(1)[0] | {"P": None}), "no column P of text"
    ),
    "labels that are nowhere": Fault(f"{EVAL} --human_labels nowhere", nothing, "--human_labels nowhere"),
    "labels that are none": Fault(f"{EVAL} --human_labels {{}}", lambda: put("labels", '{"index": 0}\n{'), "labels:2"),
    "labels of another dataset": Fault(
        f"{REPORT} --human_labels {{}}",
        lambda: put("labels", '{"index": 99, "section": "S", "verdict": "pass"}\n'),
        "labels",
    ),
    "labels of another note": Fault(
        f"{REPORT} --human_labels {{}}",
        lambda: put("labels", '\n{"index": 0, "section": "S", "verdict": "pass", "note_hash": "0123456789ab"}\n'),
        "labels:2: the label is on another text than this run's row 0, section S; correct it",
    ),
    "labels twice by one rater": Fault(
        f"{REPORT} --human_labels {{}}",
        lambda: put("labels", 2 * '{"index": 0, "section": "S", "verdict": "pass", "rater": "A"}\n'),
        "labels:2: row 0, section S already has a label by A; correct it",
    ),
    "a label without a clear verdict": Fault(
        f"{REPORT} --human_labels {{}}",
        lambda: put("labels.csv", "index,section,verdict\n0,S,\n0,O,perhaps\n"),
        "labels.csv:3: the verdict is 'perhaps', neither pass nor fail; correct it",
    ),
    "a rater that is none": Fault(
        f"{REPORT} --human_labels {{}}",
        lambda: put("labels", '{"index": 0, "section": "S", "verdict": "pass", "rater": 1}\n'),
        "labels:1: the rater must be a text; correct it",
    ),
    "a sheet without verdicts": Fault(
        f"{REPORT} --human_labels {{}}", lambda: put("labels.csv", "index;section\n0;S\n"), "labels.csv:1 has no column"
    ),
    "a sheet in half a quote": Fault(
        f"{REPORT} --human_labels {{}}",
        lambda: put("labels.csv", 'index,section,verdict\n0,S,"pass\n'),
        "labels.csv:2 is not valid CSV",
    ),
    "a sheet over another file": Fault(
        f"{REPORT} --review_sheet {{}}",
        lambda: put("sheet.csv", "filled in"),
        "sheet.csv exists, and may hold",
    ),
    "a sheet before the verdicts": Fault(
        f"{EVAL} --stage generate --review_sheet x.csv", nothing, "needs judged notes"
    ),
    "a size without a sheet": Fault(
        f"{REPORT} --review_size 9", nothing, "--review_size has no effect with no --review"
    ),
    "labels before the verdicts": Fault(
        f"{EVAL} --stage generate --human_labels x.csv", nothing, "--human_labels has no effect with --stage generate"
    ),
    "rows of a comparison": Fault("eval.py --compare a b --limit 5", nothing, "--limit has no effect with --compare"),
    "a server's engine": Fault(
        "eval.py m --api_base http://x/v1 --engine_args '{\"seed\": 1}'", nothing, "no effect with --api_base"
    ),
    "a sheet of two runs": Fault(f"{ADAPTER} --lora_path other --review_sheet x.csv", nothing, "one run's notes"),
    "a sheet below a file": Fault(f"{REPORT} --review_sheet notes.jsonl/x.csv", nothing, "notes.jsonl is not a folder"),
    # eval.py: model and adapter
    "a model that is nowhere": Fault("eval.py {} --judge_model model", lambda: "no such model", "neither a folder"),
    "a model off an unreachable hub": Fault(
        "eval.py {} --judge_model model", lambda: "nobody/x", "hub cannot be reached"
    ),
    "a checkpoint that is nowhere, before the judge is downloaded": Fault(
        "eval.py {} --judge_model nobody/x", lambda: "./ckpt/nothing", "no such folder; train first"
    ),
    "a judge that is nowhere": Fault("eval.py model --judge_model {}", lambda: "no such model", "neither a folder"),
    "a name of any bytes": Fault(
        "eval.py {} --judge_model model", lambda: os.fsdecode(b"caf\xe9 "), "neither a folder"
    ),
    "a model with a long name": Fault("eval.py {} --judge_model model", lambda: "x" * 300, "xxx"),
    "a model that is a file": Fault("eval.py notes.jsonl --judge_model model", nothing, "is a file"),
    "a folder without a model": Fault(
        "eval.py {} --judge_model model", folder, "neither config.json nor a global_step"
    ),
    "an adapter as model": Fault("eval.py adapter --judge_model model", nothing, "give its base model"),
    "a model as adapter": Fault(f"{EVAL} --lora_path model", nothing, "a whole model"),
    "a model without a tokenizer": Fault(EVAL, lambda: remove("model/tokenizer_config.json"), "no tokenizer"),
    "a model without a template": Fault(EVAL, lambda: remove("model/chat_template.jinja"), "no chat template"),
    "a model with a cut-off config": Fault(EVAL, lambda: cut("model/config.json", 99), "config.json cannot be read"),
    "a model without weights": Fault(EVAL, lambda: remove("model/model.safetensors"), "checkpoint is incomplete"),
    "weights that run code": Fault(
        EVAL, lambda: Path("model/model.safetensors").rename("model/pytorch_model.bin"), "can run code when loaded"
    ),
    "a model with cut-off weights": Fault(EVAL, lambda: cut("model/model.safetensors", 5_000), "is cut off"),
    "a checkpoint half written": Fault(
        "eval.py ckpt --judge_model model",
        lambda: (shutil.copytree("model", "ckpt/global_step_9"), cut("ckpt/global_step_9/model.safetensors", 9)),
        "global_step_9/model.safetensors is not a safetensors file, or is cut off",
    ),
    "a checkpoint under its draft's name": Fault(
        "eval.py ckpt --judge_model model", lambda: shutil.copytree("model", "ckpt/global_step_9.incomplete"), "neither"
    ),
    "an adapter that is nowhere": Fault(f"{EVAL} --lora_path nowhere", nothing, "--lora_path nowhere: no such folder"),
    "an adapter without weights": Fault(ADAPTER, lambda: remove("adapter/adapter_model.safetensors"), "is incomplete"),
    "an adapter with cut-off weights": Fault(
        ADAPTER, lambda: cut("adapter/adapter_model.safetensors", 4_000), "adapter_model.safetensors is cut off"
    ),
    "an adapter of another kind": Fault(
        ADAPTER, lambda: change("adapter/adapter_config.json", ("peft_type", "IA3")), "only LORA adapters"
    ),
    "an adapter of another model": Fault(
        ADAPTER, lambda: change("model/config.json", ("hidden_size", 96)), "give the adapter's own base model"
    ),
    "an adapter with tensors of other names": Fault(
        ADAPTER, lambda: rename_tensors("adapter/adapter_model.safetensors"), "is expected; save the adapter again"
    ),
    "an adapter with tensors of other names at run time": Fault(
        f"{ADAPTER} --engine_args '{{\"enable_lora\": true}}'",
        lambda: rename_tensors("adapter/adapter_model.safetensors"),
        "is expected; save the adapter again",
    ),
    "an adapter that asks for more than it holds": Fault(
        ADAPTER,
        lambda: change("adapter/adapter_config.json", ("target_modules", ["q_proj", "k_proj", "v_proj"])),
        "lacks",
    ),
    # eval.py: the run folder
    "a run into a file": Fault(f"{EVAL} --output_dir notes.jsonl", nothing, "another --output_dir"),
    "a run below a file": Fault(f"{EVAL} --output_dir notes.jsonl/run", nothing, "another --output_dir"),
    "a run where no file can be": Fault(f"{EVAL} --output_dir /proc/run", nothing, "another --output_dir"),
    "a run without permission": Fault(f"{EVAL} --output_dir {{}}/run", lambda: close(folder(), 0o500), "Permission"),
    "two evaluations at once": Fault(RUN, lambda: hold("run/.lock"), "another run is writing here"),
    "results of another version": Fault(RUN, lambda: change("run/manifest.json", ("format", 0)), "another version"),
    "a manifest cut off": Fault(RUN, lambda: cut("run/manifest.json", 99), "manifest.json is not JSON"),
    "no manifest": Fault(RUN, lambda: remove("run/manifest.json"), "no manifest.json"),
    "another dataset": Fault(f"{RUN} --dataset_path {{}}", lambda: dataset(*rows(2)), "dataset_hash"),
    "notes cut off in mid-line": Fault(REPORT, lambda: cut("run/predictions.jsonl", 900), "has 1 notes"),
    "verdicts cut off in mid-line": Fault(
        REPORT,
        lambda: cut("run/judgements.jsonl", Path("run/judgements.jsonl").stat().st_size - 9),
        "7 verdicts on 2",
    ),
    "NUL bytes after the notes": Fault(REPORT, lambda: add("run/predictions.jsonl", b"\0" * 99 + b"\n"), "jsonl:3"),
    "a verdict that is a list": Fault(REPORT, lambda: add("run/judgements.jsonl", b"[1]\n"), "is not a JSON object"),
    "a note without sections": Fault(REPORT, lambda: add("run/predictions.jsonl", b'{"index": 2}\n'), "jsonl:3 has no"),
    "a note twice": Fault(
        REPORT,
        lambda: add("run/predictions.jsonl", Path("run/predictions.jsonl").read_bytes()),
        "dialogue 0 has two notes",
    ),
    "a note on no dialogue": Fault(
        REPORT, lambda: put("run/predictions.jsonl", note_of(index=99)), "dialogue 99 is not among the 2"
    ),
    "a note on a dialogue in words": Fault(
        REPORT, lambda: put("run/predictions.jsonl", note_of(index="zero")), "predictions.jsonl:1: the index is not a"
    ),
    "a full disk": Fault(REPORT, lambda: full("run/results.json.new"), "No space left"),
    "a disk too full for the report": Fault(REPORT, nothing, "File too large", disk=4_000),
    "verdicts without notes": Fault(
        f"{RUN} --stage judge", lambda: remove("run/predictions.jsonl"), "has 0 notes on 2 dialogues"
    ),
    # eval.py: --overwrite, which deletes nothing before the call is known to be sound
    "verdicts started over on other data": Fault(f"{RUN} --stage judge --overwrite --limit 1", nothing, "n = 2, not 1"),
    "a run started over at a length that the model lacks": Fault(
        f"{RUN} --overwrite --max_model_len 5000", nothing, "supports at most 4096"
    ),
    "a run started over with a model that does not exist": Fault(
        f"{SEVERAL} ./nothing --overwrite", lambda: shutil.copytree("run", "runs/model"), "./nothing: no such folder"
    ),
    "verdicts started over beside a truncated manifest": Fault(
        f"{SEVERAL} second --stage judge --overwrite",
        lambda: (
            [shutil.copytree("run", f"runs/{name}") for name in ("model", "second")],
            cut("runs/second/manifest.json", 99),
        ),
        "second/manifest.json is not JSON",
    ),
    # eval.py: comparisons
    "one run to compare": Fault("eval.py --compare run", nothing, "two or more run folders"),
    "a model beside a comparison": Fault("eval.py model --compare run run", nothing, "no model"),
    "an unfinished run to compare": Fault("eval.py --compare run folder", folder, "no readable results.json"),
    "cut-off results to compare": Fault(
        "eval.py --compare run run", lambda: cut("run/results.json", 99), "no readable"
    ),
    "results that are none": Fault(
        "eval.py --compare run run", lambda: put("run/results.json", "[]"), "results.json was not written by eval.py"
    ),
    "results on other data": Fault(
        "eval.py --compare run other",
        lambda: (shutil.copytree("run", "other"), change("other/results.json", ("dataset_hash", "0"))),
        "different data",
    ),
}


def test_no_row_of_the_table_is_lost():
    assert len(FAULTS) == 214


# --- the tests


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher(HF_HUB_OFFLINE="1") as running:
        yield running


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, launcher: Launcher, tiny_model: Path, tiny_adapter: Path) -> Path:
    """The folder before anything is spoilt."""
    path = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        shutil.copytree(tiny_model, "model")
        put("model/chat_template.jinja", QWEN3_LIKE)
        shutil.copytree(tiny_adapter, "adapter")
        write_jsonl("notes.jsonl", source_rows(20))
        assert launcher.run(["preprocess_data.py", "--dataset", "notes.jsonl"], path).status == 0
        short = {"epochs": 1, "gradient_accumulation_steps": 1}
        write_config(Path(), Path("model"), "train", **short)
        write_config(Path(), Path("model"), "unfinished", **short, exit_iteration_this_run=2)
        stopped = launcher.run([TRAINING, "unfinished.yaml"], path)
        assert stopped.status == 0 and Path("unfinished/resume", STATE).is_dir(), stopped
        assert Harness(patch, Path("model"), Path("soap_dataset"), Path("run")).run() == 0
    return path


@pytest.fixture
def place(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    shutil.copytree(whole, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    yield tmp_path / "place"
    while held:
        held.pop().close()


def contents() -> dict[Path, bytes | None]:
    """Every file here, and what it holds, unless it may not be read."""
    files = (path for path in Path().rglob("*") if path.is_file() and not path.is_symlink())
    return {path: path.read_bytes() if os.access(path, os.R_OK) else None for path in files}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_clear_line_and_leaves_every_file_whole(name: str, place: Path, launcher: Launcher):
    fault = FAULTS[name]
    made = fault.make()
    command = [part.replace("{}", made) if "{}" in part else part for part in shlex.split(fault.command)]
    before = contents()
    ended = launcher.run(command, place, fault.disk)
    after = contents()
    assert ended.status == fault.status, ended.errors[-3000:]
    assert "Traceback" not in ended.errors
    lines = [line for line in ended.errors.splitlines() if "error: " in line]
    if fault.status:
        assert len(lines) == 1
        assert lines[0] == ended.errors.splitlines()[-1]
        assert fault.words in lines[0]
    else:
        assert not lines
        assert fault.words in ended.output
    kept = [path for path in before if fault.status or path.parts[0] != "unfinished"]
    assert {path: after.get(path) for path in kept} == {path: before[path] for path in kept}
    assert "cough" not in ended.errors, "a dialogue's word"
    if command[0] == "preprocess_data.py" and fault.status:
        assert after.keys() == before.keys()


def test_two_trainings_that_build_the_same_cache_at_once_both_end_well(place: Path, launcher: Launcher):
    for name in ("first", "second"):
        write_config(Path(), Path("model"), name, epochs=1, gradient_accumulation_steps=1)
    with ThreadPoolExecutor() as pool:
        ends = list(pool.map(lambda name: launcher.run([TRAINING, f"{name}.yaml"], place), ("first", "second")))
    assert [ended.status for ended in ends] == [0, 0], ends
