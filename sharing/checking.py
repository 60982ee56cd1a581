"""Ask a judge which statements of a note the dialogue does not support, with the prompts of evaluation.

A statement counts as unsupported if the judge finds "no" likelier than "yes". Evaluation fits this threshold to texts
whose right verdict is known; here there are none.
"""

from typing import Any, NamedTuple

import prompts
from evaluation.judging.sentences import split_statements
from evaluation.judging.statements import log_odds
from sharing.writers import LocalModel, ServedModel

NO_REFERENCE = dict.fromkeys(prompts.SECTIONS, "")  # evaluation also shows the judge an expert's note


class Check(NamedTuple):
    """The statements of a note that the judge calls unsupported, and how many it was asked and did not answer."""

    unsupported: list[dict[str, Any]]  # section, statement, and log_odds: ln P(yes) / P(no), below 0
    asked: int
    unanswered: int


def check_note(judge: LocalModel | ServedModel, dialogue: str, note: prompts.Note) -> Check:
    """Return the judge's opinion on each statement of `note`. Raises UserError."""
    statements = [(section, text) for section in prompts.SECTIONS for text in split_statements(note[section])]
    chats = [prompts.supported_messages(dialogue, NO_REFERENCE, text) for _, text in statements]
    answers = [log_odds(tokens) for tokens in judge.first_tokens(chats)]
    unsupported = [
        {"section": section, "statement": text, "log_odds": answer}
        for (section, text), answer in zip(statements, answers, strict=True)
        if answer is not None and answer < 0
    ]
    return Check(unsupported, len(statements), answers.count(None))
