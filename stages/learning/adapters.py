"""Fine-tuning of LoRA adapters (Hu et al., 2021) instead of all weights, and the plain weights that it amounts to.

Whatever comes after training sees an ordinary model: every checkpoint has the adapters merged into the weights that
they sit on, W + scale * B A. The embeddings, the norms and the output matrix stay as they are.
"""

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from stages.pipeline.stage import Invalid

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.modules), lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted: Any = inject_adapter_in_model(config, model)
    return adapted


@torch.no_grad()
def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the model by the names that they have without adapters, with the adapters merged.

    Weights without an adapter are the parameters themselves, not copies.
    """
    merged = {}
    for name, module in model.named_modules():
        layer: Any = module
        if hasattr(layer, "get_delta_weight"):
            change = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
            merged[f"{name}.base_layer.weight"] = layer.get_base_layer().weight.detach() + change
    found = {}
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            plain = name.replace(".base_layer.", ".")
            found[plain] = merged.get(name, weight.detach())
    return found
