"""Made-up records of a whole experiment, as the stages write them, for tests of statistics and report."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from stages.measures.edge_scores import EdgeScores
from stages.measures.edges import edge_changes
from stages.measures.overlap import overlaps
from stages.measures.similarity import similarity
from stages.pipeline.files import write_csv, write_json, write_npz
from stages.pipeline.stage import Cell
from stages.tasks.old.boxes import Boxes

ARMS = ("sft_gold", "self_sft", "reinforce", "grpo", "sft_replay", "noise")
KEPT = {"sft_gold": 0.72, "self_sft": 0.8, "reinforce": 0.84, "grpo": 0.86, "sft_replay": 0.95, "noise": 0.97}
GROUPS: tuple[Any, ...] = (
    ("fetch_answer", "last", "logits", None, ((4, 1), (4, 6), (5, 0), (5, 3), (5, 5))),
    ("q_last", "last", "fetch_answer", "q", ((0, 2), (1, 7), (0, 5))),
    ("k_separator", "earlier_separator", "fetch_answer", "k", ((1, 1), (2, 4), (3, 2))),
    ("v_separator", "earlier_separator", "fetch_answer", "v", ((2, 0), (2, 6), (3, 7))),
    ("v_query_label>q_last", "query_label", "q_last", "v", ((0, 0), (0, 4))),
    ("v_label>k_separator", "earlier_label", "k_separator", "v", ((0, 3), (1, 3))),
)
SHAMS = ("noise", "random_reward")
SHORTCUTS = {"any object": 2 / 7, "own object": 0.0}
LAYERS, HEADS, RATES = 6, 8, (1e-4, 3e-4)
# name -> column and value; the one at 0.9 is the primary one
MATCHINGS = {
    "accuracy_0_6": ("new_accuracy", 0.6),
    "accuracy_0_8": ("new_accuracy", 0.8),
    "accuracy_0_9": ("new_accuracy", 0.9),
    "kl_0_5": ("kl_new", 0.5),
    "kl_2": ("kl_new", 2.0),
    "norm_3": ("weight_norm", 3.0),
    "steps_160": ("gradient_steps", 160.0),
}
PRIMARY, AS_PRIMARY, FAR = "accuracy_0_9", ("accuracy_0_9", "kl_0_5"), "kl_2"  # no run gets to FAR


@dataclass(frozen=True)
class Experiment:
    """What to make up.

    Attributes:
        seeds, arms: the axes.
        unreached: (arm, seed) pairs that never reach the level.
        learning: (arm, seed) pairs of shams that learn the new task.
        hidden: seeds whose base has no identifiable circuit.
        weak: seeds whose base circuit does not work in place.
        effect: added to what every RL arm keeps.
        spread: standard deviation between seeds.
        new_task: what the arms learn.
    """

    seeds: Sequence[int] = (0, 1, 2)
    arms: Sequence[str] = ARMS
    unreached: frozenset[tuple[str, int]] = frozenset()
    learning: frozenset[tuple[str, int]] = frozenset()
    hidden: frozenset[int] = frozenset()
    weak: frozenset[int] = frozenset()
    effect: float = 0.0
    spread: float = 0.04
    new_task: str = "adjacent"
    valid_answers: int = 2
    contrasts: Sequence[tuple[str, str]] = field(default=(("grpo", "sft_gold"), ("grpo", "self_sft")))
    described: Sequence[tuple[str, str]] = field(default=(("self_sft", "sft_gold"), ("grpo", "reinforce")))
    controls: Sequence[tuple[str, str]] = field(default=(("sft_replay", "sft_gold"), ("noise", "sft_gold")))

    def params(self) -> dict[str, Any]:
        """What a stage reads of params.yaml."""
        return {
            "seeds": list(self.seeds),
            "arms": list(self.arms),
            "learning_rates": list(RATES),
            "new_task": self.new_task,
            "contrast": SimpleNamespace(
                base_faithfulness=0.9,
                primary_measure="evaluate.circuit.retention",
                secondary_measures=[
                    "evaluate.circuit.retention_ld",
                    "evaluate.circuit.faithfulness",
                    "evaluate.old_accuracy",
                    "cmap.tuned_to_base.circuit.accuracy",
                    "cmap.base_to_tuned.circuit.accuracy",
                    "drift.old.kl",
                    "drift.new.kl",
                ],
                contrasts=[list(pair) for pair in self.contrasts],
                described=[list(pair) for pair in self.described if set(pair) <= set(self.arms)],
                controls=[list(pair) for pair in self.controls if set(pair) <= set(self.arms)],
                confidence=0.95,
                alpha=0.05,
                power=0.8,
                equivalence_margin=0.05,
                resamples=2000,
                seed=0,
                adjust_for="drift.new.kl",
                families={"RL": ["reinforce", "grpo"], "SFT": ["sft_gold", "self_sft"]},
                forgetting="evaluate.old_accuracy",
                predictors=["drift.old.kl", "drift.new.kl", "evaluate.circuit.retention"],
            ),
            "finetune.common.clip": 1.0,
            "report": SimpleNamespace(dpi=60, max_groups=6),
        }

    def cell(self, stage: str) -> Cell:
        """A cell of a stage that reads these params."""
        return _TestCell(stage, {}, self.params())

    def write(self, root: Path) -> None:
        """Write everything that contrast and report read, below a repository root."""
        write_json(
            root / "data/tasks.json",
            {
                "new_tasks": {
                    self.new_task: {"shortcuts": SHORTCUTS, "prompt_tokens": 54, "valid_answers": self.valid_answers}
                }
            },
        )
        write_json(root / "data/old_task.json", Boxes.described())
        (root / "reports/registered").mkdir(parents=True, exist_ok=True)
        (root / "params.yaml").write_text("seeds: [0]\n")
        for seed in self.seeds:
            _write_base(root / "reports/cells", self, seed)
            for arm in self.arms:
                _write_arm(root / "reports/cells", self, arm, seed)


@dataclass(frozen=True)
class _TestCell(Cell):
    values: dict[str, Any] = field(default_factory=dict)

    def params(self, path: str) -> Any:
        return self.values[path]


def _draw(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, sum(name.encode())])


def _groups(seed: int) -> tuple[Any, ...]:
    return GROUPS if seed != 1 else GROUPS[:-1]  # bases differ in the groups that were found


def _write_base(root: Path, experiment: Experiment, seed: int) -> None:
    draw = _draw(seed, "base")
    steps = np.arange(0, 850, 50)
    learned = 0.97 / (1 + np.exp(-(steps - 420 + 30 * draw.normal()) / 45))
    curve = {"step": steps, "phase": "main", "loss": 3 * np.exp(-steps / 300), "accuracy": learned}
    curve["induction"] = 0.98 / (1 + np.exp(-(steps - 120) / 30))
    write_csv(root / f"pretrain/{seed}/curve.csv", pd.DataFrame(curve))
    tasks = {experiment.new_task: {"pass_at_8": 0.86}}
    record = {"seed": seed, "accuracy": 0.96, "settings": {"steps": 850}, "tasks": tasks}
    write_json(root / f"pretrain/{seed}/record.json", record)
    _write_model(root, experiment, "base", seed, 1.0, 0.96)


def _new_accuracy(experiment: Experiment, model: str, seed: int, draw: np.random.Generator) -> float:
    if model == "base" or (model in SHAMS and (model, seed) not in experiment.learning):
        return 0.41
    return 0.93 + 0.01 * float(draw.normal())


def _write_model(root: Path, experiment: Experiment, model: str, seed: int, kept: float, old: float) -> None:
    draw = _draw(seed, model + "x")
    hidden = seed in experiment.hidden
    groups: tuple[Any, ...] = () if hidden else _groups(seed)
    circuit = {
        "identifiable": not hidden,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "groups": [
            {
                "name": name,
                "position": position,
                "receiver": receiver,
                "component": component,
                "heads": [list(head) for head in heads],
                "scores": sorted((float(s) for s in draw.uniform(0.05, 0.6, len(heads))), reverse=True),
            }
            for name, position, receiver, component, heads in groups
        ],
    }
    write_json(root / f"discover/{model}/{seed}/circuit.json", circuit)
    record = {
        "model": model,
        "seed": seed,
        "identifiable": not hidden,
        "accuracy": old,
        "idle": _idle(groups) if model == "base" and not hidden else None,
        "settings": {"hops": "auto"},
        "hops": [] if hidden else list(HOPS),
    }
    write_json(root / f"discover/{model}/{seed}/record.json", record)
    write_npz(root / f"discover/{model}/{seed}/scores.npz", **({} if hidden else _effects(seed, 1.0)))
    scores = {
        "size": 18,
        "accuracy": 0.93 * kept,
        "logit_difference": 6 * (kept - 0.02 * (model != "base")),
        "faithfulness": 0.93 * kept / old,
        "faithfulness_ld": kept,
    }
    if seed in experiment.weak:
        scores["faithfulness"] *= 0.5
    random = [float(value) for value in draw.uniform(0.0, 0.08, 20)]
    evaluated = {
        "model": model,
        "seed": seed,
        "old_accuracy": old,
        "old_logit_difference": 6.5 * old,
        "new_accuracy": _new_accuracy(experiment, model, seed, draw),
        "new_valid_mass": 0.5,
        "circuit": None if hidden else scores,
        "circuit_in_queried_clause": None if hidden else scores | {"faithfulness": 0.8 * kept / old},
        "own_circuit": None if hidden else scores | {"faithfulness": min(1.0, 0.93 * kept / old + 0.03)},
        "groups": {name: {"accuracy_without": 0.2, "accuracy_drop": 0.7} for name, *_ in groups},
        "random": None
        if hidden
        else {
            "n": 20,
            "accuracies": random,
            "mean": float(np.mean(random)),
            "max": max(random),
            "faithfulness": random,
        }
        | {"faithfulness_ld": random},
        "inspection": _inspection(groups, kept, draw),
        "settings": {"random_circuits": 20},
    }
    shares = {"model": old} | ({} if hidden else {"circuit": 0.93 * kept})
    evaluated["examples"] = {
        part: "".join(str(int(right)) for right in draw.random(200) < share) for part, share in shares.items()
    }
    write_json(root / f"evaluate/{model}/{seed}.json", evaluated)
    desiderata = ("positional", "object_value", "box_label_value")
    masked = {
        name: {
            desideratum: {
                "selected": [list(heads[0])],
                "order": [list(head) for head in (heads if kept > 0.97 else heads[::-1])],
                "size": len(heads),
                "accuracy": float(np.clip((0.9 if index == number % 3 else 0.05) * kept + 0.02 * draw.normal(), 0, 1)),
                "floor": 0.02,
                "all_heads_accuracy": 0.9,
                "random_accuracy": 0.03,
                "n_test": 200,
            }
            for index, desideratum in enumerate(desiderata)
        }
        for number, (name, _, _, _, heads) in enumerate(groups)
    }
    again = {group: {name: scores[name]["order"] for name in scores} for group, scores in masked.items()}
    further = {group: {"next_clause": scores["positional"]} for group, scores in masked.items() if model == "base"}
    write_json(
        root / f"dcm/{model}/{seed}.json",
        {
            "model": model,
            "seed": seed,
            "groups": masked,
            "additional": further,
            "again": again,
            "settings": {"steps": 60},
        },
    )


def _idle(groups: tuple[Any, ...]) -> dict[str, Any]:
    """One more group was found that the base does without."""
    scores = {"accuracy": 0.93, "logit_difference": 6.0}
    return {
        "score": "accuracy",
        "tolerance": 0.02,
        "examples": 128,
        "found": scores | {"size": 24},
        "left": scores | {"size": 18, "accuracy": 0.92},
        "groups": {name: {"without": 0.4, "idle": False} for name, *_ in groups}
        | {"v_bos": {"without": 0.93, "idle": True}},
        "heads": [],
    }


HOPS: tuple[Any, ...] = (
    {"name": "fetch_answer", "position": "last", "component": None, "feeds": []},
    {"name": "k_separator", "position": "earlier_separator", "component": "k", "feeds": [[5, 0]]},
)


def _effects(seed: int, kept: float) -> dict[str, np.ndarray]:
    """Scores of both halves; those of the base with kept = 1."""
    own, other, noise = _draw(seed, "own"), _draw(seed, "other"), _draw(seed, f"{kept}")
    found = {}
    for hop in HOPS:
        true = kept * own.normal(size=(LAYERS, HEADS)) ** 3 + (1 - kept) * other.normal(size=(LAYERS, HEADS)) ** 3
        for half in (0, 1):
            found[f"{hop['name']}.half{half}"] = true + 0.1 * noise.normal(size=(LAYERS, HEADS))
    return found


def _retraced(experiment: Experiment, seed: int, kept: float) -> dict[str, Any]:
    base, tuned = EdgeScores.of(HOPS, _effects(seed, 1.0)), EdgeScores.of(HOPS, _effects(seed, kept))
    if seed in experiment.hidden or base is None or tuned is None:
        hidden = {"identifiable": False, "reason": "no circuit", "accuracy": None, "joint": None}
        return hidden | {"similarity": None, "overlap": None, "edges": None}
    return {
        "identifiable": True,
        "reason": None,
        "accuracy": 0.9,
        "joint": {hop["name"]: {"base": 1.0, "tuned": kept} for hop in HOPS},
        "similarity": similarity(base, tuned, 20, [seed]),
        "overlap": overlaps(base, tuned, 18),
        "edges": edge_changes(base, tuned, 0.5),
    }


def _inspection(groups: tuple[Any, ...], kept: float, draw: np.random.Generator) -> dict[str, Any]:
    """The closer look at the circuit; without groups only what needs no circuit."""
    sizes = [*range(0, 12), 16, 24, 40, 64, 120, 240]
    shares = [kept / (1 + float(np.exp(6 - size))) for size in sizes]
    paths = {}
    for path, layer in (("last>query_label", 0), ("last>earlier_label", 4), ("last>another_clause", None)):
        curve = [kept * (0.2 if at == layer else 0.98) + 0.01 * float(draw.normal()) for at in range(LAYERS)]
        paths[path] = {"accuracy": curve, "logit_difference": [6 * value for value in curve]}
        paths[path] |= {"everywhere": min(curve), "everywhere_ld": 6 * min(curve)}
    names = [*(name for name, *_ in groups), "random_1", "random_2", "worst_found"]
    gaps = {name: {"size": 3, "gap": float(draw.uniform(0, 0.5)), "gap_ld": 0.1} for name in names}
    return {
        "n": 240,
        "knockout": {"window": 1, "paths": paths},
        "completeness": {"nothing": {"gap": 0.03, "faithfulness": 0.97 * kept, "faithfulness_ld": kept}} | gaps
        if groups
        else None,
        "minimality": {"size": 18, "core": 14, "stand_ins": 3, "idle": 1, "core_share": 0.99, "threshold": 0.01}
        if groups
        else None,
        "size_curve": {
            "sizes": sizes,
            "circuit_size": 18,
            "nodes": 240,
            "share": shares,
            "share_ld": [1.1 * share for share in shares],
            "cpr": 0.9 * kept,
            "cmd": 1 - 0.9 * kept,
            "enough": 9,
        }
        if groups
        else None,
    }


def _write_arm(root: Path, experiment: Experiment, arm: str, seed: int) -> None:
    draw = _draw(seed, arm)
    reached = (arm, seed) not in experiment.unreached
    shift = float(draw.normal()) * experiment.spread
    kept = min(1.0, KEPT.get(arm, 0.8) + shift + (experiment.effect if arm in ("grpo", "reinforce") else 0.0))
    old = 0.96 * kept
    noise, steps = arm == "noise", np.array([0, 1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 90, 128, 180])
    curves = {}
    for rate in (0.0,) if noise else RATES:
        pace = 18 if rate == RATES[1] else 55
        progress = 1 - np.exp(-steps / pace)
        cost = (1 - kept) * (1.0 if rate == RATES[1] else 0.45)
        new = 0.41 + 0.57 * progress + 0.006 * draw.normal(size=len(steps))
        curves[rate] = pd.DataFrame(
            {
                "arm": arm,
                "seed": seed,
                "learning_rate": rate,
                "step": steps,
                "gradient_steps": steps * (arm != "noise"),
                "completions": steps * 64 * (arm != "noise"),
                "old_accuracy": 0.96 - (1.2 * cost * progress**1.5) + 0.004 * draw.normal(size=len(steps)),
                "old_p_correct": 0.8,
                "new_accuracy": 0.41 - 0.1 * progress if noise else np.clip(new * (0.85 if not reached else 1.0), 0, 1),
                "new_valid_mass": 0.6,
                "kl_new": (0.15 if noise else 0.9) * progress * (1.3 if arm.endswith("sft") else 1.0),
                "weight_norm": 4 * progress * (1.0 if rate == RATES[1] else 0.6),
            }
        )
    for rate in RATES:
        write_csv(root / f"finetune/{arm}/{seed}/{rate}.csv", curves[0.0 if noise else rate])
        write_csv(root / f"steps/{arm}/{seed}/{rate}.csv", _step_log(arm, draw))
    write_json(
        root / f"match/{arm}/{seed}.json",
        {
            "arm": arm,
            "seed": seed,
            "reached": reached,
            "rule": "first checkpoint at the level",
            "matching": PRIMARY,
            "like": "sft_gold" if arm in SHAMS else None,
            "level": 0.9,
            "learning_rate": RATES[1],
            "step": None if noise else 45,
            "new_accuracy_selection": 0.36 if noise else 0.93,
            "old_accuracy_selection": old,
            "weight_norm": 3.1,
            "matchings": _match_entries(reached, noise, old),
        },
    )
    write_json(root / f"matchings/{seed}/{arm}.json", _matchings(experiment, arm, seed, kept, old))
    groups = () if seed in experiment.hidden else _groups(seed)
    names = [name for name, *_ in groups] + (["circuit"] if groups else [])

    shares = {"q": 0.5 + 0.5 * kept, "k": kept, "v": 1.0}  # of the accuracy that is left with each input

    def scored(low: float, high: float) -> dict[str, Any]:
        return {
            name: {
                "accuracy": float(high if name == "circuit" else draw.uniform(min(low, high), max(low, high))),
                "logit_difference": 5.0,
            }
            | {"p_correct": 0.7}
            for name in names
        }

    write_json(
        root / f"cmap/{arm}/{seed}.json",
        {
            "arm": arm,
            "seed": seed,
            "base_accuracy": 0.96,
            "tuned_accuracy": old,
            "tuned_to_base": scored(0.8 * kept, kept * 0.95),
            "base_to_tuned": scored(old, 0.95),
            "random": {"tuned_to_base": scored(0.9, 0.95), "base_to_tuned": scored(old - 0.03, old)},
            "inputs": {
                "tuned_to_base": {name: scored(0.9, 0.96 * share) for name, share in shares.items()},
                "base_to_tuned": {name: scored(old, 0.95) for name in shares},
            },
            "heads": _heads_alone(groups, kept) if groups else None,
            "settings": {"random_draws": 4},
        },
    )
    moved = [[layer, head, float(draw.uniform(0.02, 0.25))] for layer in range(LAYERS) for head in range(HEADS)]
    far = {"kl": 1.4 * (1 - kept), "reverse_kl": 1.2 * (1 - kept), "tv": 0.5 * (1 - kept)}
    write_json(
        root / f"drift/{arm}/{seed}.json",
        {
            "arm": arm,
            "seed": seed,
            "old": far,
            "new": {"kl": 0.7 + shift, "reverse_kl": 0.6, "tv": 0.4},
            "weight_norm": 3.1,
            "weight_norm_relative": 0.08,
            "per_matrix": {"model.norm.weight": 0.1},
            "per_head": moved,
            "per_head_relative": moved,
            "cka": {"layers": [0.9] * LAYERS, "mean": 0.9},
            "relearning": {
                "target": 0.86,
                "accuracies": [0.5, 0.9],
                "steps": 1 if seed < 3 else None,
                "regained": seed < 3,
                "most_steps": 16,
            },
            "retraced": _retraced(experiment, seed, kept),
        },
    )
    _write_model(root, experiment, arm, seed, kept, old)


def _heads_alone(groups: tuple[Any, ...], kept: float) -> dict[str, Any]:
    nodes = sorted({(*head, position) for _, position, _, _, heads in groups for head in heads})
    alone = [
        {"head": [layer, head], "position": position, "damage": (1 - kept) / 10, "repair": (1 - kept) / 20}
        for layer, head, position in nodes
    ]
    return {"n": 64, "alone": alone}


def _step_log(arm: str, draw: np.random.Generator) -> pd.DataFrame:
    """Of 60 steps, of which 45 are up to the pick; SFT has no rewards, and none of its ratios is clipped."""
    n, rl = 0 if arm == "noise" else 60, arm in ("grpo", "reinforce", "random_reward")
    log = {"step": np.arange(1, n + 1), "gradient_norm": draw.uniform(0.5, 2, n), "entropy": draw.uniform(1, 2, n)}
    log |= {"clip_fraction": [0.0] * n if rl else [None] * n, "reward": [0.5] * n if rl else [None] * n}
    return pd.DataFrame(log | {"update_norm": draw.uniform(0.01, 0.02, n)})


def _match_entries(reached: bool, noise: bool, old: float) -> dict[str, Any]:
    """What every matching picked: the lower levels are always reached."""
    entries = {}
    for name, (by, at) in MATCHINGS.items():
        there = name != FAR and (reached or name not in AS_PRIMARY)
        row = {"reached": there, "new_accuracy": 0.91, "old_accuracy": old, "kl_new": 0.52}
        row |= {"weight_norm": 3.05, "gradient_steps": 0 if noise else 45}
        row |= {} if noise else {"step": 45, "furthest": at if there else 0.9 * at}
        gentle = row | {"old_accuracy": old + 0.05}
        entries[name] = {
            "by": by,
            "at": at,
            "reached": there,
            "as_primary": name in AS_PRIMARY,
            "by_learning_rate": {f"{RATES[1]:g}": row} | ({} if noise else {f"{RATES[0]:g}": gentle}),
        }
    return entries


def _matchings(experiment: Experiment, arm: str, seed: int, kept: float, old: float) -> dict[str, Any]:
    """The circuit at the other matchings and at both rates: the further and the faster, the less is left."""
    entries: dict[str, dict[str, Any]] = {}
    shifts = {"accuracy_0_6": 0.6, "accuracy_0_8": 0.3, "norm_3": -0.2, "steps_160": -0.4}
    for rate, gentler in zip(RATES, (0.5, 0.0), strict=True):
        for name in MATCHINGS:
            there = name != FAR and (name not in AS_PRIMARY or (arm, seed) not in experiment.unreached)
            own = rate == RATES[1]
            if not there or (own and name in AS_PRIMARY) or (arm == "noise" and not own):
                continue
            more = min(1.0, shifts.get(name, 0.0) + gentler)
            left = kept + more * (1 - kept)
            circuit = {"size": 18, "accuracy": 0.93 * left, "logit_difference": 6 * (left - 0.02)}
            hidden = seed in experiment.hidden
            entries.setdefault(name, {})[f"{rate:g}"] = {
                "old_accuracy": old + more * (0.96 - old),
                "old_logit_difference": 6 * old,
                "new_accuracy": 0.8,
                "new_valid_mass": 0.6,
                "circuit": None if hidden else circuit,
                "circuit_by_ablation": None if hidden else _by_ablation(circuit),
            }
    return {"arm": arm, "seed": seed, "matchings": entries}


def _by_ablation(circuit: dict[str, Any]) -> dict[str, Any]:
    """More is left with the base's outputs around the circuit."""
    shares = {"own_means": 1.0, "base_means": 1.05, "resampled": 0.6, "base_resampled": 0.65}
    return {
        kind: circuit | {key: share * circuit[key] for key in ("accuracy", "logit_difference")}
        for kind, share in shares.items()
    }
