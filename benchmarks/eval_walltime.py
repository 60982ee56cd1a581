"""Compare the wall time of eval.py with a simple reference, both with dummy weights and fixed output lengths.

The reference is a first implementation: one engine after the other, each in its own process, in eager mode, with LoRA
support, and with judge prompts that name the section before the dialogue. eval.py runs unchanged, with two exceptions
for the dummy weights: whatever they write is read as the dialogue's reference note, each statement behind a number that
no two models share, and every verdict takes all 64 tokens. eval.py also asks about statements, which the reference does
not; --no_statements leaves them out.

Input: folders with config and tokenizer of the generator and the judge, and a dataset from preprocess_data.py. Weights
are needed only for the generator with adapters or checkpoints: eval.py merges or loads them (random weights will do).
Output: tables, and with --output the same figures as JSON. The second table splits each start by vLLM's log: weights,
compilation, the rest of the engine's start (profile, cache, CUDA graphs), and all before, mostly imports.

--cold measures both twice: as on a machine's first start, with compile caches of their own in --work_dir and, as root,
after emptying the page cache; then with what the first call filled. --checkpoints N and --adapters N evaluate N
checkpoints or adapters of the generator in one call. --server URL measures eval.py alone, as the client of a server
that writes and judges; its CPU time is then that of eval.py's own process. Elsewhere it includes the engines'.

    python benchmarks/eval_walltime.py Qwen3-1.7B --judge_model Qwen3-8B --dataset_path ./soap_dataset
    python benchmarks/eval_walltime.py Qwen3-1.7B --judge_model Qwen3-8B --dataset_path ./soap_dataset --lora_rank 16
    python benchmarks/eval_walltime.py Qwen3-1.7B --judge_model Qwen3-8B --dataset_path ./soap_dataset \\
        --skip_reference --checkpoints 5 --adapters 10
    vllm serve Qwen3-8B --load-format dummy --data-parallel-size 2 --max-model-len 8192
    python benchmarks/eval_walltime.py Qwen3-8B --judge_model Qwen3-8B --dataset_path ./soap_dataset \\
        --server http://localhost:8000/v1
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import prompts  # noqa: E402
from common.dataset import load_split  # noqa: E402
from evaluation import pipeline  # noqa: E402
from evaluation.engines import models  # noqa: E402
from evaluation.judging import asking, judge  # noqa: E402
from evaluation.judging.sentences import split_statements  # noqa: E402

NOTE_TOKENS, VERDICT_TOKENS = 420, 64
DUMMY = {"load_format": "dummy"}
STAGES = ("generate", "judge", "statements")
CACHES = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE")


# --- the reference ---------------------------------------------------------------------------------------------------


def reference_chats(stage: str, rows: Any) -> list[prompts.Messages]:
    """Return the chats of a stage. Those of the judge name the section first, so they do not share the dialogue."""
    if stage == "generate":
        return [prompts.note_messages(row["dialogue"]) for row in rows]
    chats = []
    for row in rows:
        for section in prompts.SECTIONS:
            system, user = prompts.judge_messages(row["dialogue"], section, row[section], row[section])
            case = {"section": section, **json.loads(user["content"])}
            chats.append([system, user | {"content": json.dumps(case, ensure_ascii=False)}])
    return chats


def run_reference_stage(args: argparse.Namespace) -> dict[str, Any]:
    """Run one stage in this process. Return the seconds to start and to run, and the tokens."""
    began = time.monotonic()
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    rows = load_split(args.dataset_path, args.split, args.rows)
    judging = args.reference_stage == "judge"
    model = models.resolve_model(args.judge_model if judging else args.model, need_weights=False)
    llm = LLM(
        model=str(model.path),
        enforce_eager=True,
        enable_lora=True,
        max_model_len=models.context_length(None, model),
        gpu_memory_utilization=args.gpu_memory_utilization,
        **DUMMY,
        **args.engine_args,
    )
    started = time.monotonic()
    length = args.verdict_tokens if judging else args.note_tokens
    sampling = SamplingParams(
        temperature=0,
        max_tokens=length,
        min_tokens=0 if judging else length,
        ignore_eos=not judging,
        structured_outputs=StructuredOutputsParams(json=endless(judge.VERDICT_SCHEMA)) if judging else None,
    )
    outputs = llm.chat(
        reference_chats(args.reference_stage, rows),
        sampling,
        chat_template_kwargs=prompts.CHAT_TEMPLATE_KWARGS,
        use_tqdm=False,
    )
    return {
        "start_s": started - began,
        "run_s": time.monotonic() - started,
        "prompt": sum(len(output.prompt_token_ids) for output in outputs),
        "cached": sum(output.num_cached_tokens or 0 for output in outputs),
        "output": sum(len(output.outputs[0].token_ids) for output in outputs),
    }


def endless(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the verdict's schema with a reason longer than the token limit, so that every verdict reaches it."""
    reason = schema["properties"]["reason"] | {"minLength": 2000, "maxLength": 2000}
    return schema | {"properties": schema["properties"] | {"reason": reason}}


# --- eval.py ---------------------------------------------------------------------------------------------------------


def numbered(text: str, number: int) -> str:
    """Return `text` with a number in front of each statement, so that a prefix cache knows none of another number."""
    return "\n".join(f"({number}) {statement}" for statement in split_statements(text))


def run_ours(args: argparse.Namespace) -> int:
    """Run eval.main in this process, and replace the notes of the dummy weights by the reference notes."""
    import eval

    rows = load_split(args.dataset_path, args.split, args.rows)
    take_record = pipeline.read_prediction
    written: Counter[int] = Counter()

    def as_note(index: int, dialogue: str, done: Any) -> dict[str, Any]:
        written[index] += 1
        note = {section: numbered(rows[index][section], written[index]) for section in prompts.SECTIONS}
        return take_record(index, dialogue, done) | note | {"status": "ok", "reason": None}

    pipeline.read_prediction = as_note
    asking.TRIES = 1  # verdicts are cut off on purpose, so do not ask again
    judge.VERDICT_SCHEMA = endless(judge.VERDICT_SCHEMA)
    notes = {"max_tokens": args.note_tokens, "min_tokens": args.note_tokens, "ignore_eos": True}
    generator_args = args.engine_args if args.weights else DUMMY | args.engine_args
    judge_args = DUMMY | args.judge_engine_args
    if args.server:
        answered_by = ["--api_base", args.server, "--judge_api_base", args.server, "--api_concurrency", "512"]
    else:
        answered_by = ["--engine_args", json.dumps(generator_args), "--judge_engine_args", json.dumps(judge_args)]
        answered_by += ["--gpu_memory_utilization", str(args.gpu_memory_utilization)]
    return eval.main(
        [
            *(args.checkpoint or [args.model]),
            *("--judge_model", args.judge_model, "--dataset_path", args.dataset_path),
            *("--split", args.split, "--limit", str(args.rows), "--judge_controls", "0"),
            *("--output_dir", args.output_dir, *answered_by),
            *("--sampling_args", json.dumps(notes)),
            *("--judge_sampling_args", json.dumps({"max_tokens": args.verdict_tokens})),
            *(word for path in args.lora_path or () for word in ("--lora_path", path)),
            *(["--stage", args.stage] if args.stage else []),
            *(["--no_statements"] if args.no_statements else []),
        ]
    )


def make_adapter(model: str, rank: int, path: Path, seed: int = 0) -> str:
    """Write a LoRA adapter with random weights for every linear layer of `model` to `path`, and return the path.

    The shapes come from the model's config.json.
    """
    import numpy as np
    from safetensors.numpy import save_file

    config = json.loads((Path(model) / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    wide, narrow = heads * config["head_dim"], kv_heads * config["head_dim"]
    shapes = {"self_attn.q_proj": (hidden, wide), "self_attn.o_proj": (wide, hidden)}
    shapes |= {f"self_attn.{name}": (hidden, narrow) for name in ("k_proj", "v_proj")}
    shapes |= {"mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner), "mlp.down_proj": (inner, hidden)}
    generator, weights = np.random.default_rng(seed), {}
    for layer in range(config["num_hidden_layers"]):
        for name, (width_in, width_out) in shapes.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{key}.lora_A.weight"] = generator.normal(0, 0.01, (rank, width_in)).astype(np.float16)
            weights[f"{key}.lora_B.weight"] = generator.normal(0, 0.01, (width_out, rank)).astype(np.float16)
    path.mkdir()
    save_file(weights, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "base_model_name_or_path": model}
    settings |= {"target_modules": [name.split(".")[1] for name in shapes], "task_type": "CAUSAL_LM"}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return str(path)


def link_checkpoints(model: str, n: int, folder: Path) -> list[str]:
    """Make n folders global_step_1 to n with links to the files of `model`, and return their paths."""
    paths = [folder / f"global_step_{step}" for step in range(1, n + 1)]
    for path in paths:
        path.mkdir(parents=True)
        for file in Path(model).resolve().iterdir():
            if file.is_file():
                (path / file.name).symlink_to(file)
    return list(map(str, paths))


# --- measuring -------------------------------------------------------------------------------------------------------


class PeakMemory(threading.Thread):
    """Record the peak memory in use on the first visible GPU, in GiB, sampled twice a second; 0 without a GPU."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.over = 0.0, threading.Event()

    def run(self) -> None:
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        query = ["nvidia-smi", "-i", first, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self.over.wait(0.5):
            try:
                output = subprocess.run(query, capture_output=True, text=True, check=True).stdout
            except (OSError, subprocess.SubprocessError):
                return
            self.peak = max(self.peak, int(output.split()[0]) / 1024)


def measure(command: list[str], log: Path, caches: Path | None = None) -> dict[str, float]:
    """Run a command. Return its "wall_s", including the start of Python, its "cpu_s", and the "peak_gib" of GPU memory.

    With `caches`, compiled code goes to this folder. The CPU time includes that of the command's child processes.
    """
    environment = os.environ | ({name: str(caches / name) for name in CACHES} if caches else {})
    memory = PeakMemory()
    memory.start()
    began = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
        _, status, usage = os.wait4(process.pid, 0)  # Popen.wait would not tell the CPU time
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.monotonic() - began
    memory.over.set()
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} ended with status {process.returncode}:\n{log.read_text()[-2000:]}")
    return {"wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_gib": memory.peak}


def empty_page_cache() -> None:
    """Let the next command read its files from the disk. Only root can; for others, print a line."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError as error:
        print(f"the page cache stays as it is: {error.strerror}", flush=True)


def measure_reference(command: list[str], folder: Path, name: str, caches: Path | None) -> dict[str, Any]:
    result: dict[str, Any] = {"wall_s": 0.0, "cpu_s": 0.0, "peak_gib": 0.0}
    for stage in ("generate", "judge"):
        output = folder / f"{name}-{stage}.json"
        stage_command = [*command, "--reference_stage", stage, "--output", str(output)]
        used = measure(stage_command, output.with_suffix(".log"), caches)
        result[stage] = json.loads(output.read_text()) | {"wall_s": used["wall_s"]}
        result |= {name: result[name] + used[name] for name in ("wall_s", "cpu_s")}
        result["peak_gib"] = max(result["peak_gib"], used["peak_gib"])
    return result


def measure_ours(
    command: list[str], folder: Path, name: str, caches: Path | None = None, more: Iterable[str] = ()
) -> dict[str, Any]:
    run = folder / name
    return measure([*command, "--output_dir", str(run), *more], folder / f"{name}.log", caches) | read_run(run)


def measure_several(
    command: list[str], folder: Path, label: str, evaluated: dict[str, list[str]], caches: Path | None
) -> dict[str, Any]:
    """Measure one call for checkpoints or adapters, {name: arguments}. Return the results of each and of the call."""
    run, words = folder / label, itertools.chain(*evaluated.values())
    used = measure([*command, "--output_dir", str(run), "--weights", *words], folder / f"{label}.log", caches)
    results = {name: read_run(next(run.glob(f"*-{name}"))) for name in evaluated}
    return results | {f"{len(evaluated)} {label}": used}


def read_run(run: Path) -> dict[str, Any]:
    """Return {stage: its seconds and tokens} of a run folder, and "phases": {engine: seconds of its start}.

    Statements have no start of their own: the judge answers them.
    """
    manifest = json.loads((run / "manifest.json").read_text())
    times, result = manifest["timings_s"], {}
    for stage, tokens in manifest["tokens"].items():
        result[stage] = {"start_s": times.get(f"{stage}_init"), "run_s": times[stage], **tokens}
    logs = {stage: run / f"{stage}.log" for stage in ("generate", "judge")}
    return result | {
        "phases": {
            stage: start_phases(log.read_text(errors="replace"), times[f"{stage}_init"])
            for stage, log in logs.items()
            if log.exists()
        }
    }


def start_phases(log: str, start_s: float) -> dict[str, float]:
    """Split the seconds of an engine's start by vLLM's log; a phase that it does not name counts as 0."""

    def seconds(pattern: str) -> float:
        found = re.search(pattern, log)
        return float(found[1]) if found else 0.0

    weights = seconds(r"Model loading took .* and ([\d.]+) seconds")
    engine = seconds(r"init engine \(.*\) took ([\d.]+) s")
    compilation = seconds(r"init engine \(.*\) took [\d.]+ s \(compilation: ([\d.]+) s")
    return {
        "before": start_s - weights - engine,
        "weights": weights,
        "compilation": compilation,
        "engine": engine - compilation,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    columns = ["run", "stage", "start s", "run s", "wall s", "CPU s"]
    columns += ["prompt tokens", "from cache", "output tokens", "peak GiB"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for name, result in results.items():
        for stage in STAGES:
            if stage in result:
                part = result[stage]
                start = "" if part["start_s"] is None else f"{part['start_s']:.1f}"
                cells = [start, f"{part['run_s']:.1f}", "", ""]
                cached = part["cached"] / max(1, part["prompt"])
                cells += [f"{part['prompt']:,}", f"{cached:.0%}", f"{part['output']:,}", ""]
                lines.append(f"| {name} | {stage} | {' | '.join(cells)} |")
        if "wall_s" in result:
            used = f"{result['wall_s']:.1f} | {result['cpu_s']:.1f}"
            lines.append(f"| {name} | all | | | {used} | | | | {result['peak_gib']:.1f} |")
    return "\n".join(lines)


def phases_table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| run | engine | before s | weights s | compilation s | engine s |", "|---|---|---|---|---|---|"]
    for name, result in results.items():
        for engine, phases in result.get("phases", {}).items():
            lines.append(f"| {name} | {engine} | {' | '.join(f'{seconds:.1f}' for seconds in phases.values())} |")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder with the generator's config and tokenizer")
    parser.add_argument("--judge_model", required=True, help="folder with the judge's config and tokenizer")
    parser.add_argument("--dataset_path", default="./soap_dataset", help="dataset folder (default: %(default)s)")
    parser.add_argument("--split", default="test", help="split of the dataset (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=250, help="number of dialogues (default: %(default)s)")
    parser.add_argument("--note_tokens", type=int, default=NOTE_TOKENS, help="tokens per note (default: %(default)s)")
    parser.add_argument(
        "--verdict_tokens", type=int, default=VERDICT_TOKENS, help="tokens per verdict (default: %(default)s)"
    )
    parser.add_argument("--no_statements", action="store_true", help="ask for verdicts only, as the reference does")
    parser.add_argument("--cold", action="store_true", help="also measure first starts, with empty caches")
    parser.add_argument("--checkpoints", type=int, metavar="N", help="also time N checkpoints of the model in one call")
    parser.add_argument("--adapters", type=int, metavar="N", help="also time N adapters of rank 16 in one call")
    parser.add_argument("--lora_rank", type=int, help="also time generation with and without an adapter of this rank")
    parser.add_argument(
        "--gpu_memory_utilization", type=float, default=0.9, help="share of the GPU's memory (default: %(default)s)"
    )
    parser.add_argument("--engine_args", type=json.loads, default={}, help="more arguments for vLLM, as JSON")
    parser.add_argument("--judge_engine_args", type=json.loads, default={}, help="the same for eval.py's judge")
    parser.add_argument("--server", metavar="URL", help="measure only eval.py, with this server in place of engines")
    parser.add_argument("--skip_reference", action="store_true", help="measure only eval.py")
    parser.add_argument("--work_dir", type=Path, help="new folder for runs and logs (default: a temporary folder)")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("--weights", action="store_true", help=argparse.SUPPRESS)
    for hidden in ("--reference_stage", "--output_dir", "--stage"):  # for this script's subprocesses, as the next ones
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    for hidden in ("--checkpoint", "--lora_path"):
        parser.add_argument(hidden, action="append", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    parser = build_parser()
    args = parser.parse_args()
    if args.server and (args.cold or args.checkpoints or args.adapters or args.lora_rank):
        parser.error("--server measures one evaluation: leave out --cold, --checkpoints, --adapters and --lora_rank")
    if args.output_dir:
        return run_ours(args)
    if args.reference_stage:
        args.output.write_text(json.dumps(run_reference_stage(args)))
        return 0
    given = sys.argv[1:]
    command = [sys.executable, __file__, *given]
    results = {}
    with contextlib.ExitStack() as stack:
        folder = args.work_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.work_dir:
            folder.mkdir(parents=True)  # fails if it exists: eval.py would resume a run there, and take no time
        starts = (", first start", ", warm") if args.cold else ("",)
        programs = {"reference": measure_reference, "eval.py": measure_ours}
        if args.skip_reference or args.server:
            del programs["reference"]
        for start, (program, run) in itertools.product(starts, programs.items()):
            if start == ", first start":
                empty_page_cache()
            name, caches = program + start, folder / f"caches-{program}" if args.cold else None
            results[name] = run(command, folder, name.replace(", ", "-").replace(" ", "-"), caches)
            print(f"{name}: {results[name]['wall_s']:.1f} s", flush=True)
        several = {}
        if args.checkpoints:
            paths = link_checkpoints(args.model, args.checkpoints, folder / "checkpoints-to-load")
            several["checkpoints"] = {Path(path).name: ["--checkpoint", path] for path in paths}
        if args.adapters:
            names = [f"adapter{k}" for k in range(1, args.adapters + 1)]
            several["adapters"] = {
                name: ["--lora_path", make_adapter(args.model, 16, folder / name, seed=k)]
                for k, name in enumerate(names)
            }
        for label, evaluated in several.items():
            results |= measure_several(command, folder, label, evaluated, caches)
        if args.lora_rank:
            adapter = make_adapter(args.model, args.lora_rank, folder / "adapter")
            more = ["--stage", "generate", "--weights"]
            results["without adapter"] = measure_ours(command, folder, "plain", caches, more)
            results["with adapter"] = measure_ours(command, folder, "lora", caches, [*more, "--lora_path", adapter])
    print(table(results) if args.server else f"{table(results)}\n\n{phases_table(results)}")
    for start in starts if "reference" in programs else ():
        ratio = results[f"eval.py{start}"]["wall_s"] / results[f"reference{start}"]["wall_s"]
        print(f"\neval.py{start}: {ratio:.2f} of the reference's wall time")
    for label, evaluated in several.items():
        ratio = results[f"{len(evaluated)} {label}"]["wall_s"] / results[f"eval.py{starts[-1]}"]["wall_s"]
        print(f"\n{len(evaluated)} {label} take {ratio:.2f} times the wall time of one model")
    if args.lora_rank:
        ratio = results["with adapter"]["generate"]["run_s"] / results["without adapter"]["generate"]["run_s"]
        print(f"generation with an adapter / without: {ratio:.2f} of the time")
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
