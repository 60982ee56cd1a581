"""How eval.py's own time and memory grow with the number of dialogues, and what that means for 1,000,000.

No GPU and no model: in the place of vLLM stands a process that answers at once, with notes and verdicts of the usual
length. What is measured is all that this project does around an engine: reading data, prompts, queues and pipes (or,
with a server, HTTP), records, controls, scoring, bootstrap, report. The dialogues are those of demo/, numbered so that
no two are alike. The figures of one GPU, from which the table on paper is made, are arguments; without them, those of
benchmarks/results/eval_walltime.md.

Out: tables in Markdown, to the console or to --output.

    python benchmarks/eval_scaling.py
    python benchmarks/eval_scaling.py --output benchmarks/results/eval_scaling.md
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import prompts  # noqa: E402
from preprocessing.headings import read_soap  # noqa: E402

ON_PAPER = 1_000_000  # dialogues
GPUS = (1, 2, 4, 8, 16, 32, 64)
# From benchmarks/results/eval_walltime.md: seconds of one GPU for a note, for a verdict, and to the first answer.
GENERATE_S, JUDGE_S, START_S = 6.2 / 250, 16.2 / 1000, 68.6
SOURCE = (
    "benchmarks/results/eval_walltime.md: one H100, vLLM 0.23.0, Qwen3-1.7B and 8B with dummy weights, notes of 420 "
    "and verdicts of 64 tokens; the start is the first on a machine, 38 to 40 s with warm caches on 2026-11-24"
)
REASON = (
    "Both say the same on complaint, course and what is denied, but the prediction leaves out the dose and how often"
)
Answer = Callable[[list[dict[str, str]]], str]


def demo_dialogues() -> list[dict[str, str]]:
    lines = (ROOT / "demo/dialogues.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# --- what stands in the place of the models --------------------------------------------------------------------------


def answers(judging: bool) -> Answer:
    """Chat -> answer: a note of the demo, or a verdict; which one depends on the chat alone."""
    notes = [prompts.write_note(read_soap(dialogue["soap"])) for dialogue in demo_dialogues()]

    def answer(messages: list[dict[str, str]]) -> str:
        number = zlib.crc32(messages[-1]["content"].encode())
        if judging:
            return json.dumps({"reason": REASON, "verdict": "pass" if number % 3 else "fail"})
        return notes[number % len(notes)]

    return answer


def stand_in_engine() -> int:
    """Speaks as vllm_worker.py does."""
    answer = answers(judging=bool(json.loads(sys.stdin.readline())["schema"]))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        done = {"id": request["id"], "text": answer(request["messages"]), "finish_reason": "stop"}
        print(json.dumps({**done, "prompt_tokens": 900, "output_tokens": 100, "cached_tokens": 0}), flush=True)
    return 0


class StandInServer(BaseHTTPRequestHandler):
    """Answers as `vllm serve` does; a request with a schema is one for a verdict."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    answers: tuple[Answer, Answer]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = self.answers["structured_outputs" in body](body["messages"])
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": 900, "completion_tokens": 100, "total_tokens": 1000}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        data = json.dumps({**reply, "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def stand_in_server() -> int:
    StandInServer.answers = (answers(judging=False), answers(judging=True))
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandInServer)
    print(server.server_address[1], flush=True)
    server.serve_forever()
    return 0


def run_eval(arguments: list[str]) -> int:
    """eval.main in this process, with stand-ins for the engines."""
    import eval
    from evaluation.engines import vllm_engine
    from evaluation.engines.placement import Placement, Plan

    def start(spec: vllm_engine.EngineSpec, device: str, log: Path) -> subprocess.Popen:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, __file__, "--part", "engine"], start_new_session=True, **pipes)
        process.stdin.write(json.dumps({"schema": spec.schema}) + "\n")
        return process

    place = Placement(("",), {})
    vllm_engine._start = start
    eval.make_plan = lambda *_: Plan(place, place, True, "both at once, as on a GPU that holds both")
    return eval.main(arguments)


# --- measuring -------------------------------------------------------------------------------------------------------


def make_dataset(folder: Path, n: int) -> Path:
    from datasets import Dataset, DatasetDict

    dialogues = [(dialogue["dialogue"], read_soap(dialogue["soap"])) for dialogue in demo_dialogues()]
    numbered = ((number, *dialogues[number % len(dialogues)]) for number in range(n))
    rows = [{"dialogue": f"Visit {number}.\n{text}", **note} for number, text, note in numbered]
    path = folder / f"dataset-{n}"
    DatasetDict({"test": Dataset.from_list(rows)}).save_to_disk(path)
    return path


def make_model(folder: Path) -> Path:
    """What eval.py looks at before it starts an engine."""
    path = folder / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    return path


def watch(process: subprocess.Popen) -> dict[str, float]:
    """Wall and CPU seconds, and the most memory of its own (without the files that are mapped), of one process."""
    began, seen = time.monotonic(), {"cpu_s": 0.0, "peak_mib": 0.0}
    proc, tick = Path(f"/proc/{process.pid}"), os.sysconf("SC_CLK_TCK")
    while process.poll() is None:
        try:
            status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
            times = (proc / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            break
        seen["peak_mib"] = max(seen["peak_mib"], int(status.get("RssAnon", "0 kB").split()[0]) / 1024)
        seen["cpu_s"] = max(seen["cpu_s"], (int(times[11]) + int(times[12])) / tick)
        time.sleep(0.05)
    return {"status": process.wait(), "wall_s": time.monotonic() - began, **seen}


def measure(folder: Path, n: int, model: Path, port: str | None) -> dict[str, Any]:
    """One evaluation of n dialogues, through pipes or, with a port, through HTTP."""
    run = folder / f"run-{n}-{'server' if port else 'engine'}"
    arguments = ["--dataset_path", str(make_dataset(folder, n)), "--output_dir", str(run)]
    if port:
        base = f"http://127.0.0.1:{port}/v1"
        arguments += ["m", "--judge_model", "m", "--api_base", base, "--judge_api_base", base]
    else:
        dummy = '{"load_format": "dummy"}'
        arguments += [str(model), "--judge_model", str(model), "--engine_args", dummy, "--judge_engine_args", dummy]
    with (folder / "log").open("w") as log:
        command = [sys.executable, __file__, "--part", "eval", *arguments]
        seen = watch(subprocess.Popen(command, stdout=log, stderr=log))
    if seen["status"]:
        sys.exit(f"error: eval.py ended with status {seen['status']}:\n{(folder / 'log').read_text()[-2000:]}")
    times = json.loads((run / "manifest.json").read_text())["timings_s"]
    sizes = {path.name: path.stat().st_size / 2**20 for path in run.iterdir()}
    return {
        "dialogues": n,
        "through": "server" if port else "engine",
        **seen,
        "answering_s": times["total"],
        "scoring_s": seen["wall_s"] - times["total"],
        "folder_mib": sum(sizes.values()),
        "report_mib": sizes["report.html"],
    }


# --- on paper --------------------------------------------------------------------------------------------------------


def slope(results: list[dict[str, Any]], key: str) -> float:
    """Growth of a figure for one more dialogue, between the two largest sizes."""
    low, high = results[-2:]
    return (high[key] - low[key]) / (high["dialogues"] - low["dialogues"])


def on_paper(args: argparse.Namespace, engine: list[dict], server: list[dict]) -> list[list[str]]:
    """Hours for ON_PAPER dialogues on each number of GPUs: the GPUs' work, this project's one process, and both."""
    gpu_s = args.generate_s + 4 * args.judge_s
    scoring = ON_PAPER * slope(engine, "scoring_s") / 3600
    lines = []
    for gpus in GPUS:
        working = (args.start_s + ON_PAPER * gpu_s / gpus) / 3600
        cells = [f"{gpus}", f"{working:.2f}"]
        for results in (engine, server):
            own = ON_PAPER * slope(results, "answering_s") / 3600
            total = max(working, own) + scoring
            cells += [f"{own:.2f}", f"{total:.2f}", "the GPUs" if working > own + scoring else "this project"]
        lines.append(cells)
    return lines


# --- output ----------------------------------------------------------------------------------------------------------


def table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


def figures(results: list[dict[str, Any]]) -> str:
    header = ["dialogues", "through", "wall s", "answering s", "scoring s", "CPU s", "ms a dialogue"]
    header += ["peak MiB", "run folder MiB", "report MiB"]
    lines = []
    for result in results:
        ms = 1000 * result["wall_s"] / result["dialogues"]
        cells = [f"{result['dialogues']:,}", result["through"]]
        cells += [f"{result[key]:.1f}" for key in ("wall_s", "answering_s", "scoring_s", "cpu_s")] + [f"{ms:.1f}"]
        cells += [f"{result[key]:,.0f}" for key in ("peak_mib", "folder_mib", "report_mib")]
        lines.append(cells)
    return table(header, lines)


def machine() -> str:
    from importlib.metadata import version

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in ("datasets", "openai", "numpy", "rouge-score"))
    cpu = names[0].partition(": ")[2] if names else platform.machine()
    return f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB; Python {platform.python_version()}, {versions}"


def summary(args: argparse.Namespace, results: list[dict[str, Any]]) -> str:
    engine, server = ([r for r in results if r["through"] == kind] for kind in ("engine", "server"))
    parts = [
        "# How eval.py grows with the number of dialogues",
        f"{machine()}.",
        f"`{' '.join(['python', *sys.argv])}`",
    ]
    parts += [
        "The models are stand-ins that answer at once (see the script): all time and memory here is this project's.",
        figures(results),
    ]
    if len(engine) > 1 and len(server) > 1:
        header = ["GPUs", "GPUs' work h"] + [
            f"{kind}: {what}" for kind in ("engines", "servers") for what in ("own h", "all h", "limit")
        ]
        memory = engine[-1]["peak_mib"] + slope(engine, "peak_mib") * (ON_PAPER - engine[-1]["dialogues"])
        disk = slope(engine, "folder_mib") * ON_PAPER / 1024
        own = [1000 * slope(results, "answering_s") for results in (engine, server)]
        parts += [
            f"## {ON_PAPER:,} dialogues, on paper",
            f"A GPU takes {1000 * args.generate_s:.1f} ms for a note and {1000 * args.judge_s:.1f} ms for a verdict; "
            f"engines start in {args.start_s:.1f} s ({args.source}). GPUs are taken to share the work without loss.",
            f"For each dialogue this project's one process takes {own[0]:.2f} ms beside engines or {own[1]:.2f} ms "
            f"beside servers (five requests over HTTP), then {1000 * slope(engine, 'scoring_s'):.2f} ms to score it, "
            "by the growth between the two largest sizes above; `own` is the first of them for all dialogues.",
            table(header, on_paper(args, engine, server)),
            f"Memory of this process, scaled up: {memory / 1024:.1f} GiB, which is a lower bound, because at these "
            f"sizes the page of the report is the peak, not what is kept of each dialogue; run folder: {disk:.1f} GiB.",
        ]
    return "\n\n".join(parts) + "\n"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--sizes",
        type=int,
        nargs="+",
        default=[250, 2_500, 25_000],
        metavar="N",
        help="dialogues (default: 250 to 25000)",
    )
    add(
        "--server_sizes",
        type=int,
        nargs="*",
        default=[250, 2_500],
        metavar="N",
        help="through HTTP (default: 250 2500)",
    )
    add("--generate_s", type=float, default=GENERATE_S, help="seconds of one GPU for a note (default: %(default).4f)")
    add("--judge_s", type=float, default=JUDGE_S, help="the same for a verdict (default: %(default).4f)")
    add("--start_s", type=float, default=START_S, help="seconds until engines answer (default: %(default)s)")
    add("--source", default=SOURCE, help="where these three come from (default: %(default)s)")
    add("--output", type=Path, help="write the tables to this Markdown file")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = make_model(folder)
        for n in sorted(args.sizes):
            results.append(measure(folder, n, model, None))
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--part", "server"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            port = server.stdout.readline().strip()
            for n in sorted(args.server_sizes):
                results.append(measure(folder, n, model, port))
                print(json.dumps(results[-1]), file=sys.stderr, flush=True)
        finally:
            server.kill()
            server.wait()
    text = summary(args, results)
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:  # one of the processes that are measured or stand in
        part, rest = sys.argv[2], sys.argv[3:]
        sys.exit(run_eval(rest) if part == "eval" else stand_in_server() if part == "server" else stand_in_engine())
    sys.exit(main())
