"""Test the parts of benchmarks/ that run without a GPU."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import eval_scaling
import eval_walltime
import pytest
import train_throughput
import two_gpus
from conftest import ROOT, rows, save_dataset
from test_tokens import QWEN3_LIKE

from evaluation.judging.sentences import split_statements


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_each_throughput_is_saved_before_the_next_run_starts(tmp_path, monkeypatch) -> None:
    def run(name: str, _) -> list[str]:
        if name == "LoRA":
            raise KeyboardInterrupt
        return [] if name == "reference full" else ["step"] * 20

    monkeypatch.setattr(train_throughput, "run", run)
    monkeypatch.setattr(train_throughput, "summary", lambda name, *_: {"run": name})
    monkeypatch.setattr(train_throughput, "mean_tokens_per_row", lambda _: 1000.0)
    monkeypatch.setattr(train_throughput, "hardware", lambda: "a machine")
    output = tmp_path / "results.jsonl"
    with pytest.raises(KeyboardInterrupt):
        train_throughput.main(["--work_dir", str(tmp_path), "--output", str(output)])
    assert [(kept["run"], kept["machine"]) for kept in lines(output.read_text())] == [
        ("reference LoRA", "a machine"),
        ("full", "a machine"),
    ]


@pytest.mark.slow
def test_eval_scaling_measures_runs_with_engines_and_with_a_server(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/eval_scaling.py"), "--output", str(tmp_path / "table.md")]
    command += ["--sizes", "10", "20", "--server_sizes", "10", "20"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    table = (tmp_path / "table.md").read_text()
    assert table in done.stdout
    for row in ("| 10 | engines |", "| 20 | engines |", "| 10 | server |", "| 20 | server |", "| 64 |"):
        assert table.count(row) == 1, row


def test_the_extrapolated_table_follows_from_the_measured_figures() -> None:
    walltime = (ROOT / "benchmarks/results/eval_walltime.md").read_text()
    start, wall = re.search(
        r"\| eval.py, warm \| judge \| ([\d.]+) .*\n.*\n\| eval.py, warm \| all \| +\| +\| ([\d.]+)", walltime
    ).groups()
    longer = re.search(r"\| 1,250 \| 1 \|.*\| ([\d.]+) \|\n", walltime)[1]
    assert pytest.approx((float(longer) - float(wall)) / 1000) == eval_scaling.DIALOGUE_S
    assert float(start) == eval_scaling.START_S

    scaling = (ROOT / "benchmarks/results/eval_scaling.md").read_text()
    measured = {"engines": [], "server": []}
    for size, kind, answering, scoring in re.findall(
        r"^\| ([\d,]+) \| (engines|server) \| [\d.]+ \| ([\d.]+) \| ([\d.]+) ", scaling, re.MULTILINE
    ):
        result = {"dialogues": int(size.replace(",", "")), "answering_s": float(answering), "scoring_s": float(scoring)}
        measured[kind].append(result)
    lines = eval_scaling.extrapolate(eval_scaling.build_parser().parse_args([]), *measured.values())
    assert [line for line in lines if f"| {' | '.join(line)} |" not in scaling] == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", [False, True])
def test_two_gpus_passes_on_two_processes_and_fails_if_they_differ(tiny_model, tmp_path, capfd, monkeypatch, fault):
    """The fault: the run that is killed and resumed has another seed, so its packs differ."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    write_config = two_gpus.write_config

    def faulty(name: str, accumulation: int, args) -> Path:
        seed = ["seed=7"] if name == "killed" else []
        return write_config(name, accumulation, type(args)(**vars(args) | {"set": [*args.set, *seed]}))

    if fault:
        monkeypatch.setattr(two_gpus, "write_config", faulty)
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text(QWEN3_LIKE)
    dataset = save_dataset(tmp_path / "soap_dataset", {"train": rows(40), "validation": rows(44)[40:]})
    arguments = ["--model", str(model), "--dataset_path", str(dataset), "--work_dir", str(tmp_path / "work")]
    arguments += ["--layers", "1", "--steps", "14", "--save_every", "3", "--limit", "1e-4"]
    changes = [
        "optimizer.learning_rate=0.001",
        "data.max_length=1024",
        "data.pad_to=div_length",
        "model.dtype=fp32",
        "data.dl_num_workers=0",
    ]
    assert two_gpus.main([*arguments, "--set", *changes]) == fault
    output = capfd.readouterr().out
    assert "| 1 GPU, 2 packs accumulated | 14 |" in output
    assert re.search(r"killed after step \d+, resumed at \d+ \|", output)
    assert output.splitlines()[-1].startswith("FAILED" if fault else "passed")


def test_deepspeed_gets_only_as_many_visible_gpus_as_the_benchmark_uses(monkeypatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert train_throughput.gpus(2) == {"CUDA_VISIBLE_DEVICES": "0,1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert train_throughput.gpus(1) == {"CUDA_VISIBLE_DEVICES": "3"}


def test_a_joined_step_has_the_tokens_of_all_processes_and_the_time_of_one() -> None:
    first = [{"seconds": 1.0, "tokens": 10, "squares": 50}, {"seconds": 2.0, "tokens": 20, "squares": 70}]
    second = [{"seconds": 1.5, "tokens": 1, "squares": 2}, {"seconds": 2.5, "tokens": 3, "squares": 4}]
    assert train_throughput.joined([first, second]) == [
        {"seconds": 1.0, "tokens": 11, "squares": 52},
        {"seconds": 2.0, "tokens": 23, "squares": 74},
    ]


def test_peak_memory_is_that_of_the_first_visible_gpu(tmp_path: Path, monkeypatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$1 $2" = "-i 3" ] && echo 2048 || echo 9000\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    memory = eval_walltime.PeakMemory()
    memory.start()
    deadline = time.monotonic() + 30
    while not memory.peak and time.monotonic() < deadline:
        time.sleep(0.05)
    memory.over.set()
    assert memory.peak == 2.0


def test_flops_are_those_of_the_products_that_a_trainer_runs() -> None:
    shape = {"hidden_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape |= {"head_dim": 3, "intermediate_size": 5, "vocab_size": 7}
    weights = 2 * (
        4 * 3 * (2 + 2) + 4 * 3 * (1 + 1) + 3 * 4 * 5
    )  # queries and output, keys and values, the three of the MLP
    totals = {"tokens": 10, "labelled": 3, "squares": 60}
    attention = 6 * 2 * 2 * 3 * 60
    ours, stock = ({"type": kind, "model": {}} for kind in ("measured_soap", "measured_sft"))
    adapter = {"type": "measured_soap", "model": {"peft_config": {}}}
    for config, each, headed in ((ours, 6, 3), (stock, 6, 10), (adapter, 4, 3)):
        expected = each * (weights * 10 + 4 * 7 * headed) + attention
        assert train_throughput.executed_flops(shape, config, totals) == expected


def test_what_comes_of_a_yaml_lies_beside_its_copy_whatever_dots_its_name_has(tmp_path: Path, monkeypatch) -> None:
    """Of a name such as Qwen3-1.7B-24GB.yaml the part after the last dot alone is an ending."""
    config = tmp_path / "Model-1.7B-any.yaml"
    config.write_text("type: soap\nmodel: {}\ndata: {sources: []}\n")

    def train(command: list[str], env: dict, **_) -> subprocess.CompletedProcess:
        Path(env["MEASURE_LOG"] + ".0.jsonl").write_text('{"tokens": 1, "squares": 1, "labelled": 1}\n')
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(train_throughput.subprocess, "run", train)
    args = train_throughput.build_parser().parse_args(["--work_dir", str(tmp_path / "work"), "--profile"])
    args.work_dir.mkdir()
    assert train_throughput.run(str(config), args) == [{"tokens": 1, "squares": 1, "labelled": 1}]
    names = {"Model-1.7B-any.yaml", "Model-1.7B-any.log", "Model-1.7B-any.0.jsonl"}
    assert {path.name for path in args.work_dir.iterdir()} == names


def test_no_statement_of_a_dummy_note_is_that_of_another_model() -> None:
    text = "Cough for 3 days. No fever.\n- Sleeps well; eats well."
    first, second = (split_statements(eval_walltime.numbered(text, number)) for number in (1, 2))
    assert first == ["(1) Cough for 3 days.", "(1) No fever.", "(1) Sleeps well; eats well."]
    assert not set(first) & set(second)


def test_eval_walltime_measures_eval_py_as_the_client_of_a_server(tmp_path: Path) -> None:
    dataset = save_dataset(tmp_path / "soap_dataset", {"test": rows(3)})
    command = [sys.executable, str(ROOT / "benchmarks/eval_scaling.py"), "--part", "server"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}/v1"
        command = [sys.executable, str(ROOT / "benchmarks/eval_walltime.py"), "m", "--judge_model", "m"]
        command += ["--server", url, "--dataset_path", str(dataset), "--output", str(tmp_path / "figures.json")]
        table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        server.kill()
    (figures,) = json.loads((tmp_path / "figures.json").read_text()).values()
    assert figures["generate"]["prompt"] == 3 * 900  # as the stand-in counts
    assert figures["judge"]["prompt"] == 4 * 3 * 900
    assert figures["statements"]["prompt"] > 0
    assert f"| {figures['wall_s']:.1f} | {figures['cpu_s']:.1f} |" in table


@pytest.mark.parametrize("other", [["--cold"], ["--checkpoints", "2"], ["--adapters", "2"], ["--lora_rank", "8"]])
def test_eval_walltime_takes_nothing_beside_a_server_that_it_would_ignore(other, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["eval_walltime.py", "m", "--judge_model", "m", "--server", "http://h/v1", *other])
    with pytest.raises(SystemExit, match="2"):
        eval_walltime.main()
    assert "leave out --cold, --checkpoints" in capsys.readouterr().err


def test_the_measured_cpu_time_is_that_of_the_command(tmp_path: Path) -> None:
    sum_up = "import time; end = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
    used = eval_walltime.measure([sys.executable, "-c", sum_up], tmp_path / "log")
    assert 0.5 <= used["cpu_s"] < 2
    assert used["wall_s"] >= 0.5
    asleep = eval_walltime.measure(["sleep", "0.5"], tmp_path / "log")
    assert asleep["cpu_s"] < 0.3
    assert asleep["wall_s"] >= 0.5


def test_the_start_of_an_engine_is_split_by_vllms_log() -> None:
    log = (
        "INFO [gpu_model_runner.py:5188] Model loading took 3.22 GiB memory and 1.500000 seconds\n"
        "INFO [core.py:307] init engine (profile, create kv cache, warmup model) took 20.25 s (compilation: 8.25 s)\n"
    )
    phases = eval_walltime.start_phases(log, 30.0)
    assert phases == {"before": 8.25, "weights": 1.5, "compilation": 8.25, "engine": 12.0}
    assert eval_walltime.start_phases("", 30.0)["before"] == 30.0
