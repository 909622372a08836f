"""Llama models with weights set by hand, so that their circuit is known exactly.

A prompt is a beginning, four clauses, and a question, e.g. "<s> o l ; o l ; o l ; o l ; l ?" with objects o and labels
l; the answer is the object of the clause whose label is asked for. The residual stream is cut into named spaces of one
dimension for each value. A planted head attends by content (a space of the query against a space of the key) or to the
token a fixed distance before, and copies one space to another one. All norms are real RMSNorms: every token has a large
constant (the ballast) that nothing writes to, so that norms hardly change what is read. All other heads have small
random weights, except for one that writes much into a space that nothing reads; the MLPs are small and random.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from stages.circuits.circuit import Node
from stages.circuits.pairs import AlignedPairs
from stages.circuits.path_patching import PathPatcher
from stages.circuits.scores import Metric, measure_of
from stages.circuits.walker import Walker
from tests.oracles import walker_of

HEADS, HEAD_DIM, WIDTH, BALLAST = 4, 32, 120, 8.0
THETA = 1e8  # rotary frequencies 10 ** (-i / 2): pairs 0-4 tell positions, pairs 6-15 hardly turn within a prompt
N_POSITION_PAIRS, FIRST_CONTENT_PAIR = 5, 6
SIZES = {
    **{"object": 8, "label": 10, "asked": 10, "clause": 4},  # what tokens are
    **{"copied_label": 10, "bound_label": 10, "bound_object": 8, "answer": 8},  # what heads write
    **{"place": 4, "detected": 4, "sent": 4, "unread": 8},
}
SPACES = {
    name: slice(end - size, end) for (name, size), end in zip(SIZES.items(), accumulate(SIZES.values()), strict=True)
}
CONSTANT = WIDTH - 1  # the dimension of the ballast
N_OBJECTS, N_LABELS, N_CLAUSES = SIZES["object"], SIZES["label"], SIZES["clause"]


@dataclass(frozen=True)
class PlantedHead:
    """A head and what it does.

    Attributes:
        at: layer, head, and the semantic position at which it belongs to the circuit.
        copies: the space that it reads at the attended position, and the one that it writes.
        back: the distance of the attended token; None: by content.
        match: space of its query and space of the keys, for attention by content.
        weight: with which it writes; below 0 for a head that works against what it copies.
    """

    at: tuple[int, int, str]
    copies: tuple[str, str]
    back: int | None = None
    match: tuple[str, str] | None = None
    weight: float = 0.7


@dataclass(frozen=True)
class Plan:
    """A circuit and the prompts it is for.

    Attributes:
        clause: the tokens of a clause: o object, l label, p object and label in one token, m an object that is marked
            with the number of its clause, ; separator.
        question: the tokens after the clauses: q the label that is asked for, ? and , fillers.
    """

    heads: tuple[PlantedHead, ...]
    clause: str = "ol;"
    question: str = "q?"

    @property
    def nodes(self) -> set[Node]:
        return {Node(*head.at) for head in self.heads}

    def writers(self, sign: int) -> set[Node]:
        """Heads that write the answer, or against it."""
        return {Node(*head.at) for head in self.heads if head.copies[1] == "answer" and head.weight * sign > 0}


FETCH_BY_SEPARATOR = PlantedHead((2, 3, "last"), ("bound_object", "answer"), match=("copied_label", "bound_label"))
WRITE_OBJECT = PlantedHead((0, 2, "earlier_separator"), ("object", "bound_object"), back=2)
WRITE_LABEL = PlantedHead((1, 1, "earlier_separator"), ("label", "bound_label"), back=1)
COPY_QUESTION = PlantedHead((0, 0, "last"), ("asked", "copied_label"), back=1)

ALL_THREE = (FETCH_BY_SEPARATOR, WRITE_OBJECT, WRITE_LABEL, COPY_QUESTION)
MOVE: dict[str, Any] = {"copies": ("bound_object", "answer"), "match": ("copied_label", "bound_label")}
STRONG = PlantedHead((2, 3, "last"), **MOVE, weight=1.6)  # so that the model does its task against a suppressor

PLANS = {
    # "l o ; ... l": a previous-token head writes keys, the induction head matches its own token with them
    "induction": Plan(
        (
            PlantedHead((0, 1, "earlier_object"), ("label", "bound_label"), back=1),
            PlantedHead((1, 2, "last"), ("object", "answer"), match=("asked", "bound_label")),
        ),
        "lo;",
        "q",
    ),
    "through_q": Plan(
        (
            PlantedHead((0, 3, "last"), ("asked", "copied_label"), back=1),
            PlantedHead((2, 0, "last"), ("object", "answer"), match=("copied_label", "label")),
        ),
        "p;",
    ),
    "through_k": Plan(
        (
            PlantedHead((0, 1, "earlier_label"), ("label", "copied_label"), back=0),
            PlantedHead((1, 0, "earlier_object"), ("copied_label", "bound_label"), back=1),
            PlantedHead((2, 3, "last"), ("object", "answer"), match=("asked", "bound_label")),
        ),
        "lo;",
        "q",
    ),
    "through_v": Plan(
        (
            PlantedHead((0, 2, "earlier_label"), ("object", "bound_object"), back=1),
            PlantedHead((2, 1, "last"), ("bound_object", "answer"), match=("asked", "label")),
        ),
        "ol;",
        "q",
    ),
    "all_three": Plan(ALL_THREE),
    # one of the two heads that copy the question is enough: the attention of the head that reads it is saturated
    "stand_in_for_q": Plan(
        (
            *ALL_THREE,
            PlantedHead((0, 1, "last"), ("asked", "copied_label"), back=1),
        )
    ),
    "stand_in_for_k": Plan(
        (
            *ALL_THREE,
            PlantedHead((0, 3, "earlier_separator"), ("label", "bound_label"), back=1),
        )
    ),
    # moves the object too, and takes it from the answer
    "negative_mover": Plan((STRONG, *ALL_THREE[1:], PlantedHead((2, 1, "last"), **MOVE, weight=-0.88))),
    # reads from its own position what the mover wrote, and takes most of it back
    "suppressor_above": Plan(
        (STRONG, *ALL_THREE[1:], PlantedHead((3, 0, "last"), ("answer", "answer"), back=0, weight=-0.4))
    ),
    # a second mover, and one in the same layer that undoes exactly what this one does
    "suppressor_beside": Plan(
        (*ALL_THREE, PlantedHead((2, 0, "last"), **MOVE), PlantedHead((2, 1, "last"), **MOVE, weight=-0.7))
    ),
    # of two heads that cancel each other in the query, one does nothing alone: without it the attention is but sharper
    "cancelling_queries": Plan(
        (
            PlantedHead((0, 2, "earlier_label"), ("object", "bound_object"), back=1),
            PlantedHead((2, 1, "last"), ("bound_object", "answer"), match=("asked", "label")),
            PlantedHead((1, 0, "last"), ("asked", "asked"), back=0),
            PlantedHead((1, 1, "last"), ("asked", "asked"), back=0, weight=-0.7),
        ),
        "ol;",
        "q",
    ),
    # the four groups of Prakash et al. 2024
    "paper": Plan(
        (
            PlantedHead((0, 2, "earlier_label"), ("clause", "place"), back=1),
            PlantedHead((1, 0, "query_label"), ("place", "detected"), match=("asked", "label")),
            PlantedHead((2, 3, "last"), ("detected", "sent"), back=2),
            PlantedHead((3, 1, "last"), ("object", "answer"), match=("sent", "clause")),
        ),
        "ml;",
        "q,?",
    ),
}


@dataclass(frozen=True)
class Tokens:
    """Token ids by what they are."""

    filler = 0
    objects = 1
    labels = objects + N_OBJECTS
    asked = labels + N_LABELS
    marked = asked + N_LABELS  # + clause * N_OBJECTS + object
    paired = marked + N_CLAUSES * N_OBJECTS  # + label * N_OBJECTS + object
    total = paired + N_LABELS * N_OBJECTS


def planted_model(plan: Plan, seed: int = 0, noise: float = 0.02) -> LlamaForCausalLM:
    """The model of a plan.

    Args:
        noise: standard deviation of the weights of heads that are not planted, and of the MLPs.
    """
    n_layers = max(head.at[0] for head in plan.heads) + 1
    settings: dict[str, Any] = dict(
        vocab_size=Tokens.total,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=n_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        rope_theta=THETA,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, noise)
        _set_tokens(model)
        for head in plan.heads:
            _set_head(model, head)
        used = {head.at[:2] for head in plan.heads}
        loud = next((0, head) for head in range(HEADS) if (0, head) not in used)
        _clear(model, *loud)
        _set_copy(model, *loud, "object", "unread", 3.0)
    return model


def _set_tokens(model: Any) -> None:
    embedding = model.model.embed_tokens.weight
    embedding.zero_()
    embedding[:, CONSTANT] = BALLAST
    objects, labels = torch.eye(N_OBJECTS), torch.eye(N_LABELS)
    embedding[Tokens.objects : Tokens.labels, SPACES["object"]] = objects
    embedding[Tokens.labels : Tokens.asked, SPACES["label"]] = labels
    embedding[Tokens.asked : Tokens.marked, SPACES["asked"]] = labels
    embedding[Tokens.marked : Tokens.paired, SPACES["object"]] = objects.repeat(N_CLAUSES, 1)
    embedding[Tokens.marked : Tokens.paired, SPACES["clause"]] = torch.eye(N_CLAUSES).repeat_interleave(N_OBJECTS, 0)
    embedding[Tokens.paired :, SPACES["object"]] = objects.repeat(N_LABELS, 1)
    embedding[Tokens.paired :, SPACES["label"]] = labels.repeat_interleave(N_OBJECTS, 0)
    model.lm_head.weight.zero_()
    model.lm_head.weight[Tokens.objects : Tokens.labels, SPACES["answer"]] = 6 * objects


def _rows(head: int) -> slice:
    return slice(HEAD_DIM * head, HEAD_DIM * (head + 1))


def _clear(model: Any, layer: int, head: int) -> None:
    attention = model.model.layers[layer].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(attention, name).weight[_rows(head)] = 0
    attention.o_proj.weight[:, _rows(head)] = 0


def _set_copy(model: Any, layer: int, head: int, source: str, target: str, weight: float) -> None:
    attention = model.model.layers[layer].self_attn
    size, first = SIZES[source], HEAD_DIM * head
    attention.v_proj.weight[first : first + size, SPACES[source]] = torch.eye(size)
    attention.o_proj.weight[SPACES[target], first : first + size] = weight * torch.eye(size)


def _set_head(model: Any, planted: PlantedHead) -> None:
    layer, head, _ = planted.at
    _clear(model, layer, head)
    _set_copy(model, layer, head, *planted.copies, planted.weight)
    attention = model.model.layers[layer].self_attn
    q, k = (getattr(attention, name).weight[_rows(head)] for name in ("q_proj", "k_proj"))
    if planted.match is not None:
        asking, asked = planted.match
        content = slice(FIRST_CONTENT_PAIR, FIRST_CONTENT_PAIR + SIZES[asking])
        q[content, SPACES[asking]] = 9 * torch.eye(SIZES[asking])
        k[content, SPACES[asked]] = 9 * torch.eye(SIZES[asked])
    if planted.back is not None:
        pairs = torch.arange(N_POSITION_PAIRS)
        angle = planted.back * THETA ** (-2 * pairs / HEAD_DIM)
        k[pairs, CONSTANT] = 1.5
        q[pairs, CONSTANT] = 1.5 * angle.cos()
        q[pairs + HEAD_DIM // 2, CONSTANT] = -1.5 * angle.sin()


@dataclass(frozen=True)
class Prompts:
    pairs: AlignedPairs
    answer: Tensor
    others: Tensor


def planted_prompts(plan: Plan, n: int = 64, seed: int = 0) -> Prompts:
    """Prompts with corrupt partners: another context, and a question for a label that neither context has.

    As in the paper, the earlier label of a corrupt prompt is that of any of its clauses.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(pool: list[int], k: int) -> list[int]:
        return [pool[at] for at in torch.randperm(len(pool), generator=generator)[:k]]

    length = len(plan.clause)
    offset = {"earlier_object": "omp", "earlier_label": "lp", "earlier_separator": ";"}
    where = {name: next(i for i, c in enumerate(plan.clause) if c in kinds) for name, kinds in offset.items()}
    clean, corrupt, answer, others = [], [], [], []
    positions: dict[str, list[int]] = {name: [] for name in where}
    corrupt_positions: dict[str, list[int]] = {name: [] for name in where}
    for _ in range(n):
        objects, labels = draw(list(range(N_OBJECTS)), N_CLAUSES), draw(list(range(N_LABELS)), N_CLAUSES)
        other_objects, other_labels = draw(list(range(N_OBJECTS)), N_CLAUSES), draw(list(range(N_LABELS)), N_CLAUSES)
        absent = draw([label for label in range(N_LABELS) if label not in {*labels, *other_labels}], 1)[0]
        queried, elsewhere = draw(list(range(N_CLAUSES)), 1)[0], draw(list(range(N_CLAUSES)), 1)[0]
        clean.append(_prompt(plan, objects, labels, labels[queried]))
        corrupt.append(_prompt(plan, other_objects, other_labels, absent))
        answer.append(Tokens.objects + objects[queried])
        others.append([Tokens.objects + o for o in objects if o != objects[queried]])
        for name, at in where.items():
            positions[name].append(1 + length * queried + at)
            corrupt_positions[name].append(1 + length * elsewhere + at)
    end = len(clean[0])
    fixed = {"last": end - 1, "query_label": end - len(plan.question)}
    tensors = [
        {name: torch.full((n,), at) for name, at in fixed.items()} | {k: torch.tensor(v) for k, v in found.items()}
        for found in (positions, corrupt_positions)
    ]
    pairs = AlignedPairs(torch.tensor(clean), torch.tensor(corrupt), *tensors)
    return Prompts(pairs, torch.tensor(answer), torch.tensor(others))


def _prompt(plan: Plan, objects: list[int], labels: list[int], asked: int) -> list[int]:
    ids = [Tokens.filler]
    for clause, (o, label) in enumerate(zip(objects, labels, strict=True)):
        tokens = {
            "o": Tokens.objects + o,
            "l": Tokens.labels + label,
            "m": Tokens.marked + clause * N_OBJECTS + o,
            "p": Tokens.paired + label * N_OBJECTS + o,
            ";": Tokens.filler,
        }
        ids += [tokens[kind] for kind in plan.clause]
    return ids + [Tokens.asked + asked if kind == "q" else Tokens.filler for kind in plan.question]


def planted_patcher(plan: Plan, metric: Metric = Metric.LOGIT_DIFFERENCE, seed: int = 0) -> PathPatcher:
    """The patcher of a plan's model on its prompts."""
    prompts = planted_prompts(plan, seed=seed)
    walker: Walker = walker_of(planted_model(plan, seed))
    return PathPatcher(walker, prompts.pairs, measure_of(metric, prompts.answer, prompts.others), 64.0)
