"""DeepSpeed's own operators: compiled on a machine's first run, about a minute, and found ready on the next.

PyTorch guards a compilation with a file that it removes at the end, and waits for as long as the file is there. A run
that is killed while it compiles leaves the file, and every later run would wait for ever.
"""

import fcntl
import os
from pathlib import Path

from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import get_default_build_root


def compile_operators(optimizer: str) -> None:
    """Compile what a run with this optimizer needs. One process does so at a time, under a lock that dies with it."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    names = ["ShareMemCommBuilder"] if on_cpu else []
    if optimizer == "cpu_adam":
        names.append("CPUAdamBuilder")
    elif optimizer == "fused_adam" and not on_cpu:
        names.append("FusedAdamBuilder")
    with (root / "soap-notes.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in names:
            builder = accelerator.create_op_builder(name)
            if builder is not None and builder.is_compatible(verbose=False):
                for left_behind in root.rglob(f"{builder.name}/lock"):
                    left_behind.unlink()
                builder.load(verbose=False)
