"""The README's examples run as they stand there, but for fewer prompts and a shorter search."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from stages.circuits.circuit import Circuit
from stages.circuits.exchange import random_nodes
from stages.measures.overlap import overlap_at
from stages.tasks.published import GPT2_SMALL_IOI
from tests.readme import block


def example(name: str, **smaller: str) -> str:
    """A block of the README, with some of its text replaced; each replaced text must be there."""
    code = block(name)
    for long, short in smaller.items():
        assert f"{long}=" in code
        code = re.sub(rf"\b{long}=[^,)]+", f"{long}={short}", code)
    return code


def test_a_real_model_from_nothing_to_a_drawn_circuit(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = example("smollm2", n="6", random_circuits="3", readout='"end", rule=replace(RULE, max_depth=1)')
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "smollm2").symlink_to(smollm2, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(f"from dataclasses import replace\nfrom stages.circuits.finding import RULE\n{code}", names)
    printed = capsys.readouterr().out
    assert "whole model" in printed and "3 random circuits" in printed
    circuit = names["circuit"]
    assert isinstance(circuit, Circuit) and {node.position for node in circuit.nodes} == {"end"}
    assert (23, 3) in {(node.layer, node.head) for node in circuit.nodes}  # the strongest mover of names
    titles = [element.text or "" for element in ET.parse("ioi.svg").getroot().iter("{http://www.w3.org/2000/svg}title")]
    assert any(title.startswith("head 23.3 at end") for title in titles)


def test_a_published_circuit_is_drawn_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(example("published"), {})
    circuit = Circuit.load("gpt2_ioi.json")
    assert circuit == Circuit.from_heads(**GPT2_SMALL_IOI) and len(circuit.nodes) == 26
    assert "10.7" in Path("gpt2_ioi.svg").read_text(encoding="utf-8")

    # its overlap with itself, and with random circuits of its shape: what any circuit has by chance
    positions = sorted({node.position for node in circuit.nodes})
    strata = np.repeat(np.arange(len(positions) * circuit.n_layers), circuit.n_heads)

    def chosen(nodes: object) -> np.ndarray:
        vector = np.zeros((len(positions), circuit.n_layers, circuit.n_heads))
        for node in nodes:  # type: ignore[attr-defined]
            vector[positions.index(node.position), node.layer, node.head] = 1
        return vector.ravel()

    own = overlap_at(chosen(circuit.nodes), chosen(circuit.nodes), strata, 26)
    assert own["share"] == own["jaccard"] == own["corrected"] == 1
    generator = np.random.default_rng(0)
    random = [random_nodes(circuit.nodes, circuit.n_layers, circuit.n_heads, generator) for _ in range(200)]
    shares = [overlap_at(chosen(circuit.nodes), chosen(nodes), strata, 26)["share"] or 0.0 for nodes in random]
    sizes = np.array([sum(node.position == position for node in circuit.nodes) for position in positions])
    expected = float((sizes**2).sum()) / (circuit.n_layers * circuit.n_heads) / 26
    print(f"overlap with random circuits of its shape: {np.mean(shares):.3f}, expected {expected:.3f}")
    assert np.mean(shares) == pytest.approx(expected, abs=0.02)
