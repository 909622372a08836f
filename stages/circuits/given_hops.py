"""Hops that are named in advance, as a paper does that found its circuit by hand, instead of a search for them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from stages.circuits.circuit import LOGITS, Circuit, Component
from stages.circuits.needed_heads import Head
from stages.circuits.patcher import Patcher
from stages.circuits.rule import Rule
from stages.circuits.scores import Metric
from stages.circuits.search import Found, Hop, Report, circuit_of, name_of, with_scores
from stages.circuits.selection import select_heads
from stages.circuits.sweep import Receivers
from stages.pipeline.stage import Invalid


@dataclass(frozen=True)
class HopSpec:
    """A hop to be measured.

    Attributes:
        name: of the hop and the group of its senders.
        position: of the senders.
        receiver: name of an earlier hop, or "logits".
        component: which input of the receivers, "q", "k" or "v"; None for the logits.
    """

    name: str
    position: str
    receiver: str
    component: str | None


def given_hops(
    patcher: Patcher,
    metric: Metric,
    rule: Rule,
    specs: Sequence[HopSpec],
    receivers: Sequence[int] | None,
    heads: Sequence[int] | None,
    report: Report,
) -> tuple[Circuit, list[Hop]]:
    """Measure hops one after the other.

    Each hop feeds heads of an earlier one: the strongest ones alone, without regard to which of them end up in a
    group. A head that two hops find at the same position belongs to the later one (in Prakash et al. 2024 a value
    fetcher that is a position transmitter, too, is a position transmitter).

    Args:
        specs: the hops; a hop comes after the one that it feeds.
        receivers: how many of a hop's strongest heads the next hop feeds, one number a hop; None: those of
            the rule that have the sign of their receivers.
        heads: how many of a hop's strongest heads form its group, one number a hop; None: those of the rule, those
            against it in a group of their own.
        report: called after every hop.

    Returns:
        the circuit, and all hops. One whose receivers are no heads has a joint score of 0 and no scores.

    Raises:
        Invalid: the prompts lack a position, a receiver is not an earlier hop, a name is not unique, or there is not
            one number a hop.
    """
    _check(specs, receivers, heads, list(patcher.positions))
    hops: list[Hop] = []
    feeding: dict[str, tuple[Head, ...]] = {LOGITS: ()}
    for number, spec in enumerate(specs):
        component = None if spec.component is None else Component(spec.component)
        if component is not None and not feeding[spec.receiver]:
            nothing = patcher.scored(metric, torch.zeros_like(patcher.clean))
            hop = Hop(spec.name, spec.position, spec.receiver, component, nothing)
        else:
            target = Receivers(component, feeding[spec.receiver])
            together = patcher.joint_effects(spec.position, [target])[0]
            alone = patcher.head_effects(spec.position, [target])[0]
            joint = patcher.scored(metric, together)
            hop = Hop(spec.name, spec.position, spec.receiver, component, joint, target.heads)
            hop = with_scores(patcher, metric, hop, alone)
            if receivers is None or heads is None:
                hop = replace(
                    hop, selection=select_heads(patcher, metric, rule, spec.position, target, together, alone)
                )
        of_rule = {1: (), -1: ()} if hop.selection is None else hop.selection.senders
        feeding[spec.name] = of_rule[1] if receivers is None else hop.strongest(receivers[number])
        chosen = of_rule if heads is None else {1: hop.strongest(heads[number]), -1: ()}
        names = {sign: name_of(hop, sign) for sign in chosen}
        found = tuple(Found(names[sign], sign, of, names[sign]) for sign, of in chosen.items() if of)
        hops.append(replace(hop, found=found))
        report(hops[-1])
    hops = [_less_later(hop, hops[number + 1 :]) for number, hop in enumerate(hops)]
    return circuit_of(patcher, hops), hops


def _check(
    specs: Sequence[HopSpec],
    receivers: Sequence[int] | None,
    heads: Sequence[int] | None,
    positions: Sequence[str],
) -> None:
    before = [LOGITS]
    for spec in specs:
        if spec.position not in positions:
            known = ", ".join(sorted(positions))
            raise Invalid(f"hop '{spec.name}' needs the position '{spec.position}': the prompts have {known}")
        if spec.receiver not in before or (spec.receiver == LOGITS) != (spec.component is None):
            raise Invalid(
                f"hop '{spec.name}' feeds {spec.component or 'no input'} of '{spec.receiver}': must be an input q, k "
                f"or v of an earlier hop, or no input of '{LOGITS}'"
            )
        if spec.name in before:
            raise Invalid(f"two hops are called '{spec.name}': must be called differently")
        before.append(spec.name)
    for argument, numbers in (("receivers", receivers), ("heads", heads)):
        if numbers is not None and len(numbers) != len(specs):
            raise Invalid(f"{argument} has {len(numbers)} numbers: must be one for each of the {len(specs)} hops")


def _less_later(hop: Hop, later: Sequence[Hop]) -> Hop:
    """The hop without the heads that a later one has at the same position."""
    taken = {head for other in later if other.position == hop.position for part in other.found for head in part.heads}
    parts = [replace(part, heads=tuple(head for head in part.heads if head not in taken)) for part in hop.found]
    return replace(hop, found=tuple(part for part in parts if part.heads))
