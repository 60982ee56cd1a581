"""Compile DeepSpeed's operators: a machine's first run takes up to a minute, later runs use the cached build.

PyTorch guards a compilation with a lock file, and waits while that file exists. A run killed while compiling leaves the
file behind, and every later run would wait forever.
"""

import os
from pathlib import Path

import deepspeed
from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import get_default_build_root

from common.files import lock


def compile_operators(optimizer: str) -> None:
    """Compile the operators that this optimizer needs, one process at a time, under a lock released if it is killed."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    if on_cpu:
        # Only inference uses it. It takes half a minute to compile, and leaves 66 MB of shared memory behind.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    builders = {"cpu_adam": "CPUAdamBuilder"} | ({} if on_cpu else {"fused_adam": "FusedAdamBuilder"})
    if optimizer not in builders:
        return
    builder = accelerator.create_op_builder(builders[optimizer])
    with lock(root / "soap-notes.lock", wait=True):
        if builder is not None and builder.is_compatible(verbose=False):
            for left_behind in root.rglob(f"{builder.name}/lock"):
                left_behind.unlink()
            builder.load(verbose=False)
