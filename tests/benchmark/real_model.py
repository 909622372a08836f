"""The engine on a real language model, SmolLM2-135M-Instruct (Q4_1), against the paper's algorithm on a sample of it.

Three questions, all on IOI prompts (`stages/tasks/ioi.py`):

- one hop: all heads at the last token -> logits, ours whole, the naive side with a few senders and scaled: each costs
  it the same pass;
- the whole search for a circuit: how long, and how long the naive side would take for the sets of senders that it
  patches. Each costs it one pass for the logits and two for q, k or v, so its seconds are those of a pass, measured in
  the same run, times the passes. The estimates that spare ours the other heads are in our seconds; the naive side has
  none, so it is also given what it would take with every head that ours estimates patched instead;
- memory: search, then the circuit and random ones in place, in a process of its own under a stated limit.
"""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.circuits import faithfulness, find_circuit, load, path_patcher
from stages.circuits.circuit import Component
from stages.circuits.pairs import AlignedPairs, Pairs
from stages.circuits.path_patching import Receivers
from stages.circuits.scores import Metric, measure_of
from stages.pipeline.packaged_model import MODEL, packaged_model
from stages.tasks.ioi import END, IoiPrompt, ioi_prompts
from tests.benchmark.measuring import TokenLayers, can_reset_peak, process_status, reset_peak
from tests.benchmark.naive import NaivePathPatcher

WORDING = "gave"  # for the naive side all prompts must be one rectangle
SENDERS = 3  # that the naive side runs
LATE = ((23, 3), (29, 1))  # receivers of the naive side's two-pass sample: name movers of this model


def real_model(
    pairs: int, timed_mib: float, memory_pairs: int, memory_mib: float, threads: int, folder: Path | None = None
) -> dict[str, Any]:
    """The record of the benchmark's part on a real model.

    Args:
        pairs: IOI pairs of the timed questions.
        timed_mib: their limit on memory.
        memory_pairs: IOI pairs of the memory question.
        memory_mib: its limit.
        threads: of torch.
        folder: where the model is; made there if it is not.
    """
    torch.set_num_threads(threads)
    path = packaged_model() if folder is None else packaged_model(folder)
    walker, tokenizer = load(path)
    drawn = ioi_prompts(tokenizer, pairs, 0, [WORDING])
    prompts = drawn.prompts
    counted = TokenLayers(walker.model)
    walker.model(input_ids=torch.tensor([prompts[0].clean_ids]), use_cache=False)  # first calls are slower
    counted.take()

    aligned, measure = _aligned(prompts), _measure(prompts)
    naive, naive_runs = _timed(lambda: NaivePathPatcher(walker.model, aligned, measure))
    senders = [(number * walker.n_layers // SENDERS, number) for number in range(SENDERS)]
    theirs, one_pass = _timed(lambda: naive.head_effects(END, Receivers(), senders))
    _, two_passes = _timed(lambda: naive.head_effects(END, Receivers(Component.Q, LATE), senders))
    one_pass, two_passes = one_pass / SENDERS, two_passes / SENDERS
    del naive

    text = Pairs.from_text(tokenizer, **drawn.texts())
    patcher, our_runs = _timed(lambda: path_patcher(walker, text, timed_mib))
    counted.take()
    ours, our_hop = _timed(lambda: patcher.head_effects(END, [Receivers()])[0])
    hop_token_layers = counted.take()
    chosen = torch.stack([ours[sender] for sender in senders])
    heads = walker.n_layers * walker.n_heads
    naive_hop = one_pass * heads

    asked = _Asked(patcher)
    circuit, our_search = _timed(lambda: find_circuit(patcher, readout=END))
    naive_search = asked.patched.seconds(one_pass, two_passes)
    naive_estimates = asked.estimated.seconds(one_pass, two_passes)
    return {
        "model": MODEL,
        "pairs": pairs,
        "limit_mib": timed_mib,
        "tokens": aligned.clean_ids.shape[1],
        "runs": {"naive": _round(naive_runs), "ours": _round(our_runs)},
        "hop": {
            "heads": heads,
            "naive": _round(naive_hop),
            "naive_senders_timed": SENDERS,
            "ours": _round(our_hop),
            "times_faster": _round(naive_hop / our_hop),
            "ours_with_runs": _round(our_hop + our_runs),
            "token_layers": hop_token_layers,
            "largest_difference": float(f"{float((chosen - theirs).abs().max()):.1e}"),
            "largest_effect": _round(float(ours.abs().max())),
        },
        "search": {
            "seconds": _round(our_search),
            "sets_to_logits": asked.patched.to_logits,
            "sets_to_inputs": asked.patched.to_inputs,
            "naive": _round(naive_search),
            "times_faster": _round(naive_search / our_search),
            "estimated_heads": asked.estimated.to_logits + asked.estimated.to_inputs,
            "naive_every_head": _round(naive_search + naive_estimates),
            "nodes": len(circuit.nodes),
            "groups": len(circuit.groups),
        },
        "memory": _memory(path, memory_pairs, memory_mib, threads),
    }


@dataclass
class _Passes:
    """Sets of senders, once for each receiver, by what one costs the naive side: a pass for the logits, two for q, k or
    v."""

    to_logits: int = 0
    to_inputs: int = 0

    def add(self, sets: int, receivers: Sequence[Receivers]) -> None:
        logits = sum(receiver.component is None for receiver in receivers)
        self.to_logits += sets * logits
        self.to_inputs += sets * (len(receivers) - logits)

    def seconds(self, one_pass: float, two_passes: float) -> float:
        return self.to_logits * one_pass + self.to_inputs * two_passes


class _Asked:
    """Counts what a patcher is asked for.

    Attributes:
        patched: sets of senders.
        estimated: single heads.
    """

    def __init__(self, patcher: Any) -> None:
        self.patched, self.estimated = _Passes(), _Passes()
        effects: Callable[..., list[Tensor]] = patcher.effects
        estimates: Callable[..., list[Tensor]] = patcher.estimates
        heads = patcher.walker.n_layers * patcher.walker.n_heads

        def counted(position: str, senders: Tensor, receivers: Sequence[Receivers]) -> list[Tensor]:
            self.patched.add(len(senders), receivers)
            return effects(position, senders, receivers)

        def counted_estimates(position: str, receivers: Sequence[Receivers]) -> list[Tensor]:
            self.estimated.add(heads, receivers)
            return estimates(position, receivers)

        patcher.effects, patcher.estimates = counted, counted_estimates


def _memory(folder: Path, pairs: int, memory_mib: float, threads: int) -> dict[str, Any]:
    if not can_reset_peak():
        return {"how": "not measured: this system does not let a process reset its peak", "limit_mib": memory_mib}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.apply(memory_of_search, (folder, pairs, memory_mib, threads))


def memory_of_search(
    folder: Path, pairs: int, memory_mib: float, threads: int, random_circuits: int = 20
) -> dict[str, Any]:
    """Search and evaluation in this process: resident memory at its peak, in all and beyond the loaded model."""
    torch.set_num_threads(threads)
    walker, tokenizer = load(folder)
    prompts = Pairs.from_text(tokenizer, **ioi_prompts(tokenizer, pairs, 0, [WORDING]).texts())
    loaded = reset_peak()
    circuit, searched = _timed(lambda: find_circuit(path_patcher(walker, prompts, memory_mib), readout=END))
    found, evaluated = _timed(
        lambda: faithfulness(walker, circuit, prompts, random_circuits=random_circuits, memory_mib=memory_mib)
    )
    peak = process_status("VmHWM") / 1024
    return {
        "how": "peak of resident memory of the whole process, and above that with the model loaded",
        "pairs": pairs,
        "limit_mib": memory_mib,
        "peak_mib": round(peak, 1),
        "growth_mib": round(peak - loaded, 1),
        "search_seconds": _round(searched),
        "evaluation_seconds": _round(evaluated),
        "random_circuits": random_circuits,
        "circuit": found.to_json(),
    }


def _aligned(prompts: Sequence[IoiPrompt]) -> AlignedPairs:
    at = {name: torch.tensor([prompt.positions[name] for prompt in prompts]) for name in prompts[0].positions}
    clean, corrupt = (
        torch.tensor([getattr(prompt, what) for prompt in prompts]) for what in ("clean_ids", "corrupt_ids")
    )
    return AlignedPairs(clean, corrupt, at, at)


def _measure(prompts: Sequence[IoiPrompt]) -> Any:
    answer, other = (
        torch.tensor([getattr(prompt, which) for prompt in prompts]) for which in ("answer_id", "other_id")
    )
    return measure_of(Metric.LOGIT_DIFFERENCE, answer, other[:, None])


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def _round(value: float) -> float:
    return float(f"{value:.4g}")
