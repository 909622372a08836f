"""TransformerLens as an oracle: head outputs, activation patching and path patching, in a model of its own code.

Its HookedTransformer computes with its own attention, rotary embedding, norms and MLPs, from the same weights; versions
from 4 on call Hugging Face's modules instead, which the walker is compared with anyway. It is not part of the
environment: `make peers` installs it beside, and runs this.
"""

import json
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from stages.circuits.circuit import Component, Node
from stages.circuits.pairs import AlignedPairs
from stages.circuits.path_patching import PathPatcher, Receivers
from stages.circuits.scores import Metric, logit_difference, measure_of
from stages.circuits.transplant import transplant
from stages.circuits.walker import Walker
from stages.pipeline.checkpoints import load_model, load_tokenizer
from tests.oracles import random_model, random_pairs, walker_of

lens: Any = pytest.importorskip("transformer_lens", reason="TransformerLens is not installed here: make peers")
if not version("transformer-lens").startswith("3."):
    pytest.skip("this TransformerLens has no model of its own: must be 3", allow_module_level=True)

KINDS = ("llama", "llama_gqa", "qwen2", "gpt2", "gpt_neox")
MEMORY = 256.0


@dataclass(frozen=True)
class Case:
    """A model in both implementations, pairs with answers, and nodes and paths to patch.

    Attributes:
        walker: ours.
        hooked: theirs.
        pairs: with the positions "end" and "earlier".
        answer, others: what the logit difference is of.
        senders: heads, (layer, head).
        paths: where senders are patched, and what they are patched to.
    """

    walker: Walker
    hooked: Any
    pairs: AlignedPairs
    answer: Tensor
    others: Tensor
    senders: list[tuple[int, int]]
    paths: list[tuple[str, Receivers]]

    def difference(self, logits: Tensor) -> Float[Tensor, " n"]:
        return logit_difference(logits[:, -1].double(), self.answer, self.others)


def hooked_model(model: Any) -> Any:
    """TransformerLens's own model with these weights, unprocessed (nothing folded or centred), made offline."""
    conversions: Any = import_module("transformer_lens.pretrained.weight_conversions")
    config, kind = model.config, model.config.model_type
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", config.num_attention_heads)
    settings: dict[str, Any] = dict(
        d_model=config.hidden_size, d_head=width, n_heads=config.num_attention_heads, n_layers=config.num_hidden_layers,
        n_ctx=64, d_vocab=config.vocab_size, dtype=next(model.parameters()).dtype, device="cpu",
        n_key_value_heads=None if groups == config.num_attention_heads else groups,
    )  # fmt: skip
    if kind == "gpt2":
        settings |= dict(
            d_mlp=config.n_inner, eps=config.layer_norm_epsilon, act_fn="gelu_new", normalization_type="LN", n_ctx=16,
            scale_attn_by_inverse_layer_idx=config.scale_attn_by_inverse_layer_idx,
        )  # fmt: skip
        convert = conversions.convert_gpt2_weights
    elif kind == "gpt_neox":
        rope = config.rope_parameters
        settings |= dict(
            d_mlp=config.intermediate_size, eps=config.layer_norm_eps, act_fn="gelu", normalization_type="LN",
            positional_embedding_type="rotary", rotary_adjacent_pairs=False, rotary_base=rope["rope_theta"],
            rotary_dim=int(width * rope["partial_rotary_factor"]), parallel_attn_mlp=config.use_parallel_residual,
        )  # fmt: skip
        convert = conversions.convert_neox_weights
    else:
        settings |= dict(
            d_mlp=config.intermediate_size, eps=config.rms_norm_eps, act_fn=config.hidden_act, normalization_type="RMS",
            positional_embedding_type="rotary", rotary_adjacent_pairs=False, rotary_dim=width, final_rms=True,
            gated_mlp=True, rotary_base=config.rope_parameters["rope_theta"],
        )  # fmt: skip
        convert = getattr(conversions, f"convert_{kind}_weights")
    hooked = lens.HookedTransformer(lens.HookedTransformerConfig(**settings), move_to_device=False)
    # its load_and_process_state_dict would round float64 weights to float32
    missing, unexpected = hooked.load_state_dict(convert(model, hooked.cfg), strict=False)
    assert not unexpected and {name.rpartition(".")[2] for name in missing} <= {
        "mask", "IGNORE", "rotary_sin", "rotary_cos", "b_U",  # GPT-2 has no such bias: zeros
    }  # fmt: skip
    return hooked.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=KINDS)
def random_case(request: pytest.FixtureRequest) -> Case:
    """Random weights in float64."""
    model = random_model(request.param)
    pairs = random_pairs()
    at = {"end": pairs.positions["last"], "earlier": pairs.positions["query_label"]}
    pairs = AlignedPairs(pairs.clean_ids, pairs.corrupt_ids, at, at)
    senders = [(layer, head) for layer in range(3) for head in range(4)]
    heads = ((1, 0), (2, 3))
    paths = [("end", Receivers()), ("end", Receivers(Component.Q, heads))]
    paths += [("earlier", Receivers(component, heads)) for component in (Component.K, Component.V)]
    return Case(
        walker_of(model), hooked_model(model), pairs, torch.arange(5), torch.tensor([[7, 8]] * 5), senders, paths
    )  # fmt: skip


@pytest.fixture(scope="module")
def real_case(smollm2: Path) -> Case:
    """SmolLM2 on sentences in which a name is given back: the answer is the name that stands once."""
    model, tokenizer = load_model(smollm2), load_tokenizer(smollm2)
    names, places = ("Mary", "John", "Anna", "Paul"), ("store", "park", "school", "garden")
    clean, corrupt, answers, others = [], [], [], []
    for index, place in enumerate(places):
        a, b, c = (names[(index + shift) % 4] for shift in range(3))
        clean.append(f"When {a} and {b} went to the {place}, {b} gave a book to")
        corrupt.append(f"When {a} and {b} went to the {place}, {c} gave a book to")
        answers.append(f" {a}")
        others.append([f" {b}"])

    def ids(texts: list[str]) -> Tensor:
        return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts])

    assert all(len(tokenizer(text)["input_ids"]) == 1 for text in answers)
    changed = (ids(clean) != ids(corrupt)).nonzero()  # the second time that a name stands there
    at = {"end": torch.full((len(places),), ids(clean).shape[1] - 1), "earlier": changed[:, 1]}
    pairs = AlignedPairs(ids(clean), ids(corrupt), at, at)
    senders = [(10, 2), (11, 0), (16, 0), (17, 4), (23, 0), (23, 3), (29, 1)]
    paths = [("end", Receivers()), ("end", Receivers(Component.Q, ((23, 3), (29, 1))))]
    paths += [("earlier", Receivers(component, ((17, 4), (17, 0)))) for component in (Component.K, Component.V)]
    walker = Walker(model)
    return Case(
        walker, hooked_model(model), pairs, ids(answers)[:, 0], torch.stack([ids(o)[:, 0] for o in others]), senders,
        paths,
    )  # fmt: skip


def check(case: Case, tolerance: float) -> dict[str, float]:
    """Maximum errors: of logits, head outputs and what heads write in units of the largest, of patching in units of the
    largest clean logit difference."""
    errors = {}
    clean, corrupt = (case.walker.run(ids) for ids in (case.pairs.clean_ids, case.pairs.corrupt_ids))
    with torch.no_grad():
        logits, their_clean = case.hooked.run_with_cache(case.pairs.clean_ids)
        _, their_corrupt = case.hooked.run_with_cache(case.pairs.corrupt_ids)
    layers = range(case.walker.n_layers)
    errors["logits"] = relative(clean.logits, logits[:, -1])
    z = [their_clean["z", layer] for layer in layers]
    errors["head outputs"] = max(relative(clean.z[layer], z[layer]) for layer in layers)
    last = layers[-1]
    result = torch.einsum("nhd,hdm->nhm", z[last][:, -1], case.hooked.W_O[last])
    writes = case.walker.head_writes(last, clean.z[last][:, -1])
    errors["what heads write"] = relative(writes, result)
    size = float(case.difference(logits).abs().max())
    errors["activation patching"] = relative(*activation_patching(case, clean, corrupt, their_corrupt), size)
    measure = measure_of(Metric.LOGIT_DIFFERENCE, case.answer, case.others)
    patcher = PathPatcher(case.walker, case.pairs, measure, MEMORY)
    for position, receivers in case.paths:
        effects = patcher.head_effects(position, [receivers])[0]
        mine = torch.stack([effects[layer, head] for layer, head in case.senders])
        theirs = torch.stack(
            [path_patching(case, position, their_clean, their_corrupt, sender, receivers) for sender in case.senders]
        )
        name = "logits" if receivers.component is None else f"{receivers.component.value} at {position}"
        errors[f"paths to {name}"] = relative(mine, theirs, size)
        assert float(theirs.abs().max()) > 1e-4  # some sender does something
    print({name: f"{error:.1e}" for name, error in errors.items()})
    for name, error in errors.items():  # they return scores of activation patching in float32
        assert error <= (max(tolerance, 1e-7) if name == "activation patching" else tolerance), (name, errors)
    return errors


def relative(ours: Tensor, theirs: Tensor, size: float | None = None) -> float:
    assert ours.shape == theirs.shape
    return float((ours.detach().double() - theirs.double()).abs().max()) / (size or float(theirs.abs().max()))


def activation_patching(case: Case, clean: Any, corrupt: Any, their_corrupt: Any) -> tuple[Tensor, Tensor]:
    """Mean logit difference with one head's output at the end from the corrupt prompts, all above it computed anew."""
    ours = torch.stack(
        [
            logit_difference(
                transplant(case.walker, clean, corrupt, case.pairs.positions, [Node(layer, head, "end")], MEMORY)[:, 0],
                case.answer,
                case.others,
            ).mean()
            for layer, head in case.senders
        ]
    )
    at = int(case.pairs.positions["end"][0])
    index = pd.DataFrame([(layer, at, head) for layer, head in case.senders], columns=["layer", "pos", "head"])
    with torch.no_grad():
        theirs = lens.patching.generic_activation_patch(
            case.hooked,
            case.pairs.clean_ids,  # theirs patches what it calls clean into what it calls corrupted
            their_corrupt,
            lambda logits: case.difference(logits).mean(),
            lens.patching.layer_pos_head_vector_patch_setter,
            "z",
            index_df=index,
        )
    return ours, theirs


@torch.no_grad()
def path_patching(
    case: Case, position: str, clean: Any, corrupt: Any, sender: tuple[int, int], receivers: Receivers
) -> Float[Tensor, " n"]:
    """Effect on the logit difference: two forward passes with hooks, all heads but the sender frozen in the first."""
    at, rows = case.pairs.positions[position], torch.arange(len(case.pairs.clean_ids))
    base = case.difference(case.hooked(case.pairs.clean_ids))

    def freeze(z: Tensor, hook: Any) -> Tensor:
        z = clean[hook.name].clone()
        if hook.layer() == sender[0]:
            z[rows, at, sender[1]] = corrupt[hook.name][rows, at, sender[1]]
        return z

    frozen = [(lambda name: name.endswith("hook_z"), freeze)]
    if receivers.component is None:
        return case.difference(case.hooked.run_with_hooks(case.pairs.clean_ids, fwd_hooks=frozen)) - base
    site = f"hook_{receivers.component.value}"
    read: dict[int, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        read[hook.layer()] = x.clone()

    case.hooked.run_with_hooks(
        case.pairs.clean_ids, fwd_hooks=[*frozen, (lambda name: name.endswith(f"attn.{site}"), keep)]
    )

    def write(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        for layer, head in receivers.heads:
            if layer == hook.layer():
                own = head * x.shape[2] // case.walker.n_heads  # keys and values may have fewer heads
                x[rows, at, own] = read[layer][rows, at, own]
        return x

    return (
        case.difference(
            case.hooked.run_with_hooks(
                case.pairs.clean_ids, fwd_hooks=[(lambda name: name.endswith(f"attn.{site}"), write)]
            )
        )
        - base
    )


def test_random_models_in_float64(random_case: Case) -> None:
    """Hugging Face takes cosines and sines of the rotary embedding in float32 in any model; GPT-2 has none."""
    check(random_case, 1e-12 if random_case.walker.model.config.model_type == "gpt2" else 2e-6)


def test_a_real_model(real_case: Case) -> None:
    errors = check(real_case, 1e-4)
    with torch.no_grad():
        kept = real_case.difference(real_case.hooked(real_case.pairs.clean_ids))
    print(json.dumps(errors), "logit differences", kept.tolist())
    assert bool((kept > 0).all())  # it knows whose turn it is
