"""A model with its runs on some prompts kept, so that many small questions about its circuits cost little each.

Every question needs a clean run and the run in which every head gives its mean; both are made once. They are held in
memory as a whole, so this is for hundreds of prompts of a small model, or few of a large one.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stages.circuits.ablation import ablated_run, circuits_in_place, nodes_removed
from stages.circuits.circuit import Node
from stages.circuits.exchange import rows_that_fit, slices
from stages.circuits.walker import Run, Walker
from stages.measures.faithfulness import Readout
from stages.tasks.examples import Clauses, Examples


@dataclass(frozen=True)
class Part:
    """Some examples with the model's runs on them: plain, and with every head mean-ablated everywhere."""

    examples: Examples
    clean: Run
    ablated: Run


@dataclass(frozen=True)
class Prepared:
    """A model and its runs on examples; make it with `Prepared.of`."""

    walker: Walker
    means: Float[Tensor, "layers t h a"]
    memory_mib: float
    clauses: Clauses | str
    parts: Sequence[Part]

    @staticmethod
    @torch.no_grad()
    def of(
        walker: Walker,
        means: Float[Tensor, "layers t h a"],
        examples: Examples,
        memory_mib: float,
        clauses: Clauses | str = Clauses.EVERY,
    ) -> "Prepared":
        """Run the model; examples `faithfulness.in_tail_order` make the questions cheaper. `clauses` says where nodes
        at a token of a clause are kept or removed."""
        length = examples.input_ids.shape[1]
        parts = []
        for rows in slices(len(examples), rows_that_fit(walker, length, length, memory_mib)):
            some = examples.select(rows)
            parts.append(Part(some, walker.run(some.input_ids), ablated_run(walker, some.input_ids, means)))
        return Prepared(walker, means, memory_mib, clauses, parts)

    def full(self) -> Readout:
        """The whole model, one variant."""
        return self._joined([part.clean.logits[:, None] for part in self.parts])

    def in_place(self, circuits: Sequence[Collection[Node]]) -> Readout:
        """Each circuit, everything else mean-ablated."""
        return self._joined(
            [
                circuits_in_place(
                    self.walker, part.ablated, self.means, part.examples.places(self.clauses), circuits, self.memory_mib
                )
                for part in self.parts
            ]
        )

    def without(self, removed: Sequence[Collection[Node]]) -> Readout:
        """The model with only each set of nodes mean-ablated."""
        return self._joined(
            [
                torch.stack(
                    [
                        nodes_removed(
                            self.walker,
                            part.clean,
                            self.means,
                            part.examples.places(self.clauses),
                            nodes,
                            self.memory_mib,
                        )
                        for nodes in removed
                    ],
                    dim=1,
                )
                for part in self.parts
            ]
        )

    def _joined(self, logits: Sequence[Float[Tensor, "n e vocab"]]) -> Readout:
        return Readout.join(
            [
                Readout.of(some, part.examples.answer, part.examples.others)
                for some, part in zip(logits, self.parts, strict=True)
            ]
        )
