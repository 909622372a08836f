"""Sets of equally long prompts with named positions, and their parquet files."""

from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar, cast, get_origin

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int
from torch import Tensor

from stages.pipeline.files import replacing_file
from stages.pipeline.stage import Invalid


class Clauses(StrEnum):
    """Where a head at a token of a clause is meant."""

    EVERY = "every"  # at that token of every clause: it cannot know which one will be asked for
    QUERIED = "queried"  # in the queried clause alone, as in Prakash et al. 2024


_Set = TypeVar("_Set", bound="_Rows")


class _Rows:
    """Shared by the sets below: their fields are tensors, or dicts of tensors, with one row an example."""

    def __len__(self) -> int:
        return len(next(iter(_columns(self).values())))

    def select(self: _Set, index: Any) -> _Set:
        """The rows of an index, slice or mask, as a set of the same kind."""
        chosen = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, dict):
                chosen[field.name] = {name: tensor[index] for name, tensor in value.items()}
            else:
                chosen[field.name] = value[index]
        return type(self)(**chosen)


@dataclass(frozen=True)
class Examples(_Rows):
    """An old task with corrupt partners.

    Attributes:
        input_ids: clean prompts; the next token is the answer.
        answer: token id of the right answer.
        others: token ids of the other candidates.
        positions: semantic position -> index into `input_ids`, for each example.
        every_clause: the same for the positions inside a clause, with the indices in all clauses; empty for a task
            without clauses.
        corrupt_ids: prompts that say as much, but nothing of this answer.
        corrupt_positions: positions in `corrupt_ids`; those inside a clause are of another one than the clean ones.
    """

    input_ids: Int[Tensor, "n t"]
    answer: Int[Tensor, "n"]
    others: Int[Tensor, "n k"]
    positions: dict[str, Int[Tensor, "n"]]
    every_clause: dict[str, Int[Tensor, "n boxes"]]
    corrupt_ids: Int[Tensor, "n t"]
    corrupt_positions: dict[str, Int[Tensor, "n"]]

    @property
    def readout(self) -> str:
        """The position at which the answer is read, that of the last token."""
        last = self.input_ids.shape[1] - 1
        return next(name for name, at in self.positions.items() if bool((at == last).all()))

    def places(self, clauses: Clauses | str) -> dict[str, Int[Tensor, "n ..."]]:
        """Semantic position -> the index or indices at which its heads are kept, removed or transplanted."""
        return {**self.positions, **(self.every_clause if clauses == Clauses.EVERY else {})}


@dataclass(frozen=True)
class Prompts(_Rows):
    """A new task.

    An answer is one token, or several: then all answers end with one stop token, which none has before its end, so that
    no answer is the beginning of another.

    Attributes:
        input_ids: prompts.
        valid: token ids of the right answers, [n, v] or [n, v, length]; padded with -1, both where a prompt has fewer
            answers and behind an answer's end.
        canonical: the one right answer that `sft_gold` is taught, [n] or [n, length], padded in the same way.
        objects: token ids of the candidates, which an answer can be or begin with: of boxes the context's objects,
            clause by clause.
    """

    input_ids: Int[Tensor, "n t"]
    valid: Int[Tensor, "n v *length"]
    canonical: Int[Tensor, "n *length"]
    objects: Int[Tensor, "n k"]

    @property
    def several_tokens(self) -> bool:
        """Whether answers are sequences of tokens."""
        return self.valid.ndim == 3

    @property
    def one_answer(self) -> bool:
        """Whether every prompt has one right answer."""
        return self.valid.shape[1] == 1

    @property
    def stop(self) -> int | None:
        """The token that ends answers of several tokens; None where an answer is one token.

        Raises:
            Invalid: they do not end with one token that occurs nowhere else in them.
        """
        if not self.several_tokens:
            return None
        answers = self.valid[self.valid[..., 0] >= 0]
        last = answers.gather(1, (answers >= 0).sum(1, keepdim=True) - 1)
        stops = last.unique()
        if len(stops) != 1 or int((answers == stops).sum()) != len(answers):
            raise Invalid(
                f"answers of several tokens end with the tokens {stops.tolist()[:5]}: must all end with the same one, "
                "which occurs nowhere else in them"
            )
        return int(stops)

    @classmethod
    def from_numpy(cls, *arrays: np.ndarray) -> "Prompts":
        return cls(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


@dataclass(frozen=True)
class DesiderataPairs(_Rows):
    """Base and source prompts; heads that carry what is asked for turn the base's answer into the target.

    Attributes:
        base_ids: prompts that are patched.
        source_ids: prompts that head outputs are taken from.
        target: token id that the patched base should answer.
        clean_answer: token id that the base answers by itself.
        base_positions: semantic position -> index into `base_ids`.
        source_positions: semantic position -> index into `source_ids`.
    """

    base_ids: Int[Tensor, "n t"]
    source_ids: Int[Tensor, "n s"]
    target: Int[Tensor, "n"]
    clean_answer: Int[Tensor, "n"]
    base_positions: dict[str, Int[Tensor, "n"]]
    source_positions: dict[str, Int[Tensor, "n"]]


def write_examples(path: str | Path, examples: Examples) -> None:
    """Write as parquet: one column a field, dict entries as `field.key`."""
    _write(path, examples)


def read_examples(path: str | Path) -> Examples:
    """Read what `write_examples` wrote."""
    return _read(path, Examples)


def write_prompts(path: str | Path, prompts: Prompts) -> None:
    """Write as parquet, one column a field."""
    _write(path, prompts)


def read_prompts(path: str | Path) -> Prompts:
    """Read what `write_prompts` wrote."""
    return _read(path, Prompts)


def write_pairs(path: str | Path, pairs: DesiderataPairs) -> None:
    """Write as parquet: one column a field, dict entries as `field.key`."""
    _write(path, pairs)


def read_pairs(path: str | Path) -> DesiderataPairs:
    """Read what `write_pairs` wrote."""
    return _read(path, DesiderataPairs)


def _columns(rows: Any) -> dict[str, Tensor]:
    columns = {}
    for field in fields(rows):
        value = getattr(rows, field.name)
        if isinstance(value, dict):
            columns.update({f"{field.name}.{name}": tensor for name, tensor in value.items()})
        else:
            columns[field.name] = value
    return columns


def _write(path: str | Path, rows: _Rows) -> None:
    arrays = []
    columns = _columns(rows)
    for tensor in columns.values():
        column = pa.array(tensor.numpy().astype(np.int32).ravel())
        for size in reversed(tensor.shape[1:]):
            column = pa.FixedSizeListArray.from_arrays(column, size)
        arrays.append(column)
    with replacing_file(path) as temporary:
        pq.write_table(pa.table(arrays, names=list(columns)), temporary)


def _read(path: str | Path, kind: type[_Set]) -> _Set:
    with pq.ParquetFile(path) as file:  # unlike pq.read_table, this loads no module for sets of files
        table = file.read()
    # a dict without an entry has no column
    values: dict[str, Any] = {field.name: {} for field in fields(cast(Any, kind)) if get_origin(field.type) is dict}
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        shape = [len(column)]
        while pa.types.is_fixed_size_list(column.type):
            shape.append(column.type.list_size)
            column = column.values
        # DLPack shares the numbers; `to_numpy` would first load pandas, which costs more than all reading
        tensor = torch.from_dlpack(column).view(shape).long()
        field, _, key = name.partition(".")
        if key:
            values[field][key] = tensor
        else:
            values[field] = tensor
    return kind(**values)
