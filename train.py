"""Register the data source and trainer with which arctic_training trains a model to write SOAP notes.

Reads ./soap_dataset (from preprocess_data.py); writes ./ckpt/<run>/global_step_N, train-log.jsonl and loss.png.

    arctic_training Qwen3-1.7B-config.yaml         # full fine-tune
    arctic_training Qwen3-1.7B-LoRA-config.yaml    # LoRA adapter
    python train.py Qwen3-1.7B-config.yaml         # the same on one GPU, without the launcher: starts sooner
    python train.py                                # show one formatted example; --model adds token counts
"""

import gc
import os
import sys

if __name__ == "__main__":  # the preview needs neither torch nor arctic_training
    from training.preview import main

    sys.exit(main())

# Packs vary in length; by default the allocator caches blocks of every size. PyTorch reads this at first allocation.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.umask(0o077)  # only the user may read token caches and checkpoints: they contain patient data

from training.data import SOAPDataFactory, SOAPDataSource  # noqa: E402
from training.errors import report_in_one_line  # noqa: E402
from training.trainer import SOAPTrainer  # noqa: E402

__all__ = ["SOAPDataFactory", "SOAPDataSource", "SOAPTrainer"]  # `type: soap` in a YAML
report_in_one_line()
gc.freeze()  # the libraries' objects stay alive, so no later collection needs to search them
