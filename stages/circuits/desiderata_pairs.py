"""Pairs of base and source prompts that desiderata are asked with, as one table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.circuits.checks import check_name, check_positions
from stages.circuits.exchange import at_positions
from stages.circuits.walker import Run, Walker

Rows = slice | Tensor


@runtime_checkable
class Desideratum(Protocol):
    """Pairs of base and source prompts; `target` is the answer that the desideratum asks for."""

    @property
    def base_ids(self) -> Int[Tensor, "n t"]: ...
    @property
    def source_ids(self) -> Int[Tensor, "n s"]: ...
    @property
    def target(self) -> Int[Tensor, " n"]: ...
    @property
    def base_positions(self) -> Mapping[str, Int[Tensor, " n"]]: ...
    @property
    def source_positions(self) -> Mapping[str, Int[Tensor, " n"]]: ...


@dataclass(frozen=True)
class PairTable:
    """The pairs of several desiderata in the order of their earliest site, so that tails are short.

    Attributes:
        desideratum: number of the desideratum of each pair.
        count: of desiderata.
    """

    base_ids: Int[Tensor, "n t"]
    source_ids: Int[Tensor, "n s"]
    target: Int[Tensor, " n"]
    base_positions: Mapping[str, Int[Tensor, " n"]]
    source_positions: Mapping[str, Int[Tensor, " n"]]
    desideratum: Int[Tensor, " n"]
    count: int

    def __len__(self) -> int:
        return len(self.target)

    @staticmethod
    def of(pairs: Sequence[Desideratum], sites: Sequence[str]) -> "PairTable":
        """The table of all pairs.

        Raises:
            Invalid: pairs lack one of the sites, or have it outside a prompt.
        """
        for entry in pairs:
            for what in ("base", "source"):
                ids, at = getattr(entry, f"{what}_ids"), getattr(entry, f"{what}_positions")
                for name in sites:
                    check_name(name, at)
                check_positions({name: at[name] for name in sites}, len(ids), ids.shape[1], f"{what}_positions")
        earliest = torch.cat([torch.stack([entry.base_positions[name] for name in sites]).amin(0) for entry in pairs])
        order = earliest.argsort(stable=True)
        longest = max(entry.source_ids.shape[1] for entry in pairs)
        index = torch.cat([torch.full_like(entry.target, number) for number, entry in enumerate(pairs)])
        return PairTable(
            torch.cat([entry.base_ids for entry in pairs])[order],
            torch.cat([_lengthened(entry.source_ids, longest) for entry in pairs])[order],
            torch.cat([entry.target for entry in pairs])[order],
            {name: torch.cat([entry.base_positions[name] for entry in pairs])[order] for name in sites},
            {name: torch.cat([entry.source_positions[name] for entry in pairs])[order] for name in sites},
            index[order],
            len(pairs),
        )

    @torch.no_grad()
    def base_run(self, walker: Walker, rows: Rows) -> Run:
        """Run the base prompts of some of the pairs."""
        return walker.run(self.base_ids[rows].to(walker.device))

    @torch.no_grad()
    def source_outputs(
        self, walker: Walker, rows: Rows, layers: int | None = None
    ) -> dict[str, Float[Tensor, "layers n h a"]]:
        """Head outputs of the source prompts of some of the pairs at their own sites, in so many layers (None: all)."""
        ids = self.source_ids[rows].to(walker.device)
        z = walker.head_outputs(ids, walker.n_layers if layers is None else layers)
        return {
            name: torch.stack([at_positions(layer, position[rows, None])[:, 0] for layer in z])
            for name, position in self.source_positions.items()
        }


def _lengthened(ids: Int[Tensor, "n t"], length: int) -> Int[Tensor, "n length"]:
    """Prompts with more tokens behind them, which no earlier position can see: only outputs before are used."""
    return torch.nn.functional.pad(ids, (0, length - ids.shape[1]))
