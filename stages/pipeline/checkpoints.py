"""Loading and saving of Hugging Face models: safetensors only, nothing unpickled, no remote code."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast
from transformers.utils import logging

from stages.learning.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from stages.pipeline.files import replacing_directory, write_text
from stages.pipeline.hub import reason
from stages.pipeline.stage import Invalid

if TYPE_CHECKING:
    from stages.circuits.lora import Merge
    from stages.pipeline.resources import Resources

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name


def load_model(
    folder: str | Path,
    adapter: str | Path | None = None,
    revision: str | None = None,
    adapter_revision: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> PreTrainedModel:
    """Load a causal language model in eval mode, with eager attention.

    Eager attention is the one whose arithmetic the walker of `stages/circuits` reproduces.

    Args:
        folder: a folder with a model in one file or in shards, or with an adapter alone, whose config names its base;
            or the id of a model on the Hugging Face hub (owner/name), which is taken from its cache where it is there.
        adapter: a folder or hub id of an adapter for it, which is merged.
        revision: branch, tag or commit of a model on the hub.
        adapter_revision: the same for an adapter.
        device: where it is put.
        dtype: torch's name of the precision of its weights. An adapter is merged in float32.

    Raises:
        Invalid: there are no safetensors weights, the base of an adapter is missing, the hub cannot give the model, or
            the adapter does not fit (see `stages.circuits.lora.merge`).
    """
    own = adapter_of(folder)
    if own is not None and adapter is not None:
        raise Invalid(
            f"folder '{folder}' is an adapter, too: load_model(base, adapter='{adapter}') needs a whole model"
        )
    if own is not None:
        folder, adapter, revision = own, folder, revision or _config(Path(folder)).get("revision")
    model = _whole_model(folder, adapter, revision, dtype if adapter is None else "float32")
    if adapter is not None:
        model = load_adapter(model, adapter, adapter_revision).model
    placed: Any = model
    return placed.to(device=device, dtype=getattr(torch, dtype))


def load_for_analysis(folder: str | Path, available: "Resources") -> PreTrainedModel:
    """`load_model` where the environment says and as precise, for what trains nothing."""
    return load_model(folder, device=available.device, dtype=available.dtype)


def load_adapter(base: PreTrainedModel, adapter: str | Path, revision: str | None = None) -> "Merge":
    """Merge an adapter into a model, which changes in place.

    Args:
        base: the model that it was trained on.
        adapter: a folder, or a hub id.
        revision: branch, tag or commit of an adapter on the hub.

    Returns:
        The model, and which matrices changed by how much.

    Raises:
        Invalid: there are no safetensors weights, or they do not fit the base.
    """
    from stages.circuits.lora import merge  # only where there is an adapter, as PEFT

    folder = adapter_folder(adapter, revision)
    from peft import PeftConfig, PeftModel

    try:
        adapted = PeftModel(base, PeftConfig.from_pretrained(str(folder)))  # pyright: ignore[reportArgumentType]
        found = adapted.load_adapter(str(folder), "default", torch_device=str(base.device))
    except (ValueError, TypeError, RuntimeError, KeyError, SafetensorError) as error:
        raise Invalid(f"adapter '{adapter}' does not fit its base: {_first_line(error)}") from error
    wrong = [*found.missing_keys, *found.unexpected_keys]
    if wrong:
        which = "has no weights for" if found.missing_keys else "holds weights for"
        where = "which the base has" if found.missing_keys else "which the base lacks"
        name = wrong[0].removeprefix("base_model.model.")
        raise Invalid(
            f"adapter '{adapter}' does not fit its base: it {which} {name} ({len(wrong)} such entries), {where}; must "
            "be an adapter of this base"
        )
    return merge(adapted)


def _whole_model(model: str | Path, adapter: str | Path | None, revision: str | None, dtype: str) -> PreTrainedModel:
    """Load a model without adapter; `adapter` is what needs it, for the sentence."""
    needed = "" if adapter is None else f", which adapter '{adapter}' needs,"
    refuse_no_model(model, needed)
    logging.disable_progress_bar()  # the terminal belongs to the stages' own progress bars
    try:
        found, loading = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            model,
            output_loading_info=True,
            dtype=dtype,
            attn_implementation="eager",
            trust_remote_code=False,
            use_safetensors=True,
            **found_at(model, revision),
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise cannot_be_had(model, needed, revision, error) from error
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers would draw them at random
        raise Invalid(f"model '{model}'{needed} has no weights for {missing[0]} ({len(missing)} such entries)")
    return found.eval()


def refuse_no_model(model: str | Path, needed: str = "") -> None:
    """Refuse what can be no model, without a look into it.

    Args:
        model: folder or id.
        needed: part of the sentence.
    """
    is_folder = Path(model).is_dir()
    if is_folder and not list(Path(model).glob("*.safetensors")):
        raise Invalid(f"model folder '{model}'{needed} holds no .safetensors file; only safetensors weights are loaded")
    if not is_folder and not (isinstance(model, str) and HUB_ID.fullmatch(model)):
        raise Invalid(f"model '{model}'{needed} is missing: must be a folder, or a model on the hub (owner/name)")


def cannot_be_had(model: str | Path, needed: str, revision: str | None, error: Exception) -> Invalid:
    """The sentence on a model that is not given; `needed` is part of it."""
    said = _first_line(error)
    if isinstance(error, SafetensorError):
        said = f"{said.rstrip('.')}: its weights must be whole safetensors files, not pickles of that name"
    if Path(model).is_dir():
        return Invalid(f"model folder '{model}'{needed} cannot be loaded: {said}")
    return Invalid(
        f"model '{model}'{needed} is no folder here, and cannot be had from the hub"
        f"{'' if revision is None else f' at revision {revision}'} with safetensors weights: "
        f"{reason(error, str(model)) or said}"
    )


def found_at(model: str | Path, revision: str | None) -> dict[str, Any]:
    """What `from_pretrained` is told of where to look: in the folder alone, or on the hub at a revision."""
    return {"local_files_only": True} if Path(model).is_dir() else {"revision": revision or "main"}


def adapter_of(folder: str | Path) -> str | None:
    """The base of a folder that holds an adapter alone; None for any other.

    Raises:
        Invalid: it holds a model as well, or its config names no base.
    """
    path = Path(folder)
    if not (path / ADAPTER_CONFIG).is_file():
        return None
    if (path / "config.json").is_file() and [
        file for file in path.glob("*.safetensors") if file.name != ADAPTER_WEIGHTS
    ]:
        raise Invalid(f"folder '{folder}' holds a model and an adapter: must be one of them, each in its own folder")
    base = _config(path).get("base_model_name_or_path")
    if not base:
        raise Invalid(f"adapter '{folder}' names no base: give it, load_model(base, adapter='{folder}')")
    if not Path(base).is_dir() and not HUB_ID.fullmatch(base):
        raise Invalid(
            f"adapter '{folder}' needs its base '{base}', which is not there: put it there, or name it, "
            f"load_model(base, adapter='{folder}')"
        )
    return base


def adapter_folder(adapter: str | Path, revision: str | None) -> Path:
    """The folder of an adapter with safetensors weights; one on the hub is fetched, without anything else there."""
    folder = Path(adapter)
    if not folder.is_dir() and isinstance(adapter, str) and HUB_ID.fullmatch(adapter):
        from huggingface_hub import snapshot_download

        try:
            folder = Path(
                snapshot_download(adapter, revision=revision, allow_patterns=[ADAPTER_CONFIG, ADAPTER_WEIGHTS])
            )
        except (OSError, ValueError) as error:
            raise Invalid(
                f"adapter '{adapter}' is no folder here, and cannot be had from the hub: "
                f"{reason(error, adapter) or _first_line(error)}"
            ) from error
    if not folder.is_dir():
        raise Invalid(f"adapter '{adapter}' is missing: must be a folder, or an adapter on the hub (owner/name)")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise Invalid(f"adapter '{adapter}' holds no {name}; only adapters with safetensors weights are loaded")
    return folder


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))


def _first_line(error: Exception) -> str:
    """What an error says, on one line that is not too long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2])
    return text if len(text) <= 300 else text[:297] + "..."


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer from its files."""
    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def load_pretrained_tokenizer(model: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a model in a folder or on the hub.

    Raises:
        Invalid: it cannot be had, or there is no fast one.
    """
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    at = found_at(model, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, use_fast=True, trust_remote_code=False, **at)
    except (OSError, ValueError) as error:
        raise Invalid(
            f"the tokenizer of '{model}' cannot be had: {reason(error, model) or _first_line(error)}"
        ) from error
    if not tokenizer.is_fast:
        raise Invalid(f"the tokenizer of '{model}' is a slow one: must have a fast one (tokenizer.json)")
    return tokenizer


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Save model and tokenizer as a folder that `from_pretrained` loads; same weights give same bytes."""
    with replacing_directory(folder) as temporary:
        model.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        config_path = temporary / "config.json"
        config = json.loads(config_path.read_text())
        config.pop("_name_or_path", None)
        write_text(config_path, json.dumps(config, sort_keys=True, indent=1) + "\n")
