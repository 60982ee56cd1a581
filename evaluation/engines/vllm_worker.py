"""The process that owns one vLLM engine: `python -m evaluation.engines.vllm_worker`, started by vllm_engine.py.

It reads lines of JSON from stdin: the specification of the engine, then requests. It writes lines of JSON to stdout:
any `line` for the user, then `ready`, `refused` or `failed`, then each answer as it finishes. A request of the kind
`load` replaces the weights; it comes only when all others have answers. One of the kind `merge`, which has no answer,
says which adapter a later one will load. Everything that libraries print goes to stderr, which is a log file. When
stdin ends, because the parent is done or dead, the worker kills its process group, which frees the GPU memory, the
shared memory and vLLM's child processes.
"""

import contextlib
import gc
import json
import multiprocessing
import os
import queue
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from common.chat_template import PromptEncoder, TemplateError, load_tokenizers
from common.errors import UserError
from common.files import lock
from common.merging import load_merged
from evaluation.engines.base import first_token
from evaluation.engines.processes import kill_groups
from evaluation.engines.reload import check_same_network, reload

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams

Prepared = tuple[dict[str, Any], list[int], str]  # a request, its tokens, and why they could not be made, or ""

# If the schema allowed any white space, a model could write it until its tokens run out.
NO_FREE_WHITE_SPACE = {"backend": "xgrammar", "disable_any_whitespace": True}

_NO_MEMORY = re.compile(
    r"out of memory|No available memory|KV cache is needed|Free memory on device|Available memory on node"
)
_ADVICE = "free the GPU, reduce --max_model_len, or change --gpu_memory_utilization"

# Requests to submit between two steps. More of them would wait anyway, and the GPU for their submission.
_MOST_PER_STEP = 256
# Seconds that an idle engine waits for a further request. A prompt's last bits depend on what is computed with it, so
# equal runs should compute the same prompts together.
_GATHER = 0.2

APPLY_AT_RUN_TIME = "pass --engine_args '{\"enable_lora\": true}' to let vLLM apply the adapter at run time"


def main() -> int:
    """Serve until stdin ends. Return 1 if the engine cannot start, or fails."""
    gc.disable()  # imports create no garbage; searching for it takes a quarter of their time
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    requests = os.fdopen(os.dup(sys.stdin.fileno()), encoding="utf-8")
    # A forked child closes sys.stdin. That would wait forever for the lock of the thread that reads from it.
    sys.stdin = Path(os.devnull).open()  # noqa: SIM115
    spec = json.loads(requests.readline())
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_lines, args=(requests, lines), daemon=True).start()
    try:
        _serve(spec, lines, replies)
    except TemplateError as error:
        print(error, file=sys.stderr)
        _send(replies, {"refused": str(error)})
    except Exception as error:
        traceback.print_exc()
        _send(replies, {"failed": explain(error)})
    return 1


def explain(error: BaseException) -> str:
    """Return the cause of an engine's failure in one line and, if memory ran out, what to try."""
    text = " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY.search(text):
        return f"not enough memory ({text[:160]}); {_ADVICE}"
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text[:300] or 'no message'}"


def explain_by_log(failed: str, log: str) -> str:
    """Like `explain`, for failures in vLLM's child processes, whose cause appears only in the log.

    `failed` is the message of the parent process; `log` is the part of the log that this start wrote.
    """
    cause = [line for line in log.splitlines() if _NO_MEMORY.search(line)] if "root cause" in failed else []
    return f"not enough memory ({' '.join(cause[-1].split())[-160:]}); {_ADVICE}" if cause else failed


def import_model_class(model: str) -> None:
    """Import vLLM's class for the model in a folder.

    Otherwise vLLM inspects it in a process of its own at a machine's first start, which imports everything again. That
    keeps CUDA out of a process that may fork later; this one spawns its children.
    """
    from vllm import ModelRegistry

    config = json.loads(Path(model, "config.json").read_text(encoding="utf-8"))
    for name in config.get("architectures") or []:
        with contextlib.suppress(ImportError):  # then vLLM may know another class for it
            if known := ModelRegistry.models.get(name):
                ModelRegistry.register_model(name, known.load_model_cls())


def merge(model: str, adapter: str, folder: str) -> str:
    """Merge `adapter` into `model` in float32, save the result to `folder` in the model's own type, return `folder`.

    Replicas that start together merge only once. Raises UserError if the result is not the model that was trained.
    """
    from transformers import AutoTokenizer

    with lock(Path(f"{folder}.lock"), wait=True):
        if not Path(folder).exists():
            partial = f"{folder}.incomplete"
            load_merged(model, adapter, APPLY_AT_RUN_TIME).save_pretrained(partial)
            AutoTokenizer.from_pretrained(model).save_pretrained(partial)
            Path(partial).rename(folder)
    return folder


class _Merger:
    """Merge adapters in a process of its own: after vLLM starts, PEFT assumes a distributed process group.

    The process stays, because its imports take longer than a merge.
    """

    def __init__(self):
        self._pool: ProcessPoolExecutor | None = None
        self._begun: dict[str, Future[str]] = {}  # by merge_into

    def begin(self, model: str, lora_path: str | None, merge_into: str | None) -> None:
        """Start `merge` with these arguments, unless it has begun or there is nothing to merge."""
        if merge_into and merge_into not in self._begun:
            self._pool = self._pool or ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            self._begun[merge_into] = self._pool.submit(merge, model, lora_path, merge_into)

    def finish(self, model: str, lora_path: str | None, merge_into: str | None) -> str:
        """Return `merge_into` once it holds the result of `merge`, or `model` if there is nothing to merge.

        Raises the errors of `merge`.
        """
        self.begin(model, lora_path, merge_into)
        return self._begun.pop(merge_into).result() if merge_into else model


def _read_lines(requests: TextIO, lines: queue.SimpleQueue) -> None:
    try:
        for line in requests:
            lines.put(line)
        kill_groups(os.getpgrp())
    finally:
        os._exit(1)


def _send(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")


def _serve(spec: dict[str, Any], lines: queue.SimpleQueue, replies: TextIO) -> None:
    merger = _Merger()
    merger.begin(spec["model"], spec["lora_path"], spec["merge_into"])  # while vLLM and all else is imported
    # Report faulty tokenizers and templates before the engine's long start.
    tokenizer, lines_for_user = load_tokenizers([spec["model"], *spec["check_first"]])
    for line in lines_for_user:
        _send(replies, {"line": line})
    _sampling_params(spec["sampling"], None)  # raises if the parameters are invalid
    # Tokenize prompts while the engine starts and while it computes.
    prepared: queue.SimpleQueue[Prepared] = queue.SimpleQueue()
    encode = PromptEncoder(tokenizer)
    threading.Thread(target=_prepare, args=(lines, encode, prepared), daemon=True).start()
    engine = _Engine(spec, tokenizer, merger)
    gc.enable()
    _send(replies, {"ready": True})
    while True:
        for answer in _submit(engine, prepared):
            _send(replies, answer)
        if not engine.is_idle():
            for answer in engine.step():
                _send(replies, answer)


def _submit(engine: "_Engine", prepared: "queue.SimpleQueue[Prepared]") -> Iterator[dict[str, Any]]:
    """Submit the requests that are ready, and yield the replies to those that vLLM does not take.

    An idle engine waits for a request, and then until none has come for _GATHER seconds.
    """
    patience = _GATHER if engine.is_idle() else 0
    for _ in range(_MOST_PER_STEP):
        try:
            request = prepared.get(timeout=None if engine.is_idle() else patience)
        except queue.Empty:
            return
        if answer := engine.submit(*request):
            yield answer


class _Engine:
    """vLLM with the model, adapter and arguments of an EngineSpec."""

    def __init__(self, spec: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", merger: _Merger):
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self._model, self._sampling, self._adapter = spec["model"], spec["sampling"], None
        self._merger, model = merger, merger.finish(spec["model"], spec["lora_path"], spec["merge_into"])
        if spec["lora_path"] and not spec["merge_into"]:
            self._adapter = LoRARequest("adapter", 1, spec["lora_path"])
        import_model_class(model)
        gc.freeze()  # once it is up, vLLM collects garbage and freezes the rest; it need not search what was imported
        # vLLM 0.23 reads this from the engine's settings only, not from a request.
        self._llm = LLM(model=model, **{"structured_outputs_config": NO_FREE_WHITE_SPACE, **spec["vllm_args"]})
        self._engine, self._limit = self._llm.llm_engine, self._llm.model_config.max_model_len
        self._text_of = cache(lambda token: tokenizer.decode([token]))

    def is_idle(self) -> bool:
        """Return whether all requests have answers."""
        return not self._engine.has_unfinished_requests()

    def submit(self, request: dict[str, Any], ids: list[int], error: str) -> dict[str, Any] | None:
        """Submit a request. Return a reply at once if vLLM rejects it, or after a weight load."""
        if request["kind"] == "load":
            self._load(**request["weights"])
            return no_answer(request["id"], "loaded", 0)
        if request["kind"] == "merge":
            self._merger.begin(**request["weights"])
            return None
        if not error and len(ids) >= self._limit:
            return no_answer(request["id"], "prompt_too_long", len(ids))
        if not error:
            try:
                sampling = _sampling_params({**self._sampling, **request["sampling"]}, request["schema"])
                prompt = {"prompt_token_ids": ids}
                self._engine.add_request(str(request["id"]), prompt, sampling, lora_request=self._adapter)
                return None
            except ValueError as cause:  # e.g. a token that the model does not have
                error = explain(cause)
        print(f"request {request['id']}: {error}", file=sys.stderr)
        return no_answer(request["id"], "error", len(ids), error)

    def _load(self, model: str, lora_path: str | None, merge_into: str | None) -> None:
        check_same_network(self._model, model)
        reload(self._llm, self._merger.finish(model, lora_path, merge_into))

    def step(self) -> list[dict[str, Any]]:
        """Compute one step of all requests, and return the replies that are now complete."""
        return [_completion(output, self._text_of) for output in self._engine.step() if output.finished]


def _sampling_params(parameters: dict[str, Any], schema: dict[str, Any] | None) -> "SamplingParams":
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    structured = schema and _structured(json.dumps(schema))
    if "logprobs" in parameters and parameters.get("max_tokens") == 1 and not parameters.get("stop"):
        # To turn tokens into text, vLLM first decodes the whole prompt, which takes longer than all else that it does
        # for such a request. `_completion` does it instead.
        parameters = {"detokenize": False, **parameters}
    return SamplingParams(**parameters, output_kind=RequestOutputKind.FINAL_ONLY, structured_outputs=structured)


@cache
def _structured(schema: str) -> "StructuredOutputsParams":
    from vllm.sampling_params import StructuredOutputsParams

    return StructuredOutputsParams(json=schema)


def _prepare(
    lines: queue.SimpleQueue, encode: Callable[[list], list[int]], prepared: "queue.SimpleQueue[Prepared]"
) -> None:
    """Tokenize prompts: put (request, tokens, error) into `prepared`. `error` is empty, or says why it failed."""
    while True:
        request = json.loads(lines.get())
        try:
            ids, error = encode(request["messages"]) if request["kind"] == "chat" else [], ""
        except Exception as cause:  # a library fails on this one text: only this request gets no answer
            ids, error = [], explain(cause)
        prepared.put((request, ids, error))


def no_answer(number: int, reason: str, prompt_tokens: int, error: str = "") -> dict[str, Any]:
    """Return the reply to a request that vLLM cannot take."""
    return {"id": number, "text": "", "finish_reason": reason, "prompt_tokens": prompt_tokens, "error": error}


def _completion(output: Any, text_of: Callable[[int], str]) -> dict[str, Any]:
    completion = output.outputs[0]
    text, tokens = completion.text, None
    if completion.logprobs:
        likeliest = completion.logprobs[0]
        if any(token.decoded_token is None for token in likeliest.values()):  # see `_sampling_params`
            text = "".join(map(text_of, completion.token_ids))
        tokens = ((token.decoded_token or text_of(number), token.logprob) for number, token in likeliest.items())
    return {
        "id": int(output.request_id),
        "text": text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "output_tokens": len(completion.token_ids),
        "cached_tokens": output.num_cached_tokens or 0,
        "first_token": tokens and first_token(tokens),
    }


if __name__ == "__main__":
    sys.exit(main())
