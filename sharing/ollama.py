"""Write an Ollama Modelfile that builds the same prompts as evaluation.

https://github.com/ollama/ollama/blob/main/docs/modelfile.md
"""

from typing import TYPE_CHECKING

import prompts
from common.chat_template import render_chat
from common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM, _USER = "SYSTEM-MESSAGE", "USER-MESSAGE"  # replaced by Ollama's variables
_QUOTES = '"""'


def ollama_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the tokenizer's chat template for one question as a Go template with .System, .Prompt and .Response.

    Raises UserError if it contains triple quotes, which a Modelfile cannot hold.
    """
    text = render_chat(tokenizer, [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}])
    begin = tokenizer.bos_token
    if begin and text.startswith(begin) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        text = text.removeprefix(begin)  # Ollama adds it, too
    text = text.replace("{{", '{{ "{{" }}')
    for placeholder, variable in ((_SYSTEM, "{{ .System }}"), (_USER, "{{ .Prompt }}")):
        text = text.replace(placeholder, variable)
    if _QUOTES in text:
        raise UserError('the chat template contains """, which a Modelfile cannot hold; change the template')
    return text + "{{ .Response }}"


def modelfile(tokenizer: "PreTrainedTokenizerBase", weights: str, stops: list[str], context: int) -> str:
    """Return the Modelfile of the model in `weights`: a path relative to it, e.g. "." or "./model.gguf".

    `stops` are the texts that end a reply; `context` is the maximum of prompt and reply, in tokens. The other
    parameters make Ollama decode as eval.py does: greedily and without penalties.
    """
    parameters = ["temperature 0", "repeat_penalty 1", f"num_ctx {context}", "num_predict 1024"]
    parameters += [f'stop "{stop}"' for stop in stops]
    return "\n".join(
        [
            "# ollama create soap-notes -f Modelfile",
            "# Give it a dialogue as the only message. Not for clinical use.",
            f"FROM {weights}",
            f"TEMPLATE {_QUOTES}{ollama_template(tokenizer)}{_QUOTES}",
            f"SYSTEM {_QUOTES}{prompts.SYSTEM_PROMPT}{_QUOTES}",
            *(f"PARAMETER {parameter}" for parameter in parameters),
            "",
        ]
    )
