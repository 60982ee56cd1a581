"""DeepSpeed's own operators: compiled on a machine's first run, within a minute, and found ready on the next.

PyTorch guards a compilation with a file that it removes at the end, and waits for as long as the file is there. A run
that is killed while it compiles leaves the file, and every later run would wait for ever.
"""

import os
from pathlib import Path

import deepspeed
from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import get_default_build_root

from common.files import lock


def compile_operators(optimizer: str) -> None:
    """Compile what a run with this optimizer needs. One process does so at a time, under a lock that dies with it."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    if on_cpu:
        # It sums over processes for inference alone, takes half a minute to compile, and leaves 66 MB of shared memory.
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
