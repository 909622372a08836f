"""Loading and saving of Hugging Face models: safetensors only, float32, nothing unpickled, no remote code."""

import json
from pathlib import Path

from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast
from transformers.utils import logging

from stages.pipeline.files import replacing_directory, write_text
from stages.pipeline.stage import Invalid


def load_model(folder: str | Path) -> PreTrainedModel:
    """Load a causal language model in float32, in eval mode, with eager attention.

    Eager attention is the one whose arithmetic the walker of `stages/circuits` reproduces.

    Raises:
        Invalid: the folder holds no safetensors weights.
    """
    folder = Path(folder)
    if not list(folder.glob("*.safetensors")):
        raise Invalid(f"model folder '{folder}' holds no .safetensors file; only safetensors weights are loaded")
    logging.disable_progress_bar()  # the terminal belongs to the stages' own progress bars
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="float32",
        attn_implementation="eager",
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
    )
    return model.eval()


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer from its files."""
    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Save model and tokenizer as a folder that `from_pretrained` loads; same weights give same bytes."""
    with replacing_directory(folder) as temporary:
        model.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        config_path = temporary / "config.json"
        config = json.loads(config_path.read_text())
        config.pop("_name_or_path", None)
        write_text(config_path, json.dumps(config, sort_keys=True, indent=1) + "\n")
