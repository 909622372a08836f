"""A model of Llama's architecture with random weights, and params of preset `llama7b` with sizes for it."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stages.pipeline import stage
from stages.pipeline.overrides import compose
from stages.pipeline.params import load_params
from tests.conftest import REPOSITORY

PRESET = REPOSITORY / "stages/presets/llama7b.yaml"
SIZES = [
    "synthesize.boxes=4",
    "synthesize.old={selection: 8, discovery: 12, pruning: 6, evaluation: 8, relearning: 4, means: 8}",
    "synthesize.new={train: 16, selection: 8, evaluation: 8}",
    "synthesize.desiderata={train: 8, selection: 6, test: 6}",
    "source.model=theirs",
    "source.revision=null",
    "discover.examples=12",
    "discover.identifiable_accuracy=0.0",  # random weights answer nothing
    "discover.paper_top={receivers: [4, 2, 3, 2], heads: [8, 3, 5, 2]}",
    "evaluate.random_subsets=1",
    "evaluate.greedy_steps=1",
    "evaluate.greedy_examples=4",
    "drift.n_examples=8",
    "drift.relearning.examples=4",
    "drift.relearning.probe_examples=8",
    "finetune.common.probe_examples=8",
    "dcm.steps=2",
    "dcm.batch=4",
    "contrast.resamples=200",
    "report.dpi=60",
]


def small_llama(tokens: int) -> LlamaForCausalLM:
    """Llama-7B with an eighth of the layers and heads, and heads of 8: MLP / width = 2.69, as many keys as queries."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokens, hidden_size=32, intermediate_size=86, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, initializer_range=0.15, rms_norm_eps=1e-6, max_position_embeddings=2048,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prepare(patch: pytest.MonkeyPatch, changes: list[str]) -> None:
    compose(REPOSITORY / "params.yaml", Path("params.yaml"), PRESET, changes)
    patch.setattr(stage, "_cache", {"params": load_params(Path("params.yaml"))})
