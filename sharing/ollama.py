"""Write an Ollama Modelfile that builds the same prompts as evaluation.

https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx
"""

import re
from typing import TYPE_CHECKING

import prompts
from common.chat_template import render_chat
from sharing.llama_cpp import CONVERTER, GGUF

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM, _USER = "SYSTEM-MESSAGE", "USER-MESSAGE"  # replaced by Ollama's variables
_QUOTES = '"""'
# Braces begin an action, triple quotes end the template, and Ollama drops characters that Go cannot print. Every brace:
# one just before an action would become part of it.
_SPECIAL = re.compile(r"\{+|\"{3,}|.", re.DOTALL)


def ollama_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the tokenizer's chat template for one question as a Go template with .System, .Prompt and .Response."""
    text = render_chat(tokenizer, [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}])
    begin = tokenizer.bos_token
    if begin and text.startswith(begin) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        text = text.removeprefix(begin)  # Ollama adds it, too
    text = _SPECIAL.sub(lambda match: _go_literal(match[0]), text)
    for placeholder, variable in ((_SYSTEM, "{{ .System }}"), (_USER, "{{ .Prompt }}")):
        text = text.replace(placeholder, variable)
    return text + "{{ .Response }}"


def _go_literal(text: str) -> str:
    """Return what writes `text` in a Go template in a Modelfile: itself, or else an action with a string."""
    if text[0] != "{" and len(text) == 1 and (text.isprintable() or text in "\n\t"):
        return text
    escaped = "".join(c if c == "{" else f"\\U{ord(c):08x}" for c in text)
    return f'{{{{ "{escaped}" }}}}'


def modelfile(tokenizer: "PreTrainedTokenizerBase", stops: list[str], context: int) -> str:
    """Return the Modelfile of the model in model.gguf beside it.

    `stops` are the texts that end a reply; `context` is the maximum of prompt and reply, in tokens. The other
    parameters make Ollama decode as eval.py does: greedily and without penalties. It is always for a GGUF file:
    from safetensors, Ollama builds only some architectures, and for Qwen3 it ignores the template below
    (https://github.com/ollama/ollama/blob/main/docs/import.mdx).
    """
    parameters = ["temperature 0", "repeat_penalty 1", f"num_ctx {context}", "num_predict 1024"]
    parameters += [f'stop "{stop}"' for stop in stops]
    return "\n".join(
        [
            "# ollama create soap-notes -f Modelfile",
            '# ollama run soap-notes "$(cat visit.txt)"',
            "# Give it a dialogue as the only message. Not for clinical use.",
            f"# If {GGUF} is missing, write it with llama.cpp: python {CONVERTER} . --outfile {GGUF}",
            f"FROM ./{GGUF}",
            f"TEMPLATE {_QUOTES}{ollama_template(tokenizer)}{_QUOTES}",
            f"SYSTEM {_QUOTES}{prompts.SYSTEM_PROMPT}{_QUOTES}",
            *(f"PARAMETER {parameter}" for parameter in parameters),
            "",
        ]
    )
