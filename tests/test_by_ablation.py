"""A circuit in place with other outputs around it, against whole hooked passes."""

from types import SimpleNamespace

import pytest
import torch

from stages.circuits.ablation import mean_outputs
from stages.circuits.circuit import Circuit, Group, Node
from stages.evaluate import circuit_by_ablation, evaluate
from stages.measures.by_ablation import Resampled, circuit_with, from_donor
from stages.measures.prompts import AnsweredPrompts
from stages.measures.readout import Readout
from stages.pipeline.resources import Resources
from stages.pipeline.stage import Invalid
from stages.tasks.examples import Examples, Prompts
from tests.oracles import head_outputs, random_model, walker_of
from tests.oracles_ablation import naive_circuit, naive_means, random_circuit, random_prompts, several_positions

IDS, DONORS, MEMORY = random_prompts(), random_prompts(seed=5), 64.0
OTHERS = torch.tensor([[7, 8, 9]] * 6)
SCORES = ("correct", "best_candidate", "logit_difference", "p_correct")


def prompts_of(positions: dict[str, torch.Tensor]) -> AnsweredPrompts:
    return AnsweredPrompts(IDS, torch.arange(6), OTHERS, positions)


def worst(found: Readout, expected: Readout) -> float:
    return max(float((getattr(found, s).double() - getattr(expected, s).double()).abs().max()) for s in SCORES)


@pytest.mark.parametrize("kind", ["llama", "llama_gqa", "gpt2", "gemma2"])
def test_every_kind_is_that_of_whole_passes(kind: str) -> None:
    tuned, base = random_model(kind), random_model(kind, seed=1)
    walker, of_base = walker_of(tuned), walker_of(base)
    prompts, nodes = prompts_of(several_positions()), random_circuit(3, 4, 0.4, 0)
    errors, seen = {}, []
    for name, model in (("own_means", tuned), ("base_means", base)):
        means = naive_means(model, random_prompts(20, seed=1))
        found, _ = circuit_with(walker, prompts, nodes, means, MEMORY)
        naive = naive_circuit(tuned, IDS, means, prompts.positions, nodes)
        errors[name] = worst(found, Readout.of(naive[:, None], prompts.answer, OTHERS))
        seen.append(found.logit_difference)
    for name, model, donor in (("resampled", tuned, walker), ("base_resampled", base, of_base)):
        z = torch.stack(head_outputs(model, DONORS)).unflatten(-1, (4, -1))
        naive = torch.cat(  # one prompt after the other: the outputs of its donor are its "means"
            [
                naive_circuit(
                    tuned, IDS[[row]], z[:, row], {p: at[[row]] for p, at in prompts.positions.items()}, nodes
                )
                for row in range(6)
            ]
        )
        found, likeliest = circuit_with(walker, prompts, nodes, Resampled(donor, DONORS), MEMORY)
        small, _ = circuit_with(walker, prompts, nodes, Resampled(donor, DONORS), 1e-6, processes=2)
        errors[name] = worst(found, Readout.of(naive[:, None], prompts.answer, OTHERS))
        assert worst(small, found) <= 1e-12 and torch.equal(likeliest, naive.argmax(-1))
        seen.append(found.logit_difference)
    print(f"{kind}: largest errors {errors}")
    assert max(errors.values()) <= 1e-9
    assert all(float((a - b).abs().max()) > 1e-3 for i, a in enumerate(seen) for b in seen[:i])


def test_the_whole_model_as_circuit_and_resampling_from_oneself_change_nothing() -> None:
    walker, other = walker_of(random_model("llama")), walker_of(random_model("llama", seed=1))
    length = IDS.shape[1]
    prompts = prompts_of({str(token): torch.full((6,), token) for token in range(length)})
    everything = [Node(layer, head, at) for layer in range(3) for head in range(4) for at in prompts.positions]
    full = Readout.of(walker.run(IDS).logits[:, None], prompts.answer, OTHERS)
    ablations = [mean_outputs(other, IDS, MEMORY), Resampled(walker, DONORS), Resampled(other, DONORS)]
    errors = [worst(circuit_with(walker, prompts, everything, a, MEMORY)[0], full) for a in ablations]
    same = circuit_with(walker, prompts, random_circuit_here(), Resampled(walker, IDS), MEMORY)[0]
    errors.append(worst(same, full))
    print(f"largest errors {errors}")
    assert max(errors) <= 1e-9


def random_circuit_here() -> list[Node]:
    return [Node(0, 1, "3"), Node(2, 2, "10")]


def test_the_record_of_the_stage() -> None:
    base, tuned = walker_of(random_model("llama")), walker_of(random_model("llama", seed=1))
    at = several_positions()
    positions = {name: places if places.ndim == 1 else places[:, 0] for name, places in at.items()}
    answer = base.run(IDS).logits.argmax(-1)
    old = Examples(IDS, answer, OTHERS, positions, {}, DONORS, positions)
    new = Prompts(IDS, answer[:, None], answer, OTHERS)
    circuit = Circuit((Group("fetch", "last", "logits", None, ((2, 0), (1, 3))),), 3, 4)
    settings, available = SimpleNamespace(random_circuits=1, clauses="every"), Resources(1, MEMORY)
    base_means = mean_outputs(base, IDS, MEMORY)
    records = []
    for walker in (base, tuned):
        means = mean_outputs(walker, IDS, MEMORY)
        record = evaluate(walker, means, circuit, circuit, old, new, settings, 0, available)
        found = circuit_by_ablation(walker, base, base_means, circuit, old, record, "every", available)
        assert found is not None and found["own_means"] == record["circuit"]
        records.append(found)
        assert (
            circuit_by_ablation(walker, base, base_means, circuit, old, {"circuit": None}, "every", available) is None
        )
    of_base, of_tuned = records
    assert of_base["base_means"] == of_base["own_means"] and of_base["base_resampled"] == of_base["resampled"]
    assert of_tuned["base_means"] != of_tuned["own_means"] and of_tuned["base_resampled"] != of_tuned["resampled"]
    assert set(of_tuned["resampled"]) == {*of_tuned["base_means"], "from_donor"}


def test_what_comes_from_the_donor_and_bad_input() -> None:
    prompts, donors = torch.tensor([[1, 2], [1, 2], [1, 2]]), torch.tensor([[3, 2], [3, 2], [3, 2]])
    assert from_donor(torch.tensor([3, 2, 9]), prompts, donors).tolist() == [True, False, False]
    walker = walker_of(random_model("llama"))
    few, shallow = Resampled(walker, DONORS[:2]), Resampled(walker_of(random_model("llama", n_layers=2)), DONORS)
    for ablation, named in ((few, "resampled from prompts of shape"), (shallow, "the donor has")):
        with pytest.raises(Invalid, match=named):
            circuit_with(walker, prompts_of(several_positions()), [Node(0, 1, "last")], ablation, MEMORY)
