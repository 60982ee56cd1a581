"""Start the judge, ask it for verdicts, and repeat the questions whose replies cannot be read."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.dataset import Row
from evaluation.engines.base import LanguageModel, Usage
from evaluation.engines.models import Model
from evaluation.engines.placement import Placement
from evaluation.engines.server import Server, key_of_judge
from evaluation.engines.vllm_engine import VLLM_DEFAULTS, Engine, EngineSpec
from evaluation.judging import judge
from evaluation.judging.attacks import attack_cases
from evaluation.judging.known_answers import control_cases
from evaluation.options import Options
from evaluation.run.records import Judgement

MAX_TOKENS = 192  # a verdict with a reason of 200 characters takes about 60
TRIES = 3  # for a verdict that cannot be read
SEED = 0  # for controls and attacks
SOURCE_ROWS = 250  # that may be read for each control or attack of a section; bounds time and memory


def sampling(options: Options) -> dict[str, Any]:
    """Return the judge's sampling settings."""
    return {"temperature": 0, "max_tokens": MAX_TOKENS, **options.judge_sampling_args}


def start_judge(options: Options, model: Model | None, log: Path, placement: Placement | None) -> LanguageModel:
    """Start the model that judges; it may not be ready yet when this returns."""
    if options.judge_api_base:
        served = (options.judge_api_base, options.judge_model, sampling(options))
        return Server("judge", *served, concurrency=options.api_concurrency, key_variable=key_of_judge())
    vllm_args = {**VLLM_DEFAULTS, **placement.vllm_args, **options.judge_engine_args}
    spec = EngineSpec(model.path, vllm_args, sampling(options))
    return Engine("judge", spec, log, placement.devices)


async def judge_case(model: Usage, case: judge.Case, sampling: dict[str, Any]) -> Judgement:
    """Return the verdict on `case`, unscored if none of up to TRIES replies can be read.

    `sampling` holds the sampling settings of `model`. Raises UserError.
    """
    messages, changes = case.messages(), {}
    for attempt in range(1, TRIES + 1):
        reply = await model.chat(messages, group=case.index, schema=judge.VERDICT_SCHEMA, **changes)
        verdict, reason = judge.read_verdict(reply.text, reply.finish_reason, reply.error)
        if verdict != "unscored" or reply.finish_reason == "prompt_too_long":
            break
        changes = sampling_of_retry(sampling, attempt + 1)
    return case.record(verdict, reason, raw=reply.text, attempts=attempt)


def sampling_of_retry(sampling: dict[str, Any], attempt: int) -> dict[str, Any]:
    """Return the changes to `sampling` for the second and the third attempt at a readable verdict.

    Greedy decoding repeats itself, so the second attempt gets more tokens, and the third also samples at random, with a
    seed that does not depend on other requests.
    """
    room = {"max_tokens": 4 * sampling["max_tokens"]} if sampling.get("max_tokens") else {}
    if attempt == 2:
        return room
    return room | {"temperature": max(0.5, sampling["temperature"] or 0), "seed": sampling.get("seed", 0)}


def known_cases(rows: Sequence[Row], controls: int, attacks: int) -> list[judge.Case]:
    """Return, for each section, `controls` good and `controls` bad cases, and `attacks` attacks with their baselines.

    The same rows always give the same cases. They are made from at most SOURCE_ROWS rows for each requested case.
    """
    if not controls and not attacks:
        return []
    most, indices = SOURCE_ROWS * max(controls, attacks), range(len(rows))
    if len(rows) > most:
        indices = sorted(random.Random(SEED).sample(indices, most))
    sources = {index: rows[index] for index in indices}
    return [*control_cases(sources, controls, SEED), *attack_cases(sources, attacks, SEED)]
