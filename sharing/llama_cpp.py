"""Write a model in GGUF, the file format of llama.cpp and Ollama, with llama.cpp's own converter.

https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from common.errors import UserError

CONVERTER = "convert_hf_to_gguf.py"
GGUF = "model.gguf"
OUTPUT_TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}  # torch's names: the converter's
_PARTS = ("conversion", "gguf")  # modules that are in llama.cpp's folder, beside the converter


def find_converter(path: str) -> Path:
    """Return llama.cpp's converter: `path`, the file in the folder `path`, or if it is empty, one on PATH.

    Raises UserError.
    """
    found = Path(path) if path else Path(shutil.which(CONVERTER) or "")
    if path and found.is_dir():
        found /= CONVERTER
    if not found.is_file():
        where = f"{found} does not exist" if path else f"{CONVERTER} is not on PATH"
        raise UserError(f"--gguf: {where}; give the folder of llama.cpp's source, or leave out --gguf")
    return found.resolve()


def write_gguf(converter: Path, folder: Path, dtype: str, name: str) -> None:
    """Let llama.cpp convert the model in `folder` to model.gguf, with matrices in the type `dtype`. Raises UserError.

    `name` is stored in the file: without it, the converter would store that of `folder`.
    """
    output = folder / GGUF
    options = ["--outfile", str(output), "--outtype", OUTPUT_TYPES[dtype], "--model-name", name]
    command = [sys.executable, str(converter), str(folder), *options]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode or not output.is_file():
        raise UserError(f"--gguf: {converter} failed: {_explain(result.stderr.strip() or result.stdout.strip())}")


def _explain(log: str) -> str:
    """Return the cause in the converter's log, and a remedy, in one line."""
    last = log.splitlines()[-1][:200] if log else "no message"
    missing = re.search(r"No module named '(\w+)", last)
    if missing and missing[1] in _PARTS:
        return f"{missing[1]} is not beside it; give the folder of llama.cpp's whole source"
    if missing:
        return f"this Python lacks its package {missing[1]}; install llama.cpp's requirements.txt or that package"
    return f"{last}; if the model is newer than that llama.cpp, update it, or leave out --gguf"
