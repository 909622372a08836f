"""The search with its own settings, on a real model: SmolLM2 does indirect object identification with movers for the
answer and against it."""

from dataclasses import replace
from pathlib import Path

from stages.circuits import Pairs, find_circuit, load, path_patcher
from stages.circuits.finding import RULE
from stages.circuits.search import Hop
from stages.tasks.ioi import ioi_prompts


def test_heads_for_and_against_the_answer_of_a_real_model(smollm2: Path) -> None:
    walker, tokenizer = load(smollm2)
    patcher = path_patcher(walker, Pairs.from_text(tokenizer, **ioi_prompts(tokenizer, 24, 0).texts()))
    told: list[Hop] = []
    circuit = find_circuit(patcher, "end", replace(RULE, max_depth=1), report=told.append)
    groups = {group.name: group for group in circuit.groups}
    print({name: dict(zip(group.heads, group.scores or (), strict=True)) for name, group in groups.items()})
    assert groups.keys() == {"answer", "answer-against"}
    assert groups["answer"].sign == 1 and {(23, 3), (29, 1)} <= set(groups["answer"].heads)
    assert groups["answer-against"].sign == -1 and {(29, 0), (24, 4)} <= set(groups["answer-against"].heads)
    (hop,) = told  # all heads move all of the answer, and those that were estimated only do little
    assert abs(float(hop.joint.score) - 1) < 1e-3
    assert hop.scores is not None and hop.patched is not None and 9 < int(hop.patched.sum()) < 135
