"""LoRA adapters: a model that carries them is merged before it is walked.

The engine writes into head outputs and reads weight matrices, so every matrix has to be one matrix. Merging adds each
adapter's change to the matrix that it sits on (for LoRA W + scale * B A; DoRA, rsLoRA, modules saved whole and single
token embeddings as PEFT does it), after which the adapter layers are taken out.

What can go wrong without a word is refused or shown here:
- embedding and head share one matrix and the adapter sits on one of them: they are untied, so that the other stays;
- of several adapters some are inactive: the caller says which are meant;
- an adapter was made for another base: part of what it targets would stay as it was;
- weights do not hold all of what the adapted model computes (for instance a hook on an adapter layer): the merged model
  is compared with the adapted one on a few tokens;
- what was changed, by which adapter and how much, is in the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from stages.pipeline.stage import Invalid

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}  # of the largest logit; norms compute in float32 in any model
TOLERANCE_LOW = 0.1  # bfloat16, float16: the sum is rounded


@dataclass(frozen=True)
class WeightChange:
    """A parameter that adapters changed.

    Attributes:
        name: in the merged model.
        adapters: the adapters that did.
        relative: Frobenius norm of the change, divided by that of the parameter before (by 1 if that is 0).
    """

    name: str
    adapters: tuple[str, ...]
    relative: float


@dataclass(frozen=True)
class Merge:
    """A merged model, and what merging did.

    Attributes:
        model: the plain Hugging Face model.
        adapters: those that were merged.
        changes: of every matrix that they target, and of every other parameter that they changed.
        untied: whether embedding and head shared a matrix before and no longer do.
    """

    model: PreTrainedModel
    adapters: tuple[str, ...]
    changes: tuple[WeightChange, ...]
    untied: bool


def adapter_layers(model: nn.Module) -> list[str]:
    """Names of the modules that PEFT put in the place of others, merged or not; LoRA layers keep theirs inside."""
    return [name for name, module in model.named_modules() if _is_adapter(module)]


def merged(model: nn.Module, adapters: Sequence[str] | None = None) -> PreTrainedModel:
    """The model of `merge`."""
    return merge(model, adapters).model


def merge(model: nn.Module, adapters: Sequence[str] | None = None) -> Merge:
    """The plain Hugging Face model with its adapters merged into its weights.

    The weights change in place: the given model is the returned one afterwards. A model without adapters is returned
    as it is. In bfloat16 the sum is rounded, so merge in float32 where the difference matters.

    Args:
        model: a PEFT model, or a Hugging Face model with adapter layers inside.
        adapters: names of those to merge; None: all that it has, if all are active.

    Raises:
        Invalid: the adapters cannot be merged (such as prompt or prefix tuning), some are inactive and `adapters` does
            not say which are meant, there is no adapter of a name, part of what they target stays as it was, or the
            merged model does not compute what the adapted one does.
    """
    plain: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
    layers = {name: module for name, module in plain.named_modules() if _is_adapter(module)}
    layers = {name: module for name, module in layers.items() if not any(_inside(name, other) for other in layers)}
    if isinstance(model, PreTrainedModel) and not layers:
        return Merge(model, (), (), False)
    if not layers or not isinstance(plain, PreTrainedModel):
        raise Invalid(f"{_kind(model)} cannot be merged into the weights: must be LoRA on a Hugging Face model")
    chosen = _choose(layers, adapters)
    plain.eval()
    ids = _tokens(plain, layers)
    try:
        _activate(layers, chosen)
        expected = _logits(plain, ids)
        tied = _untie(plain)
        changes = [change for name, layer in layers.items() for change in _merge_layer(plain, name, layer, chosen)]
    except (ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError) as error:
        raise Invalid(f"the adapters cannot be merged into the weights: {error}") from error
    untied = tied and not _retie(plain)
    for trace in ("peft_config", "_hf_peft_config_loaded"):  # of adapters that are no longer there
        vars(plain).pop(trace, None)
    _refuse_partial(changes)
    _compare(expected, _logits(plain, ids))
    plain.requires_grad_(True)  # as in any model that was loaded; PEFT freezes what it sits on
    return Merge(plain, tuple(chosen), tuple(changes), untied)


def _is_adapter(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") or hasattr(type(module), "unload_and_optionally_merge_module")


def _inside(name: str, other: str) -> bool:
    return name.startswith(other + ".")


def _kind(model: Any) -> str:
    """What to call a model that cannot be merged."""
    active = getattr(model, "active_peft_config", None)
    return f"an adapter of type {active.peft_type.value}" if active is not None else f"a {type(model).__name__}"


def _choose(layers: dict[str, Any], wanted: Sequence[str] | None) -> list[str]:
    """The adapters to merge."""
    known = sorted({name for layer in layers.values() for name in layer._get_available_adapters()})
    if wanted is not None:
        for name in wanted:
            if name not in known:
                raise Invalid(f"adapters: '{name}' must be one of {', '.join(known)}, which the model carries")
        if not wanted:
            raise Invalid(f"adapters is empty: must name at least one of {', '.join(known)}")
        return list(dict.fromkeys(wanted))
    if any(layer.disable_adapters for layer in layers.values()):
        raise Invalid("the adapters of the model are switched off: switch them on, or say which to merge (adapters=)")
    active = {name for layer in layers.values() for name in layer.active_adapters}
    idle = [name for name in known if name not in active]
    if idle:
        raise Invalid(
            f"the model carries the adapters {', '.join(known)}, of which {', '.join(idle)} "
            f"{'is' if len(idle) == 1 else 'are'} not active: say which to merge (adapters=)"
        )
    return known


def _activate(layers: dict[str, Any], chosen: list[str]) -> None:
    """Make just these adapters count, wherever they are; what is merged already is taken out again."""
    for layer in layers.values():
        if layer.merged_adapters:
            layer.unmerge()
        if layer.disable_adapters:
            layer.enable_adapters(True)
        available = layer._get_available_adapters()
        layer.set_adapter([adapter for adapter in chosen if adapter in available], inference_mode=True)


def _tokens(model: Any, layers: dict[str, Any]) -> Int[Tensor, "n t"]:
    """A few prompts, of random tokens and of those whose embeddings are adapted."""
    generator = torch.Generator("cpu").manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (4, 8), generator=generator, device="cpu")
    for layer in layers.values():
        for indices in getattr(getattr(layer, "token_adapter", None), "token_indices", {}).values():
            own = torch.as_tensor(indices, device="cpu").unique()[:8]
            ids[-1, : len(own)] = own
    return ids.to(next(model.parameters()).device)


@torch.no_grad()
def _logits(model: Any, ids: Int[Tensor, "n t"]) -> Float[Tensor, "n t vocab"]:
    return model(input_ids=ids, use_cache=False).logits


def _ends(model: Any) -> tuple[Any, Any]:
    """The modules under any adapters that hold the matrices of embedding and head."""
    found: list[Any] = []
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        while _is_adapter(module):
            module = module.base_layer if "base_layer" in module._modules else module.original_module
        found.append(module)
    return found[0], found[1]


def _untie(model: Any) -> bool:
    """Give the head a parameter of its own (with the same memory, which merging replaces); whether it shared one."""
    embedding, head = _ends(model)
    tied = head.weight is embedding.weight
    if tied:
        head.weight = nn.Parameter(head.weight.detach())
    return tied


def _retie(model: Any) -> bool:
    """Let embedding and head share a matrix again if theirs are equal; otherwise the config says that they do not."""
    embedding, head = _ends(model)
    if torch.equal(embedding.weight, head.weight):
        head.weight = embedding.weight
        return True
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}  # which saving looks at
    return False


@torch.no_grad()
def _merge_layer(model: Any, name: str, layer: Any, chosen: list[str]) -> list[WeightChange]:
    """Merge one adapter layer and put the plain module in its place."""
    own = tuple(adapter for adapter in chosen if adapter in layer._get_available_adapters())
    saved_whole = "modules_to_save" in layer._modules
    plain = layer.original_module if hasattr(type(layer), "unload_and_optionally_merge_module") else layer
    while "base_layer" in plain._modules:
        plain = plain.base_layer
    before = {key: weight.detach().clone() for key, weight in plain.named_parameters()}
    if hasattr(type(layer), "unload_and_optionally_merge_module"):
        plain = layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
    else:
        layer.merge(safe_merge=True)
        plain = layer.get_base_layer()
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, plain)
    if not own:
        return []
    found = []
    for key, weight in plain.named_parameters():
        relative = _relative(before[key], weight)
        if relative != 0 or key == "weight" or saved_whole:
            found.append(WeightChange(f"{name}.{key}", own, relative))
    return found


def _relative(before: Tensor, after: Tensor) -> float:
    size = float(before.double().norm())
    return float((after.double() - before.double()).norm()) / (size if size > 0 else 1.0)


def _refuse_partial(changes: list[WeightChange]) -> None:
    """Adapters that were trained leave no matrix that they target as it was; those of another base do."""
    unchanged = [change for change in changes if change.relative == 0]
    if unchanged and len(unchanged) < len(changes):
        names = ", ".join(f"'{name}'" for name in dict.fromkeys(n for change in unchanged for n in change.adapters))
        raise Invalid(
            f"adapter {names}: {len(unchanged)} of {len(changes)} targeted matrices stay as they were, the first "
            f"{unchanged[0].name}: must be an adapter of this base, with weights for all that it targets"
        )


def _compare(expected: Float[Tensor, "n t vocab"], found: Float[Tensor, "n t vocab"]) -> None:
    tolerance = TOLERANCE.get(expected.dtype, TOLERANCE_LOW)
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= tolerance:
        raise Invalid(
            f"the adapters cannot be merged into the weights: merged and unmerged model differ by {error:.1e} of the "
            "largest logit"
        )
