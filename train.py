"""Register the data source and trainer with which arctic_training trains a model to write SOAP notes.

Reads ./soap_dataset (from preprocess_data.py); writes ./ckpt/<run>/global_step_N, train-log.jsonl and loss.png.

    arctic_training Qwen3-1.7B-config.yaml         # full fine-tune
    arctic_training Qwen3-1.7B-LoRA-config.yaml    # LoRA adapter
    python train.py                                # show one formatted example; --model adds token counts
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # the preview needs neither torch nor arctic_training
    from training.preview import main

    sys.exit(main())

if Path(sys.argv[0]).name == "arctic_training_run" and "RANK" not in os.environ:
    # A single process without the launcher, which imports DeepSpeed twice before a run begins.
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}

# Packs vary in length; by default the allocator caches blocks of every size. PyTorch reads this at first allocation.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.umask(0o077)  # only the user may read token caches and checkpoints: they contain patient data

from training.data import SOAPDataFactory, SOAPDataSource  # noqa: E402
from training.errors import report_in_one_line  # noqa: E402
from training.trainer import SOAPTrainer  # noqa: E402

__all__ = ["SOAPDataFactory", "SOAPDataSource", "SOAPTrainer"]  # `type: soap` in a YAML
report_in_one_line()
