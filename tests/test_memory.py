"""What is alive at once under a limit on memory, and where tensors are made: every public function of ablation, DCM,
CMAP, knockout, reading and of the measures on them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from stages.circuits.ablation import ablated_run, circuits_in_place, mean_outputs, nodes_removed
from stages.circuits.circuit import Group, Node
from stages.circuits.exchange import random_nodes
from stages.circuits.knockout import knocked_out, layer_windows
from stages.circuits.mask_training import MaskSettings
from stages.circuits.masks import component_masks
from stages.circuits.reading import mean_attention
from stages.circuits.transplant import random_like, transplant, transplant_inputs
from stages.circuits.walker import Walker
from stages.cmap import patch_both_ways
from stages.measures.alignment import last_streams
from stages.measures.by_ablation import Resampled, circuit_with
from stages.measures.faithfulness import evaluate_circuits
from stages.measures.prepared import Prepared
from stages.measures.prompts import AnsweredPrompts
from stages.measures.readout import reading
from stages.tasks.examples import DesiderataPairs
from tests.live_bytes import LiveBytes

MIB = 2**20


@dataclass(frozen=True)
class Setting:
    """A model with prompts and a circuit."""

    walker: Walker
    prompts: AnsweredPrompts
    pairs: DesiderataPairs
    nodes: list[Node]
    groups: list[Group]

    @staticmethod
    def of(layers: int, vocabulary: int, n: int, length: int, device: str = "cpu") -> "Setting":
        """Small, with few weights beside the runs, and with groups of heads in low and high layers."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=144,
            intermediate_size=384,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=16,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=None,
        )
        walker = Walker(torch.nn.Module.to(LlamaForCausalLM(config).eval(), device))
        generator = torch.Generator().manual_seed(0)

        def draw(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator, device="cpu")

        ids, source = draw(0, vocabulary, n, length), draw(0, vocabulary, n, length)
        positions = {
            "label": draw(2, 6, n, 3),  # at three tokens of each prompt
            "name": draw(6, length - 2, n),
            "end": torch.full((n,), length - 1, device="cpu"),
        }
        answer, others = draw(0, vocabulary, n), draw(0, vocabulary, n, 4)
        others[0, 2:] = -1
        at = {name: positions[name] for name in ("name", "end")}
        pairs = DesiderataPairs(ids, source, answer, answer, at, at)
        heads = tuple((layer, head) for layer in (layers // 4, layers - 2) for head in (0, 4))
        groups = [Group("high", "end", "logits", None, heads), Group("low", "name", "high", None, heads)]
        nodes = [Node(layer, head, name) for layer, head in heads for name in positions]
        return Setting(walker, AnsweredPrompts(ids, answer, others, positions), pairs, nodes, groups)


MASKS = MaskSettings(
    steps=2,
    batch=4,
    learning_rate=0.1,
    start=0.5,
    sparsity=0.02,
    objective="log_probability",
    tolerance=0.0,
    memory_mib=0.0,
)

Call = Callable[[float], object]


def calls(of: Setting, circuits: int = 8) -> tuple[Mapping[str, Call], list[object]]:
    """Every public function by name, called with a limit in MiB, and the runs that some of them are given."""
    walker, prompts, nodes = of.walker, of.prompts, of.nodes
    ids, at, shape = prompts.input_ids, prompts.positions, (walker.n_layers, walker.n_heads)
    generator = np.random.default_rng(0)
    sets = [nodes, *(random_nodes(nodes, *shape, generator) for _ in range(circuits))]
    means = mean_outputs(walker, ids, 64.0)
    clean, background = walker.run(ids.to(walker.device)), ablated_run(walker, ids, means)
    read = reading(prompts.answer, prompts.others)
    random = random_like(nodes, len(ids), 3, *shape, generator)
    windows = layer_windows(walker.n_layers, 3)[::5]
    keys = torch.stack([at["name"], at["name"] - 1], 1)

    def prepared(mib: float) -> object:
        model = Prepared(walker, means, prompts, mib)
        model.make_runs()
        blinded = model.blinded(at["end"], keys, windows, 3)
        return model.full(), model.in_place(sets[:3]), model.without(sets[:1]), blinded

    def masks(mib: float) -> object:
        pairs = {"one": of.pairs, "two": of.pairs.select(slice(len(ids) // 2, None))}
        settings = MaskSettings(**{**vars(MASKS), "memory_mib": mib})
        return component_masks(walker, pairs, pairs, pairs, of.groups, settings, np.random.default_rng(0))

    found: dict[str, Call] = {
        "mean_outputs": lambda mib: mean_outputs(walker, ids, mib),
        "mean_attention": lambda mib: mean_attention(walker, ids, at, mib),
        "circuits_in_place": lambda mib: circuits_in_place(walker, background, means, at, sets, mib, read),
        "nodes_removed": lambda mib: nodes_removed(walker, clean, means, at, nodes, mib, read),
        "knocked_out": lambda mib: knocked_out(walker, clean, at["end"], keys, windows, mib, read),
        "transplant": lambda mib: transplant(walker, clean, clean, at, nodes, mib, random, read),
        "transplant_q": lambda mib: transplant_inputs(walker, clean, walker, clean, at, nodes, "q", mib, random, read),
        "transplant_v": lambda mib: transplant_inputs(walker, clean, walker, clean, at, nodes, "v", mib, random, read),
        "evaluate_circuits": lambda mib: evaluate_circuits(walker, means, prompts, sets, sets[:1], mib),
        "circuit_with_means": lambda mib: circuit_with(walker, prompts, nodes, means, mib)[0],
        "circuit_resampled": lambda mib: circuit_with(walker, prompts, nodes, Resampled(walker, ids.flip(0)), mib)[0],
        "prepared": prepared,
        "component_masks": masks,
        "patch_both_ways": lambda mib: patch_both_ways(
            walker, walker, prompts, {"circuit": nodes}, 2, mib, np.random.default_rng(0), inputs=("q", "k", "v")
        ),
        "last_streams": lambda mib: last_streams(walker, ids, 32, mib),
    }
    return found, [clean, background, means, random]


@cache
def large() -> tuple[Setting, Mapping[str, Call], list[object]]:
    setting = Setting.of(layers=30, vocabulary=49_000, n=10, length=20)
    return setting, *calls(setting)


def tensors_of(things: list[object]) -> list[Tensor]:
    """Tensors, and those that runs hold."""
    return [x for thing in things for x in ([thing] if isinstance(thing, Tensor) else vars(thing).values())]


LIMIT, OF_MASKS = 16.0, 24.0  # MiB; what masks are trained on keeps all that gradients need


@pytest.mark.parametrize("name", list(calls(Setting.of(2, 50, 4, 12))[0]))
def test_what_is_alive_stays_within_the_limit(name: str) -> None:
    setting, functions, given = large()
    mib = OF_MASKS if name == "component_masks" else LIMIT
    known = [*setting.walker.model.parameters(), *setting.walker.model.buffers(), *tensors_of(given)]
    with LiveBytes(*known) as live:
        functions[name](mib)
    print(f"{name}: limit {mib} MiB, peak {live.peak / MIB:.2f} MiB")
    assert live.peak <= 1.25 * mib * MIB


def flat(result: object) -> list[Tensor]:
    """All tensors and numbers of a result."""
    if isinstance(result, Tensor):
        return [result.double()]
    if isinstance(result, float | int | bool):
        return [torch.tensor(float(result), dtype=torch.float64, device="cpu")]
    if isinstance(result, Mapping):
        return [x for value in result.values() for x in flat(value)]
    if isinstance(result, tuple | list):
        return [x for value in result for x in flat(value)]
    return [x for value in vars(result).values() for x in flat(value)] if hasattr(result, "__dict__") else []


@pytest.mark.parametrize("name", list(calls(Setting.of(2, 50, 4, 12))[0]))
def test_no_tensor_is_made_on_the_default_device(name: str) -> None:
    """What is made goes to the model's device or, by name, to the CPU; anything else would be "meta" here."""
    functions, _ = calls(Setting.of(3, 100, 6, 20), circuits=3)
    expected = flat(functions[name](64.0))
    with torch.device("meta"):
        found = flat(functions[name](64.0))
    assert expected and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", list(calls(Setting.of(2, 50, 4, 12))[0]))
def test_a_gpu_gives_what_the_cpu_gives(name: str) -> None:
    expected = flat(calls(Setting.of(3, 100, 6, 20), circuits=3)[0][name](64.0))
    found = flat(calls(Setting.of(3, 100, 6, 20, "cuda"), circuits=3)[0][name](64.0))
    error = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    print(f"{name}: largest difference {error:.1e}")
    assert all(x.device.type == "cpu" for x in found) and error <= 1e-3
