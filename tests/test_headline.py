"""Test benchmarks/headline.py and its parts: trainings side by side, one call of eval.py, tables over seeds."""

import argparse
import dataclasses
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import headline
import headline_table
import psutil
import pytest
import trainings
import yaml
from conftest import ROOT, build_tokenizer, rows
from test_tokens import QWEN3_LIKE
from test_train import free_port

import prompts
from common.chat_template import check_template, render_chat
from common.errors import UserError
from evaluation.engines.models import Model

# --- trainings -------------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_of_its_values():
    assert trainings.grid("full: epochs=1,2 optimizer.learning_rate=1e-5,2e-5") == [
        ("full", ("epochs=1", "optimizer.learning_rate=1e-5")),
        ("full", ("epochs=1", "optimizer.learning_rate=2e-5")),
        ("full", ("epochs=2", "optimizer.learning_rate=1e-5")),
        ("full", ("epochs=2", "optimizer.learning_rate=2e-5")),
    ]
    bad = ["epochs=1,2", "half: epochs=1", "full: epochs", "full:", "full: epochs=", "full: epochs=1,,2"]
    bad += ["LoRA: a=[q,v", "LoRA: a=q]", "LoRA: a=[q]],[v", "LoRA: a=[q, v]"]
    for spec in bad:
        with pytest.raises(UserError, match="give a recipe and values"):
            trainings.grid(spec)


@pytest.mark.parametrize(
    "values", list(itertools.product(["1e-5", "[q_proj,v_proj]", "{a:,b:}", "'x,y'", "[[1,2],[3]]"], repeat=2))
)
def test_a_grid_splits_values_only_outside_lists_and_strings(values):
    assert trainings.grid(f"LoRA: a={','.join(values)}") == [("LoRA", (f"a={value}",)) for value in values]


def test_a_list_in_a_grid_reaches_the_training_as_a_list():
    changes = trainings.grid("LoRA: model.peft_config.target_modules=[q_proj,v_proj]")[0][1]
    training = trainings.Training("LoRA", "x", 0, changes)
    config = trainings.make_config(training, "m", Path("d"), Path("f"), export=False)
    assert config["model"]["peft_config"]["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize("change", ["epochs", "epochs=[1", "epochs.first=1", "data.sources.split=x", "seed: 1"])
def test_a_change_that_cannot_be_made_is_refused_before_any_training(fake_training, tmp_path, change):
    slots = trainings.make_slots(1, 1, 5000)
    with pytest.raises(UserError, match=f"full: {re.escape(change)} cannot be set; give KEY=VALUE"):
        trainings.train_all([*make(0), *make(1, changes=(change,))], MODEL, Path("d"), tmp_path, slots, True)
    assert fake_training.started == []


def test_two_trainings_that_would_share_a_folder_are_refused(fake_training, tmp_path):
    with pytest.raises(UserError, match="full-seed1 would be trained twice"):
        trainings.check(make(0, 1, 1))
    long = [trainings.Training("full", "full " + "x" * 300 + end, 0) for end in "ab"]
    trainings.check(long)
    assert all(len(training.name) < 200 for training in long)


def test_trainings_share_gpus_only_when_each_has_one(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert trainings.make_slots(2, 2, 5000) == [("3", 5000), ("1", 5001), ("3", 5002), ("1", 5003)]
    with pytest.raises(UserError, match="--gpus 3: CUDA_VISIBLE_DEVICES has only 2"):
        trainings.make_slots(3, 1, 5000)
    with pytest.raises(UserError, match="give at least 1 of each"):
        trainings.make_slots(1, 0, 5000)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [slot.gpu for slot in trainings.make_slots(4, 1, 5000)] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("recipe", trainings.RECIPES)
def test_a_training_differs_from_the_shipped_yaml_in_named_settings_only(recipe):
    training = trainings.Training(recipe, recipe, 7, ("optimizer.learning_rate=1e-5", "epochs=3"), rows=50)
    config = trainings.make_config(training, "model", Path("data"), Path("run"), export=True)
    shipped = yaml.safe_load(trainings.RECIPES[recipe].read_text())
    paths = {"model.name_or_path", "data.cache_dir", "train_log_metrics_path", "kill_switch_path", "code", "type"}
    paths |= {f"data.{kind}.name_or_path" for kind in ("sources", "eval_sources")}
    paths |= {"checkpoint.0.output_dir", "checkpoint.1.output_dir"}

    def leaves(value, name=""):
        if isinstance(value, dict):
            return {leaf: v for key, part in value.items() for leaf, v in leaves(part, f"{name}.{key}").items()}
        if isinstance(value, list) and value and isinstance(value[0], dict):
            numbered = len(value) > 1
            parts = [leaves(part, f"{name}.{k}" if numbered else name) for k, part in enumerate(value)]
            return {leaf: v for part in parts for leaf, v in part.items()}
        return {name.strip("."): value}

    ours, theirs = leaves(config), leaves(shipped)
    changed = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert changed - paths == {"seed", "optimizer.learning_rate", "epochs", "data.sources.sample_count"}
    assert (config["seed"], config["epochs"], config["data"]["sources"][0]["sample_count"]) == (7, 3, 50)
    assert float(config["optimizer"]["learning_rate"]) == 1e-5
    assert [part["output_dir"] for part in config["checkpoint"]] == ["run", "run/resume"]
    assert trainings.make_config(training, "model", Path("data"), Path("run"), export=False)["checkpoint"] == []


@pytest.fixture
def fake_training(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replace arctic_training; `started` lists (folder, GPU, port).

    Folders named in `fails` end in error, those in `damaged` leave a log that cannot be read, and those in `unmeasured`
    take no step that measures memory.
    """
    state = SimpleNamespace(started=[], fails=set(), damaged=set(), unmeasured=set())

    def run(command: list, env: dict, **_) -> subprocess.CompletedProcess:
        folder = Path(command[1]).parent
        state.started.append((folder.name, env["CUDA_VISIBLE_DEVICES"], command[3]))
        if folder.name in state.fails:
            return subprocess.CompletedProcess(command, 1)
        lines = [{"step": 1, "loss": 2.0}, {"step": 1, "validation_loss": 1.5}, {"step": 2, "validation_loss": 1.7}]
        end = "no JSON\n" if folder.name in state.damaged else '{"ste'
        (folder / "train-log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
        if folder.name in state.unmeasured:
            return subprocess.CompletedProcess(command, 0)
        Path(env["MEASURE_LOG"] + ".0.jsonl").write_text('{"peak_reserved": 3000000000}\n{"peak_reserved": 1}\n')
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(trainings.subprocess, "run", run)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return state


MODEL = Model("model", Path("model"), {}, 0, "0123456789ab")


def make(*seeds: int, changes: tuple[str, ...] = ()) -> list[trainings.Training]:
    return [trainings.Training("full", "full", seed, changes) for seed in seeds]


def test_a_failed_training_is_repeated_and_the_finished_ones_are_not(fake_training, tmp_path, capsys):
    arguments = MODEL, Path("data"), tmp_path, trainings.make_slots(1, 1, 5000), True
    fake_training.fails = {"full-seed1"}
    results = trainings.train_all(make(0, 1, 2), *arguments)
    assert [training.seed for training in results] == [0, 2]
    assert capsys.readouterr().err == f"error: full-seed1 ended with status 1; see {tmp_path}/full-seed1/train.log\n"
    fake_training.fails, fake_training.started = set(), []
    again = trainings.train_all(make(0, 1, 2), *arguments)
    assert fake_training.started == [("full-seed1", "0", "5000")]
    assert [training.seed for training in again] == [0, 1, 2]
    result = again[make(0)[0]]
    assert (result.best, result.steps, result.gpu_gb) == ((1, 1.5), 2, 3.0)
    assert result == results[make(0)[0]]


def test_a_finished_training_with_other_settings_is_refused(fake_training, tmp_path, capsys):
    arguments = MODEL, Path("data"), tmp_path, trainings.make_slots(1, 1, 5000), True
    trainings.train_all(make(0), *arguments)
    assert trainings.train_all(make(0, changes=("epochs=9",)), *arguments) == {}
    refused = f"error: {tmp_path}/full-seed0 holds a training of another model or with other settings; "
    assert refused in capsys.readouterr().err
    other = dataclasses.replace(MODEL, fingerprint="ba9876543210")  # other weights under the same name
    assert trainings.train_all(make(0), other, *arguments[1:]) == {}
    assert refused in capsys.readouterr().err
    assert len(fake_training.started) == 1


def test_a_training_that_fails_in_any_way_leaves_the_results_of_the_others(fake_training, tmp_path, capsys):
    fake_training.fails, fake_training.damaged, fake_training.unmeasured = (
        {"full-seed0"},
        {"full-seed1"},
        {"full-seed2"},
    )
    slots = trainings.make_slots(2, 1, 5000)
    results = trainings.train_all(make(0, 1, 2, 3), MODEL, Path("d"), tmp_path, slots, True)
    assert {training.seed: result.gpu_gb for training, result in results.items()} == {2: 0.0, 3: 3.0}
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 2 and any(line.startswith("error: full-seed1: JSONDecodeError: ") for line in shown)


def test_each_training_gets_a_slot_of_its_own(fake_training, tmp_path):
    results = trainings.train_all(make(*range(12)), MODEL, Path("d"), tmp_path, trainings.make_slots(2, 2, 5000), True)
    assert len(results) == 12
    slots = {("0", "5000"), ("1", "5001"), ("0", "5002"), ("1", "5003")}
    assert {tuple(slot) for _, *slot in fake_training.started} <= slots


def test_two_gpus_train_at_the_same_time(fake_training, monkeypatch, tmp_path):
    both, run = threading.Barrier(2, timeout=20), trainings.subprocess.run
    monkeypatch.setattr(trainings.subprocess, "run", lambda *words, **named: both.wait() < 2 and run(*words, **named))
    results = trainings.train_all(make(*range(4)), MODEL, Path("d"), tmp_path, trainings.make_slots(2, 1, 5000), True)
    assert len(results) == 4
    assert {tuple(slot) for _, *slot in fake_training.started[:2]} == {("0", "5000"), ("1", "5001")}


def result(*losses: float, **changes) -> trainings.Result:
    steps = list(enumerate(losses, 1))
    return trainings.Result(Path("x"), 60.0, 1.0, False, steps, len(steps))._replace(**changes)


def test_an_interrupt_ends_the_running_trainings_and_starts_no_other(monkeypatch, tmp_path, capsys):
    run, started = subprocess.run, []

    def sleep(*_, **__) -> subprocess.CompletedProcess:
        started.append(threading.get_ident())
        if len(started) == 2:
            main = threading.main_thread().ident
            threading.Timer(0.5, signal.pthread_kill, (main, signal.SIGINT)).start()
        return run(["sh", "-c", "sleep 60; true"], check=False)

    monkeypatch.setattr(trainings.subprocess, "run", sleep)
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    before, began = psutil.Process().children(recursive=True), time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            trainings.train_all(make(0, 1, 2, 3), MODEL, Path("d"), tmp_path, trainings.make_slots(2, 1, 5000), True)
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert time.monotonic() - began < 30 and len(started) == 2
    assert psutil.Process().children(recursive=True) == before
    assert capsys.readouterr().err == ""


def test_the_table_of_a_grid_puts_the_lowest_mean_validation_loss_first():
    found = {trainings.Training("full", "full a=1", 0): result(1.0, 0.9)}
    found |= {
        trainings.Training("full", "full a=2", seed): result(0.8, best, 1.1) for seed, best in ((0, 0.7), (1, 0.6))
    }
    found |= {trainings.Training("full", "full a=3", seed): result(*losses) for seed, losses in ((0, [0.1]), (1, []))}
    found |= {trainings.Training("LoRA", "LoRA a=1", 0): result(0.5)}
    assert headline_table.training_table(found)[2:] == [
        "| full a=2 | 0.6500 | 0.7000 at 2 (seed 0), 0.6000 at 2 (seed 1) | 1.1000 | 3 | 1.0 | 1.0 |",
        "| full a=1 | 0.9000 | 0.9000 at 2 (seed 0) | 0.9000 | 2 | 1.0 | 1.0 |",
        "| full a=3 | not validated |  |  | 0, 1 | 1.0 | 1.0 |",
        "| LoRA a=1 | 0.5000 | 0.5000 at 1 (seed 0) | 0.5000 | 1 | 1.0 | 1.0 |",
    ]


def test_a_table_of_trainings_leaves_out_partial_times_and_unmeasured_memory():
    found = {each: result(0.5, seconds=120.0, gpu_gb=30.0) for each in make(0, 1, 2)}
    found[make(1)[0]] = result(0.5, seconds=12.0, resumed=True, gpu_gb=0.0)
    assert headline_table.training_table(found)[2].endswith(" | 1 | 2.0 | 30.0 |")
    partial = {make(0)[0]: result(0.5, resumed=True, gpu_gb=0.0)}
    assert headline_table.training_table(partial)[2].endswith(" | 1 |  |  |")


# --- evaluation ------------------------------------------------------------------------------------------------------


def arguments(tmp_path: Path, *words: str):
    needed = ["--model", "base", "--data", "d.jsonl", "--test", "t.jsonl", "--work_dir", str(tmp_path)]
    return headline.build_parser().parse_args([*needed, *words])


def test_all_rows_of_a_learning_curve_are_the_training_of_the_headline(tmp_path):
    whole = headline.make_trainings(arguments(tmp_path, "--seeds", "0"))
    curve = headline.make_trainings(arguments(tmp_path, "--seeds", "0", "--train_rows", "20", "all"))
    assert [each.rows for each in curve] == [20, None, 20, None]
    assert set(whole) < set(curve)
    with pytest.raises(argparse.ArgumentTypeError, match="20,40 is no number of rows"):
        headline.number_of_rows("20,40")


def test_a_test_set_has_its_tables_before_the_next_is_evaluated(tmp_path, monkeypatch):
    """Tables of the first exist even if the second fails; --evaluate_on leaves a test set out."""
    tests = {name: tmp_path / name for name in ("one", "two", "three")}
    args = arguments(tmp_path, "--evaluate_on", "one", "three")
    args.slots, args.output, before = [], tmp_path / "x.md", []

    def evaluate(name: str, *_) -> tuple[list, list]:
        before.append((name, (tmp_path / "x.md").read_text() if before else ""))
        return [], []

    monkeypatch.setattr(headline, "preprocess", lambda *_: None)
    monkeypatch.setattr(headline, "load_split", lambda *_: [])
    monkeypatch.setattr(headline, "train_all", lambda *_, **__: {})
    monkeypatch.setattr(headline, "evaluate", evaluate)
    headline.compare(args, ["head"], MODEL, tmp_path / "all", tests)
    assert [name for name, _ in before] == ["one", "three"]
    assert re.search("^head\n## Trainings\n(.*\n)*## Test set one: 0 dialogues", before[1][1])
    assert "Test set three" not in before[1][1]
    args = arguments(tmp_path, "--evaluate_on", "omi")
    with pytest.raises(UserError, match="--evaluate_on omi: no test set has this name; the names are t"):
        headline.measure(args, [])


@pytest.mark.parametrize(
    ("only", "calls"),
    [
        (["untrained", "full", "LoRA"], [("results/t", "base full-seed0 full-seed1 --lora_path LoRA-seed0 "
                                          "--lora_path LoRA-seed1")]),
        (["untrained", "LoRA"], [("results/t/base", "base"),
                                 ("results/t", "base --lora_path LoRA-seed0 --lora_path LoRA-seed1")]),
        (["full"], [("results/t", "full-seed0 full-seed1")]),
        (["LoRA"], [("results/t", "base --lora_path LoRA-seed0 --lora_path LoRA-seed1")]),
        (["untrained"], [("results/t/base", "base")]),
    ],
)  # fmt: skip
def test_one_call_of_eval_starts_the_judge_for_all_models(tmp_path, monkeypatch, only, calls):
    """Without a full fine-tune, eval.py cannot take the untrained model and adapters together."""
    args = arguments(tmp_path, "--seeds", "0", "1", "--only", *only)
    made = headline.make_trainings(args)
    trained = {each: trainings.Result(tmp_path / each.name, 1, 0, False, [], 1) for each in made}
    started = []
    monkeypatch.setattr(headline, "run_eval", lambda words, folder, *_: started.append((folder, words)) or True)
    untrained = {"untrained": "base"} if "untrained" in only else {}
    evaluated, failed = headline.evaluate("t", tmp_path, args, trained, untrained)
    assert failed == []
    shown = [
        (str(folder.relative_to(tmp_path)), " ".join(Path(word).name for word in words)) for folder, words in started
    ]
    assert shown == calls
    names = {"untrained": ["base"], "full": ["full-seed0", "full-seed1"]}
    names["LoRA"] = ["base-LoRA-seed0", "base-LoRA-seed1"]
    assert [model.run.name for model in evaluated] == [name for label in only for name in names[label]]


@pytest.mark.parametrize(("only", "left"), [(["untrained", "LoRA"], ["base"]), (["untrained", "full", "LoRA"], [])])
def test_the_old_figures_of_a_call_that_fails_are_left_out_and_named(tmp_path, monkeypatch, capsys, only, left):
    """Every folder holds figures of an earlier judge; eval.py refuses each call with an adapter."""
    args = arguments(tmp_path, "--seeds", "0", "--only", *only, "--judge_model", "other")
    trained = {
        each: trainings.Result(tmp_path / each.name, 1, 0, False, [], 1) for each in headline.make_trainings(args)
    }
    for name in ("base", "full-seed0", "base-LoRA-seed0"):
        (tmp_path / "results/t" / name).mkdir(parents=True)
        (tmp_path / "results/t" / name / "results.json").write_text('{"judge_model": "first"}')

    def refuse(command: list, **_) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(command, 2 if "--lora_path" in command else 0)

    monkeypatch.setattr(headline.subprocess, "run", refuse)
    evaluated, failed = headline.evaluate("t", tmp_path, args, trained, {"untrained": "base"})
    assert [model.run.name for model in evaluated] == left
    assert len(failed) == len(only) - len(left)
    assert "error: eval.py ended with status 2; see " in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--limit 3", "--judge_model x", "--stage generate", "--split validation", "other"])
def test_eval_flags_that_would_change_the_compared_runs_are_refused(tmp_path, words):
    headline.check_eval_arguments(arguments(tmp_path, "--eval=--judge_controls 0 --engine_args '{\"seed\": 1}'"))
    with pytest.raises(UserError, match="cannot be set there; leave it out"):
        headline.check_eval_arguments(arguments(tmp_path, f"--eval={words}"))


def test_a_dataset_of_other_rows_or_another_split_is_refused(tmp_path):
    for name, part in (("train", rows(18)[:14]), ("test", rows(18)[14:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))

    def preprocess(fraction: str) -> Path:
        args = arguments(tmp_path / "work", "--validation_fraction", fraction)
        args.data = tmp_path / "train.jsonl"
        return headline.preprocess("all", [tmp_path / "test.jsonl"], args)

    dataset = preprocess("0.1")
    written = (dataset / "dataset_dict.json").stat().st_mtime_ns
    assert preprocess("0.1") == dataset and (dataset / "dataset_dict.json").stat().st_mtime_ns == written
    with pytest.raises(UserError, match=r"was split with .* 0\.1.*, not .* 0\.4.*; give another --work_dir"):
        preprocess("0.4")
    (tmp_path / "train.jsonl").write_text(json.dumps(rows(1)[0]))
    with pytest.raises(UserError, match="holds other rows"):
        preprocess("0.1")


def test_a_second_test_set_without_notes_is_refused_before_any_training(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(headline, "train_all", lambda *words, **_: started.append(words))
    for name, part in (("train", rows(18)[:14]), ("one", rows(18)[14:16]), ("two", [{"dialogue": "Hi", "S": "x"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    tests = {name: tmp_path / f"{name}.jsonl" for name in ("one", "two")}
    args = arguments(tmp_path / "work")
    args.data = tmp_path / "train.jsonl"
    args.slots = trainings.make_slots(1, 1, 5000)
    with pytest.raises(UserError, match=f"status 2; correct {re.escape(str(args.data))} and the test files"):
        headline.compare(args, [], MODEL, tmp_path / "all", tests)
    assert started == []


@pytest.mark.parametrize("text", ["a/b=x.jsonl", "=x.jsonl", "/data/x=1/test.jsonl", "..=x.jsonl"])
def test_a_test_set_has_a_name_that_can_name_a_folder(text):
    with pytest.raises(argparse.ArgumentTypeError, match="give NAME=FILE"):
        headline.named_test(text)
    assert headline.named_test("omi=x/y=1.jsonl") == ("omi", Path("x/y=1.jsonl"))


def test_an_example_follows_the_system_message_of_note_prompts_only():
    row = rows(1)[0] | {"dialogue": 'Doctor: "Hi" {{ x }} {% y %}\nPatient: \\n 38.5 \u00b0C \U0001f600 it\'s.'}
    tokenizer = build_tokenizer()
    messages, judged = prompts.note_messages("Doctor: Hello."), prompts.judge_messages("d", "S", "r", "p")
    plain = render_chat(tokenizer, judged)
    example = prompts.training_messages(row["dialogue"], row)
    tokenizer.chat_template = headline.template_with_example(tokenizer.chat_template, example)
    text = render_chat(tokenizer, messages)
    places = [text.index(message["content"]) for message in (*example, messages[1])]
    assert places == sorted(places) and len(set(places)) == 4
    assert render_chat(tokenizer, judged) == plain
    assert check_template(tokenizer) is None


# --- tables ----------------------------------------------------------------------------------------------------------


def record(seed: int | None, value: float | None, **changes) -> dict:
    figure = {"value": value, "ci95": [0.1, 0.9]}
    figures = dict.fromkeys([*headline_table.COLUMNS, *headline_table.BY_SECTION], figure) | changes
    cost = {} if seed is None else {"training_min": 2.0, "gpu_gb": 30.0, "resumed": False}
    return {"model": "full" if cost else "untrained", "seed": seed, "figures": figures, **cost}


def test_three_seeds_give_students_interval_and_two_give_none():
    from scipy.stats import ttest_1samp

    values = [0.5, 0.6, 0.8]
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    assert headline_table.t_interval(values) == pytest.approx((low, high))
    runs = [record(seed, value) for seed, value in enumerate(values)]
    assert headline_table.over_seeds("passed", runs) == f"63.3% [{100 * low:.1f}, {100 * min(1, high):.1f}]"
    assert headline_table.over_seeds("passed", runs[:2]) == "55.0%"
    assert headline_table.over_seeds("rougeL", runs[:2]) == "0.550"
    equal = [record(seed, 1.0) for seed in range(3)]
    assert headline_table.over_seeds("passed", equal) == "100.0%", "no spread shows no interval of width 0"


def test_a_figure_that_was_not_measured_is_named_and_never_zero():
    runs = [record(None, 0.5, lenient=None, supported={"value": None, "ci95": None})]
    table = headline_table.results_tables(runs)
    assert table[2].split(" | ")[:4] == ["| untrained", "", "50.0% [10.0, 90.0]", "not asked"]
    assert table[2].count("none") == 1
    seeds = [record(seed, 0.5, lenient=None) for seed in range(3)]
    assert "| **full** | mean of 3 | 50.0% | not asked |" in "\n".join(headline_table.results_tables(seeds))


def test_differences_from_the_first_model_have_their_interval_and_p():
    def differs(seed: int, value: float | None) -> dict:
        values = {"difference": value, "ci95": value and [value - 0.1, value + 0.1], "p": value and 0.04}
        return record(seed, 0.5) | {"minus_first": {"passed": values, **dict.fromkeys(headline_table.BY_STATEMENTS)}}

    assert headline_table.difference_table([record(None, 0.5)]) == []
    table = headline_table.difference_table([record(None, 0.5), *(differs(k, k / 100) for k in (1, 2, 3))])
    low, high = headline_table.t_interval([1, 2, 3])
    assert table[1].startswith("Minus untrained, on the same dialogues")
    assert table[6] == "| full | 2 | +2.0 [-8.0, +12.0], p = 0.040 | none | none | none |"
    assert table[8] == f"| **full** | mean of 3 | +2.0 [{low:+.1f}, {high:+.1f}] | none | none | none |"
    assert (
        "| **full** | mean of 2 | none |"
        in headline_table.difference_table([record(None, 0.5), differs(1, 0.1), differs(2, None)])[-1]
    )


def test_the_judges_line_says_how_statements_decide_at_their_threshold():
    auc = {"auc": 0.9, "ci95": [0.8, 0.95]}
    few = {"n_good": 2, "n_bad": 2, "verdict": auc, "statements": auc, "better": None}
    controls = {
        "sensitivity": 1.0,
        "sensitivity_ci95": [0.92, 1.0],
        "specificity": 0.55,
        "specificity_ci95": [0.4, 0.7],
    }
    rates = headline_table.at_threshold({"statements": {"threshold": -0.75, "judge_controls_all": controls}})
    found = [{"instruments": few, "at_threshold": None}, {"instruments": few | {"n_bad": 9}, "at_threshold": rates}]
    (line, _) = headline_table.judge_line(found)
    assert "9 bad controls" in line
    assert line.endswith(
        "A statement counts as yes from log odds of -0.75; so read, statements pass 100% [92, 100] of the good "
        "controls that did not fit this threshold, and fail 55% [40, 70] of the bad ones."
    )
    assert "log odds" not in headline_table.judge_line(found[:1])[0]
    without = headline_table.at_threshold({"statements": {"threshold": 0.0, "judge_controls_all": None}})
    assert headline_table.judge_line([{"instruments": few, "at_threshold": without}]) == headline_table.judge_line(
        found[:1]
    )
    assert headline_table.at_threshold({"statements": None}) is None
    assert headline_table.judge_line([{"instruments": None, "at_threshold": rates}]) == []


def test_sections_and_statements_without_an_answer_are_counted():
    asked, whole = {"n": 5, "unscored": 2}, {"n": 3, "unscored": 0}
    results = {"n": 4, "sections": {"S": {"unscored": 1}, "O": {"unscored": 0}}}
    statements = {
        "sections": {"S": {"covered": asked, "supported": asked}, "O": {"covered": whole, "supported": asked}}
    }
    found = [headline_table.unscored(results), headline_table.unscored(results | {"statements": statements})]
    records = [{"run": f"run{k}", "unscored": counts} for k, counts in enumerate(found)]
    assert headline_table.unscored_line(records)[0] == (
        "**Not scored, because the judge gave no answer: run0: 1 of 8 sections; run1: 1 of 8 sections; "
        "run1: 6 of 18 statements.**"
    )
    assert headline_table.unscored_line([{"run": "x", "unscored": {"sections": (0, 8)}}]) == []


def test_all_models_are_read_at_the_threshold_of_the_run_with_most_controls(tmp_path, monkeypatch):
    """A model of a call without controls has a threshold of its own in its results.json."""
    means = {"share": [0.1, 0.2], "ci95": [[0.0, 0.3], [0.1, 0.4]]}
    pair = {"a": 0, "b": 1, "mean": {"difference": 0.5}, "covered": {"difference": 0.1}, "supported": None}
    statements = {"mean": means | {"accuracy": [0.3, 0.4]}, "covered": {"mean": means}, "supported": {"mean": means}}
    comparison = {"pairs": [pair], "statements": statements | {"pairs": [pair]}}
    monkeypatch.setattr(headline_table, "compare", lambda _: comparison)
    monkeypatch.setattr(headline_table, "read_figures", lambda *_: {"covered": "of its own threshold"})
    monkeypatch.setattr(headline_table, "unscored", lambda _: {})
    models = [headline_table.Evaluated(name, tmp_path / name) for name in ("untrained", "one example")]
    for model in models:
        model.run.mkdir()
        (model.run / "results.json").write_text('{"n": 2, "judge_model": "x"}')
    first, second = headline_table.evaluation_records("t", models, [])
    assert first["figures"]["covered"] == {"value": 0.1, "ci95": [0.0, 0.3]} and "minus_first" not in first
    assert second["figures"]["passed by statements"] == {"value": 0.4, "ci95": [0.1, 0.4]}
    assert {name: each and each["difference"] for name, each in second["minus_first"].items()} == {
        "passed": 0.5, "passed by statements": 0.5, "covered": 0.1, "supported": None
    }  # fmt: skip


# --- all together ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the command that measures the tiny model on 14 and 4 dialogues, on a CPU."""
    folder = tmp_path_factory.mktemp("headline")
    shutil.copytree(tiny_model, folder / "tiny")
    (folder / "tiny/chat_template.jinja").write_text(QWEN3_LIKE)
    for name, part in (("train", rows(18)[:14]), ("test", rows(18)[14:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    cpu = ["model.attn_implementation=sdpa", "optimizer.type=cpu_adam", "data.max_length=1024", "epochs=1"]
    command = [sys.executable, str(ROOT / "benchmarks/headline.py"), "--model", str(folder / "tiny"), "--data"]
    command += [str(folder / "train.jsonl"), "--test", str(folder / "test.jsonl"), "--full", *cpu, "--lora", *cpu]
    return [*command, "--work_dir", str(folder / "work"), "--master_port", str(free_port())]


def run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=850, check=False)


@pytest.mark.slow
def test_headline_trains_evaluates_and_resumes_without_repeating(workplace):
    command = [*workplace, "--seeds", "0", "1", "--per_gpu", "2", "--eval=--max_new_tokens 96 --judge_controls 0"]
    done = run(command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    work = Path(workplace[workplace.index("--work_dir") + 1])
    table = (work / "results.md").read_text()
    for row in ("| full | 0 |", "| full | 1 |", "| **LoRA** | mean of 2 |"):
        assert table.count(row) == 3, table  # figures, differences, sections
    assert table.count("| untrained |  |") == 2 and table.count("| full | ") == 1 + 2 * 3, table
    found = [json.loads(line) for line in (work / "results.jsonl").read_text().splitlines()]
    assert [(each["model"], each["seed"]) for each in found] == [
        ("untrained", None), ("full", 0), ("full", 1), ("LoRA", 0), ("LoRA", 1)
    ]  # fmt: skip
    assert all(each["best_validation"] for each in found[1:])
    passed = [each["figures"]["passed"]["value"] for each in found]
    differences = [each["minus_first"]["passed"]["difference"] for each in found[1:]]
    assert differences == pytest.approx([value - passed[0] for value in passed[1:]])
    assert "Minus untrained, on the same dialogues" in table
    assert not [path for path in work.rglob("*.jsonl") if path.stat().st_mode & 0o077]
    kept = {path: path.stat().st_mtime_ns for path in work.rglob("*.safetensors")}
    predictions = {path: path.stat().st_mtime_ns for path in work.rglob("predictions.jsonl")}
    assert len(kept) == 4 and len(predictions) == 5
    again = run(command)
    assert again.returncode == 0, again.stderr[-3000:]
    assert (work / "results.md").read_text() == table
    assert kept == {path: path.stat().st_mtime_ns for path in work.rglob("*.safetensors")}
    assert predictions == {path: path.stat().st_mtime_ns for path in work.rglob("predictions.jsonl")}
    other = shutil.copytree(work.parent / "tiny", work.parent / "other_judge")
    (other / "chat_template.jinja").write_text("{# another judge #}" + QWEN3_LIKE)
    refused = run([*command, "--judge_model", str(other)])
    assert refused.returncode == 1
    assert "error: eval.py ended with status 2" in refused.stderr
    table = (work / "results.md").read_text()
    assert "4 dialogues, judged by no model" in table and "| untrained |" not in table
    assert "failed: tiny; full-seed0; full-seed1; tiny-LoRA-seed0; tiny-LoRA-seed1.**" in table
    assert (work / "results.jsonl").read_text() == ""


@pytest.mark.slow
def test_a_grid_compares_validation_losses_and_keeps_no_weights(workplace, tmp_path):
    grid = ["--seeds", "0", "--grid", "full: optimizer.learning_rate=1e-4,1e-3", "--output", str(tmp_path / "grid.md")]
    done = run([*workplace, *grid, "--work_dir", str(tmp_path / "work"), "--per_gpu", "2"])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = (tmp_path / "grid.md").read_text()
    assert table.count("| full optimizer.learning_rate=1e-") == 2
    assert not list((tmp_path / "work").rglob("*.safetensors"))
