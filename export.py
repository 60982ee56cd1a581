"""Export a trained model as one folder for transformers, vLLM, Ollama and the hub, or a run's records as tables.

Input: a model (hub name, folder, or folder of global_step_N checkpoints), optionally a LoRA adapter. Output: a folder
with the weights (the adapter merged into them), tokenizer, an Ollama Modelfile, and a model card (README.md), filled in
from train-log.jsonl and a run of eval.py; with --gguf also model.gguf, which the Modelfile needs. The folder appears
once it is complete; nothing is overwritten.
With --records: the records of a run of eval.py, as CSV and Parquet.

    python export.py Qwen/Qwen3-1.7B --lora_path ./ckpt/Qwen3-1.7B-LoRA --output_dir ./exported
    python export.py ./ckpt/Qwen3-1.7B-finetuned --results results/Qwen3-1.7B-finetuned --output_dir ./exported
    python export.py --records results/Qwen3-1.7B-finetuned --output_dir ./tables
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import prompts
from common.chat_template import FIXED_DATE
from common.console import print_line
from common.errors import UserError, short_cause
from common.replacing import replacing
from sharing.llama_cpp import CONVERTER, OUTPUT_TYPES, find_converter, write_gguf
from sharing.writers import load_tokenizer, silence_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from evaluation.engines.models import Adapter, Model

TYPES = tuple(OUTPUT_TYPES)
GGUF_HELP = (
    f"also write model.gguf, with llama.cpp's {CONVERTER}: PATH is that file or its folder (default: found on PATH)"
)
RESULTS_HELP = "run folder of eval.py on this model, for the model card (default: the card says that it was not run)"
LOG_HELP = "training log for the model card (default: train-log.jsonl beside the checkpoint, if it exists)"
PUSH_HELP = "upload the folder to a new repository on the hub, such as me/soap-notes; private unless --public"

# --- parts of the folder ---------------------------------------------------------------------------------------------


def load(model: "Model", adapter: "Adapter | None", dtype: str) -> "PreTrainedModel":
    """Return the model, with the adapter merged into its weights, in the type of that name. Raises UserError."""
    import torch

    from common.merging import load_merged, load_model

    kind = getattr(torch, dtype)
    if adapter:
        return load_merged(model.path, adapter.path, "choose --dtype float32", kind)
    return load_model(model.path, kind)


def end_texts(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return the texts of the tokens that end a reply."""
    ends = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    return tokenizer.convert_ids_to_tokens(sorted(ids))


def fix_template_options(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Change the chat template so that, without options, it builds the prompts of training.

    Other programs do not know this project's options: they would let Qwen3 think, and insert today's date.
    """
    template = tokenizer.get_chat_template()
    used = {name: value for name, value in prompts.CHAT_TEMPLATE_KWARGS.items() if name in template}
    settings = "".join(f"{{%- set {name} = {json.dumps(value)} %}}" for name, value in used.items())
    clock = re.compile(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""")
    dated = clock.sub(lambda call: json.dumps(FIXED_DATE.strftime(call[2])), template)
    tokenizer.chat_template = settings + dated


def describe(
    options: argparse.Namespace, model: "Model", adapter: "Adapter | None", settings: dict[str, Any] | None
) -> dict[str, Any]:
    """Return what the card says about training and evaluation, by the names of card.Facts. Raises UserError."""
    from sharing import card

    trained = adapter.path if adapter else model.path
    beside = [folder / "train-log.jsonl" for folder in (trained, trained.parent)]
    log = Path(options.train_log) if options.train_log else next(filter(Path.is_file, beside), None)
    base = settings.get("base_model_name_or_path") if settings else None
    is_hub_name = bool(base) and re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    return {
        "name": (options.push_to_hub or Path(options.output_dir).resolve().name).rpartition("/")[2],
        "base": base if is_hub_name else None,
        "adapter": settings,
        "training": card.read_training(log, trained.name) if log else None,
        "results": card.read_results(Path(options.results), model, adapter) if options.results else None,
    }


# --- the two exports -------------------------------------------------------------------------------------------------


def export_model(options: argparse.Namespace) -> None:
    """Write the folder of a model and, on request, upload it. Raises UserError."""
    converter = find_converter(options.gguf) if options.gguf is not None else None
    if options.push_to_hub:
        check_hub(options.push_to_hub)
    from evaluation.engines import models
    from sharing import card
    from sharing.ollama import modelfile

    model = models.resolve_model(options.model, print_line=print_line)
    adapter = models.resolve_adapter(options.lora_path, model, print_line) if options.lora_path else None
    settings = json.loads((adapter.path / "adapter_config.json").read_text()) if adapter else None
    facts = describe(options, model, adapter, settings)
    silence_libraries()
    tokenizer = load_tokenizer(model.path)
    with replacing(Path(os.path.realpath(options.output_dir)), set()) as folder:
        loaded = load(model, adapter, options.dtype)
        loaded.save_pretrained(folder)
        fix_template_options(tokenizer)
        tokenizer.save_pretrained(folder)
        if converter:
            write_gguf(converter, folder, options.dtype, facts["name"])
        own_type = str(model.config.get("dtype") or model.config.get("torch_dtype") or "float32")
        (folder / "Modelfile").write_text(
            modelfile(tokenizer, end_texts(loaded, tokenizer), models.context_length(None, model)), encoding="utf-8"
        )
        written = card.model_card(card.Facts(dtype=options.dtype, evaluated_dtype=own_type, **facts))
        (folder / "README.md").write_text(written, encoding="utf-8")
    print_line(f"wrote {options.output_dir}")
    if options.push_to_hub:
        push(Path(options.output_dir), options.push_to_hub, not options.public)


def export_records(options: argparse.Namespace) -> None:
    """Write the records of a run as CSV and Parquet. Raises UserError."""
    from sharing.tables import export_tables

    if not Path(options.records).is_dir():
        raise UserError(f"--records {options.records}: no such folder; give the folder of a run of eval.py")
    os.umask(0o077)  # the records hold patients' words, so only the owner may read them
    with replacing(Path(os.path.realpath(options.output_dir)), set()) as folder:
        counts = export_tables(Path(options.records), folder)
    rows = ", ".join(f"{count} {name}" for name, count in counts.items())
    print_line(f"wrote {options.output_dir}: {rows}, each as .csv and .parquet")


# --- hub -------------------------------------------------------------------------------------------------------------


def check_hub(repo: str) -> None:
    """Raise UserError if the user is not logged in to the hub, or the repository exists."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        HfApi().whoami()
        exists = HfApi().repo_exists(repo)
    except LocalTokenNotFoundError:
        raise UserError("--push_to_hub: not logged in; run `huggingface-cli login`") from None
    except HFValidationError:
        raise UserError(f"--push_to_hub {repo} is not a repository's name; give one such as me/soap-notes") from None
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"--push_to_hub: no access ({short_cause(error)}); log in again, or leave it out") from None
    if exists:
        raise UserError(f"--push_to_hub {repo} exists; nothing is overwritten, so choose another name")


def push(folder: Path, repo: str, private: bool) -> None:
    """Upload the folder to a new repository on the hub. Raises UserError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().create_repo(repo, private=private)
        HfApi().upload_folder(repo_id=repo, folder_path=folder)
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"the upload failed ({short_cause(error)}); repeat it with `huggingface-cli upload {repo} {folder}`"
        ) from None
    print_line(f"uploaded to {repo} ({'private' if private else 'public'})")


# --- command line ----------------------------------------------------------------------------------------------------


def check(options: argparse.Namespace) -> None:
    """Raise UserError for flags that exclude each other, or if the output would overwrite a file."""
    if bool(options.model) == bool(options.records):
        raise UserError("give either a model, or --records and a run folder; `python export.py --help` shows how")
    for flag in ("lora_path", "gguf", "results", "train_log", "push_to_hub"):
        if options.records and getattr(options, flag) is not None:
            raise UserError(f"--{flag} is for a model and has no effect with --records; leave it out")
    if options.public and not options.push_to_hub:
        raise UserError("--public needs --push_to_hub and a repository's name")
    output = Path(options.output_dir)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output_dir {output} exists; nothing is overwritten, so choose another")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", help="hub name, model folder, or folder of global_step_N checkpoints")
    add("--lora_path", metavar="DIR", help="LoRA adapter of the model, to merge into its weights")
    add("--output_dir", metavar="DIR", required=True, help="folder to write; it must not exist")
    add("--dtype", choices=TYPES, default=TYPES[0], help="type of the weights (default: %(default)s)")
    add("--gguf", nargs="?", const="", metavar="PATH", help=GGUF_HELP)
    add("--results", metavar="RUN", help=RESULTS_HELP)
    add("--train_log", metavar="FILE", help=LOG_HELP)
    add("--push_to_hub", metavar="REPO", help=PUSH_HELP)
    add("--public", action="store_true", help="make the repository of --push_to_hub public")
    add("--records", metavar="RUN", help="export the records of this run folder in place of a model")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = build_parser().parse_args(argv)
    try:
        check(options)
        export_records(options) if options.records else export_model(options)
    except UserError as error:
        print_line(f"error: {error}")
        return 2
    except OSError as error:  # a full disk, no permission
        print_line(f"error: {error.filename or options.output_dir}: {error.strerror or error}; fix that and try again")
        return 2
    except KeyboardInterrupt:
        print_line("stopped; nothing was written")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
