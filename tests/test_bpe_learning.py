"""Fine-tuning with a byte-pair tokenizer whose padding is its end of text, which also starts every prompt.

Three habits of real tokenizers can change what is learned without a word: padding that equals the end of text hides a
real end of text from the loss; a tokenizer adds special tokens in one place and not in another; and an answer that is
the end of text itself looks like padding. Here all three hold at once, and what each trainer feeds its model is
compared with the ids that were made once.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stages.learning import adapters, reinforcement, supervised
from stages.learning.arms import dr_grpo, sft_gold
from stages.learning.last_layer import last_layer_at_the_end
from stages.learning.probes import Probe, last_log_probs
from stages.learning.rewards import validity
from stages.learning.run import Recorder, Run
from stages.learning.schedule import checkpoint_steps, prompt_order
from stages.tasks.examples import Examples, Prompts
from tests.plain_loop import of_last_token, train_plainly
from tests.test_learning import SECTION, TRAINING, largest_difference, new_folder, section_with

TEXTS = [f"When {a} and {b} went to the {place}, {b} gave a drink to" for a, b, place in (
    ("Mary", "John", "store"), ("Anna", "Paul", "park"), ("Tom", "Kate", "school"), ("Lisa", "Mark", "garden"),
    ("Paul", "Mary", "house"), ("Kate", "Anna", "store"), ("Mark", "Tom", "park"), ("John", "Lisa", "school"),
)]  # fmt: skip
ANSWERS = [text.split()[1] for text in TEXTS]
END = "<|endoftext|>"


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Pad = end = beginning of text; the beginning is added to every text unless one asks that it be not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=END, eos_token=END, bos_token=END)


TOKENIZER = bpe_tokenizer()
EOS = 0


def bpe_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, pad_token_id=EOS, bos_token_id=EOS, eos_token_id=EOS,
        initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation("sdpa")
    return model


def model_that_ends(logit: float) -> LlamaForCausalLM:
    """It gives the end of text this logit after every prompt."""
    model: Any = bpe_model()
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        states = model.model(input_ids=bpe_prompts().input_ids).last_hidden_state[:, -1]
        model.lm_head.weight[EOS] = torch.linalg.lstsq(states, torch.full((len(states), 1), logit)).solution[:, 0]
    return model


def bpe_prompts() -> Prompts:
    """Prompts that start with the end of text; its answer is a name, or the end of text for every third."""
    ids = TOKENIZER(TEXTS)["input_ids"]
    lengths = {len(row) for row in ids}
    assert len(lengths) == 1, "the texts are of equal length in tokens"
    inputs = torch.tensor(ids)
    assert (inputs[:, 0] == EOS).all() and not (inputs[:, 1:] == EOS).any()
    names = [TOKENIZER(f" {answer}", add_special_tokens=False)["input_ids"] for answer in ANSWERS]
    assert all(len(name) == 1 for name in names)
    answers = torch.tensor(names)[:, 0]
    answers[::3] = EOS
    valid = torch.stack([answers, answers.roll(1)], 1)
    valid[:, 1] = torch.where(valid[:, 1] == valid[:, 0], -1, valid[:, 1])
    return Prompts(inputs, valid, answers, inputs[:, [2, 4]])


def bpe_run(arm: str, model: LlamaForCausalLM | None = None) -> Run:
    base, prompts = bpe_model() if model is None else model, bpe_prompts()
    n, length = prompts.input_ids.shape
    last = {"last": torch.full((n,), length - 1)}
    ids = prompts.input_ids
    old = Examples(ids, prompts.canonical, ids[:, [2, 4]], last, {"last": last["last"][:, None]}, ids.flip(0), last)
    training = replace(TRAINING, prompts_per_step=4)
    probe, steps = Probe.of(base, old, prompts), checkpoint_steps(training)
    recorder = Recorder(base, probe, steps, lambda step, row: None, new_folder())
    order = prompt_order(n, training, seed=5)
    return Run(arm, 5, 1e-3, training, SECTION, base, TOKENIZER, prompts, prompts, order, recorder)


def watch(run: Run) -> list[dict[str, torch.Tensor]]:
    """What the model is called with, in training as in probes."""
    seen: list[dict[str, torch.Tensor]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append({name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)})

    run.model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def test_the_tokenizer_is_as_awkward_as_real_ones() -> None:
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id == TOKENIZER.bos_token_id == EOS
    text = TEXTS[0]
    assert TOKENIZER(text)["input_ids"] == [EOS, *TOKENIZER(text, add_special_tokens=False)["input_ids"]]
    assert (bpe_prompts().canonical == EOS).any() and (bpe_prompts().canonical != EOS).any()


def test_supervised_labels_are_the_answer_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    run = bpe_run("sft_gold")
    seen: list[dict[str, torch.Tensor]] = []
    loss = supervised.SFTTrainer.compute_loss

    def note(self: Any, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        seen.append({name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        return loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(supervised.SFTTrainer, "compute_loss", note)
    fed = watch(run)
    sft_gold.train(run)
    assert len(seen) == TRAINING.steps
    for rows, inputs in zip(torch.from_numpy(run.order), seen, strict=True):
        ids, answers = run.train.input_ids[rows], run.train.canonical[rows]
        assert torch.equal(inputs["input_ids"], torch.cat([ids, answers[:, None]], 1))
        assert (inputs["labels"][:, :-1] == -100).all() and torch.equal(inputs["labels"][:, -1], answers)
        assert "attention_mask" not in inputs or bool(inputs["attention_mask"].all()), "an end of text is no padding"
    for inputs in fed:
        assert "attention_mask" not in inputs or bool(inputs["attention_mask"].all())
    oracle = train_plainly(
        bpe_model(), run, of_last_token(run, lambda logp, rows: -logp.gather(1, run.train.canonical[rows, None]).mean())
    )
    error, moved = largest_difference(run.model, oracle), largest_difference(run.model, bpe_model())
    print(f"maximum error {error:.1e}, largest change {moved:.1e}")
    assert error < 1e-6 < 1e-3 < moved


@pytest.mark.parametrize("baseline", [True, False])
def test_reinforcement_learns_from_ends_of_text_as_from_any_answer(baseline: bool) -> None:
    """Half of the vocabulary is right, the end of text among it, which is drawn often."""
    run = bpe_run("dr_grpo", model_that_ends(5.0))
    right = torch.arange(0, len(TOKENIZER), 2).expand(len(TEXTS), -1)
    generator = run.draw("samples")
    fed = watch(run)
    reinforcement.fit(run, validity(right), baseline)
    prompts = {tuple(row) for row in run.train.input_ids.tolist()}
    for inputs in fed:  # sampling and loss share a pass; probes see the same prompts
        assert {tuple(row) for row in inputs["input_ids"].tolist()} <= prompts
        assert "attention_mask" not in inputs or bool(inputs["attention_mask"].all())
    drawn: list[torch.Tensor] = []

    def loss(logp: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        draws = torch.multinomial(logp.detach().exp().repeat_interleave(4, 0), 1, generator=generator).view(-1, 4)
        drawn.append(draws)
        reward = (draws[:, :, None] == right[rows][:, None, :]).any(-1).float()
        advantage = reward - reward.mean(1, keepdim=True) * baseline
        return -(advantage * logp.gather(1, draws)).mean()

    start = model_that_ends(5.0)
    moved = largest_difference(run.model, start)
    error = largest_difference(run.model, train_plainly(start, run, of_last_token(run, loss)))
    ends = int((torch.stack(drawn) == EOS).sum())
    print(f"maximum error {error:.1e}, largest change {moved:.1e}, {ends} ends of text drawn")
    assert error < 1e-5 < 1e-3 < moved and ends > 5


def test_an_end_of_text_that_is_drawn_is_rewarded_and_not_masked() -> None:
    """The base is made to answer with it nearly always, so that the loss is about it alone."""
    run = replace(bpe_run("reinforce", model_that_ends(6.0)), section=section_with(samples_per_prompt=8))
    before = last_log_probs(run.model, run.train.input_ids)[:, EOS]
    end_is_right = torch.full_like(run.train.valid, EOS)
    reinforcement.fit(run, validity(end_is_right), baseline=False)
    after = last_log_probs(run.model, run.train.input_ids)[:, EOS]
    print(f"p {before.exp().mean():.3f} -> {after.exp().mean():.3f}")
    assert bool((after > before).all())


@pytest.mark.parametrize("arm", [sft_gold, dr_grpo], ids=["sft_gold", "dr_grpo"])
def test_every_part_of_a_run_sees_the_same_ids(arm: SimpleNamespace) -> None:
    """Training, sampling and probes, also with adapters and with the last layer at the end alone."""
    model = bpe_model()
    lora: Any = SimpleNamespace(rank=2, alpha=4, modules=("q_proj",))
    run = bpe_run(arm.__name__.rpartition(".")[2], model)
    adapted = adapters.with_adapters(model, lora, seed=0)
    object.__setattr__(run.recorder, "_model", adapted)
    run = replace(run, model=adapted)
    fed = watch(run)
    with last_layer_at_the_end(model, tokens=2):
        arm.train(run)
    prompts, length = {tuple(row) for row in run.train.input_ids.tolist()}, run.train.input_ids.shape[1]
    assert len(fed) > TRAINING.steps
    for inputs in fed:
        assert {tuple(row[:length]) for row in inputs["input_ids"].tolist()} <= prompts
    assert run.tokenizer.pad_token_id == run.tokenizer.eos_token_id == model.config.eos_token_id == EOS
