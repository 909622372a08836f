"""Circuits from the literature, as data that a circuit is made of: `Circuit.from_heads(**GPT2_SMALL_IOI)`."""

from collections.abc import Mapping, Sequence
from typing import Any

from stages.pipeline.stage import Invalid
from stages.tasks.old.boxes import Boxes

# Wang et al., "Interpretability in the wild: a circuit for indirect object identification in GPT-2 small" (2022,
# arXiv 2211.00593), figure 2: 26 heads in seven classes, each with its token. As published, they keep 87 % of the logit
# difference. Of a class's paths the main one is given: S-inhibition feeds the queries of all three kinds of movers.
GPT2_SMALL_IOI: dict[str, Any] = {
    "classes": {
        "name mover": ((9, 9), (10, 0), (9, 6)),
        "negative name mover": ((10, 7), (11, 10)),
        "backup name mover": ((10, 10), (10, 6), (10, 2), (10, 1), (11, 2), (9, 7), (9, 0), (11, 9)),
        "S-inhibition": ((7, 3), (7, 9), (8, 6), (8, 10)),
        "induction": ((5, 5), (5, 8), (5, 9), (6, 9)),
        "duplicate token": ((0, 1), (0, 10), (3, 0)),
        "previous token": ((2, 2), (4, 11)),
    },
    "position": {
        "name mover": "end",
        "negative name mover": "end",
        "backup name mover": "end",
        "S-inhibition": "end",
        "induction": "s2",
        "duplicate token": "s2",
        "previous token": "s1+1",
    },
    "sign": {"negative name mover": -1},
    "feeds": {
        "name mover": ("logits", None),
        "negative name mover": ("logits", None),
        "backup name mover": ("logits", None),
        "S-inhibition": ("name mover", "q"),
        "induction": ("S-inhibition", "v"),
        "duplicate token": ("S-inhibition", "v"),
        "previous token": ("induction", "k"),
    },
    "n_layers": 12,
    "n_heads": 12,
}


def entity_tracking(
    groups: Mapping[str, Sequence[Sequence[int]]], n_layers: int = 32, n_heads: int = 32
) -> dict[str, Any]:
    """A circuit of Prakash et al. (2024) in the form of their files, `{"value_fetcher": [[15, 13], ...], ...}`, as
    `Circuit.from_heads` takes it: with the position of each group and what it feeds. Their models are those of
    Llama-7B's size.

    Args:
        groups: heads of each of their groups, as (layer, head).
        n_layers, n_heads: of the model.

    Raises:
        Invalid: there is a group that is none of theirs.
    """
    hops = {hop.name: hop for hop in Boxes.paper_hops}
    if unknown := sorted(set(groups) - set(hops)):
        raise Invalid(f"group '{unknown[0]}': must be one of {', '.join(hops)}")
    present = [hop for hop in hops.values() if hop.name in groups]
    return {
        "classes": {hop.name: [(int(layer), int(head)) for layer, head in groups[hop.name]] for hop in present},
        "position": {hop.name: hop.position for hop in present},
        "feeds": {hop.name: (hop.receiver, hop.component) for hop in present if hop.receiver in ("logits", *groups)},
        "n_layers": n_layers,
        "n_heads": n_heads,
    }
