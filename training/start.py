"""Start a run on one GPU without the launcher of arctic_training, which imports DeepSpeed in two more processes."""

import gc
import os
import sys
from pathlib import Path

from common.errors import UserError

ONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def train_in_this_process(config: Path) -> None:
    """Train as `arctic_training <config> --num_gpus 1` does. Raises UserError if there is no such YAML."""
    if not config.is_file():
        raise UserError(f"{config} does not exist; give the path of a YAML")
    os.environ |= ONE_PROCESS
    sys.argv = [sys.argv[0], "--config", str(config)]
    gc.disable()  # the imports create a million objects, nearly all of which stay alive
    from arctic_training.entrypoint import launch

    gc.enable()
    launch()
