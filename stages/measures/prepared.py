"""A model with its runs on some prompts kept, so that many small questions about its circuits cost little each.

A question needs a clean run, or the run in which every head gives its mean. Runs are made when they are first asked
for, on parts of the prompts, and kept as long as all that is kept fits one half of the memory; the others are made
again for every question. The other half is for passes, and for runs that are made.
"""

from collections.abc import Collection, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.circuits.ablation import ablated_run, circuits_in_place, nodes_removed
from stages.circuits.budget import MIB, run_bytes
from stages.circuits.circuit import Node
from stages.circuits.exchange import Reduce, slices
from stages.circuits.knockout import knocked_out
from stages.circuits.walker import Run, Walker
from stages.measures.faithfulness import runs_that_fit
from stages.measures.prompts import Prompts
from stages.measures.readout import Readout, reading


class Prepared:
    """A model and its runs on prompts.

    Prompts that are `prompts.in_tail_order` make the questions cheaper.

    Attributes:
        walker: the model.
        means: its mean head outputs.
        prompts: with answers and positions.
    """

    def __init__(
        self, walker: Walker, means: Float[Tensor, "layers t h a"], prompts: Prompts, memory_mib: float
    ) -> None:
        self.walker, self.means, self.prompts = walker, means, prompts
        self._half = memory_mib / 2
        self._run_mib = run_bytes(walker, prompts.input_ids.shape[1]) / MIB
        self._parts = slices(len(prompts), runs_that_fit(walker, prompts, self._half))
        self._kept: dict[tuple[int, bool], Run] = {}
        self._kept_mib = 0.0

    def make_runs(self) -> None:
        """Make the runs that are kept now, so that forked processes share them."""
        for rows in self._parts:
            for clean in (True, False):
                if not self._fits(rows):
                    return
                self._run(rows, clean)

    def full(self) -> Readout:
        """The whole model, one variant."""
        return Readout.join([read(run.logits[:, None], slice(0, len(part))) for _, part, run, read in self._runs(True)])

    def in_place(self, circuits: Sequence[Collection[Node]]) -> Readout:
        """Each circuit, everything else mean-ablated."""
        found = []
        for _, part, run, read in self._runs(False):
            left = self._left(part)
            found.append(circuits_in_place(self.walker, run, self.means, part.positions, circuits, left, read))
        return Readout.join(found)

    def without(self, removed: Sequence[Collection[Node]]) -> Readout:
        """The model with only each set of nodes mean-ablated."""
        found = []
        for _, part, run, read in self._runs(True):
            at, left = part.positions, self._left(part)
            each = [nodes_removed(self.walker, run, self.means, at, nodes, left, read) for nodes in removed]
            found.append(torch.stack(each, dim=1))
        return Readout.join(found)

    def blinded(
        self, query: Int[Tensor, " n"], keys: Int[Tensor, "n k"], windows: Sequence[Collection[int]], every: int = 1
    ) -> Readout:
        """The model where the position `query` of each prompt cannot see `keys` in the layers of each window, on every
        so many-th prompt."""
        found = []
        for rows, part, run, _ in self._runs(True):
            some = slice((-rows.start) % every, None, every)
            chosen, left = part.select(some), self._left(part)
            if len(chosen):
                read = reading(chosen.answer, chosen.others)
                at = query[rows][some], keys[rows][some]
                found.append(knocked_out(self.walker, run.select(some), *at, windows, left, read))
        return Readout.join(found)

    def _runs(self, clean: bool) -> Iterator[tuple[slice, Prompts, Run, Reduce]]:
        """Which prompts, the prompts, their clean or their ablated run, and what reads their logits."""
        for rows in self._parts:
            part = self.prompts.select(rows)
            yield rows, part, self._run(rows, clean), reading(part.answer, part.others)

    def _run(self, rows: slice, clean: bool) -> Run:
        kept = self._kept.get((rows.start, clean))
        if kept is not None:
            return kept
        ids = self.prompts.input_ids[rows].to(self.walker.device)
        run = self.walker.run(ids) if clean else ablated_run(self.walker, ids, self.means)
        if self._fits(rows):
            self._kept[rows.start, clean] = run
            self._kept_mib += len(ids) * self._run_mib
        return run

    def _fits(self, rows: slice) -> bool:
        return self._kept_mib + (rows.stop - rows.start) * self._run_mib <= self._half

    def _left(self, part: Prompts) -> float:
        """Memory for a pass, in MiB: the half that is not for runs that are kept, less one run that is not."""
        return self._half - len(part) * self._run_mib
