"""The JSON schema of a note, for engines and servers that must write this form."""

import prompts

# The texts have no maxLength, which in vLLM 0.23 (xgrammar 0.2.8) would forbid line breaks and quotes, and at 2,000
# characters would take milliseconds of CPU time for each token. --max_new_tokens ends endless texts.
NOTE_SCHEMA = {
    "type": "object",
    "properties": {section: {"type": "string"} for section in prompts.SECTIONS},
    "required": list(prompts.SECTIONS),
    "additionalProperties": False,
}
