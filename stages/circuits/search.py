"""Finding a circuit: which heads, at which positions, feed the answer, and through which inputs.

A hop is one path-patching experiment: senders at one position, receivers (the logits, or the heads of a group
that was found before) and the component of the receivers that they write to. `search` chooses the hops itself, from the
logits backwards. Every group that was found is asked what feeds its queries (at its own position) and its keys and
values (at every position up to its own). A few joint patches (`screening`) say whether anything at a position
feeds a component; where it does, single heads are scored. It ends where nothing beats the noise. `given_hops` measures
hops that are named in advance.

Which heads of a position are the senders of a hop is decided in `selection.py`, by one rule for every model. They form
one group, or two: a group has one sign, +1 where its heads raise the measure of the answer, -1 where they lower it.
A group that has its receivers' sign is called after the hop, e.g. "k_separator": what feeds the keys of the root group
at the separator; "v_label>k_separator": values of those heads at the label. A group of the other sign works against
what its receivers do, and is called so: "answer-against" are negative movers, "v_s1>answer-against" what feeds them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Bool, Float
from torch import Tensor

from stages.circuits.circuit import LOGITS, Circuit, Component, Group
from stages.circuits.needed_heads import Head
from stages.circuits.patcher import Patcher
from stages.circuits.rule import Rule
from stages.circuits.scores import Metric, Scores, half_scores, split_half
from stages.circuits.screening import heads_alone, patch_alone
from stages.circuits.selection import Selection, select_heads, strongest
from stages.circuits.sweep import Receivers
from stages.pipeline.stage import Invalid

AGAINST = "-against"
FEEDS = ">"


@dataclass(frozen=True)
class Found:
    """Senders of a hop that have one sign.

    Attributes:
        name: that of the hop, with "-against" where the sign is not that of the receivers; unique.
        sign: +1: they raise the measure, -1: they lower it.
        heads: (layer, head) pairs, in the order in which they were found.
        group: name of the group that they form or join.
    """

    name: str
    sign: int
    heads: tuple[Head, ...]
    group: str

    @property
    def forms_group(self) -> bool:
        return self.group == self.name


@dataclass(frozen=True)
class Hop:
    """One hop that was tried.

    Attributes:
        name: unique.
        position: of the senders.
        receiver: name of the receiving group, or "logits".
        component: which input of the receivers; None for the logits.
        joint: score of all heads at the position together, with its noise.
        feeds: the (layer, head) pairs of the receiver whose input was patched; none for the logits.
        sign: of the receivers.
        gate: scores of the joint patches that say whether the hop counts, the first one of all heads; None where it was
            not asked.
        scores: score of each head alone, [layers h]; None where the hop does not count.
        patched: which of these are of patches; the others are estimates below the rule's `screen`. None without scores.
        halves: the scores of the even and of the odd examples; None without scores, or with fewer than four examples.
        split_half: correlation between the two.
        selection: what was selected and how complete it is; None where nothing was selected by the rule.
        found: the senders, those with the receivers' sign first; empty where there are none.
    """

    name: str
    position: str
    receiver: str
    component: Component | None
    joint: Scores
    feeds: tuple[Head, ...] = ()
    sign: int = 1
    gate: Scores | None = None
    scores: Scores | None = None
    patched: Bool[Tensor, "layers h"] | None = None
    halves: Float[Tensor, "2 layers h"] | None = None
    split_half: float | None = None
    selection: Selection | None = None
    found: tuple[Found, ...] = ()

    def of(self, sign: int) -> Found | None:
        """The senders of a sign."""
        return next((found for found in self.found if found.sign == sign), None)

    @property
    def heads(self) -> tuple[Head, ...]:
        """The senders that have the receivers' sign, strongest first."""
        found = self.of(self.sign)
        return () if found is None else found.heads

    @property
    def group(self) -> str | None:
        """Name of the group that these form or join."""
        found = self.of(self.sign)
        return None if found is None else found.group

    def strongest(self, k: int) -> tuple[Head, ...]:
        """The k heads that do most alone, strongest first."""
        return () if self.scores is None else tuple(strongest(self.scores)[:k])


Report = Callable[[Hop], None]  # called after every hop


@dataclass(frozen=True)
class _Target:
    """What is asked at a position: a hop without its results."""

    name: str
    receiver: str
    component: Component | None
    heads: tuple[Head, ...]
    sign: int


def search(
    patcher: Patcher,
    metric: Metric,
    rule: Rule,
    report: Report,
    readout: str,
    root: str = "answer",
    display: Mapping[str, str] | None = None,
) -> tuple[Circuit, list[Hop]]:
    """Find a circuit from the logits backwards.

    Args:
        report: called after every hop.
        readout: the position whose heads write into the logits that are measured.
        root: name of the group that writes the answer there.
        display: position -> how it is called in names; the others are called as they are.

    Returns:
        the circuit, and every hop that was tried, in order.

    Raises:
        Invalid: there is no such position, or names of hops would be ambiguous.
    """
    positions = _positions(patcher)
    if readout not in positions:
        raise Invalid(f"readout = '{readout}': must be a position of the prompts: {', '.join(sorted(positions))}")
    shown = _shown(positions, display or {}, root)
    hops = _ask(patcher, metric, rule, readout, [_Target(root, LOGITS, None, (), 1)], [], report)
    asked: dict[str, set[Head]] = {}  # group -> its heads whose inputs were searched
    together: dict[str, list[set[Head]]] = {}  # position -> heads whose inputs were searched together
    frontier = hops
    for _ in range(1, rule.max_depth):
        found: list[Hop] = []
        for upper in frontier:
            for part in upper.found:
                # of senders that joined a group only the heads that are new there
                heads = tuple(head for head in part.heads if head not in asked.setdefault(part.group, set()))
                asked[part.group].update(heads)
                if all(layer == 0 for layer, _ in heads):
                    continue  # no head writes into the first layer
                # what feeds a head does so whichever of its own paths goes on: movers that feed their suppressor, too
                if any(known.issuperset(heads) for known in together.setdefault(upper.position, [])):
                    continue
                together[upper.position].append(set(heads))
                for position in _up_to(positions, upper.position):
                    targets = []
                    for component in list(Component) if position == upper.position else [Component.K, Component.V]:
                        step = f"{component}_{shown[position]}"
                        name = step if part.name == root else f"{step}{FEEDS}{part.name}"
                        targets.append(_Target(name, part.group, component, heads, part.sign))
                    found += _ask(patcher, metric, rule, position, targets, [*hops, *found], report)
        hops += found
        frontier = found
    return circuit_of(patcher, hops), hops


def _ask(
    patcher: Patcher,
    metric: Metric,
    rule: Rule,
    position: str,
    targets: Sequence[_Target],
    earlier: Sequence[Hop],
    report: Report,
) -> list[Hop]:
    """One hop for each target, all of which have the same receiving heads: the gate first, then each head alone."""
    receivers = [Receivers(target.component, target.heads) for target in targets]
    found = heads_alone(patcher, metric, rule, position, receivers)
    hops: list[Hop] = []
    for target, receiver, (gate, alone, patched) in zip(targets, receivers, found, strict=True):
        scores = patcher.scored(metric, gate)
        joint = scores[0]
        hop = Hop(target.name, position, target.receiver, target.component, joint, target.heads, target.sign, scores)
        if alone is not None:
            chosen = select_heads(patcher, metric, rule, position, receiver, gate[0], alone, target.sign, patched)
            senders = [head for heads in chosen.senders.values() for head in heads if not patched[head]]
            patch_alone(patcher, position, receiver, senders, alone, patched)
            hop = replace(with_scores(patcher, metric, hop, alone), patched=patched, selection=chosen)
            hop = replace(hop, found=_found(hop, chosen, [*earlier, *hops], rule.merge_overlap))
        report(hop)
        hops.append(hop)
    return hops


def with_scores(patcher: Patcher, metric: Metric, hop: Hop, alone: Float[Tensor, "layers h n"]) -> Hop:
    """The hop with the scores of single heads."""
    hop = replace(hop, scores=patcher.scored(metric, alone))
    if len(patcher.clean) < 4:
        return hop
    halves = half_scores(metric, alone, patcher.clean, patcher.corrupt)
    return replace(hop, halves=halves, split_half=split_half(halves))


def name_of(hop: Hop, sign: int) -> str:
    """The name of the senders of a sign."""
    return hop.name if sign == hop.sign else hop.name + AGAINST


def circuit_of(patcher: Patcher, hops: Sequence[Hop]) -> Circuit:
    """The groups that were formed, each with the heads that joined it."""
    groups = []
    for hop in hops:
        for part in hop.found:
            if part.forms_group and hop.scores is not None:
                joined = [
                    head for other in hops for more in other.found if more.group == part.name for head in more.heads
                ]
                heads = tuple(dict.fromkeys([*part.heads, *joined]))
                values = tuple(float(hop.scores.score[head]) for head in heads)
                groups.append(Group(part.name, hop.position, hop.receiver, hop.component, heads, values, part.sign))
    return Circuit(tuple(groups), patcher.walker.n_layers, patcher.walker.n_heads)


def _found(hop: Hop, chosen: Selection, earlier: Sequence[Hop], merge_overlap: float) -> tuple[Found, ...]:
    """The senders of either sign, with the groups that they form or join."""
    parts = []
    for sign in (hop.sign, -hop.sign):
        if heads := chosen.senders[sign]:
            name = name_of(hop, sign)
            parts.append(Found(name, sign, heads, _group_of(name, hop.position, sign, heads, earlier, merge_overlap)))
    return tuple(parts)


def _group_of(
    name: str, position: str, sign: int, heads: Sequence[Head], earlier: Sequence[Hop], merge_overlap: float
) -> str:
    """The name of the group that heads join: their own unless they are much the same as another's of their sign."""
    chosen = set(heads)
    for hop in earlier:
        for other in hop.found:
            if other.forms_group and hop.position == position and other.sign == sign:
                if len(chosen & set(other.heads)) >= merge_overlap * len(chosen | set(other.heads)):
                    return other.name
    return name


def _positions(patcher: Patcher) -> Mapping[str, Tensor]:
    """Semantic position -> its absolute position in every example; the last token of one that spans several."""
    return {name: at if at.ndim == 1 else at.amax(-1) for name, at in patcher.positions.items()}


def _up_to(positions: Mapping[str, Tensor], position: str) -> list[str]:
    """Semantic positions that are never after `position`: itself first, then from late to early."""
    before = [name for name, at in positions.items() if bool((at <= positions[position]).all())]
    return sorted(before, key=lambda name: (name != position, -float(positions[name].double().mean()), name))


def _shown(positions: Mapping[str, Tensor], display: Mapping[str, str], root: str) -> dict[str, str]:
    """How positions are called in names: all differently, so that every hop has a name of its own.

    Raises:
        Invalid: two would be called alike, a name holds what joins names, or the root is called like a hop.
    """
    shown = {name: display.get(name, name) for name in positions}
    for name, called in shown.items():
        others = [other for other in shown if other != name and shown[other] == called]
        if others:
            raise Invalid(
                f"positions '{name}' and '{others[0]}' are both called '{called}': must be called differently"
            )
    for called in (*shown.values(), root):
        if not called or FEEDS in called or called.endswith(AGAINST):
            raise Invalid(f"name '{called}': must not be empty, hold '{FEEDS}' or end in '{AGAINST}'")
    if root in {f"{component}_{called}" for component in Component for called in shown.values()}:
        raise Invalid(f"root = '{root}': must not be the name of a hop, which is an input and a position")
    return shown
