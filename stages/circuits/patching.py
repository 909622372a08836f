"""Path patching over pairs of any lengths: the rows of equal length each have a patcher, and share one memory limit."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from stages.circuits.continuations import rectangles
from stages.circuits.pairs import Pairs
from stages.circuits.patcher import Patcher, Progress
from stages.circuits.patching_budget import Budget
from stages.circuits.path_patching import PathPatcher
from stages.circuits.spread import spread_patcher
from stages.circuits.sweep import Receivers
from stages.circuits.walker import Walker
from stages.pipeline.stage import Invalid


def path_patcher(
    model: nn.Module | Walker, pairs: Pairs, memory_mib: float | int = 1024, processes: int = 1
) -> Patcher:
    """The patcher of a model over pairs.

    Args:
        model: a Hugging Face decoder, or a walker of it.
        memory_mib: limit on the working set, that is everything but the model, the pairs and the results; of all
            processes together.
        processes: how many share the examples. More than one need a parent that has run torch with one thread only,
            and do the work faster than threads where the model is small.

    Raises:
        Invalid: the model is not supported, the prompts do not fit it, or a number is out of range.
    """
    if not 1 <= processes <= len(pairs):
        raise Invalid(f"processes = {processes}: must be from 1 to the number of examples, {len(pairs)}")
    if memory_mib <= 0:
        raise Invalid(f"memory_mib = {memory_mib}: must be above 0")
    if processes > 1 and torch.get_num_threads() > 1:
        raise Invalid(
            f"processes = {processes} with {torch.get_num_threads()} threads: call torch.set_num_threads(1) before "
            "anything is run, since a forked process has no threads"
        )
    walker = model if isinstance(model, Walker) else Walker(model)
    share = memory_mib / processes
    return spread_patcher(walker, pairs, lambda rows: GroupedPatcher(walker, pairs.select(rows), share), processes)


class GroupedPatcher(Patcher):
    """A `Patcher` over pairs of any lengths, whose measure is `Pairs`'.

    Attributes:
        pairs: the examples.

    Raises:
        Invalid: as `PathPatcher`.
    """

    def __init__(self, walker: Walker, pairs: Pairs, memory_mib: float | int) -> None:
        self.walker, self.pairs = walker, pairs
        self.watch: Callable[[Progress], None] | None = None
        budget = Budget(memory_mib)
        self._parts = [
            (PathPatcher(walker, rows.pairs, rows.measure, budget), rows.example) for rows in rectangles(pairs)
        ]
        self.clean = self._sum([part.clean for part, _ in self._parts])
        self.corrupt = self._sum([part.corrupt for part, _ in self._parts])

    @property
    def positions(self) -> Mapping[str, Int[Tensor, "n ..."]]:
        return self.pairs.positions

    @property
    def correct(self) -> Bool[Tensor, "n"]:
        """Where every token of the answer is the most probable one, with those before it given."""
        right = torch.ones(len(self.pairs), dtype=torch.bool, device="cpu")
        for part, example in self._parts:
            answer = part.measure.answer  # type: ignore[attr-defined]
            wrong = (answer >= 0) & ~part.correct
            right[example[wrong]] = False
        return right

    def effects(
        self, position: str, senders: Bool[Tensor, "e layers h"], receivers: Sequence[Receivers]
    ) -> list[Float[Tensor, "e n"]]:
        """As `Patcher.effects`."""
        found = []
        for number, (part, _) in enumerate(self._parts):
            part.watch = None if self.watch is None else self._scaled(number)
            found.append(part.effects(position, senders, receivers))
        return [self._sum([effects[number] for effects in found]) for number in range(len(receivers))]

    def estimates(self, position: str, receivers: Sequence[Receivers]) -> list[Float[Tensor, "layers h n"]]:
        """As `Patcher.estimates`."""
        found = [part.estimates(position, receivers) for part, _ in self._parts]
        return [self._sum([effects[number] for effects in found]) for number in range(len(receivers))]

    def _sum(self, of_parts: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, "..."]:
        """The sum over the rows of each example, the last axis."""
        total = of_parts[0].new_zeros(*of_parts[0].shape[:-1], len(self.pairs))
        for values, (_, example) in zip(of_parts, self._parts, strict=True):
            total.index_add_(-1, example, values)
        return total

    def _scaled(self, number: int) -> Callable[[Progress], None]:
        """Tells of one part as of a share of the whole."""
        sizes = [len(example) for _, example in self._parts]
        before, here = sum(sizes[:number]) / sum(sizes), sizes[number] / sum(sizes)

        def tell(progress: Progress) -> None:
            assert self.watch is not None
            share = before + here * progress.done / max(1, progress.total)
            done = progress.total * share
            self.watch(Progress(done, progress.total, progress.strongest, progress.effect))

        return tell
