import asyncio
import contextlib
import itertools
import json
import math
import os
import queue
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import LEARNED_NOTE, ROOT, chats, perturbed, rows
from hypothesis import given, settings
from hypothesis import strategies as st

import prompts
from common.errors import UserError
from evaluation.engines import vllm_engine as engine_module
from evaluation.engines import vllm_worker as worker
from evaluation.engines.base import Completion, LanguageModel, Request, Usage, first_token
from evaluation.engines.note_schema import NOTE_SCHEMA
from evaluation.engines.placement import Gpu, Placement, memory_needs, plan_engines
from evaluation.engines.processes import kill_groups
from evaluation.engines.reload import can_reload, check_same_network
from evaluation.engines.vllm_engine import VLLM_DEFAULTS, Engine, EngineSpec, compiles_nothing

CPU_ARGS = {"enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 8, "kv_cache_memory_bytes": 64 << 20}
GREEDY = {"temperature": 0, "max_tokens": 200}
VERDICT_OF = {"type": "object", "properties": {"verdict": {"enum": ["pass", "fail"]}}, "required": ["verdict"]}
ANSWER_OF = {"type": "object", "properties": {"answer": {"enum": ["yes", "no"]}}, "required": ["answer"]}


class Delayed(LanguageModel):
    """Answer only when a test calls `answer`, in the order that it chooses."""

    def __init__(self, window: int = 100):
        super().__init__("delayed model", window)
        self.waiting: list[tuple[int, Request]] = []

    def close(self) -> None:
        self.waiting.clear()

    def _send(self, number: int, request: Request) -> None:
        self.waiting.append((number, request))
        self.most = max(getattr(self, "most", 0), self.in_flight)
        if self.in_flight >= self.window:
            self.answer(-1)

    def answer(self, position: int) -> None:
        number, request = self.waiting.pop(position)
        self.report({"id": number, "text": request.messages, "finish_reason": "stop", "prompt_tokens": 3})


def test_each_chat_gets_its_own_answer_in_any_order() -> None:
    model = Delayed()
    finished: list[str] = []

    async def ask(text: str) -> Completion:
        completion = await usage.chat(text)
        finished.append(text)
        return completion

    async def ask_all() -> list[Completion]:
        return await asyncio.gather(*(ask(f"text {k}") for k in range(3)))

    usage = Usage(model)
    threading.Timer(0.1, lambda: [model.answer(position) for position in (2, 0, 0)]).start()
    assert asyncio.run(ask_all()) == [Completion(f"text {k}", "stop", 3) for k in range(3)]
    assert finished == [f"text {k}" for k in (2, 0, 1)]
    assert usage.tokens == {"prompt": 9, "cached": 0, "output": 0}
    assert usage.seconds > 0.05


def test_at_most_a_window_of_requests_is_in_flight() -> None:
    model = Delayed(window=4)

    async def ask_all() -> list[Completion]:
        tasks = [asyncio.create_task(model.chat(str(k))) for k in range(50)]
        done, _ = await asyncio.wait(tasks, timeout=0.2)
        assert len(done) == 47
        for _ in range(3):
            model.answer(0)
        return await asyncio.gather(*tasks)

    assert [answer.text for answer in asyncio.run(ask_all())] == list(map(str, range(50)))
    assert model.most == 4


@given(st.lists(st.lists(st.integers(0, 4), max_size=6), min_size=1, max_size=8), st.integers(1, 3))
def test_groups_take_turns_like_an_elevator(arrivals: list[list[int]], window: int) -> None:
    model, sent, waiting = Delayed(window), [], []
    model._send = lambda number, request: sent.append(request.group)
    answers = itertools.count()

    async def answer_one() -> None:
        floor = sent[-1]
        model.report({"id": next(answers), "text": "", "finish_reason": "stop"})
        await asyncio.sleep(0.001)
        if waiting:
            waiting.remove(due := min(waiting, key=lambda group: (group < floor, group)))
            assert sent[-1] == due

    async def ask_all() -> None:
        tasks = []
        for groups in arrivals:
            for group in groups:
                before = len(sent)
                tasks.append(asyncio.create_task(model.chat("text", group)))
                await asyncio.sleep(0)
                if len(sent) == before:
                    waiting.append(group)
            if model.in_flight:
                await answer_one()
        while model.in_flight:
            await answer_one()
        await asyncio.gather(*tasks)

    asyncio.run(ask_all())
    assert sorted(sent) == sorted(itertools.chain(*arrivals))


def test_the_answer_to_a_cancelled_chat_is_dropped() -> None:
    model = Delayed(window=1)

    async def give_up_and_ask_again() -> Completion:
        first = asyncio.create_task(model.chat("first"))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        second = asyncio.create_task(model.chat("second"))
        await asyncio.sleep(0.01)
        return await second

    model.window = 2  # with a full window, Delayed would answer at once
    threading.Timer(0.1, lambda: [model.answer(0), model.answer(0)]).start()
    assert asyncio.run(give_up_and_ask_again()).text == "second"
    assert model.in_flight == 0


def test_a_chat_that_is_cancelled_while_it_waits_gives_its_turn_to_the_next() -> None:
    model = Delayed(window=1)

    async def give_up_waiting() -> list[Completion]:
        first, second, third = (asyncio.create_task(model.chat(text)) for text in ("first", "second", "third"))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.wait([second])
        return await asyncio.gather(first, third)

    model._send = lambda number, request: model.report(
        {"id": number, "text": request.messages, "finish_reason": "stop"}
    )
    assert [answer.text for answer in asyncio.run(give_up_waiting())] == ["first", "third"]
    assert model.in_flight == 0


def test_an_engine_that_stops_gives_one_line() -> None:
    model = Delayed()
    model.report({"failed": "out of luck"})
    with pytest.raises(UserError, match=r"^the delayed model stopped: out of luck$"):
        chats(model, [Request("text")])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("Free memory on device cuda:0 (3/79 GiB) on startup is less than desired"), "not enough memory"),
        (ValueError("To serve at least one request, 1.0 GiB KV cache is needed"), "--max_model_len"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20 MiB"), "--gpu_memory_utilization"),
        (KeyError("rope"), "KeyError: 'rope'"),
        (RuntimeError("two\nlines"), "two lines"),
        (RuntimeError(), "no message"),
    ],
)
def test_the_cause_of_a_failure_is_explained_in_one_line(error: Exception, words: str) -> None:
    line = worker.explain(error)
    assert words in line
    assert "\n" not in line


def test_a_child_process_without_memory_is_explained_from_the_log() -> None:
    failed = "Exception: WorkerProc initialization failed due to an exception in a background process. "
    failed += "See stack trace for root cause."
    log = "(Worker_TP1 pid=7) ERROR\n(Worker_TP1) torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2\n"
    line = worker.explain_by_log(failed, log + "later lines\n")
    assert "not enough memory" in line and "Tried to allocate 2)" in line and "--max_model_len" in line
    assert worker.explain_by_log(failed, "nothing") == failed
    assert worker.explain_by_log("KeyError: 'rope'", log) == "KeyError: 'rope'"


@pytest.mark.slow
def test_adapters_are_merged_ahead_by_one_process(tiny_model: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(tiny_adapter, tmp_path / "damaged")
    (damaged / "adapter_model.safetensors").write_bytes(b"damaged")
    adapters = {str(tmp_path / name): path for name, path in (("a", tiny_adapter), ("b", damaged), ("c", tiny_adapter))}
    merger, others = worker._Merger(), psutil.Process().children()

    def new_processes() -> list[int]:
        children = [child for child in psutil.Process().children() if child not in others]
        return [child.pid for child in children if "spawn_main" in str(child.cmdline())]

    for folder, adapter in adapters.items():
        merger.begin(str(tiny_model), str(adapter), folder)
    started = new_processes()
    first, second, third = adapters
    assert merger.finish(str(tiny_model), str(tiny_adapter), third) == third
    with pytest.raises(Exception, match="header"):
        merger.finish(str(tiny_model), str(damaged), second)
    assert merger.finish(str(tiny_model), str(tiny_adapter), first) == first
    weights = [(Path(folder) / "model.safetensors").read_bytes() for folder in (first, third)]
    assert weights[0] == weights[1]
    shutil.rmtree(first)
    assert merger.finish(str(tiny_model), str(tiny_adapter), first) == first and Path(first).exists(), "merged anew"
    assert new_processes() == started and len(started) == 1
    merger._pool.shutdown()


def test_merged_weights_are_the_base_plus_the_adapter(tiny_model: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    worker.merge(str(tiny_model), str(tiny_adapter), str(tmp_path / "merged"))
    base, merged = load_file(tiny_model / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    adapter = load_file(tiny_adapter / "adapter_model.safetensors")
    assert base.keys() == merged.keys()
    changed = 0
    for name, weight in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        expected = weight.float()
        if f"{key}.lora_A.weight" in adapter:
            expected = expected + 2 * adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"]  # alpha / r = 2
            changed += 1
        assert merged[name].dtype == torch.bfloat16
        assert torch.equal(merged[name], expected.bfloat16()), name
    assert changed == 4
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


def test_an_engine_can_fork_while_requests_are_read() -> None:
    code = """
        import multiprocessing, time
        from evaluation.engines import vllm_worker as worker

        def serve(spec, lines, replies):
            while lines.empty():  # the thread has read one request, and waits for the next
                time.sleep(0.01)
            time.sleep(0.1)
            child = multiprocessing.get_context("fork").Process(target=print)
            child.start()
            child.join(timeout=5)
            worker._send(replies, {"exitcode": child.exitcode})
            child.kill()

        worker._serve = serve
        worker.main()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    ) as process:
        process.stdin.write("{}\n{}\n")
        process.stdin.flush()
        assert process.stdout.readline() == '{"exitcode": 0}\n'


def test_the_engine_computes_while_many_requests_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of vLLM: an engine that answers two requests per step and refuses every third one."""
    submitted_before_steps, waiting, sent = [], [], []

    class Engine:
        submitted = 0

        def __init__(self, *_: object) -> None: ...

        def is_idle(self) -> bool:
            return not waiting

        def submit(self, request: dict, ids: list[int], error: str) -> dict | None:
            self.submitted += 1
            if request["id"] % 3 == 0:
                return {"id": request["id"]}
            waiting.append(request["id"])
            return None

        def step(self) -> list[dict]:
            assert waiting
            submitted_before_steps.append(self.submitted)
            return [{"id": waiting.pop(0)} for _ in range(min(2, len(waiting)))]

    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    for number in range(1000):
        lines.put(json.dumps({"id": number, "kind": "chat", "messages": []}))

    def send(replies: object, message: dict) -> None:
        sent.append(message.get("id"))
        if len(sent) == 1001:  # the answers, and that it is ready
            raise KeyboardInterrupt

    monkeypatch.setattr(worker, "_Engine", Engine)
    monkeypatch.setattr(worker, "_send", send)
    monkeypatch.setattr(worker, "load_tokenizers", lambda models: (None, []))
    monkeypatch.setattr(worker, "PromptEncoder", lambda tokenizer: lambda messages: [])
    monkeypatch.setattr(worker, "_sampling_params", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        worker._serve(
            {"model": "", "check_first": [], "sampling": {}, "lora_path": None, "merge_into": None}, lines, None
        )
    assert sorted(sent[1:]) == list(range(1000))
    steps = zip([0, *submitted_before_steps], submitted_before_steps, strict=False)
    assert max(after - before for before, after in steps) <= worker._MOST_PER_STEP + 1


class Submitted(list):
    """In place of vLLM: requests that were submitted, and refused if their number is negative."""

    def is_idle(self) -> bool:
        return not self

    def submit(self, request: dict, ids: list[int], error: str) -> dict | None:
        if request["id"] < 0:
            return request
        self.append(request["id"])
        return None


@given(gaps=st.lists(st.sampled_from([0.0, 0.01, 0.03]), max_size=6), refused=st.booleans())
@settings(max_examples=20, deadline=None)
def test_an_idle_engine_computes_together_what_arrives_together(gaps: list[float], refused: bool) -> None:
    engine, prepared = Submitted(), queue.SimpleQueue()

    def arrive() -> None:
        for number, gap in enumerate([0.0, *gaps]):
            time.sleep(gap)
            prepared.put(({"id": number}, [], ""))

    if refused:
        prepared.put(({"id": -1}, [], ""))
    thread = threading.Thread(target=arrive)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "_GATHER", 0.5)  # a busy machine may lengthen the gaps
        thread.start()
        answers = list(worker._submit(engine, prepared))
    thread.join()
    assert engine == list(range(len(gaps) + 1))
    assert answers == [{"id": -1}] * refused


def test_an_engine_that_computes_does_not_wait_for_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_GATHER", 10)  # so that a busy machine is not mistaken for a wait
    engine, prepared = Submitted([1]), queue.SimpleQueue()
    prepared.put(({"id": 2}, [], ""))
    began = time.monotonic()
    assert not list(worker._submit(engine, prepared))
    assert engine == [1, 2]
    assert time.monotonic() - began < worker._GATHER / 2


@pytest.fixture(scope="module")
def engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Yield two replicas of the tiny model on vLLM."""
    spec = EngineSpec(tiny_model, CPU_ARGS, GREEDY)
    with contextlib.closing(
        Engine("generator", spec, tmp_path_factory.mktemp("engine") / "log", devices=("", ""))
    ) as model:
        yield model


@pytest.mark.slow
def test_vllm_answers_chats_and_counts_time_and_tokens(engine: Engine) -> None:
    usage = Usage(engine)

    async def ask_all() -> list[Completion]:
        return await asyncio.gather(
            *(usage.chat(prompts.note_messages(row["dialogue"]), group=k) for k, row in enumerate(rows(4)))
        )

    answers = asyncio.run(ask_all())
    assert [prompts.read_note(answer.text) for answer in answers] == [LEARNED_NOTE] * 4
    assert {answer.finish_reason for answer in answers} == {"stop"}
    assert all(answer.prompt_tokens > 100 and answer.output_tokens > 20 for answer in answers)
    assert usage.tokens["cached"] > 0, "the system prompt that all chats share must come from the prefix cache"
    assert engine.ready - engine.started > 1 > 0 < usage.seconds


@pytest.mark.slow
def test_a_first_start_compiles_nothing_and_inspects_no_model_apart(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    assert fresh_answers(EngineSpec(tiny_model, CPU_ARGS, SHORT), tmp_path / "log")
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".cpp", ".so") or path.name == "modelinfos"]


@pytest.mark.slow
def test_each_request_has_its_own_schema_or_none(engine: Engine) -> None:
    chat = prompts.note_messages(rows(1)[0]["dialogue"])
    schemas = [VERDICT_OF, None, ANSWER_OF, NOTE_SCHEMA, VERDICT_OF]
    answers = chats(engine, [Request(chat, group=number, schema=schema) for number, schema in enumerate(schemas)])
    assert [list(json.loads(answer.text)) for answer in answers] == [
        ["verdict"],
        list(prompts.SECTIONS),
        ["answer"],
        list(prompts.SECTIONS),
        ["verdict"],
    ]
    assert prompts.read_note(answers[1].text) == prompts.read_note(answers[3].text) == LEARNED_NOTE
    assert all(answer.text == json.dumps(json.loads(answer.text)) for answer in answers), "no free white space"


@pytest.mark.slow
def test_the_first_token_has_the_probabilities_that_transformers_computes(engine: Engine, tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chat = prompts.note_messages(rows(1)[0]["dialogue"])
    requests = [Request(chat, sampling=more) for more in ({}, *({"logprobs": 5, "max_tokens": n} for n in (3, 1)))]
    plain, asked, one = chats(engine, requests)
    assert plain.first_token is None
    assert one.text == next(iter(one.first_token)) == next(iter(asked.first_token))
    assert one.first_token == pytest.approx(asked.first_token, abs=0.05)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True, **prompts.CHAT_TEMPLATE_KWARGS
    )
    with torch.no_grad():
        best = model(**ids).logits[0, -1].log_softmax(-1).topk(5)
    expected = {
        tokenizer.decode([token]): value for token, value in zip(best.indices, best.values.tolist(), strict=True)
    }
    assert len(asked.first_token) == 5
    assert next(iter(asked.first_token)) == plain.text[: len(next(iter(asked.first_token)))]
    for text in list(expected)[:3]:  # the type of the engine rounds, so equally unlikely tokens may change places
        assert asked.first_token[text] == pytest.approx(expected[text], abs=0.3), text


def test_probabilities_of_tokens_with_the_same_text_add_up() -> None:
    found = first_token([("a", math.log(0.5)), ("b", math.log(0.25)), ("b", math.log(0.125)), ("c", -9999.0)])
    assert found == pytest.approx({"a": math.log(0.5), "b": math.log(0.375), "c": -9999.0})


@pytest.mark.slow
def test_a_prompt_over_the_limit_is_marked_and_the_others_are_answered(engine: Engine) -> None:
    texts = ["A cough.", "word " * 5000, "A cough.", "word " * 5000]
    answers = chats(engine, [Request(prompts.note_messages(text)) for text in texts])
    assert {number: answer.finish_reason for number, answer in enumerate(answers)} == {
        0: "stop",
        1: "prompt_too_long",
        2: "stop",
        3: "prompt_too_long",
    }


@pytest.mark.slow
def test_an_answer_cut_off_at_the_limit_is_marked(engine: Engine) -> None:
    (answer,) = chats(engine, [Request(prompts.note_messages("A cough."), sampling={"max_tokens": 3})])
    assert (answer.finish_reason, answer.output_tokens) == ("length", 3)


@pytest.mark.slow
def test_a_failed_start_gives_one_line_and_leaves_no_process(tiny_model: Path, tmp_path: Path) -> None:
    spec = EngineSpec(tiny_model, CPU_ARGS | {"max_model_len": 1 << 20}, GREEDY)
    with contextlib.closing(Engine("judge", spec, tmp_path / "log")) as model:
        (process,) = model._processes
        with pytest.raises(UserError) as error:
            chats(model, [Request(prompts.note_messages("A cough."))])
    assert str(error.value).startswith("the judge stopped: ")
    assert str(tmp_path / "log") in str(error.value)
    assert "\n" not in str(error.value)
    assert not members(process.pid)


@pytest.fixture
def spread(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> EngineSpec:
    """Split the tiny model over two processes, as over two GPUs. They communicate through shared memory."""
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    return EngineSpec(tiny_model, CPU_ARGS | {"tensor_parallel_size": 2}, GREEDY)


@pytest.mark.slow
def test_a_split_model_answers_the_same_and_leaves_no_process_or_memory(spread: EngineSpec, tmp_path: Path) -> None:
    with contextlib.closing(Engine("judge", spec=spread, log=tmp_path / "log")) as model:
        (answer,) = chats(model, [Request(prompts.note_messages(rows(1)[0]["dialogue"]))])
        group = model._processes[0].pid
        shared = shared_memory(group)
        assert len(members(group)) >= 3 and shared
    assert prompts.read_note(answer.text) == LEARNED_NOTE
    assert not members(group)
    assert not [path for path in shared if path.exists()]


@pytest.mark.slow
def test_an_engine_and_its_children_end_when_the_parent_is_killed(spread: EngineSpec, tmp_path: Path) -> None:
    code = f"""
        import asyncio, time
        from pathlib import Path
        from evaluation.engines.vllm_engine import Engine, EngineSpec
        spec = EngineSpec(Path({str(spread.model)!r}), {spread.vllm_args!r}, {GREEDY!r})
        model = Engine("generator", spec, Path({str(tmp_path / "log")!r}))
        asyncio.run(model.chat([{{"role": "user", "content": "A cough."}}]))
        print(model._processes[0].pid, flush=True)
        time.sleep(600)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    group = int(parent.stdout.readline())
    shared = shared_memory(group)
    assert len(members(group)) >= 3 and shared
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while members(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not members(group)
    assert not [path for path in shared if path.exists()]


def test_killing_a_group_removes_its_shared_memory_but_not_the_files_it_reads() -> None:
    """Use processes like vLLM's: shared memory and a semaphore of Python, memory of C++ code, weights in /dev/shm."""
    code = """
        import mmap, multiprocessing, os, subprocess, sys
        from multiprocessing import shared_memory
        memory = shared_memory.SharedMemory(create=True, size=1000)
        lock = multiprocessing.get_context("spawn").Lock()
        name = f"/dev/shm/{os.getpid()}-cpp"
        with open(name, "w+b") as file:
            file.truncate(1000)
            cpp = mmap.mmap(file.fileno(), 1000)
        with open(sys.argv[1], "rb") as file:
            weights = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        subprocess.Popen(["sleep", "60"])
        print("/dev/shm/" + memory.name, "/dev/shm/sem." + lock._semlock.name[1:], name, flush=True)
        sys.stdin.read()
    """
    kept = Path(f"/dev/shm/{os.getpid()}-weights")
    kept.write_bytes(b"weights")
    try:
        command = [sys.executable, "-c", textwrap.dedent(code), str(kept)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as leader:
            shared = [Path(name) for name in leader.stdout.readline().split()]
            assert [path.exists() for path in shared] == [True] * 3
            kill_groups(leader.pid)
            assert not members(leader.pid)
        assert [path.exists() for path in (*shared, kept)] == [False, False, False, True]
    finally:
        kept.unlink()


@pytest.mark.parametrize("error", [PermissionError(), psutil.AccessDenied()])
def test_a_process_that_cannot_be_killed_is_left_after_the_timeout(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(process: psutil.Process) -> None:
        raise error

    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        with monkeypatch.context() as patch:
            patch.setattr(psutil.Process, "kill", refuse)
            kill_groups(process.pid, patience=0.2)
        assert members(process.pid)
        process.kill()


def test_a_worker_ends_with_its_parent_even_if_its_group_cannot_be_killed() -> None:
    code = """
        import os, time
        from evaluation.engines import vllm_worker as worker

        def refuse(*groups):
            raise PermissionError

        worker.kill_groups = refuse
        worker._serve = lambda *_: time.sleep(60)
        worker.main()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    ended = subprocess.run(command, cwd=ROOT, input="{}\n", text=True, capture_output=True, timeout=20, check=False)
    assert ended.returncode == 1


def test_closing_an_engine_twice_kills_all_replicas_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleeper").write_text("#!/bin/sh\nsleep 60\n")
    (tmp_path / "sleeper").chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "sleeper"))
    killed = []
    monkeypatch.setattr(engine_module, "kill_groups", lambda *groups: (killed.append(groups), kill_groups(*groups)))
    model = Engine("judge", EngineSpec(tmp_path, {}, {}), tmp_path / "log", devices=("", ""))
    groups = tuple(process.pid for process in model._processes)
    model.close()
    model.close()
    assert killed == [groups, ()]
    assert not [pid for pid in groups if members(pid)]


def random_model(kind: str, tied: bool, tokenizer: Path, folder: Path) -> Path:
    """Write a model of two layers and of this type, with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(2)
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        eos_token_id=tokens.eos_token_id,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def edit(folder: Path, name: str, **settings: object) -> None:
    file = folder / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | settings))


# config.json as published with Qwen2.5 and Qwen3, in a tiny shape.
AS_PUBLISHED = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "max_position_embeddings": 32768,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
}
PUBLISHED = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "max_window_layers": 21, "sliding_window": 32768},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "rope_scaling": None},
}


def published_model(kind: str, tokenizer: Path, folder: Path) -> Path:
    """Write a random model in the layout in which Qwen's models are published: the chat template is in the JSON."""
    random_model(kind, True, tokenizer, folder)
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    config = {**AS_PUBLISHED, **PUBLISHED[kind], "model_type": kind, "vocab_size": vocab_size}
    (folder / "config.json").write_text(json.dumps(config))
    template = folder / "chat_template.jinja"
    edit(folder, "tokenizer_config.json", chat_template=template.read_text())
    template.unlink()
    generation = {"bos_token_id": 0, "eos_token_id": [2, 0], "do_sample": True, "transformers_version": "4.51.0"}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def fine_tuned(base: Path, folder: Path) -> Path:
    """Write a copy of `base` with other weights, as the installed transformers saves a model after training."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    noise = torch.Generator().manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model.config.use_cache = False  # as training sets it
    for weight in model.parameters():
        weight.data = (weight.float() * (1 + 0.3 * torch.randn(weight.shape, generator=noise))).to(weight.dtype)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer(["short", "a longer text"], padding=True, truncation=True, max_length=2)  # leaves its mark in the file
    tokenizer.save_pretrained(folder)
    return folder


def answers_of(model: Engine) -> list[str]:
    requests = [Request(prompts.note_messages(row["dialogue"]), group=k) for k, row in enumerate(rows(4))]
    return [answer.text for answer in chats(model, requests)]


async def load_and_answer(model: Engine, specs: list[EngineSpec]) -> list[list[str]]:
    """Return the answers to the same prompts before, and after each load. So all prompts are in the prefix cache."""
    found = []
    for spec in (None, *specs):
        assert spec is None or await model.load(spec)
        chat = [prompts.note_messages(row["dialogue"]) for row in rows(4)]
        answers = await asyncio.gather(*(model.chat(messages, group=k) for k, messages in enumerate(chat)))
        found.append([answer.text for answer in answers])
    return found


RELOAD_ARGS = CPU_ARGS | {"dtype": "bfloat16"}
SHORT = GREEDY | {"max_tokens": 60}


def fresh_answers(spec: EngineSpec, log: Path) -> list[str]:
    with contextlib.closing(Engine("generator", spec, log)) as model:
        return answers_of(model)


@pytest.mark.slow
def test_a_published_base_its_fine_tune_and_adapter_share_one_start(tiny_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = published_model("qwen2", tiny_model, tmp_path / "base")
    tuned = fine_tuned(base, tmp_path / "tuned")
    assert json.loads((base / "config.json").read_text()) != json.loads((tuned / "config.json").read_text())
    assert (tuned / "chat_template.jinja").exists() and not (base / "chat_template.jinja").exists()
    settings = LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(tmp_path / "adapter")
    plain, second = (EngineSpec(path, RELOAD_ARGS, SHORT) for path in (base, tuned))
    merged = [replace(plain, lora_path=tmp_path / "adapter", merge_into=tmp_path / place) for place in ("one", "two")]
    with contextlib.closing(Engine("generator", plain, tmp_path / "log", devices=("", ""))) as model:
        first_start = model.ready, model.started
        before, changed, adapted, again = asyncio.run(load_and_answer(model, [second, merged[0], plain]))
        assert (model.ready, model.started) != first_start
        assert len({process.pid for process in model._processes}) == 2
        assert not model.settings["merged"]
    assert before == again
    assert changed == fresh_answers(second, tmp_path / "log") != before
    assert adapted == fresh_answers(merged[1], tmp_path / "log") != before


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("qwen3", False)])
def test_each_reloaded_architecture_answers_like_a_fresh_engine(
    kind: str, tied: bool, tiny_model: Path, tmp_path: Path
) -> None:
    one = random_model(kind, tied, tiny_model, tmp_path / "one")
    first, second = (EngineSpec(path, RELOAD_ARGS, SHORT) for path in (one, perturbed(one, tmp_path / "two")))
    with contextlib.closing(Engine("generator", first, tmp_path / "log")) as model:
        before, after = asyncio.run(load_and_answer(model, [second]))
    assert after == fresh_answers(second, tmp_path / "log") != before


@pytest.mark.slow
def test_all_parts_of_a_split_model_load_the_weights(spread: EngineSpec, tmp_path: Path) -> None:
    other = replace(spread, model=perturbed(spread.model, tmp_path / "other"), sampling=SHORT)
    with contextlib.closing(Engine("generator", replace(spread, sampling=SHORT), tmp_path / "log")) as model:
        before, after = asyncio.run(load_and_answer(model, [other]))
    assert after == fresh_answers(other, tmp_path / "log") != before


def drop_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_configuration_of_another_layout_has_the_same_meaning(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    base = published_model(kind, tiny_model, tmp_path / "base")
    tuned = fine_tuned(base, tmp_path / "tuned")
    check_same_network(str(base), str(tuned))
    cases = [
        ("config.json", {"rope_theta": 10000.0}, "rope_parameters"),
        ("config.json", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters"),
        ("config.json", {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ("config.json", {"dtype": "float32"}, "dtype"),
        ("config.json", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("config.json", {"max_position_embeddings": 4096}, "max_position_embeddings"),
        ("config.json", {"use_sliding_window": True, "sliding_window": 512}, "sliding_window"),
        ("config.json", {"head_dim": 16}, "head_dim"),
        ("config.json", {"vocab_size": 7}, "vocab_size"),
        ("config.json", {"eos_token_id": 5}, "eos_token_id"),
        ("generation_config.json", {"eos_token_id": 5}, "generation_config"),
        ("tokenizer_config.json", {"eos_token": "<think>"}, "special_tokens"),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, "tokenizer"),
    ]
    for number, (name, edits, cause) in enumerate(cases):
        other = shutil.copytree(tuned, tmp_path / f"{number}")
        edit(other, name, **edits)
        with pytest.raises(UserError, match=f"^{cause} of "):
            check_same_network(str(base), str(other))
    (tuned / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(UserError, match=r"^chat_template of "):
        check_same_network(str(base), str(tuned))


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        (lambda folder: None, True),
        (lambda folder: edit(folder, "config.json", architectures=["MambaForCausalLM"]), False),
        (lambda folder: edit(folder, "config.json", quantization_config={"bits": 4}), False),
        (drop_tensor, False),
    ],
)
def test_models_that_cannot_be_loaded_start_afresh_at_once(change, fits, tiny_model: Path, tmp_path: Path) -> None:
    other = perturbed(tiny_model, tmp_path / "other")
    change(other)
    running, wanted = (EngineSpec(path, CPU_ARGS, GREEDY) for path in (tiny_model, other))
    assert can_reload(running, wanted) is can_reload(wanted, running) is fits


@pytest.mark.parametrize(
    "argument",
    [{"load_format": "dummy"}, {"enable_lora": True}, {"quantization": "fp8"}, {"hf_overrides": {"rope_theta": 7.0}}],
)
def test_arguments_that_change_the_weights_need_a_new_engine(argument: dict, tiny_model: Path) -> None:
    spec = EngineSpec(tiny_model, CPU_ARGS | argument, GREEDY)
    assert not can_reload(spec, spec)


async def answer_in_turn(model: Engine, specs: list[EngineSpec | None]) -> list[list[str]]:
    """Like `load_and_answer`, one prompt at a time: on a GPU, a prompt's numbers depend on those computed with it."""
    found = []
    for spec in specs:
        assert spec is None or await model.load(spec)
        messages = [prompts.note_messages(row["dialogue"]) for row in rows(4)]
        found.append([(await model.chat(message, group=0)).text for message in messages])
    return found


def on_gpus(model: Path, count: int) -> Placement:
    """Return where eval.py would run a generator on this many GPUs of 80 GiB."""
    gpus = [Gpu(f"{k}", "H100", 80 << 30, 79 << 30) for k in range(count)]
    config = json.loads((model / "config.json").read_text())
    return plan_engines(gpus, memory_needs("tiny", config, 0, 1024), None, 0.3).generator


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("extra", [{}, {"enforce_eager": True}])
def test_an_engine_placed_by_the_plan_can_load_other_weights(count: int, extra: dict, tiny_model: Path) -> None:
    args = VLLM_DEFAULTS | on_gpus(tiny_model, count).vllm_args | extra
    spec = EngineSpec(tiny_model, args, GREEDY)
    assert can_reload(spec, spec)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("qwen2", True), ("qwen3", True)])
def test_on_a_gpu_cuda_graphs_use_the_reloaded_weights(kind: str, tied: bool, tiny_model: Path, tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    one = random_model(kind, tied, tiny_model, tmp_path / "one")
    args = VLLM_DEFAULTS | on_gpus(one, 1).vllm_args
    assert args["compilation_config"]["cudagraph_mode"] == "FULL_DECODE_ONLY"
    first, second = (EngineSpec(path, args, SHORT) for path in (one, perturbed(one, tmp_path / "two")))
    with contextlib.closing(Engine("generator", first, tmp_path / "log")) as model:
        before, after, again = asyncio.run(answer_in_turn(model, [None, second, first]))
    with contextlib.closing(Engine("generator", second, tmp_path / "log")) as model:
        [fresh] = asyncio.run(answer_in_turn(model, [None]))
    assert before == again
    assert after == fresh != before


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({}, False),
        ({"enforce_eager": True}, True),
        ({"enforce_eager": False, "compilation_config": {"mode": 0}}, True),
        ({"compilation_config": 0}, True),
        ({"compilation_config": {"mode": "NONE"}}, True),
        ({"compilation_config": {"mode": 3}}, False),
        ({"compilation_config": {"cudagraph_mode": "NONE"}}, False),
        ({"compilation_config": 3}, False),
    ],
)
def test_torch_compile_is_off_only_if_the_arguments_turn_it_off(args: dict, expected: bool) -> None:
    assert compiles_nothing(args) is expected


def test_other_arguments_and_adapters_at_run_time_need_a_new_engine(tiny_model: Path, tiny_adapter: Path) -> None:
    spec = EngineSpec(tiny_model, CPU_ARGS, GREEDY)
    assert can_reload(spec, spec)
    assert not can_reload(spec, EngineSpec(tiny_model, CPU_ARGS | {"max_model_len": 512}, GREEDY))
    assert not can_reload(spec, EngineSpec(tiny_model, CPU_ARGS, GREEDY | {"max_tokens": 9}))
    assert not can_reload(spec, EngineSpec(tiny_model, CPU_ARGS, GREEDY, tiny_adapter))
    assert can_reload(spec, EngineSpec(tiny_model, CPU_ARGS, GREEDY, tiny_adapter, Path("merged")))


def members(group: int) -> list[psutil.Process]:
    """Return the running processes of the group, without zombies, which hold no memory."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def shared_memory(group: int) -> set[Path]:
    """Return the files in /dev/shm that the group's processes map."""
    maps = [area.path for process in members(group) for area in process.memory_maps()]
    return {Path(path) for path in maps if path.startswith("/dev/shm/")}
