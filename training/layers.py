"""Choose the implementation of a model's layers that this machine can run."""

LIGER, PLAIN = "liger", "huggingface"


def supported_layers(wanted: str, model_type: str) -> tuple[str, str | None]:
    """Return the `model.type` to use for the requested one, and the reason if they differ (else None)."""
    import torch

    if wanted != LIGER:
        return wanted, None
    if not torch.cuda.is_available():
        return PLAIN, "there is no GPU"
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError:
        return PLAIN, "liger-kernel is not installed"
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return PLAIN, f"it has no kernels for {model_type} models"
    return LIGER, None
