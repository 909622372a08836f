"""LoRA adapters: a model that carries them is merged before it is walked.

The engine writes into head outputs and reads weight matrices, so every matrix has to be one matrix. Merging adds each
adapter's product to the matrix that it sits on (W + scale * B A), after which the adapter layers are taken out.
"""

from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from stages.pipeline.stage import Invalid


def adapter_layers(model: nn.Module) -> list[str]:
    """Names of the modules that PEFT put in the place of others, merged or not; LoRA layers keep theirs inside."""
    return [name for name, module in model.named_modules() if hasattr(module, "base_layer")]


def merged(model: nn.Module) -> PreTrainedModel:
    """The plain Hugging Face model with its adapters merged into its weights.

    The weights change in place: the given model is the returned one afterwards. A model without adapters is returned
    as it is. In bfloat16 the sum is rounded, so merge in float32 where the difference matters.

    Raises:
        Invalid: the adapters cannot be merged (such as prompt or prefix tuning), or the merged weights are not finite.
    """
    if isinstance(model, PreTrainedModel) and not adapter_layers(model):
        return model
    peft: Any = model
    if not hasattr(peft, "merge_and_unload") or not adapter_layers(model):
        raise Invalid(f"{_kind(peft)} cannot be merged into the weights: must be LoRA on a Hugging Face model")
    try:
        plain = peft.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise Invalid(f"the adapters cannot be merged into the weights: {error}") from error
    return plain.eval()


def _kind(model: Any) -> str:
    """What to call a model that cannot be merged."""
    active = getattr(model, "active_peft_config", None)
    return f"an adapter of type {active.peft_type.value}" if active is not None else f"a {type(model).__name__}"
