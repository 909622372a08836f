"""Bad input of the causal engine: one sentence each, before any work."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jaxtyping import config

from stages.circuits.ablation import circuits_in_place, nodes_removed
from stages.circuits.circuit import Component, Node
from stages.circuits.exchange import Sites
from stages.circuits.masks import PairTable
from stages.circuits.pairs import AlignedPairs
from stages.circuits.path_patching import PathPatcher, Receivers
from stages.circuits.scores import Metric, half_scores, measure_of, score
from stages.circuits.transplant import transplant
from stages.circuits.walker import Walker
from stages.pipeline.stage import Invalid
from tests.oracles import VOCAB, random_model, random_pairs, walker_of

PAIRS = random_pairs(length=11)
N, LENGTH = PAIRS.clean_ids.shape


@pytest.fixture(scope="module")
def walker() -> Walker:
    return walker_of(random_model("llama"))


def first_logit(logits: Any, index: Any) -> Any:
    return logits[..., 0]


def moved(name: str, row: int, to: int) -> dict[str, torch.Tensor]:
    """The positions with one of them changed."""
    at = PAIRS.positions[name].clone()
    at[row] = to
    return {**PAIRS.positions, name: at}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(corrupt_ids=PAIRS.corrupt_ids[:, 1:]), r"clean_ids has shape \[5, 11\], corrupt_ids \[5, 10\]"),
        (dict(corrupt_ids=PAIRS.corrupt_ids[1:]), r"clean_ids has shape \[5, 11\], corrupt_ids \[4, 11\]"),
        (dict(clean_ids=PAIRS.clean_ids[0], corrupt_ids=PAIRS.corrupt_ids[0]), r"clean_ids has shape \[11\]"),
        (dict(positions={}), "positions is empty"),
        (dict(positions={"last": torch.full((4,), 10)}), r"positions\['last'\] has shape \[4\].*must be 5 integers"),
        (dict(positions={"last": torch.full((5,), 10.0)}), r"positions\['last'\] has .* type torch.float32"),
        (dict(positions=moved("earlier", 3, 11)), r"positions\['earlier'\] of example 3 = 11: must be from 0 to 10"),
        (dict(positions=moved("earlier", 0, -1)), r"positions\['earlier'\] of example 0 = -1: must be from 0 to 10"),
        (dict(corrupt_positions=moved("earlier", 1, 99)), r"corrupt_positions\['earlier'\] of example 1 = 99"),
        (
            dict(positions=moved("last", 2, 8)),
            r"\['last'\] of example 2 = 8: must be 10, .* equal length without padding",
        ),
        (dict(corrupt_positions={"last": PAIRS.positions["last"]}), "corrupt_positions lacks earlier, query_label"),
    ],
)
def test_pairs(change: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # outside the tests nothing else looks at shapes
    with pytest.raises(Invalid, match=sentence):
        replace(PAIRS, **change)


def test_tokens_and_padding(walker: Walker) -> None:
    def patcher(pairs: AlignedPairs) -> PathPatcher:
        return PathPatcher(walker, pairs, first_logit, 64.0)

    ids = PAIRS.clean_ids.clone()
    ids[1, 3] = VOCAB
    with pytest.raises(Invalid, match="clean_ids holds token id 40: must be from 0 to 39"):
        patcher(replace(PAIRS, clean_ids=ids))
    ids[1, 3] = -1
    with pytest.raises(Invalid, match="corrupt_ids holds token id -1"):
        patcher(replace(PAIRS, corrupt_ids=ids))
    with pytest.raises(Invalid, match="input_ids holds token id -1"):
        walker.run(ids)
    with pytest.raises(Invalid, match=r"input_ids has shape \[0, 11\]"):
        walker.run(ids[:0])
    padded = PAIRS.clean_ids.clamp(min=1)
    padded[4, 0] = 0
    padding = walker_of(random_model("llama"))
    padding.model.config.pad_token_id = 0
    with pytest.raises(Invalid, match="clean_ids: prompt 4 starts or ends with the padding token 0: .* by length"):
        PathPatcher(padding, replace(PAIRS, clean_ids=padded), first_logit, 64.0)
    padding.model.config.bos_token_id = 0  # then it starts every text, and says nothing
    PathPatcher(padding, replace(PAIRS, clean_ids=padded), first_logit, 64.0)


def test_paths(walker: Walker) -> None:
    patcher = PathPatcher(walker, PAIRS, first_logit, 64.0)
    for heads, sentence in (
        (((3, 0),), "receiver of q 3.0: must be a layer from 0 to 2 and a head from 0 to 3"),
        (((1, 1), (2, 4)), "receiver of q 2.4: must be a layer from 0 to 2"),
        (((-1, 0),), "receiver of q -1.0"),
    ):
        with pytest.raises(Invalid, match=sentence):
            patcher.head_effects("last", [Receivers(Component.Q, heads)])
    with pytest.raises(Invalid, match="position 'box': must be one of earlier, last, query_label"):
        patcher.head_effects("box", [Receivers()])
    with pytest.raises(Invalid, match=r"senders have shape \[1, 2, 4\]: must be sets by 3 layers by 4 heads"):
        patcher.effects("last", torch.ones(1, 2, 4, dtype=torch.bool), [Receivers()])
    with pytest.raises(Invalid, match="receivers v of no head: must be heads with a component"):
        Receivers(Component.V)
    with pytest.raises(Invalid, match="must be heads with a component, or no heads and no component"):
        Receivers(None, ((1, 0),))


def test_answers(walker: Walker) -> None:
    answer, others = torch.arange(5), torch.tensor([[7, 8]] * 5)
    for metric in Metric:
        with pytest.raises(Invalid, match="hold token id 40: every label must be one token .* from 0 to 39"):
            PathPatcher(walker, PAIRS, measure_of(metric, answer + 36, others), 64.0)
        with pytest.raises(Invalid, match="hold token id -100: every label must be one token"):
            PathPatcher(walker, PAIRS, measure_of(metric, answer, torch.full((5, 2), -100)), 64.0)
        with pytest.raises(Invalid, match="4 answers, but a prompt with index 4"):
            PathPatcher(walker, PAIRS, measure_of(metric, answer[:4], others[:4]), 64.0)
    with pytest.raises(Invalid, match=r"answer has shape \[5\], others \[5, 0\]"):
        measure_of(Metric.LOGIT_DIFFERENCE, answer, others[:, :0])


def test_numbers_that_are_not_finite(walker: Walker) -> None:
    def broken(at: int | None) -> Any:
        """nan on runs that have variants, from layer `at` of the senders' axis; on clean runs where it is None."""

        def measure(logits: Any, index: Any) -> Any:
            value = logits[..., 0].clone()
            if at is None:
                value[index == 3] = float("nan")
            elif value.shape[1] > at:
                value[index == 2, at] = float("inf")
            return value

        return measure

    with pytest.raises(Invalid, match="the measure of the clean run is nan in example 3: must be a finite number"):
        PathPatcher(walker, PAIRS, broken(None), 64.0)
    patcher = PathPatcher(walker, PAIRS, broken(5), 64.0)
    with pytest.raises(Invalid, match="the effect of 1.1 at 'last' on the logits is inf in example 2"):
        patcher.head_effects("last", [Receivers()])
    receivers = Receivers(Component.V, ((2, 0), (2, 3)))
    with pytest.raises(Invalid, match="the effect of 1.1 at 'earlier' on v of 2.0, 2.3 is inf in example 2"):
        patcher.head_effects("earlier", [receivers])


def test_scores_that_are_not_finite() -> None:
    clean, corrupt = torch.tensor([4.0, 8.0]), torch.tensor([0.0, -4.0])
    effects = torch.zeros(2, 3, 2)
    with pytest.raises(Invalid, match="the same mean logit difference"):
        score(Metric.LOGIT_DIFFERENCE, effects, clean, clean)
    effects[1, 2, 0] = float("nan")
    for metric in Metric:
        with pytest.raises(Invalid, match=f"the {metric} score of sender 1.2 is not a finite number"):
            score(metric, effects, clean, corrupt)
        with pytest.raises(Invalid, match="scores of 1 example: must be at least 2"):
            score(metric, effects[..., :1], clean[:1], corrupt[:1])
    with pytest.raises(Invalid, match="scores of 1 example: must be at least 2"):
        half_scores(Metric.LOGIT_DIFFERENCE, torch.ones(2, 3, 2), clean, corrupt)


def test_transplants_and_masks(walker: Walker) -> None:
    clean, other = walker.run(PAIRS.clean_ids), walker_of(random_model("llama", n_layers=2)).run(PAIRS.clean_ids)
    with pytest.raises(
        Invalid, match=r"shape \[2, 5, 11, 4, 8\], of the receiver \[3, 5, 11, 4, 8\]: must be two models"
    ):
        transplant(walker, clean, other, PAIRS.positions, [Node(0, 0, "last")], 64.0)

    def table(site: str, **change: Any) -> PairTable:
        pairs: Any = SimpleNamespace(
            base_ids=PAIRS.clean_ids,
            source_ids=PAIRS.corrupt_ids,
            target=torch.arange(5),
            base_positions=PAIRS.positions,
            source_positions=PAIRS.corrupt_positions,
        )
        vars(pairs).update(change)
        return PairTable.of([pairs], [site])

    assert len(table("earlier").target) == 5
    with pytest.raises(Invalid, match="position 'box': must be one of earlier, last, query_label"):
        table("box")
    with pytest.raises(Invalid, match=r"source_positions\['earlier'\] of example 2 = 11: must be from 0 to 10"):
        table("earlier", source_positions=moved("earlier", 2, 11))


def test_sites_and_nodes(walker: Walker) -> None:
    run, means = walker.run(PAIRS.clean_ids), torch.zeros(3, LENGTH, 4, 8, dtype=torch.float64)
    for nodes, sentence in (
        ([Node(3, 0, "last")], "node 3.0: must be a layer from 0 to 2 and a head from 0 to 3"),
        ([Node(0, 4, "last")], "node 0.4"),
        ([Node(0, 0, "box")], "position 'box': must be one of earlier, last, query_label"),
    ):
        with pytest.raises(Invalid, match=sentence):
            circuits_in_place(walker, run, means, PAIRS.positions, [nodes], 64.0)
        with pytest.raises(Invalid, match=sentence):
            nodes_removed(walker, run, means, PAIRS.positions, nodes, 64.0)
    at = torch.tensor([[3, 10], [4, 10]])
    for wrong, sentence in ((at + 1, "site at position 11: must be from 0 to 10"), (at - 4, "site at position -1")):
        for make in (Sites.alone, Sites.tail):
            with pytest.raises(Invalid, match=sentence):
                make(wrong, LENGTH)
    with pytest.raises(Invalid, match=r"sites have shape \[0, 2\]"):
        Sites.tail(at[:0], LENGTH)
    with pytest.raises(Invalid, match="sites must include the last position of every prompt, 10"):
        Sites.alone(at - 1, LENGTH)
