"""A model to look into, from a folder or the Hugging Face hub, with its tokenizer."""

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from stages.circuits.walker import Walker
from stages.pipeline.checkpoints import load_model, load_pretrained_tokenizer
from stages.pipeline.stage import Invalid


def load(
    path_or_id: str | Path,
    adapter: str | Path | None = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Walker, PreTrainedTokenizerFast]:
    """A causal language model that is checked and ready to be patched, and its tokenizer.

    Weights are read from safetensors only, and no code comes with them. Attention is eager, the one whose arithmetic
    the walker repeats. Nothing is downloaded unless the environment says HF_HUB_OFFLINE=0: a name on the hub is looked
    up among what was downloaded before.

    Args:
        path_or_id: a folder, or a name on the hub such as "HuggingFaceTB/SmolLM2-135M-Instruct".
        adapter: folder or name of a LoRA adapter, which is merged into the weights.
        revision: branch, tag or commit of the model on the hub.
        device: where the model is put; None: on the processor.
        dtype: in bfloat16 effects are rounded, so the default is float32 whatever the files hold.

    Returns:
        the walker (the Hugging Face model is its `model`), and the tokenizer.

    Raises:
        Invalid: there is no such model, fast tokenizer or adapter, it has no safetensors weights, or its architecture
            is not supported.
    """
    source = _local(path_or_id, revision, "model")
    model: Any = load_model(source, None if adapter is None else _local(adapter, None, "adapter"), revision)
    tokenizer = load_pretrained_tokenizer(source, revision)
    return Walker(model.to(device=device, dtype=dtype).requires_grad_(False)), tokenizer


def _local(path_or_id: str | Path, revision: str | None, what: str) -> str:
    """The folder itself, or the one in which the hub's files were kept; the name where it may be downloaded."""
    if Path(path_or_id).is_dir() or os.environ.get("HF_HUB_OFFLINE", "1") == "0":
        return str(path_or_id)
    try:
        return snapshot_download(str(path_or_id), revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError) as error:
        missing = f"{what} '{path_or_id}' is no folder, nor one that was downloaded from the hub before"
        raise Invalid(f"{missing}: to download it, set HF_HUB_OFFLINE=0") from error
