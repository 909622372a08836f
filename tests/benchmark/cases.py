"""What is measured: models with random weights, prompts, and the four hops of the paper."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_utils import PreTrainedModel

from stages.circuits.circuit import LOGITS, Component
from stages.circuits.pairs import AlignedPairs
from stages.circuits.path_patching import Receivers, TokenMeasure
from stages.pipeline.checkpoints import load_model, load_tokenizer
from stages.pipeline.packaged_model import packaged_model
from stages.tasks.old.boxes import Boxes
from tests.benchmark.boxes import BOXES, box_prompts

CLAUSE = 7  # tokens of a clause; the first label is at token 6, the query label is the third token from the end

# Layers of the receivers in the published Llama-7B scores (32 layers): the strongest 20 / 5 / 10 heads of one hop
# receive in the next, as in the paper.
PUBLISHED_LAYERS = 32
PUBLISHED = {
    "value_fetcher": (11, 12, 13, 14, 15, 15, 16, 17, 17, 18, 18, 19, 20, 21, 21, 21, 23, 24, 29, 30),
    "pos_transmitter": (11, 12, 13, 14, 19),
    "pos_detector": (1, 7, 9, 9, 9, 10, 11, 11, 13, 13),
}


@dataclass(frozen=True)
class Case:
    """A model's shape with what runs on it.

    Attributes:
        name: said in the table.
        kind: "llama" or "qwen2" (biases of q, k, v).
        examples: prompts for both sides.
        timed_heads: heads of each layer that the naive side is timed with; None: all. Every sender costs it two
            whole passes, so its seconds are scaled to all senders.
        repetitions: both sides run this often, in turn.
        memory_mib: what our side is told to stay within.
        checked_layers: depth of the float64 comparison, at full width.
        checked_senders: how many senders it compares, spread over all; None: all.
        real: the weights and the tokenizer of the packaged model, with the paper's prompts as text; else random
            weights and random tokens.
    """

    name: str
    kind: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    examples: int
    timed_heads: int | None
    repetitions: int
    memory_mib: float
    checked_layers: int
    checked_senders: int | None
    tokens: int = 54
    receivers: str = "published"  # or "spread": ten heads over all layers, the hardest case
    real: bool = False

    @property
    def senders(self) -> int:
        return self.layers * self.heads

    def timed_senders(self) -> list[tuple[int, int]]:
        """The senders that the naive side runs, in every layer, heads in turn."""
        each = self.heads if self.timed_heads is None else self.timed_heads
        return [(layer, (layer + head) % self.heads) for layer in range(self.layers) for head in range(each)]

    def quick(self) -> "Case":
        """The same in tiny, for tests."""
        return replace(
            self,
            layers=3,
            width=32,
            heads=4,
            kv_heads=min(self.kv_heads, 2),
            mlp=48,
            vocabulary=40,
            examples=3,
            timed_heads=None if self.timed_heads is None else 1,
            repetitions=2,
            memory_mib=64.0,
            checked_layers=3,
            checked_senders=None,
            real=False,
        )


CASES = {
    "base": Case(
        name="6 layers, width 64 (the pipeline's base)",
        kind="llama",
        layers=6,
        width=64,
        heads=8,
        kv_heads=8,
        mlp=256,
        vocabulary=160,
        examples=28,
        timed_heads=None,
        repetitions=5,
        memory_mib=512.0,
        checked_layers=6,
        checked_senders=None,
    ),
    "medium": Case(
        name="12 layers, width 512",
        kind="llama",
        layers=12,
        width=512,
        heads=8,
        kv_heads=8,
        mlp=1408,
        vocabulary=8192,
        examples=4,
        timed_heads=None,
        repetitions=2,
        memory_mib=512.0,
        checked_layers=12,
        checked_senders=12,
    ),
    "qwen": Case(
        name="24 layers, width 896 (Qwen2.5-0.5B shape)",
        kind="qwen2",
        layers=24,
        width=896,
        heads=14,
        kv_heads=2,
        mlp=4864,
        vocabulary=151936,
        examples=2,
        timed_heads=1,
        repetitions=2,
        memory_mib=512.0,
        checked_layers=8,
        checked_senders=8,
    ),
    "smollm2": Case(
        name="SmolLM2-135M-Instruct (Q4_1), the paper's prompts",
        kind="llama",
        layers=30,
        width=576,
        heads=9,
        kv_heads=3,
        mlp=1536,
        vocabulary=49152,
        examples=4,
        timed_heads=1,
        repetitions=1,
        memory_mib=512.0,
        checked_layers=8,
        checked_senders=8,
        tokens=53,
        real=True,
    ),
    "llama7b": Case(
        name="32 layers, width 4096 (Llama-7B shape)",
        kind="llama",
        layers=32,
        width=4096,
        heads=32,
        kv_heads=32,
        mlp=11008,
        vocabulary=32000,
        examples=300,
        timed_heads=1,
        repetitions=1,
        memory_mib=60000.0,
        checked_layers=2,
        checked_senders=2,
    ),
}
ON_TWO_CORES = ("base", "medium", "qwen", "smollm2")


def build_model(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> PreTrainedModel:
    """The case's model: real, or with random weights, norms and biases."""
    if case.real:
        model: Any = load_model(packaged_model())
        return model.to(device, dtype).requires_grad_(False)
    config_class: Any = Qwen2Config if case.kind == "qwen2" else LlamaConfig
    model_class: Any = Qwen2ForCausalLM if case.kind == "qwen2" else LlamaForCausalLM
    config = config_class(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        intermediate_size=case.mlp,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        max_position_embeddings=256,
        tie_word_embeddings=case.kind == "qwen2",
        initializer_range=0.06 if case.width >= 512 else 0.15,
    )
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = model_class(config)
    finally:
        torch.set_default_dtype(default)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def exact_norms(model: PreTrainedModel) -> PreTrainedModel:
    """Replace the norms of Hugging Face, which round to float32, for a comparison in float64."""
    decoder: Any = model.model
    for parent in [decoder, *decoder.layers]:
        for name, child in list(parent.named_children()):
            if name.endswith("norm"):
                norm = nn.RMSNorm(child.weight.shape[0], child.variance_epsilon, dtype=child.weight.dtype)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return model


def build_pairs(case: Case, examples: int | None = None) -> AlignedPairs:
    """Random tokens, or text, with the positions of the paper's prompts; the queried clauses are spread evenly."""
    n = case.examples if examples is None else examples
    if case.real:
        return _text(n)[0]
    generator = torch.Generator().manual_seed(1)
    clean, corrupt = torch.randint(case.vocabulary, (2, n, case.tokens), generator=generator)
    clauses = (torch.arange(n) * 2 + 1) * BOXES // (2 * n)
    labels = 6 + CLAUSE * clauses
    fixed = {"last": torch.full((n,), case.tokens - 1), "query_label": torch.full((n,), case.tokens - 3)}
    return AlignedPairs(
        clean,
        corrupt,
        {**fixed, "earlier_label": labels},
        {**fixed, "earlier_label": 6 + CLAUSE * ((clauses + 3) % BOXES)},
    )


def build_measure(case: Case, examples: int | None = None) -> TokenMeasure:
    """The logit of one token (of text: the answer) minus the mean of six others, other tokens for each example."""
    n = case.examples if examples is None else examples
    generator = torch.Generator().manual_seed(2)
    tokens: Int[Tensor, "n 7"] = torch.randint(case.vocabulary, (n, BOXES), generator=generator)
    if case.real:
        tokens = _text(n)[1]
    return TokenMeasure(tokens, lambda logits: logits[..., 0] - logits[..., 1:].mean(-1))


@cache
def _text(n: int) -> tuple[AlignedPairs, Int[Tensor, "n 7"]]:
    return box_prompts(load_tokenizer(packaged_model()), n)


def hops(case: Case) -> list[tuple[str, str, Receivers]]:
    """(name, sender position, receivers) of the paper's hops."""
    found = []
    for name, position, receiver, component in Boxes.paper_hops:
        if component is None or receiver == LOGITS:
            found.append((name, position, Receivers()))
            continue
        heads: list[tuple[int, int]] = []
        for number, layer in enumerate(_receiving_layers(case, receiver)):
            free = [head for head in range(case.heads) if (layer, (head + number) % case.heads) not in heads]
            if free:
                heads.append((layer, (free[0] + number) % case.heads))
        found.append((name, position, Receivers(Component(component), tuple(heads))))
    return found


def _receiving_layers(case: Case, group: str) -> list[int]:
    if case.receivers == "spread":
        return [number * (case.layers - 1) // 9 for number in range(10)]
    return [layer * case.layers // PUBLISHED_LAYERS for layer in PUBLISHED[group]]
