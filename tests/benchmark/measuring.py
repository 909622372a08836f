"""Seconds, token-layers, memory and differences of both sides for one case."""

import ctypes
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stages.circuits.path_patching import PathPatcher
from stages.circuits.walker import Walker
from tests.benchmark.cases import Case, build_measure, build_model, build_pairs, exact_norms, hops
from tests.benchmark.naive import NaivePathPatcher

RUNS = "clean and corrupt runs"


class TokenLayers:
    """Counts tokens that pass through an MLP: one token through one layer is one token-layer.

    Attributes:
        count: since the last `take`.
    """

    def __init__(self, model: Any) -> None:
        self._count = 0
        for block in model.model.layers:
            block.mlp.register_forward_pre_hook(self._add)

    def _add(self, _: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        self._count += arguments[0][..., 0].numel()

    def take(self) -> int:
        """The count since the last call."""
        count, self._count = self._count, 0
        return count


def compare(case: Case, device: str, dtype: torch.dtype, threads: int, isolated: bool = True) -> dict[str, Any]:
    """Time both sides in turn, hop by hop, and measure memory and differences.

    Args:
        isolated: measure memory in processes of their own.

    Returns:
        the record of one case, as it is written to the file.
    """
    torch.set_num_threads(threads)
    rows, difference = _timed(case, device, dtype)
    record = {
        "model": case.name,
        "shape": {
            "layers": case.layers,
            "width": case.width,
            "heads": case.heads,
            "key_value_heads": case.kv_heads,
            "mlp": case.mlp,
            "vocabulary": case.vocabulary,
        },
        "dtype": str(dtype).removeprefix("torch."),
        "examples": case.examples,
        "tokens": case.tokens,
        "senders": case.senders,
        "senders_timed_naive": len(case.timed_senders()),
        "repetitions": case.repetitions,
        "receivers": {name: len(receivers.heads) for name, _, receivers in hops(case)},
        "receivers_at": case.receivers,
        "hops": rows,
        "total": _sum("total", rows),
        "first_three_hops": _sum("first three hops", rows[1:4]),
        "memory": memory(case, device, dtype, threads, isolated),
        "max_difference_timed": difference,
        "max_difference_float64": difference_float64(case),
    }
    for row in [*rows, record["total"], record["first_three_hops"]]:
        row["naive"]["seconds"] = _spread(row["naive"]["seconds"])
        row["ours"]["seconds"] = _spread(row["ours"]["seconds"])
        row["times_faster"] = _spread(row["times_faster"])
    return record


def _timed(case: Case, device: str, dtype: torch.dtype) -> tuple[list[dict[str, Any]], float]:
    """A row for each hop with the seconds of every repetition, and the largest difference between both sides."""
    model = build_model(case, dtype, device)
    walker, pairs, measure = Walker(model), build_pairs(case), build_measure(case)
    counted, clock = TokenLayers(model), _clock(device)
    senders, scale = case.timed_senders(), case.senders / len(case.timed_senders())
    names = [RUNS, *(name for name, _, _ in hops(case))]
    seconds = {side: {name: [] for name in names} for side in ("naive", "ours")}
    token_layers: dict[str, dict[str, int]] = {"naive": {}, "ours": {}}
    difference = 0.0
    with torch.no_grad():  # first calls are slower
        model(input_ids=pairs.clean_ids.to(device), use_cache=False, logits_to_keep=1)
    counted.take()

    def timed(side: str, name: str, work: Callable[[], Any], times: float = 1) -> Any:
        start = clock()
        result = work()
        seconds[side][name].append((clock() - start) * times)
        token_layers[side][name] = round(counted.take() * times)
        return result

    for _ in range(case.repetitions):
        naive = timed("naive", RUNS, lambda: NaivePathPatcher(model, pairs, measure))
        ours = timed("ours", RUNS, lambda: PathPatcher(walker, pairs, measure, case.memory_mib))
        for name, position, receivers in hops(case):
            theirs = timed("naive", name, lambda: naive.head_effects(position, receivers, senders), scale)  # noqa: B023
            mine = timed("ours", name, lambda: ours.head_effects(position, [receivers])[0])  # noqa: B023
            chosen = torch.stack([mine[sender] for sender in senders])
            difference = max(difference, float((chosen - theirs).abs().max()))
        del naive, ours
    rows = []
    for name in names:
        row: dict[str, Any] = {"hop": name}
        for side in ("naive", "ours"):
            row[side] = {"seconds": seconds[side][name], "token_layers": token_layers[side][name]}
        rows.append(_ratios(row))
    return rows, difference


def _ratios(row: dict[str, Any]) -> dict[str, Any]:
    pairs = zip(row["naive"]["seconds"], row["ours"]["seconds"], strict=True)
    row["times_faster"] = [naive / ours for naive, ours in pairs]
    row["token_layer_ratio"] = round(row["naive"]["token_layers"] / row["ours"]["token_layers"], 2)
    return row


def _sum(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    summed: dict[str, Any] = {"hop": name}
    for side in ("naive", "ours"):
        each = zip(*(row[side]["seconds"] for row in rows), strict=True)
        summed[side] = {
            "seconds": [sum(seconds) for seconds in each],
            "token_layers": sum(row[side]["token_layers"] for row in rows),
        }
    return _ratios(summed)


def _spread(values: list[float]) -> dict[str, float]:
    """Median with range."""
    return {
        "median": float(f"{statistics.median(values):.4g}"),
        "least": float(f"{min(values):.4g}"),
        "most": float(f"{max(values):.4g}"),
    }


def difference_float64(case: Case) -> dict[str, Any]:
    """Largest difference of effects in float64, at full width."""
    small = case if case.checked_senders is None else _shallow(case)
    examples = min(2, case.examples)
    model = exact_norms(build_model(small, torch.float64))
    pairs, measure = build_pairs(small, examples), build_measure(small, examples)
    everyone = [(layer, head) for layer in range(small.layers) for head in range(small.heads)]
    count = len(everyone) if small.checked_senders is None else small.checked_senders
    senders = [everyone[number * len(everyone) // count] for number in range(count)]
    naive = NaivePathPatcher(model, pairs, measure)
    ours = PathPatcher(Walker(model), pairs, measure, case.memory_mib)
    chosen = torch.zeros(count, small.layers, small.heads, dtype=torch.bool)
    for number, sender in enumerate(senders):
        chosen[number][sender] = True
    worst = largest = 0.0
    for _, position, receivers in hops(small):
        theirs = naive.head_effects(position, receivers, senders)
        mine = ours.effects(position, chosen, [receivers])[0]
        worst, largest = max(worst, float((mine - theirs).abs().max())), max(largest, float(theirs.abs().max()))
    return {
        "difference": float(f"{worst:.1e}"),
        "largest_effect": float(f"{largest:.1e}"),
        "layers": small.layers,
        "senders": count,
        "examples": examples,
    }


def _shallow(case: Case) -> Case:
    return replace(case, layers=case.checked_layers, vocabulary=min(case.vocabulary, 1024), real=False)


def memory(case: Case, device: str, dtype: torch.dtype, threads: int, isolated: bool) -> dict[str, Any]:
    """Peak working set of each side in MiB: everything but the model.

    Args:
        isolated: each side in a process of its own, so that nothing freed earlier is used again unseen.
    """
    if device != "cpu":
        return {
            "how": "peak of allocated device memory above the model",
            "budget_mib": case.memory_mib,
            "ours_mib": _device_peak(case, "ours", device, dtype),
            "naive_mib": _device_peak(case, "naive", device, dtype),
        }
    if not can_reset_peak():
        return {"how": "not measured: this system does not let a process reset its peak", "budget_mib": case.memory_mib}
    tasks = [(case, "ours", dtype, threads), (case, "naive", dtype, threads)]
    if isolated:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            ours, naive = pool.starmap(_resident_peak, tasks, chunksize=1)
    else:
        ours, naive = (_resident_peak(*task) for task in tasks)
    return {
        "how": "peak of resident memory above that with the model loaded",
        "budget_mib": case.memory_mib,
        "ours_mib": ours,
        "naive_mib": naive,
    }


def _resident_peak(case: Case, side: str, dtype: torch.dtype, threads: int) -> float:
    torch.set_num_threads(threads)
    with _side(case, side, "cpu", dtype) as work:
        before = reset_peak()
        work()
        return round(process_status("VmHWM") / 1024 - before, 1)


def reset_peak() -> float:
    """Resident memory of this process now, in MiB; its peak ("VmHWM") starts anew."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what building the model left behind is no room for the work
    before = process_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    return before / 1024


def _device_peak(case: Case, side: str, device: str, dtype: torch.dtype) -> float:
    with _side(case, side, device, dtype) as work:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


@contextmanager
def _side(case: Case, side: str, device: str, dtype: torch.dtype) -> Iterator[Callable[[], None]]:
    """All hops of one side; the naive side with one sender, since each needs the same."""
    model = build_model(case, dtype, device)
    walker, pairs, measure = Walker(model), build_pairs(case), build_measure(case)

    def work() -> None:
        if side == "ours":
            ours = PathPatcher(walker, pairs, measure, case.memory_mib)
            for _, position, receivers in hops(case):
                ours.head_effects(position, [receivers])
        else:
            naive = NaivePathPatcher(model, pairs, measure)
            for _, position, receivers in hops(case):
                naive.head_effects(position, receivers, [(0, 0)])

    yield work


def can_reset_peak() -> bool:
    """Whether this system lets a process reset its peak of resident memory."""
    return os.access("/proc/self/clear_refs", os.W_OK)


def process_status(name: str) -> int:
    """A line of this process's status, in KiB."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def _clock(device: str) -> Callable[[], float]:
    def now() -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    return now
