"""Scores, selection and search on a model whose circuit was put there by hand, and the stage around them."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stages import discover
from stages.circuits.circuit import Circuit, Component, Node
from stages.circuits.given_hops import HopSpec, given_hops
from stages.circuits.pairs import AlignedPairs
from stages.circuits.path_patching import PathPatcher
from stages.circuits.rule import Rule
from stages.circuits.scores import Metric, half_scores, logit_difference, measure_of, score, split_half
from stages.circuits.search import Found, Hop, _group_of, search
from stages.pipeline.files import read_json, write_json
from stages.pipeline.resources import DTYPE, MEMORY_MIB, PROCESSES
from stages.pipeline.stage import Cell, Invalid
from stages.tasks.examples import Examples, write_examples
from stages.tasks.old.boxes import Boxes
from tests.comparing import record_difference
from tests.oracles import walker_of

TOKENS, LENGTH = 8, 12
RULE = Rule(minimum_effect=0.02, minimum_head_effect=0.005, noise_z=4.0, coverage=0.9, merge_overlap=0.5, max_depth=4)


def counting_model() -> LlamaForCausalLM:
    """Answers with the most frequent token, by two heads that average over all earlier positions.

    The stream has four parts of 8: A the token, B and C written by heads, D read by nothing. All queries and
    keys are 0, so attention is uniform. Head 0.0 moves A to B, head 1.0 moves B to C, the head of the model
    reads C. Head 0.2 moves A to B with 1 % of the weight, head 0.3 moves A to D with full weight. All other
    heads and the MLPs give 0.
    """
    settings: dict[str, Any] = dict(
        vocab_size=TOKENS,
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        attn_implementation="eager",
        eos_token_id=None,  # every token is a word
    )
    model: Any = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    part, eye = {"A": 0, "B": 8, "C": 16, "D": 24}, torch.eye(TOKENS)

    def move(layer: int, head: int, source: str, target: str, weight: float) -> None:
        attention = model.model.layers[layer].self_attn
        attention.v_proj.weight[8 * head : 8 * head + 8, part[source] : part[source] + 8] = eye
        attention.o_proj.weight[part[target] : part[target] + 8, 8 * head : 8 * head + 8] = weight * eye

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, :8] = eye
        model.lm_head.weight[:, 16:24] = 9 * eye
        move(0, 0, "A", "B", 1.0)
        move(0, 2, "A", "B", 0.01)
        move(0, 3, "A", "D", 1.0)
        move(1, 0, "B", "C", 1.0)
    return model


def counting_examples(n: int = 40) -> Examples:
    """Clean prompts that hold the answer 4 to 6 times, corrupt prompts that do not hold it."""
    rng = np.random.default_rng(0)
    answer = rng.integers(TOKENS, size=n)
    ids = (answer[:, None] + rng.integers(1, TOKENS, size=(2, n, LENGTH))) % TOKENS
    for row in range(n):
        ids[0, row, rng.choice(LENGTH - 1, size=rng.integers(4, 7), replace=False)] = answer[row]
    others = (answer[:, None] + np.arange(1, TOKENS)) % TOKENS
    at = {
        "last": np.full(n, LENGTH - 1),
        "query_label": np.full(n, LENGTH - 3),
        "earlier_label": rng.integers(1, 4, size=n),
    }
    positions = {name: torch.from_numpy(index) for name, index in at.items()}
    to = torch.from_numpy
    return Examples(
        to(ids[0]), to(answer), to(others), positions, {"last": positions["last"][:, None]}, to(ids[1]), positions
    )


def counting_patcher(metric: Metric = Metric.LOGIT_DIFFERENCE, also: dict[str, str] | None = None) -> PathPatcher:
    """The model on its prompts; `also` names positions once more: new name -> known one."""
    examples = counting_examples()
    positions, corrupt = (
        at | {new: at[known] for new, known in (also or {}).items()}
        for at in (examples.positions, examples.corrupt_positions)
    )
    pairs = AlignedPairs(examples.input_ids, examples.corrupt_ids, positions, corrupt)
    return PathPatcher(walker_of(counting_model()), pairs, measure_of(metric, examples.answer, examples.others), 64.0)


def test_scores_by_hand():
    logits = torch.tensor([[1.0, 5.0, 2.0, 4.0], [0.0, 1.0, 3.0, 9.0]])
    answer, others = torch.tensor([1, 3]), torch.tensor([[0, 2], [0, 1]])
    assert torch.equal(logit_difference(logits, answer, others), torch.tensor([5 - 1.5, 9 - 0.5]))
    probability = measure_of(Metric.RELATIVE_PROBABILITY, answer, others)(logits[:, None], torch.tensor([0, 1]))
    assert torch.allclose(probability[:, 0], logits.softmax(-1)[[0, 1], answer])

    clean, corrupt = torch.tensor([4.0, 8.0]), torch.tensor([0.0, -4.0])
    effects = torch.tensor([[-1.0, -3.0], [0.0, 4.0]])
    ratio = score(Metric.LOGIT_DIFFERENCE, effects, clean, corrupt)
    assert ratio.score.tolist() == [0.25, -0.25]
    # residuals of the first: (-1 + .25 * 4) / -8 = 0 and (-3 + .25 * 12) / -8 = 0; of the second 1/8, -1/8
    assert torch.allclose(ratio.noise, torch.tensor([0.0, 0.125])) and torch.equal(ratio.strength, ratio.score)
    relative = score(Metric.RELATIVE_PROBABILITY, effects, clean, corrupt)
    assert relative.score.tolist() == [-0.3125, 0.25] and relative.strength.tolist() == [0.3125, -0.25]


def test_noise_is_the_standard_deviation_over_repeated_draws():
    generator = torch.Generator().manual_seed(0)
    clean, effects = torch.randn(2, 400, 200, generator=generator, dtype=torch.float64)
    clean, corrupt = clean + 8, torch.zeros(400, 200, dtype=torch.float64)
    draws = [score(Metric.LOGIT_DIFFERENCE, e - 1, c, k) for e, c, k in zip(effects, clean, corrupt, strict=True)]
    spread = float(torch.stack([draw.score for draw in draws]).std())
    assert float(torch.stack([draw.noise for draw in draws]).mean()) == pytest.approx(spread, rel=0.1)


def test_split_half_correlation():
    patcher = counting_patcher()
    effects = torch.randn(2, 4, 40, generator=torch.Generator().manual_seed(0))

    def halves(effects):
        return half_scores(Metric.LOGIT_DIFFERENCE, effects, patcher.clean, patcher.corrupt)

    assert split_half(halves(torch.zeros(2, 4, 40))) is None
    steady = effects.mean(-1, keepdim=True).expand(-1, -1, 40)
    assert split_half(halves(steady)) == pytest.approx(1)
    noisy = split_half(halves(effects))
    assert noisy is not None and abs(noisy) < 0.9
    full = patcher.corrupt - patcher.clean
    by_hand = effects[1, 2, 1::2].mean() / full[1::2].mean()
    assert float(halves(effects)[1, 1, 2]) == pytest.approx(float(by_hand))


def test_search_finds_the_circuit_that_was_put_there():
    patcher = counting_patcher()
    told = []
    circuit, hops = search(patcher, Metric.LOGIT_DIFFERENCE, RULE, told.append, "last", Boxes.root, Boxes.display)
    assert told == hops
    shape = [(group.name, group.position, group.receiver, group.component, group.heads) for group in circuit.groups]
    assert shape == [
        ("fetch_answer", "last", "logits", None, ((1, 0),)),
        ("v_last", "last", "fetch_answer", Component.V, ((0, 0),)),
        ("v_query_label", "query_label", "fetch_answer", Component.V, ((0, 0),)),
        ("v_label", "earlier_label", "fetch_answer", Component.V, ((0, 0),)),
    ]
    assert len(circuit.nodes) == 4 and Circuit.from_json(json.loads(json.dumps(circuit.to_json()))) == circuit
    fetch = hops[0].scores
    assert fetch is not None and float(fetch.score[1, 0]) == pytest.approx(1, abs=0.05)  # all of the answer passes it
    assert [hop.name for hop in hops] == [
        "fetch_answer", "q_last", "k_last", "v_last", "k_query_label", "v_query_label", "k_label", "v_label",
    ]  # fmt: skip
    assert all(abs(float(hop.joint.score)) < 1e-6 for hop in hops if hop.component in (Component.Q, Component.K))


def test_the_rule_asks_for_size_and_for_certainty():
    patcher = counting_patcher()
    for rule in (replace(RULE, minimum_effect=1.5), replace(RULE, noise_z=1e6)):
        circuit, hops = search(patcher, Metric.LOGIT_DIFFERENCE, rule, lambda hop: None, "last")
        assert circuit.groups == () and len(hops) == 1
    shallow, _ = search(
        patcher, Metric.LOGIT_DIFFERENCE, replace(RULE, max_depth=1), lambda hop: None, "last", Boxes.root
    )
    assert [group.name for group in shallow.groups] == ["fetch_answer"]
    # head 0.2 does 1 % of what head 0.0 does and head 0.3 turns only norms, so that more than 99 % needs them, too
    all_of_it = replace(RULE, coverage=0.995, minimum_head_effect=2e-4, noise_z=2.0)
    thorough, _ = search(patcher, Metric.LOGIT_DIFFERENCE, all_of_it, lambda hop: None, "last")
    assert {node for node in thorough.nodes if node.layer == 0 and node.position == "query_label"} == {
        Node(0, head, "query_label") for head in (0, 2, 3)
    }


def test_hops_with_much_the_same_heads_share_a_group():
    none = score(Metric.LOGIT_DIFFERENCE, torch.zeros(4), -torch.ones(4), torch.ones(4))

    def hop(position: str, **changes: Any) -> Hop:
        part = Found("a", 1, ((0, 0), (0, 1), (0, 2)), "a")
        return Hop("a", position, "logits", None, none, found=(replace(part, **changes),))

    heads = ((0, 0), (0, 1), (1, 0))
    assert _group_of("b", "last", 1, heads, [hop("last")], 0.5) == "a"
    assert _group_of("b", "last", 1, heads, [hop("last")], 0.51) == "b"
    assert _group_of("b", "last", -1, heads, [hop("last")], 0.5) == "b"  # a group has one sign
    assert _group_of("b", "last", 1, heads, [hop("query_label")], 0.5) == "b"
    assert _group_of("b", "last", 1, heads, [hop("last", group="c")], 0.5) == "b"  # joined another group itself


def test_names_of_hops_are_the_callers_and_cannot_collide():
    patcher = counting_patcher(also={"label": "earlier_label"})

    def names(**arguments: Any) -> list[str]:
        found = search(patcher, Metric.LOGIT_DIFFERENCE, replace(RULE, max_depth=2), lambda hop: None, **arguments)
        return [hop.name for hop in found[1]]

    kept = names(readout="last")
    assert kept[:4] == ["answer", "q_last", "k_last", "v_last"]
    assert {"v_label", "v_earlier_label"} <= set(kept) and len(set(kept)) == len(kept)
    with pytest.raises(Invalid, match="'(earlier_)?label' and '(earlier_)?label' are both called 'label'"):
        names(readout="last", display=Boxes.display)
    with pytest.raises(Invalid, match="readout = 'end': must be a position of the prompts: earlier_label, label, last"):
        names(readout="end")
    with pytest.raises(Invalid, match="root = 'q_last': must not be the name of a hop"):
        names(readout="last", root="q_last")
    for wrong in ("a>b", "x-against", ""):
        with pytest.raises(Invalid, match=f"name '{wrong}': must not be empty, hold '>' or end in '-against'"):
            names(readout="last", root=wrong)


@pytest.mark.parametrize("metric", Metric)
def test_paper_hops(metric):
    patcher = counting_patcher(metric)
    specs = [HopSpec(*hop) for hop in Boxes.paper_hops]
    circuit, hops = given_hops(patcher, metric, RULE, specs, None, None, lambda hop: None)
    assert [group.name for group in circuit.groups] == ["value_fetcher"] and circuit.nodes[0].layer == 1
    # no head feeds its queries, and so the later hops have no receivers
    assert [hop.name for hop in hops] == ["value_fetcher", "pos_transmitter", "pos_detector", "struct_reader"]
    assert [hop.scores is None for hop in hops] == [False, False, True, True]
    assert all(float(hop.joint.score) == 0 and hop.heads == () for hop in hops[2:])
    told = []
    circuit, hops = given_hops(patcher, metric, RULE, specs, [1, 1, 1, 1], [2, 3, 4, 1], told.append)
    assert [len(hop.heads) for hop in told] == [2, 3, 4, 1]
    assert set(hops[0].heads) == set(told[0].heads) - set(hops[1].heads)  # a head is in one group at a position
    assert hops[1:] == told[1:]
    assert [(hop.position, hop.receiver, hop.component) for hop in hops] == [
        ("last", "logits", None),
        ("last", "value_fetcher", Component.Q),
        ("query_label", "pos_transmitter", Component.V),
        ("earlier_label", "pos_detector", Component.V),
    ]
    wrong = {
        "hop 'pos_detector' feeds v of 'struct_reader': must be an input q, k or v of an earlier": [
            *specs[:2],
            replace(specs[2], receiver="struct_reader"),
        ],
        "hop 'value_fetcher' feeds q of 'logits'": [replace(specs[0], component="q")],
        "two hops are called 'value_fetcher'": [specs[0], specs[0]],
        "receivers has 4 numbers: must be one for each of the 1 hops": specs[:1],
    }
    for message, given in wrong.items():
        with pytest.raises(Invalid, match=message):
            given_hops(patcher, metric, RULE, given, [1, 1, 1, 1], None, lambda hop: None)
    assert isinstance(patcher.pairs.positions, dict)
    del patcher.pairs.positions["query_label"]
    with pytest.raises(Invalid, match="needs the position 'query_label': the prompts have earlier_label, last"):
        given_hops(patcher, metric, RULE, specs, None, None, lambda hop: None)


def stage_cell(**changes: object) -> Cell:
    values = {
        "hops": "auto",
        "score": "logit_difference",
        "examples": 40,
        "identifiable_accuracy": 0.5,
        "minimum_effect": 0.02,
        "minimum_head_effect": 0.005,
        "screen": None,
        "most_senders": None,
        "noise_z": 4.0,
        "coverage": 0.9,
        "merge_overlap": 0.5,
        "max_depth": 4,
        "paper_top": None,
    } | changes
    settings = SimpleNamespace(**values, model_dump=lambda mode: values)

    class Given(Cell):
        def params(self, path: str) -> Any:
            of_evaluate = {"evaluate.score": "accuracy", "evaluate.clauses": "every", "evaluate.idle_tolerance": 0.02}
            return settings if path == "discover" else of_evaluate[path]

    return Given("discover", {"model": "base", "seed": "0"})


@pytest.fixture
def stage_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("discovery", "pruning", "means"):
        write_examples(f"data/old/{name}.parquet", counting_examples())
    write_json("data/old_task.json", Boxes.described())
    counting_model().save_pretrained("models/base/0")
    return tmp_path / "reports/cells/discover/base/0"


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def written(folder) -> dict[str, Any]:
    """The same, read."""
    with np.load(folder / "scores.npz") as arrays:
        scores = {name: array.tolist() for name, array in arrays.items()}
    return {"scores": scores} | {name: read_json(folder / f"{name}.json") for name in ("circuit", "record")}


def test_stage_writes_the_same_bytes_again(stage_folder):
    discover.main(stage_cell())
    first = contents(stage_folder)
    discover.main(stage_cell())
    assert contents(stage_folder) == first and sorted(first) == ["circuit.json", "record.json", "scores.npz"]
    circuit = Circuit.from_json(json.loads(first["circuit.json"]))
    assert circuit.identifiable and [group.name for group in circuit.groups][:2] == ["fetch_answer", "v_last"]
    with np.load(stage_folder / "scores.npz") as arrays:
        assert arrays["fetch_answer.score"].shape == arrays["v_label.noise"].shape == (2, 4)
        assert arrays["v_label.half0"].shape == arrays["v_label.half1"].shape == (2, 4)
    record = json.loads(first["record.json"])
    assert record["size"] == 3 and record["idle"]["found"]["size"] == 4  # one head too many was found
    assert record["accuracy"] == pytest.approx(0.85) and record["settings"]["noise_z"] == 4.0
    idle = {name for name, entry in record["idle"]["groups"].items() if entry["idle"]}
    assert {hop["name"] for hop in record["hops"] if hop["group"] == hop["name"]} == set(record["sizes"]) | idle
    assert idle == {"v_label"} and {group.name for group in circuit.idle} == idle
    # all heads spread their attention evenly: over the tokens up to the label, the earlier the more on each of them
    feeds = {hop["name"]: hop["feeds"] for hop in record["hops"]}
    assert feeds["fetch_answer"] == [] and feeds["v_last"] == [[1, 0]]
    reads = {hop["name"]: hop["reads"] for hop in record["hops"]}
    assert reads["q_last"] is None and set(reads["fetch_answer"]) == {"position", "share"}
    assert reads["fetch_answer"]["share"] == pytest.approx(1 / LENGTH, abs=1e-5)
    assert reads["v_query_label"]["share"] == pytest.approx(1 / (LENGTH - 2), abs=1e-5)


def test_stage_finds_the_same_with_other_resources_but_for_rounding(stage_folder, monkeypatch):
    discover.main(stage_cell())
    expected = written(stage_folder)
    for processes, memory_mib in (("1", "512"), ("3", "0.2")):
        monkeypatch.setenv(PROCESSES, processes)
        monkeypatch.setenv(MEMORY_MIB, memory_mib)
        discover.main(stage_cell())
        error = record_difference(written(stage_folder), expected)
        print(f"{processes} processes, {memory_mib} MiB: max error {error:.1e}")
        assert error <= 1e-5, "in float32"


def test_in_bfloat16_the_record_says_how_heads_are_ranked(stage_folder, monkeypatch):
    monkeypatch.setenv(DTYPE, "bfloat16")
    discover.main(stage_cell())
    record = written(stage_folder)["record"]
    found = record["precision"]
    print(found)
    assert record["settings"]["dtype"] == "bfloat16" and found["reference"] == "float32"
    assert found["examples"] == discover.AGREEING and 1 <= found["heads"] <= 8
    assert found["heads_of_least"] >= 1 and 0 < found["largest_difference"] < 0.02


def test_stage_does_not_search_where_the_model_cannot_do_the_task(stage_folder):
    discover.main(stage_cell(identifiable_accuracy=1.01))
    circuit = Circuit.from_json(json.loads((stage_folder / "circuit.json").read_text()))
    assert circuit == Circuit((), 2, 4, identifiable=False)
    with np.load(stage_folder / "scores.npz") as arrays:
        assert list(arrays) == []


def test_stage_refuses_more_examples_than_there_are(stage_folder):
    with pytest.raises(Invalid, match="discover.examples = 41: .* holds 40"):
        discover.main(stage_cell(examples=41))
