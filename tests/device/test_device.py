"""On a device that is not the CPU: nothing is on the wrong side, and results are the CPU's (see `second_device`)."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from stages import discover
from stages.circuits.load_check import differences
from stages.circuits.walker import Walker
from stages.learning.arms import dr_grpo, iterative_sft, noise, self_sft, sft_gold, sft_oracle
from stages.learning.last_layer import last_layer_at_the_end
from stages.learning.probes import Probe
from stages.learning.run import Recorder, Run
from stages.learning.schedule import checkpoint_steps
from stages.measures.relearning import relearn
from stages.pipeline.resources import Resources
from tests.comparing import record_difference
from tests.device.second_device import DEVICE, Elsewhere, second_device
from tests.oracles import random_model
from tests.test_learning import checkpoint, new_folder, section_with, tiny_examples, tiny_run
from tests.test_search import stage_cell, stage_folder, written  # noqa: F401


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The second device, which trainers take as well."""
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", str(DEVICE))
    AcceleratorState._reset_state(reset_partial_state=True)
    with second_device() as name:
        yield name
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    "mixing",
    [
        lambda there: there + torch.ones(3),
        lambda there: torch.cat([there, torch.ones(1)]),
        lambda there: torch.ones(3)[there.long()],
        lambda there: there.numpy(),
        lambda there: torch.ones(3, 3) @ there,
        lambda there: torch.nn.Linear(3, 1)(there),
        lambda there: torch.rand(3, device=there.device, generator=torch.Generator()),
    ],
)
def test_the_second_device_refuses_what_a_gpu_refuses(device: str, mixing: Any) -> None:
    there = torch.ones(3, device=device)
    assert isinstance(there, Elsewhere) and (there + 1).device == DEVICE and (there + 1).tolist() == [2, 2, 2]
    with pytest.raises((RuntimeError, TypeError)):
        mixing(there)


@pytest.mark.parametrize("kind", ["llama_gqa", "gemma2", "gpt2"])
def test_the_load_check_runs_where_the_model_is(device: str, kind: str) -> None:
    model: Any = random_model(kind)
    walker = Walker(model.to(device))
    assert walker.device == DEVICE
    found = list(differences(walker.model, walker.architecture, walker.kv_head))
    assert found and all(each.error <= each.tolerance for each in found)


def test_stage_discover_finds_the_same(
    stage_folder: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    device: str,
) -> None:
    found = {}
    for where in ("cpu", device):
        monkeypatch.setattr(discover, "resources", lambda where=where: Resources(1, 512.0, where))
        discover.main(stage_cell())
        found[where] = written(stage_folder)
    assert found[device]["record"]["settings"].pop("device") == DEVICE.type
    error = record_difference(found[device], found["cpu"])
    print(f"max error {error:.1e}")
    assert error <= 1e-5, "in float32"


def run_on(device: str, arm: Any) -> Run:
    section = section_with(every=2, scales=[0.1, 0.2])
    run = tiny_run(arm.__name__.rpartition(".")[2], section=section)
    model: Any = run.model
    model.to(device)
    probe = Probe.of(model, run.recorder.probe.old, run.recorder.probe.new)
    recorder = Recorder(model, probe, checkpoint_steps(run.training), lambda step, row: None, new_folder())
    run = replace(run, watcher=recorder)
    with last_layer_at_the_end(model, tokens=2):
        arm.train(run)
    return run


@pytest.mark.parametrize("arm", [sft_gold, sft_oracle, self_sft, iterative_sft, dr_grpo, noise])
def test_arms_learn_the_same_from_the_same_draws(device: str, arm: Any) -> None:
    there = run_on(device, arm)
    assert there.model.device == DEVICE and all(isinstance(weight, Elsewhere) for weight in there.model.parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
        AcceleratorState._reset_state(reset_partial_state=True)
        here = run_on("cpu", arm)
    last = max(int(row["step"]) for row in here.recorder.rows)
    moved = checkpoint(here, last)
    error = max(float((moved[name] - weight).abs().max()) for name, weight in checkpoint(there, last).items())
    curves = record_difference(there.recorder.rows, here.recorder.rows)
    print(f"max error {error:.1e} of the weights, {curves:.1e} of the curves")
    assert error <= 1e-6 and curves <= 1e-4, "in float32; curves hold norms of gradients, which are large"


def test_relearning_trains_a_copy_where_the_model_is(device: str) -> None:
    model: Any = tiny_run("sft_gold").model
    found = {}
    for where in ("cpu", device):
        learner = copy.deepcopy(model).to(where)
        examples = tiny_examples()
        found[where] = vars(relearn(learner, examples, examples, 1.0, 3, 1e-2, (0.9, 0.999), 0.0))
    assert found[device]["accuracies"] == found["cpu"]["accuracies"] and len(found["cpu"]["accuracies"]) == 4
    assert record_difference(found[device], found["cpu"]) <= 1e-5, "in float32"
