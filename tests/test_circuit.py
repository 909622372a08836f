"""Circuits as values: their nodes, their files, and published lists of heads."""

from typing import Any

import pytest

from stages.circuits.circuit import Circuit, Component, Group
from stages.measures.overlap import circuit_overlap
from stages.pipeline.stage import Invalid
from stages.tasks.published import entity_tracking


def test_nodes_of_a_circuit_are_unique_and_sorted():
    groups = (
        Group("b", "last", "a", Component.Q, ((1, 2), (0, 1))),
        Group("a", "last", "logits", None, ((1, 2),), (0.5,)),
    )
    assert [(node.layer, node.head) for node in Circuit(groups, 2, 4).nodes] == [(0, 1), (1, 2)]


def test_a_circuit_is_the_same_when_it_is_read_again(tmp_path):
    groups = (
        Group("movers", "last", "logits", None, ((1, 2),), (0.5,)),
        Group("against", "last", "logits", None, ((1, 3),), (-0.2,), sign=-1),
    )
    circuit = Circuit(groups, 2, 4)
    circuit.save(tmp_path / "circuit.json")
    assert Circuit.load(tmp_path / "circuit.json") == circuit
    data = circuit.to_json()
    for group in data["groups"]:
        del group["sign"]  # as it was written before groups had one
    assert [group.sign for group in Circuit.from_json(data).groups] == [1, 1]
    (tmp_path / "other.json").write_text('{"groups": [{}]}')
    with pytest.raises(
        Invalid, match="other.json holds no circuit .KeyError: 'name'.: must be as Circuit.save wrote it"
    ):
        Circuit.load(tmp_path / "other.json")


# Wang et al. 2022, GPT-2 small: some of its classes
PUBLISHED: dict[str, Any] = {
    "name movers": [(9, 9), "10.0", "a9.h6"],
    "negative name movers": ["L10H7", "11.10"],
    "previous token": ["2.2", "4.11"],
}


def test_a_published_list_of_heads_is_a_circuit(tmp_path):
    at = {"name movers": "end", "negative name movers": "end", "previous token": "s1+1"}
    feeds: Any = {"name movers": ("logits", None), "negative name movers": ("logits", None)}
    circuit = Circuit.from_heads(PUBLISHED, at, 12, 12, {"negative name movers": -1}, feeds)
    assert [(group.name, group.position, group.receiver, group.component, group.sign) for group in circuit.groups] == [
        ("name movers", "end", "logits", None, 1),
        ("negative name movers", "end", "logits", None, -1),
        ("previous token", "s1+1", None, None, 1),
    ]
    assert [group.heads for group in circuit.groups] == [
        ((9, 9), (10, 0), (9, 6)),
        ((10, 7), (11, 10)),
        ((2, 2), (4, 11)),
    ]
    circuit.save(tmp_path / "ioi.json")
    assert Circuit.load(tmp_path / "ioi.json") == circuit
    assert {node.position for node in Circuit.from_heads(PUBLISHED, "end", 12, 12).nodes} == {"end"}
    induction = Circuit.from_heads({"a": ["1.1"], "b": ["0.1"]}, "end", 2, 2, feeds={"b": ("a", "k")})
    assert induction.groups[1].receiver == "a" and induction.groups[1].component == Component.K


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 11}, "class 'negative name movers': head '11.10' must be below 11 layers of 12 heads"),
        ({"classes": {"a": ["9"]}}, "class 'a': head '9' must be a layer and a head, as"),
        ({"classes": {"a": ["1.1", (1, 1)]}}, "class 'a' has head 1.1 twice"),
        ({"position": {"name movers": "end"}}, "class 'negative name movers' has no position"),
        ({"position": {"movers": "end"}}, "position names the class 'movers': must be one of name movers, "),
        ({"sign": {"movers": -1}}, "sign names the class 'movers'"),
        ({"sign": 0}, "sign of class 'name movers' = 0: must be 1 or -1"),
        (
            {"feeds": {"previous token": ("induction", "k")}},
            "class 'previous token' feeds 'induction': must be 'logits'",
        ),
    ],
)
def test_a_list_of_heads_that_is_wrong_is_refused(changes, message):
    arguments: dict[str, Any] = {"classes": PUBLISHED, "position": "end", "n_layers": 12, "n_heads": 12} | changes
    with pytest.raises(Invalid, match=message):
        Circuit.from_heads(**arguments)


def test_what_is_no_published_circuit_is_one_sentence() -> None:
    with pytest.raises(Invalid, match="group 'movers': must be one of value_fetcher, pos_transmitter"):
        entity_tracking({"movers": [[0, 0]]})
    with pytest.raises(Invalid, match="class 'value_fetcher': head .* must be below 4 layers"):
        Circuit.from_heads(**entity_tracking({"value_fetcher": [[15, 13]]}, n_layers=4))
    small = Circuit.from_heads(**entity_tracking({"value_fetcher": [[1, 1]]}, 4, 4))
    with pytest.raises(Invalid, match=r"\(4, 4\) and \(32, 32\) layers and heads: must be the same"):
        circuit_overlap(small, Circuit.from_heads(**entity_tracking({})))
