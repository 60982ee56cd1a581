"""Write the SOAP note of one dialogue, or of several, with a trained model. Not for clinical use.

Input: a model (hub name, folder, or folder of global_step_N checkpoints), optionally a LoRA adapter, and dialogues as
text files in UTF-8, one visit each, or on stdin. Prompt, limits and reading are those of eval.py. Output: each note as
text under four headings, shown while it is written; with --json, one JSON object a line once a note is complete. If a
reply has another form than the prompt asks for, but eval.py can read it, a line on stderr names the form. A dialogue
that fails does not stop the others; then the exit status is 2.

    python write_note.py ./ckpt/Qwen3-1.7B-finetuned visit.txt
    python write_note.py Qwen/Qwen3-1.7B --lora_path ./ckpt/Qwen3-1.7B-LoRA --json < visit.txt
    python write_note.py soap --api_base http://localhost:8000/v1 visits/*.txt
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import prompts
from common.console import print_line
from common.errors import UserError
from sharing.partial_note import NoteStream
from sharing.writers import LocalModel, ServedModel

if TYPE_CHECKING:
    from sharing.checking import Check

STDIN = "-"
CHECK_HELP = (
    "also list the statements that the dialogue does not support, in the opinion of this model: hub name or folder or, "
    "with --api_base, a name on that server. eval.py measures how often it is wrong"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # could change the terminal's state


def read_dialogue(name: str) -> str:
    """Return the text of a file, or of stdin for "-". Raises UserError."""
    try:
        data = sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}; give a text file with one dialogue") from None
    except UnicodeDecodeError:
        raise UserError(f"{name} is not UTF-8; save it as a text file in that encoding") from None
    if not text.strip():
        raise UserError(f"{name} has no text; give a dialogue")
    return text


class Printer:
    """Print the sections of one note as they arrive, each under its heading."""

    def __init__(self) -> None:
        self._stream, self._section = NoteStream(), ""

    def show(self, piece: str) -> None:
        """Print the new text in a piece of the reply."""
        for section, text in self._stream.feed(piece):
            self._print(section, text)

    def finish(self, note: prompts.Note | None) -> None:
        """Print the rest of the note. If other text was shown, which the whole reply contradicts, print all of it."""
        shown = self._stream.shown
        if note and any(not note[section].startswith(text) for section, text in shown.items()):
            print("\n\n(The whole reply reads:)\n")
            shown, self._section = {}, ""
        for section, text in (note or {}).items():
            rest = text[len(shown.get(section, "")) :]
            if rest or section not in shown:
                self._print(section, rest or "(empty)")
        if self._section:
            print(flush=True)

    def _print(self, section: str, text: str) -> None:
        if section != self._section:
            print("\n\n" if self._section else "", prompts.SECTION_NAMES[section], sep="")
            self._section = section
        print(_CONTROL.sub("", text), end="", flush=True)


def write_one(model: LocalModel | ServedModel, name: str, dialogue: str, as_json: bool) -> prompts.Note:
    """Return the note of one dialogue and, unless `as_json`, print it. Raises UserError if there is none."""
    from evaluation.reading import read_prediction

    printer = Printer()
    try:
        reply = model.write(prompts.note_messages(dialogue), (lambda _: None) if as_json else printer.show)
    except UserError as error:
        printer.finish(None)
        raise UserError(f"{name}: {error}") from None
    read = read_prediction(0, dialogue, reply)
    if read["status"] == "invalid":
        printer.finish(None)
        begin = _CONTROL.sub("", " ".join(reply.text.split())[:80])
        remedies = ["raise --max_new_tokens"] if reply.finish_reason == "length" else []
        if "cut off" not in read["reason"] or not remedies:
            remedies.append(f'the reply begins "{begin}"')
        raise UserError(f"{name}: no note in the reply ({read['reason']}); {'; '.join(remedies)}")
    note = {section: read[section] for section in prompts.SECTIONS}
    if not as_json:
        printer.finish(note)
    if read["form"]:
        print_line(f"{name}: the reply is not in the JSON form that the prompt asks for; read as: {read['form']}")
    return note


def check_all(options: argparse.Namespace, dialogues: dict[str, str], notes: dict[str, prompts.Note]) -> int:
    """Print which statements of the notes the dialogues do not support, says the judge. Return how many checks failed.

    With --json, a note whose check failed is printed without the results of the check.
    """
    from sharing.checking import check_note

    failed = 0
    try:
        judge = start(options, options.check, None)
    except UserError as error:
        print_line(f"error: no note was checked: {error}")
        judge = None
    for name, note in notes.items():
        try:
            check = judge and check_note(judge, dialogues[name], note)
        except UserError as error:
            print_line(f"error: {name} was not checked: {error}")
            check = None
        if not check:
            failed += 1
        if options.json:
            result = {"unsupported": check.unsupported, "unanswered": check.unanswered} if check else {}
            print_json({"file": name, **note, **result})
        elif check:
            print_check(name, check, options.check)
    return failed


def print_check(name: str, check: "Check", judge: str) -> None:
    """Print the statements of a note that the judge found unsupported."""
    found = f"{len(check.unsupported)} of {check.asked} statements not supported by the dialogue"
    left = f"; {check.unanswered} without an answer" if check.unanswered else ""
    print(f"\n{name}: {found}, says {judge}{left}")
    for statement in check.unsupported:
        print(f"  {statement['section']}: {_CONTROL.sub('', statement['statement'])}")


def print_json(value: dict[str, object]) -> None:
    """Print a line of JSON."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def start(options: argparse.Namespace, name: str, lora_path: str | None) -> LocalModel | ServedModel:
    """Return the model of that name, on this machine or on the server. Raises UserError."""
    if options.api_base:
        return ServedModel(name, options.api_base, options.max_new_tokens)
    return LocalModel(name, lora_path, options.max_new_tokens, options.max_model_len)


def read_dialogues(names: list[str]) -> dict[str, str]:
    """Return the dialogues by name. Print an error for each one that cannot be read."""
    dialogues = {}
    for name in names:
        try:
            dialogues[name] = read_dialogue(name)
        except UserError as error:
            print_line(f"error: {error}")
    return dialogues


def write_all(options: argparse.Namespace) -> int:
    """Write the notes of all dialogues with one start of the model. Return how many failed. Raises UserError."""
    names = list(dict.fromkeys(options.dialogue or [STDIN]))
    if not options.dialogue and sys.stdin.isatty():
        raise UserError("no dialogue; give a text file, or pipe one in")
    if options.lora_path and options.api_base:
        raise UserError(
            "--lora_path cannot be combined with --api_base; give the adapter's served name as the model instead"
        )
    if options.max_model_len and options.api_base:
        raise UserError("--max_model_len has no effect with --api_base; set it on the server")
    dialogues = read_dialogues(names)
    if not dialogues:
        return len(names)
    model = start(options, options.model, options.lora_path)
    notes: dict[str, prompts.Note] = {}
    for number, (name, dialogue) in enumerate(dialogues.items()):
        if len(names) > 1 and not options.json:
            print("\n" if number else "", f"==> {name} <==", sep="")
        try:
            notes[name] = write_one(model, name, dialogue, options.json)
        except UserError as error:
            print_line(f"error: {error}")
            continue
        if options.json and not options.check:
            print_json({"file": name, **notes[name]})
    failed = len(names) - len(notes)
    if notes and options.check:
        del model  # its memory is for the judge
        failed += check_all(options, dialogues, notes)
    if notes:
        print_line("not for clinical use: nobody has checked this")
    return failed


def positive(text: str) -> int:
    """Parse a whole number above 0, as a type for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="hub name, model folder, or folder of global_step_N checkpoints")
    add("dialogue", nargs="*", help="text files, one dialogue each (default: stdin)")
    add("--lora_path", metavar="DIR", help="LoRA adapter of the model")
    add("--api_base", metavar="URL", help="OpenAI-compatible server that serves the model (key: OPENAI_API_KEY)")
    add("--check", metavar="JUDGE", help=CHECK_HELP)
    add("--json", action="store_true", help='print lines {"file", "S", "O", "A", "P"} in place of text')
    add("--max_new_tokens", type=positive, default=1024, metavar="N", help="maximum tokens of a note (default: 1024)")
    add(
        "--max_model_len",
        type=positive,
        metavar="N",
        help="maximum tokens of a prompt and its note (default: the model's limit, at most 8192)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = build_parser().parse_intermixed_args(argv)  # files may follow an option
    try:
        return 2 if write_all(options) else 0
    except UserError as error:
        print_line(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        print_line("stopped")
        return 130


if __name__ == "__main__":
    sys.exit(main())
