"""Measure how eval.py's own time and memory grow with the number of dialogues, and extrapolate to 1,000,000.

It needs no GPU and no model: a process that answers at once, with notes and verdicts of the usual length, replaces
vLLM. So the times are those of the project's own work: data, prompts, pipes (or, with a server, HTTP), records,
controls, statements, scoring, bootstrap and report. The dialogues are those of demo/, numbered so that no two are
equal. The extrapolation also needs the speed of a GPU; by default it is taken from benchmarks/results/eval_walltime.md.

Output: tables in Markdown, to the console and to --output.

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

MANY = 1_000_000  # dialogues to extrapolate to
GPUS = (1, 2, 4, 8, 16, 32, 64)
# From benchmarks/results/eval_walltime.md, warm: seconds of one GPU for each further dialogue, and to start.
DIALOGUE_S, START_S = (249.6 - 75.2) / 1000, 25.6
SOURCE = (
    "benchmarks/results/eval_walltime.md: one H200, vLLM 0.23.0, Qwen3-1.7B and 8B with dummy weights, notes of 420 "
    "and verdicts of 64 tokens, 29 questions on statements; the increase from 250 to 1,250 dialogues"
)
REASON = (
    "Both say the same on complaint, course and what is denied, but the prediction leaves out the dose and how often"
)
Answer = Callable[[list[dict[str, str]]], str]


def demo_dialogues() -> list[dict[str, str]]:
    lines = (ROOT / "demo/dialogues.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# --- stand-ins for the models ----------------------------------------------------------------------------------------


def answers(judging: bool) -> Answer:
    """Return a function that answers a chat with a note of the demo or, if `judging`, with a verdict.

    Equal chats get equal answers.
    """
    notes = [prompts.write_note(read_soap(dialogue["soap"])) for dialogue in demo_dialogues()]

    def answer(messages: list[dict[str, str]]) -> str:
        number = zlib.crc32(messages[-1]["content"].encode())
        if judging:
            return json.dumps({"reason": REASON, "verdict": "pass" if number % 3 else "fail"})
        return notes[number % len(notes)]

    return answer


# The 20 likeliest first tokens of an answer to a question about a statement.
FIRST_TOKENS = [("yes", -0.4), ("no", -1.2), *((f"token {k}", -5.0 - k) for k in range(18))]


def stand_in_engine() -> int:
    """Read requests and write answers, in the format of vllm_worker.py."""
    note, verdict = answers(judging=False), answers(judging=True)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "logprobs" in request["sampling"]:
            done = {"id": request["id"], "text": "yes", "finish_reason": "length", "first_token": dict(FIRST_TOKENS)}
        else:
            answer = verdict if request["schema"] else note
            done = {"id": request["id"], "text": answer(request["messages"]), "finish_reason": "stop"}
        print(json.dumps({**done, "prompt_tokens": 900, "output_tokens": 100, "cached_tokens": 0}), flush=True)
    return 0


class StandInServer(BaseHTTPRequestHandler):
    """Answer like `vllm serve`. A request with a schema asks for a verdict."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    answers: tuple[Answer, Answer]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asks_statement = body.get("logprobs")
        text = "yes" if asks_statement else self.answers["response_format" in body](body["messages"])
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        if asks_statement:
            tokens = [{"token": token, "logprob": value, "bytes": None} for token, value in FIRST_TOKENS]
            choice["logprobs"] = {"content": [{**tokens[0], "top_logprobs": tokens}]}
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
    ThreadingHTTPServer.request_queue_size = 128  # connections that wait to be accepted; the default, 5, refuses some
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandInServer)
    print(server.server_address[1], flush=True)
    server.serve_forever()
    return 0


def run_eval(arguments: list[str]) -> int:
    """Run eval.main in this process, with stand-ins for the engines."""
    import eval
    from evaluation.engines import vllm_engine
    from evaluation.engines.placement import Placement, Plan

    def start(spec: vllm_engine.EngineSpec, device: str, log: Path) -> subprocess.Popen:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, __file__, "--part", "engine"], start_new_session=True, **pipes)

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
    """Write the files that eval.py checks before it starts an engine."""
    path = folder / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    return path


def watch(process: subprocess.Popen) -> dict[str, float]:
    """Wait for the process. Return its status, wall and CPU seconds, and peak memory (without mapped files) in MiB."""
    began, seen = time.monotonic(), {"cpu_s": 0.0, "peak_mib": 0.0}
    proc, tick = Path(f"/proc/{process.pid}"), os.sysconf("SC_CLK_TCK")
    while process.poll() is None:
        try:
            status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
            times = (proc / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # the process has just ended
            break
        seen["peak_mib"] = max(seen["peak_mib"], int(status.get("RssAnon", "0 kB").split()[0]) / 1024)
        seen["cpu_s"] = max(seen["cpu_s"], (int(times[11]) + int(times[12])) / tick)
        time.sleep(0.05)
    return {"status": process.wait(), "wall_s": time.monotonic() - began, **seen}


def measure(folder: Path, n: int, model: Path, port: str | None) -> dict[str, Any]:
    """Measure one evaluation of n dialogues, with engines or, if `port` is given, with a server."""
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
        "models": "server" if port else "engines",
        **seen,
        "answering_s": round(times["total"], 1),  # as in the table, so that the extrapolation follows from it
        "scoring_s": round(seen["wall_s"] - times["total"], 1),
        "folder_mib": sum(sizes.values()),
        "report_mib": sizes["report.html"],
    }


# --- extrapolation ---------------------------------------------------------------------------------------------------


def slope(results: list[dict[str, Any]], key: str) -> float:
    """Return the increase of a figure per dialogue, between the two largest sizes."""
    low, high = results[-2:]
    return (high[key] - low[key]) / (high["dialogues"] - low["dialogues"])


def extrapolate(args: argparse.Namespace, engines: list[dict], server: list[dict]) -> list[list[str]]:
    """Return a table row for each number of GPUs: hours for MANY dialogues of the GPUs, of eval.py, and in total."""
    scoring = MANY * slope(engines, "scoring_s") / 3600
    lines = []
    for gpus in GPUS:
        gpu_hours = (args.start_s + MANY * args.dialogue_s / gpus) / 3600
        cells = [f"{gpus}", f"{gpu_hours:.2f}"]
        for results in (engines, server):
            own_hours = MANY * slope(results, "answering_s") / 3600
            total = max(gpu_hours, own_hours) + scoring
            cells += [f"{own_hours:.2f}", f"{total:.2f}", "GPUs" if gpu_hours > own_hours + scoring else "eval.py"]
        lines.append(cells)
    return lines


# --- output ----------------------------------------------------------------------------------------------------------


def table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


def figures(results: list[dict[str, Any]]) -> str:
    header = ["dialogues", "models", "wall s", "answering s", "scoring s", "CPU s", "ms per dialogue"]
    header += ["peak MiB", "run folder MiB", "report MiB"]
    lines = []
    for result in results:
        ms = 1000 * result["wall_s"] / result["dialogues"]
        cells = [f"{result['dialogues']:,}", result["models"]]
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
    engines, server = ([r for r in results if r["models"] == kind] for kind in ("engines", "server"))
    parts = [
        "# Time and memory of eval.py by number of dialogues",
        f"{machine()}.",
        f"`{' '.join(['python', *sys.argv])}`",
    ]
    parts += [
        "The models are stand-ins that answer at once (see the script), so all time and memory is that of eval.py.",
        figures(results),
    ]
    if len(engines) > 1 and len(server) > 1:
        header = ["GPUs", "GPU h"] + [
            f"{kind}: {column}" for kind in ("engines", "server") for column in ("eval.py h", "total h", "bottleneck")
        ]
        memory = engines[-1]["peak_mib"] + slope(engines, "peak_mib") * (MANY - engines[-1]["dialogues"])
        disk = slope(engines, "folder_mib") * MANY / 1024
        own_ms = [1000 * slope(results, "answering_s") for results in (engines, server)]
        parts += [
            f"## Extrapolation to {MANY:,} dialogues",
            f"A GPU takes {1000 * args.dialogue_s:.0f} ms for a dialogue's note, verdicts and statements; engines "
            f"start in {args.start_s:.1f} s ({args.source}). Several GPUs are assumed to scale perfectly.",
            f"While the models answer, eval.py takes {own_ms[0]:.2f} ms per dialogue with engines, or {own_ms[1]:.2f} "
            "ms with a server: the column `eval.py h`, for all dialogues. Scoring then takes "
            f"{1000 * slope(engines, 'scoring_s'):.2f} ms per dialogue, which `total h` includes. These figures are "
            "the increase between the two largest sizes above.",
            table(header, extrapolate(args, engines, server)),
            f"Extrapolated memory of eval.py: {memory / 1024:.1f} GiB. It is a lower bound: at the measured sizes the "
            f"report's page causes the peak, not the data kept per dialogue. Extrapolated run folder: {disk:.1f} GiB.",
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
        help="numbers of dialogues to measure with engines (default: 250 2500 25000)",
    )
    add(
        "--server_sizes",
        type=int,
        nargs="*",
        default=[250, 2_500],
        metavar="N",
        help="numbers of dialogues to measure with a server (default: 250 2500)",
    )
    add("--dialogue_s", type=float, default=DIALOGUE_S, help="one GPU's seconds per dialogue (default: %(default).4f)")
    add("--start_s", type=float, default=START_S, help="seconds that engines take to start (default: %(default)s)")
    add("--source", default=SOURCE, help="source of these two, for the report (default: %(default)s)")
    add("--output", type=Path, help="also write the tables to this Markdown file")
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
    if sys.argv[1:2] == ["--part"]:  # a process that is measured, or a stand-in
        part, rest = sys.argv[2], sys.argv[3:]
        sys.exit(run_eval(rest) if part == "eval" else stand_in_server() if part == "server" else stand_in_engine())
    sys.exit(main())
