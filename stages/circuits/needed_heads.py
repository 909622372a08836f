"""Which heads account for what many do together: steps 2 to 4 of `selection`, and the joint effects that they are
decided by."""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from stages.circuits.patcher import Patcher, head_sets
from stages.circuits.rule import Rule
from stages.circuits.scores import Scores
from stages.circuits.sweep import Receivers

Head = tuple[int, int]  # (layer, head)
HeadSet = frozenset[Head]
Scored = Callable[[Tensor], Scores]  # effects [*sets n] -> their scores


class JointEffects:
    """E: effects of sets of heads at one position on one kind of receivers, each computed once.

    Attributes:
        known: set of heads -> effect per example.
        strength: of every head alone.
        sure: heads that do enough alone.
    """

    known: dict[HeadSet, Tensor]
    strength: Float[Tensor, "layers h"]
    sure: HeadSet = frozenset()

    def __init__(self, patcher: Patcher, position: str, receivers: Receivers) -> None:
        self.known = {frozenset(): torch.zeros_like(patcher.clean)}
        self._patcher, self._position, self._receivers = patcher, position, receivers

    def sure_of(self, heads: Iterable[Head], sign: int) -> list[Head]:
        """Those that do enough alone, in the direction of a sign."""
        return [head for head in heads if head in self.sure and sign * self.strength[head] > 0]

    def of(self, heads: Iterable[Head]) -> Float[Tensor, "n"]:
        return self.of_each([frozenset(heads)])[0]

    def of_each(self, sets: Sequence[HeadSet]) -> Float[Tensor, "e n"]:
        if not sets:
            return self.known[frozenset()][None][:0]
        new = [heads for heads in dict.fromkeys(sets) if heads not in self.known]
        if new:
            walker = self._patcher.walker
            senders = head_sets(new, walker.n_layers, walker.n_heads)
            effects = self._patcher.effects(self._position, senders, [self._receivers])[0]
            self.known |= dict(zip(new, effects, strict=True))
        return torch.stack([self.known[heads] for heads in sets])


def needed(
    effect: JointEffects,
    scored: Scored,
    rule: Rule,
    tolerated: float,
    patched: HeadSet,
    order: Sequence[Head],
    sign: int,
) -> list[Head] | None:
    """Steps 2 to 4: which of the heads in `order`, strongest first, account for what all of them do: none where that is
    tolerated, and no list where it takes more than the rule's most.

    Args:
        tolerated: strength that need not be accounted for.
        patched: heads that are patched throughout.
        sign: the direction that counts as strength.
    """

    def pair(senders: Sequence[Head]) -> tuple[HeadSet, HeadSet]:
        """The senders, and all heads but them."""
        return patched | set(senders), patched | (set(order) - set(senders))

    def change(sets: Iterable[HeadSet]) -> Float[Tensor, "e n"]:
        return effect.of_each(list(sets)) - effect.of(patched)

    def pass_both(candidates: Sequence[Sequence[Head]]) -> list[bool]:
        """Whether they pass the first two tests; the second one is asked only where the first one passes."""
        pairs = [pair(senders) for senders in candidates]
        passes = sign * scored(change(senders for senders, _ in pairs)).strength >= whole - tolerated
        enough = [number for number, passed in enumerate(passes.tolist()) if passed]
        if enough:
            passes[enough] = sign * scored(change(pairs[number][1] for number in enough)).strength <= tolerated
        return passes.tolist()

    whole = sign * scored(change([pair(order)[0]])[0]).strength
    if float(whole) <= tolerated:
        return []
    most = rule.most_senders
    if most is not None and len(order) > most and not pass_both([order[:most]])[0]:
        return None
    sure = effect.sure_of(order, sign)
    among = sure if sure and pass_both([sure])[0] else list(order)
    added = torch.cumsum(torch.stack([sign * effect.strength[head] for head in among]), 0)
    guess = 1 + int((added < float(whole) - tolerated).sum())
    enough = shortest_run(len(among), guess, lambda run: pass_both([among[:run]])[0])

    kept, idle = among[:enough], set[Head]()

    def drop(heads: list[Head]) -> None:
        """Let go of some heads, as many as the tests allow; parts that do nothing together are not looked into."""
        nonlocal kept
        blocks = [heads] if heads else []
        while blocks:
            block = blocks.pop()
            rest = [head for head in kept if head not in block]
            if pass_both([rest])[0]:
                kept = rest
            elif not adds(block)[0]:
                idle.update(block)
            elif len(block) > 1:
                half = (len(block) + 1) // 2
                blocks += [block[:half], block[half:]]

    def adds(*parts: Sequence[Head]) -> list[bool]:
        """Whether parts of what is kept change what it does, or what the others do."""
        senders, others = pair(kept)
        lost = change([senders]) - change(senders - set(part) for part in parts)
        left = change(others | set(part) for part in parts) - change([others])
        return (rule.adds(scored(lost), sign) | rule.adds(scored(left), sign)).tolist()

    drop([head for head in kept if head not in effect.sure])
    live = [head for head in kept if head not in idle]
    passes = pass_both([[head for head in kept if head != left_out] for left_out in live])
    drop([head for head, passed in zip(live, passes, strict=True) if passed])
    live = [head for head in kept if head not in idle]
    stays = adds(*([head] for head in live)) if live else []
    return [head for head, stay in zip(live, stays, strict=True) if stay]


def shortest_run(longest: int, guess: int, passes: Callable[[int], bool]) -> int:
    """The shortest run of the first of some things that passes a test, where every longer one passes; the longest one,
    which is not tested, where no other does.

    Args:
        guess: where to begin. Steps from there double until the answer is between two of them.
    """
    enough, too_few, step, at = longest, 0, 1, min(max(guess, 1), longest - 1)
    while enough - too_few > 1:
        if passes(at):
            enough = at
            at = max(at - step, too_few + 1) if too_few == 0 else (enough + too_few) // 2
        else:
            too_few = at
            at = min(at + step, enough - 1) if enough == longest else (enough + too_few) // 2
        step *= 2
    return enough
