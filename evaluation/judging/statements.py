"""Judge a note statement by statement: one yes/no question for each sentence, answered by one token.

Covered: does the note's section say this sentence of the reference? Supported: is this sentence of the note supported
by the dialogue or the expert's note? The answer is the log odds of the judge's first token, so that a threshold can be
fitted to texts whose right verdict is known (evaluation.scoring.statements).
"""

import asyncio
import math
import re
from collections.abc import Awaitable, Callable
from typing import Any

import prompts
from evaluation.engines.base import Usage
from evaluation.judging.judge import Case
from evaluation.judging.sentences import split_statements
from evaluation.run.records import Judgement, Statement, StatementRecord

# One greedy token. 20 is the most alternatives that OpenAI's interface and vLLM's default settings give.
SAMPLING: dict[str, Any] = {"temperature": 0, "max_tokens": 1, "logprobs": 20}
LEAST = 1e-20  # probability in a bound; OpenAI and vLLM send -9999 as the logarithm of unlikely ones
LEAST_SHARE = 0.499  # of the first token's probability, for "yes" and "no" together: half, less rounding
_AROUND_WORD = re.compile(r"^[\W_]+|[\W_]+$")  # white space, punctuation, markup


async def ask_statements(model: Usage, case: Case, reference: prompts.Note) -> StatementRecord:
    """Return the answers on all statements of `case`; equal statements are asked once.

    `reference` is the expert's whole note. Raises UserError if the model stops.
    """

    async def ask(statement: str, messages: Callable[[str], prompts.Messages]) -> float | None:
        completion = await model.chat(messages(statement), group=case.index, **SAMPLING)
        return log_odds(completion.first_token)

    def covered(statement: str) -> prompts.Messages:
        return prompts.covered_messages(case.prediction, statement)

    def supported(statement: str) -> prompts.Messages:
        return prompts.supported_messages(case.dialogue, reference, statement)

    answers = await asyncio.gather(
        _answer_all(split_statements(case.reference), lambda statement: ask(statement, covered)),
        _answer_all(split_statements(case.prediction), lambda statement: ask(statement, supported)),
    )
    return {
        **{key: getattr(case, key) for key in ("index", "section", "control", "attack")},
        "reason": "",
        "status": "asked",
        "covered": answers[0],
        "supported": answers[1],
    }


async def _answer_all(statements: list[str], ask: Callable[[str], Awaitable[float | None]]) -> list[Statement]:
    distinct = list(dict.fromkeys(statements))
    answers = dict(zip(distinct, await asyncio.gather(*map(ask, distinct)), strict=True))
    return [{"statement": statement, "log_odds": answers[statement]} for statement in statements]


def log_odds(first_token: dict[str, float] | None) -> float | None:
    """Return ln P(yes) / P(no) from the log-probabilities of the likeliest first tokens.

    Spellings are added up ("Yes", " yes.", "**Yes"). If one of the two words is not among the tokens, it gets the least
    likely token's probability or all that is left, whichever is less, which gives a bound. Return None if the two words
    together have less than half of the probability: the model answered something else.
    """
    found = {"yes": [], "no": []}
    for token, log_probability in (first_token or {}).items():
        word = _AROUND_WORD.sub("", token).lower()
        if word in found:
            found[word].append(math.exp(log_probability))
    yes, no = map(math.fsum, found.values())
    if yes + no < LEAST_SHARE:
        return None
    rest = 1 - math.fsum(map(math.exp, first_token.values()))
    least = max(min(math.exp(min(first_token.values())), rest if rest > 0 else 1), LEAST)
    return round(math.log(yes or least) - math.log(no or least), 3)


def decided_statement(judgement: Judgement, reference: str) -> StatementRecord:
    """Return the record of a section that a rule decided without the judge. `reference` is the expert's section."""
    return {
        **{key: judgement[key] for key in ("index", "section", "control", "attack", "reason")},
        "status": "unscored" if judgement["verdict"] == "unscored" else "missing",
        "covered": [{"statement": statement, "log_odds": None} for statement in split_statements(reference)],
        "supported": [],
    }
