"""Fine-tuning of LoRA adapters (Hu et al., 2021) instead of all weights: W + scale * B A in place of a matrix W.

Checkpoints hold the adapters alone, in PEFT's format, since the rest stays that of the base, and so do the models that
stage `match` picks. Whatever comes after training sees an ordinary model: loading merges the adapters into the weights
that they sit on (`load_model`, and `stages/learning/checkpoints.py`).
"""

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stages.learning.checkpoints import ADAPTER_PREFIX
from stages.pipeline.stage import Invalid

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "default"  # PEFT's name of the one adapter that a layer has here


@runtime_checkable
class LoraSettings(Protocol):
    """Rank of every adapter, `alpha` (the scale is alpha / rank), and the names of the modules that get one."""

    rank: int
    alpha: int
    modules: tuple[str, ...]


def with_adapters(model: "PreTrainedModel", lora: LoraSettings, seed: int) -> "PreTrainedModel":
    """The model, in which now only adapters are trained; at first they change nothing.

    Raises:
        Invalid: the model has no module of one of the names, or one shares its matrix with the embeddings, which then
            would change as well in the plain weights.
    """
    from peft import LoraConfig, inject_adapter_in_model  # only where adapters are asked for

    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for module in lora.modules:
        if module not in names:
            raise Invalid(f"finetune.common.lora.modules: '{module}' must be one of {', '.join(sorted(names))}")
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    tied = head.weight is embedding.weight
    for name, module in model.named_modules():
        if tied and module is head and name.rpartition(".")[2] in lora.modules:
            raise Invalid(
                f"finetune.common.lora.modules: '{name}' shares its matrix with the embeddings of this base: must be "
                f"other modules ({', '.join(sorted(names - set(lora.modules)))})"
            )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.modules),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted: Any = inject_adapter_in_model(config, model)
    return adapted


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with an adapter by the names of the modules that they took the place of; none in a plain model."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """The matrices A [rank, in] and B [out, rank] of all adapters by their names in PEFT's format; not copies."""
    return {
        f"{ADAPTER_PREFIX}{name}.{which}.weight": getattr(layer, which)[ADAPTER].weight.detach()
        for name, layer in adapter_layers(model).items()
        for which in ("lora_A", "lora_B")
    }


def adapter_config(model: "PreTrainedModel") -> dict[str, Any]:
    """The config of the adapters as PEFT writes it; lists in alphabetical order, so that bytes are stable."""
    config: Any = model.peft_config
    entries = config[ADAPTER].to_dict() | {"inference_mode": True}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in entries.items()}


@torch.no_grad()
def squared_change(model: nn.Module) -> Float[Tensor, ""]:
    """Sum of squares of what the adapters add to the weights, in float64.

    That of one matrix, |scale * B A|^2 = scale^2 * sum of (B^T B) * (A A^T), takes no more than [rank, rank].
    """
    parts = []
    for layer in adapter_layers(model).values():
        a, b = (getattr(layer, which)[ADAPTER].weight.double() for which in ("lora_A", "lora_B"))
        parts.append(layer.scaling[ADAPTER] ** 2 * ((b.T @ b) * (a @ a.T)).sum())
    return torch.stack(parts).sum()
