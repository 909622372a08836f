"""Finding a circuit: which heads, at which positions, feed the answer, and through which inputs.

A hop is one path-patching experiment: senders at one position, receivers (the logits, or the heads of a group
that was found before) and the component of the receivers that they write to. Two ways to choose the hops:

- `paper_hops`: the four hops of Prakash et al. 2024, with their positions;
- `search`: from the logits backwards. Every group that was found is asked what feeds its queries (at its own
  position) and its keys and values (at every position up to its own). One patch of all heads together says
  whether anything at a position feeds a component; where it does, single heads are scored. It ends where
  nothing beats the noise.

Which heads of a position are the senders of a hop is decided in `selection.py`, by one rule for every model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from stages.circuits.circuit import LOGITS, Circuit, Component, Group
from stages.circuits.path_patching import PathPatcher, Receivers
from stages.circuits.scores import Metric, Scores, half_scores, score, split_half
from stages.circuits.selection import Head, Rule, select_heads, strongest
from stages.pipeline.stage import Invalid

ROOT = "fetch_answer"  # the group that writes the answer into the logits


@dataclass(frozen=True)
class Hop:
    """One hop that was tried.

    Attributes:
        name: of the group of its senders, unique.
        position: of the senders.
        receiver: name of the receiving group, or "logits".
        component: which input of the receivers; None for the logits.
        joint: score of all heads at the position together, with its noise.
        scores: score of each head alone, [layers h]; None where the joint effect did not pass.
        halves: the scores of the even and of the odd examples; None without scores, or with fewer than four examples.
        split_half: correlation between the two.
        heads: selected (layer, head) pairs, strongest first.
        group: name of the group that these heads form or join; None without heads.
        feeds: the (layer, head) pairs of the receiver whose input was patched; none for the logits.
    """

    name: str
    position: str
    receiver: str
    component: Component | None
    joint: Scores
    scores: Scores | None = None
    halves: Float[Tensor, "2 layers h"] | None = None
    split_half: float | None = None
    heads: tuple[Head, ...] = ()
    group: str | None = None
    feeds: tuple[Head, ...] = ()

    @property
    def forms_group(self) -> bool:
        return self.group == self.name

    def strongest(self, k: int) -> tuple[Head, ...]:
        """The k heads that do most alone, strongest first."""
        return () if self.scores is None else tuple(strongest(self.scores)[:k])


# name of the hop and its group, sender position, receiver, component
PAPER_HOPS = (
    ("value_fetcher", "last", LOGITS, None),
    ("pos_transmitter", "last", "value_fetcher", Component.Q),
    ("pos_detector", "query_label", "pos_transmitter", Component.V),
    ("struct_reader", "earlier_label", "pos_detector", Component.V),
)

Report = Callable[[Hop], None]  # called after every hop


def search(patcher: PathPatcher, metric: Metric, rule: Rule, report: Report) -> tuple[Circuit, list[Hop]]:
    """Find a circuit from the logits backwards.

    Returns:
        the circuit, and every hop that was tried, in order.
    """
    hops = _try(patcher, metric, rule, "last", [(ROOT, LOGITS, None, ())], [], report)
    asked: dict[str, set[Head]] = {}  # group -> its heads whose inputs were searched
    frontier = hops
    for _ in range(1, rule.max_depth):
        found: list[Hop] = []
        for upper in frontier:
            if upper.group is None:
                continue
            # of a hop that joined a group only the heads that are new there
            heads = tuple(head for head in upper.heads if head not in asked.setdefault(upper.group, set()))
            asked[upper.group].update(heads)
            if all(layer == 0 for layer, _ in heads):
                continue  # no head writes into the first layer
            for position in _up_to(patcher, upper.position):
                components = list(Component) if position == upper.position else [Component.K, Component.V]
                targets = [(_name(part, position, upper.name), upper.group, part, heads) for part in components]
                found += _try(patcher, metric, rule, position, targets, [*hops, *found], report)
        hops += found
        frontier = found
    return _circuit(patcher, hops), hops


def paper_hops(
    patcher: PathPatcher,
    metric: Metric,
    rule: Rule,
    receivers: Sequence[int] | None,
    heads: Sequence[int] | None,
    report: Report,
) -> tuple[Circuit, list[Hop]]:
    """The four hops of Prakash et al. 2024, section 3 and appendix.

    Each hop feeds heads of the hop before it: the strongest ones alone, without regard to which of them end up in a
    group. A head that two hops find at the same position belongs to the later one (there: a value fetcher that is a
    position transmitter, too, is a position transmitter).

    Args:
        receivers: how many of a hop's strongest heads the next hop feeds, one number a hop; None: those of
            the rule.
        heads: how many of a hop's strongest heads form its group, one number a hop; None: those of the rule.

    Returns:
        the circuit, and all four hops. One whose receivers are no heads has a joint score of 0 and no scores.

    Raises:
        Invalid: the prompts have no query label or no earlier label.
    """
    for _, position, _, _ in PAPER_HOPS:
        if position not in patcher.pairs.positions:
            known = ", ".join(sorted(patcher.pairs.positions))
            raise Invalid(f"the paper's hops need the position '{position}': the prompts have {known}")
    hops: list[Hop] = []
    feeding: dict[str, tuple[Head, ...]] = {LOGITS: ()}
    for number, (name, position, receiver, component) in enumerate(PAPER_HOPS):
        if component is not None and not feeding[receiver]:
            nothing = torch.zeros_like(patcher.clean)
            hop = Hop(name, position, receiver, component, _scores(patcher, metric, nothing))
        else:
            target = Receivers(component, feeding[receiver])
            together = patcher.joint_effects(position, [target])[0]
            alone = patcher.head_effects(position, [target])[0]
            hop = Hop(name, position, receiver, component, _scores(patcher, metric, together), feeds=target.heads)
            hop = _scored(patcher, metric, hop, alone)
            if receivers is None or heads is None:
                selected = select_heads(patcher, metric, rule, position, target, together, alone)
                hop = replace(hop, heads=selected)
        feeding[name] = hop.heads if receivers is None else hop.strongest(receivers[number])
        chosen = hop.heads if heads is None else hop.strongest(heads[number])
        hops.append(replace(hop, heads=chosen, group=name if chosen else None))
        report(hops[-1])
    hops = [_less_later(hop, hops[number + 1 :]) for number, hop in enumerate(hops)]
    return _circuit(patcher, hops), hops


def _less_later(hop: Hop, later: Sequence[Hop]) -> Hop:
    """The hop without the heads that a later one has at the same position."""
    taken = {head for other in later if other.position == hop.position for head in other.heads}
    heads = tuple(head for head in hop.heads if head not in taken)
    return replace(hop, heads=heads, group=hop.group if heads else None)


def _try(
    patcher: PathPatcher,
    metric: Metric,
    rule: Rule,
    position: str,
    targets: Sequence[tuple[str, str, Component | None, tuple[Head, ...]]],
    earlier: Sequence[Hop],
    report: Report,
) -> list[Hop]:
    """One hop for each target (name, receiver, component, receiving heads): all heads first, then each."""
    receivers = [Receivers(component, heads) for _, _, component, heads in targets]
    together = patcher.joint_effects(position, receivers)
    joints = [_scores(patcher, metric, effect) for effect in together]
    counting = [number for number, joint in enumerate(joints) if rule.counts(joint)]
    effects = dict(zip(counting, patcher.head_effects(position, [receivers[i] for i in counting]), strict=True))
    hops: list[Hop] = []
    for number, (name, receiver, component, feeds) in enumerate(targets):
        hop = Hop(name, position, receiver, component, joints[number], feeds=feeds)
        if number in effects:
            alone = effects[number]
            heads = select_heads(patcher, metric, rule, position, receivers[number], together[number], alone)
            hop = _scored(patcher, metric, replace(hop, heads=heads), alone)
            hop = replace(hop, group=_group_of(hop, [*earlier, *hops], rule.merge_overlap))
        report(hop)
        hops.append(hop)
    return hops


def _scored(patcher: PathPatcher, metric: Metric, hop: Hop, alone: Float[Tensor, "layers h n"]) -> Hop:
    """The hop with the scores of single heads."""
    hop = replace(hop, scores=_scores(patcher, metric, alone))
    if len(patcher.clean) < 4:
        return hop
    halves = half_scores(metric, alone, patcher.clean, patcher.corrupt)
    return replace(hop, halves=halves, split_half=split_half(halves))


def _group_of(hop: Hop, earlier: Sequence[Hop], merge_overlap: float) -> str | None:
    """The name of the group that a hop's heads join: its own unless they are much the same as another's."""
    if not hop.heads:
        return None
    heads = set(hop.heads)
    for other in earlier:
        if other.forms_group and other.position == hop.position:
            if len(heads & set(other.heads)) >= merge_overlap * len(heads | set(other.heads)):
                return other.name
    return hop.name


def _scores(patcher: PathPatcher, metric: Metric, effects: Float[Tensor, "*senders n"]) -> Scores:
    return score(metric, effects, patcher.clean, patcher.corrupt)


def _up_to(patcher: PathPatcher, position: str) -> list[str]:
    """Semantic positions that are never after `position`: itself first, then from late to early."""
    positions = patcher.pairs.positions
    before = [name for name, at in positions.items() if bool((at <= positions[position]).all())]
    return sorted(before, key=lambda name: (name != position, -float(positions[name].double().mean()), name))


def _name(component: Component, position: str, receiver: str) -> str:
    """E.g. "k_separator" feeds keys of the answer fetchers, "v_label>k_separator" values of those heads."""
    step = f"{component}_{position.removeprefix('earlier_')}"
    return step if receiver == ROOT else f"{step}>{receiver}"


def _circuit(patcher: PathPatcher, hops: Sequence[Hop]) -> Circuit:
    groups = []
    for hop in hops:
        if hop.forms_group and hop.scores is not None:
            joined = [head for other in hops if other.group == hop.name for head in other.heads]
            heads = tuple(dict.fromkeys([*hop.heads, *joined]))
            values = tuple(float(hop.scores.score[head]) for head in heads)
            groups.append(Group(hop.name, hop.position, hop.receiver, hop.component, heads, values))
    return Circuit(tuple(groups), patcher.walker.n_layers, patcher.walker.n_heads)
