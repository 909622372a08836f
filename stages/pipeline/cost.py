"""What a run will cost, before it starts: core seconds of every stage, from what was measured on two cores.

The figures were measured on two otherwise idle cores of a small server. A training step of the params' own model, timed
here, says how much slower this machine is with that model. On two other kinds of servers the sum came within a fifth
of what the full preset took. They are for planning, not for reporting.
"""

import time
from typing import Any

# measured seconds of one core, where a step of `slowness` takes REFERENCE_STEP
REFERENCE_STEP = 0.19
PRETRAIN_STEP = 0.48  # 64 contexts
TRAIN_STEP = 0.25  # 64 prompts
PROBE = 0.0013  # one prompt
START = 1.0  # a fork of a process that has torch and transformers
# one cell, its start included, with tests of TESTED prompts
TESTED = 512
CELL = {"match": 1.0, "discover": 18.0, "evaluate": 16.0, "dcm": 19.0, "cmap": 7.0, "drift": 11.0}
PER_PROMPT = 0.4  # share of the seconds of these that goes with the number of prompts
TESTING = ("evaluate", "dcm", "cmap", "drift")
DESIDERATUM = 5.0  # one more desideratum of a base
INPUT = 3.7  # q, k or v transplanted in a cell of `cmap`, both ways, with as many prompts
MATCHING = 2.3  # one other checkpoint of an arm, with as many prompts
# what DVC itself takes for a cell: a fixed part, and reading and writing a dvc.lock (one a seed) of so many cells
DVC, DVC_PER_CELL = 0.5, 0.008


def slowness(params: Any) -> float:
    """How often longer than on the machine of the figures a training step takes here, with the params' own model.

    Args:
        params: validated params (`stages.pipeline.params.load_params`).
    """
    import torch  # takes seconds, which who only counts cells should not pay

    size = params.pretrain.model
    torch.set_num_threads(1)
    # about the work of the base's layers, without importing its implementation
    layer = torch.nn.TransformerEncoderLayer(size.width, size.heads, size.mlp, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, size.layers, enable_nested_tensor=False)
    prompts = torch.zeros(64, 7 * params.synthesize.boxes + 6, size.width)
    seconds = []
    for _ in range(8):  # the first one allocates, others may be disturbed
        start = time.perf_counter()
        model(prompts).sum().backward()
        seconds.append(time.perf_counter() - start)
    return min(seconds) / REFERENCE_STEP


def estimate(params: Any, slower: float = 1.0) -> dict[str, tuple[int, float]]:
    """Number of cells and core seconds by stage.

    Args:
        params: validated params (`stages.pipeline.params.load_params`).
        slower: how often longer everything takes than where the figures were measured.
    """
    seeds, arms, models, rates = map(len, (params.seeds, params.arms, params.models, params.learning_rates))
    runs = seeds * rates
    found = {
        "code": (1, 2.0),
        "source": (1, 2.0),
        "synthesize": (1, 10.0),
        "pretrain": (seeds, seeds * _pretrain(params.pretrain)),
        "finetune": (arms * runs, runs * sum(_finetune(params.finetune, arm) for arm in params.arms)),
    }
    prompts, match = params.synthesize.old["evaluation"] / TESTED, params.match
    # of the levels all but the primary one, which `evaluate` tests
    checkpoints = len(match.levels) - 1 + len(match.kl) + len(match.norm) + len(match.steps)
    found["matchings"] = (seeds * arms, seeds * arms * (START + checkpoints * MATCHING * prompts))
    for stage, seconds in CELL.items():
        cells = seeds * (models if stage in ("discover", "evaluate", "dcm") else arms)
        by_prompts = PER_PROMPT if stage in TESTING else 0.0
        found[stage] = (cells, cells * seconds * (1 - by_prompts + by_prompts * prompts))
    cells, seconds = found["dcm"]
    found["dcm"] = (cells, seconds + seeds * len(params.dcm.of_base) * DESIDERATUM)
    cells, seconds = found["cmap"]
    found["cmap"] = (cells, seconds + cells * len(params.cmap.inputs) * INPUT * prompts)
    found |= {"contrast": (1, 5.0), "report": (1, 15.0)}
    cells = sum(number for number, _ in found.values())
    found["dvc"] = (cells, cells * (DVC + DVC_PER_CELL * cells / seeds / 2))
    return {stage: (number, slower * seconds) for stage, (number, seconds) in found.items()}


def table(costs: dict[str, tuple[int, float]], workers: int, done: int) -> str:
    """The estimate as text, with the number of cells that are done already."""
    seconds = sum(value for _, value in costs.values())
    lines = [f"{'stage':<11} {'cells':>5} {'core minutes':>12}"]
    lines += [f"{stage:<11} {number:>5} {value / 60:>12.1f}" for stage, (number, value) in costs.items()]
    lines.append(f"from nothing about {seconds / workers / 3600:.1f} hours with {workers} workers, a core for each")
    return "\n".join([*lines, progress(costs, done)])


def progress(costs: dict[str, tuple[int, float]], done: int) -> str:
    """How many cells there are, and how many are done already."""
    return f"{done} of {costs['dvc'][0]} cells are done"


def _pretrain(section: Any) -> float:
    steps = [phase.most_steps for phase in section.curriculum.values()]
    # a phase but the last ends when it is passed, mostly after a fifth of its steps
    return START + PRETRAIN_STEP * (sum(steps[:-1]) / 5 + steps[-1])


def _finetune(section: Any, arm: str) -> float:
    common, scales = section.common, getattr(section.of(arm), "scales", None)
    checkpoints = len(scales) if scales else common.dense_until // common.dense_every + common.sparse_checkpoints
    probes = (checkpoints + 1) * 2 * common.probe_examples * PROBE
    return START + probes + (0 if scales else common.steps * TRAIN_STEP * common.prompts_per_step / 64)
