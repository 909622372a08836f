"""Fine-tuning arms: schedules, trainers against plain loops and the plain TRL trainer, matching, cells."""

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from stages import finetune, match
from stages.learning import answers, probes, reinforcement, supervised
from stages.learning.arms import (
    dr_grpo,
    dr_grpo_kl,
    iterative_sft,
    joint,
    noise,
    random_reward,
    reinforce,
    rloo,
    self_sft,
    sft_accepted,
    sft_far,
    sft_gold,
    sft_oracle,
    sft_replay,
)
from stages.learning.checkpoints import checkpoint_file
from stages.learning.last_layer import last_layer_at_the_end
from stages.learning.matching import Matching, Pick, moved_as_far, pick, pick_as_far, read_curves
from stages.learning.policy_gradient import DrGRPO
from stages.learning.probes import Probe, last_log_probs, last_logits
from stages.learning.rewards import validity
from stages.learning.run import STEP_COLUMNS, Recorder, Run
from stages.learning.schedule import checkpoint_steps, optimiser, prompt_order
from stages.learning.settings import NO_RATE, Training
from stages.learning.trainers import common_arguments, refuse_dropout
from stages.pipeline.checkpoints import load_model, save_model
from stages.pipeline.params import load_params
from stages.pipeline.stage import Cell, Invalid
from stages.tasks.examples import Examples, Prompts, write_examples, write_prompts
from tests.conftest import REPOSITORY
from tests.plain_loop import of_last_token, train_plainly

torch.set_num_threads(1)

WORDS = [f"w{i}" for i in range(40)]
VOCAB = 43  # with <pad>, <bos>, <eos>
LENGTH = 12
TRAINING = Training(
    steps=4,
    prompts_per_step=6,
    dense_until=2,
    dense_every=1,
    sparse_checkpoints=1,
    probe_examples=16,
    betas=(0.9, 0.999),
    epsilon=1e-4,  # with 1e-8 AdamW would turn the rounding errors of vanishing gradients into full steps
    weight_decay=0.0,
    clip=1.0,
    warmup_steps=0,
    seed=0,
)
RATES = (1e-3, 3e-3)
SECTION = SimpleNamespace(
    samples_per_prompt=4, temperature=1.0, loss_type="dr_grpo", scale_rewards="none", num_iterations=1, epsilon=0.2,
    beta=0.0,
)  # fmt: skip
RUNS = tempfile.TemporaryDirectory(prefix="runs-")  # gone when the tests end


def section_with(**changed: Any) -> SimpleNamespace:
    """The settings of an arm, some of them changed or added."""
    return SimpleNamespace(**vars(SECTION) | changed)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def tiny_model(attention_dropout: float = 0.0, vocab_size: int = VOCAB) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.3, tie_word_embeddings=False,
        attention_dropout=attention_dropout,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation("sdpa")
    return model


def tiny_prompts(n: int = 40) -> Prompts:
    draw = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(40, generator=draw)[:LENGTH] + 3 for _ in range(n)])
    valid = torch.cat([ids[:, [2, 5]], torch.full((n, 1), -1)], 1)
    return Prompts(input_ids=ids, valid=valid, canonical=ids[:, 5], objects=ids[:, [2, 5, 8]])


def tiny_examples(n: int = 24) -> Examples:
    ids = tiny_prompts(n).input_ids
    positions = {"last": torch.full((n,), LENGTH - 1)}
    return Examples(
        input_ids=ids, answer=ids[:, 2], others=ids[:, [5, 8]],
        positions=positions, every_clause={"last": positions["last"][:, None]},
        corrupt_ids=ids.flip(0), corrupt_positions=positions,
    )  # fmt: skip


def new_folder() -> Path:
    """For the checkpoints of one run."""
    return Path(tempfile.mkdtemp(dir=RUNS.name))


def tiny_run(
    arm: str,
    rate: float = 1e-3,
    section: object = SECTION,
    training: Training = TRAINING,
    folder: Path | None = None,
) -> Run:
    base, prompts = tiny_model(), tiny_prompts()
    probe, folder = Probe.of(base, tiny_examples(), prompts), folder or new_folder()
    recorder = Recorder(base, probe, checkpoint_steps(training), lambda step, row: None, folder)
    order = prompt_order(len(prompts), training, seed=5)
    return Run(arm, 5, rate, training, section, base, tiny_tokenizer(), prompts, tiny_prompts(30), order, recorder)


def checkpoint(run: Run, step: int) -> dict[str, torch.Tensor]:
    """What is written of a run after a step."""
    return load_file(checkpoint_file(run.recorder.folder, step))


def largest_difference(a: torch.nn.Module, b: torch.nn.Module) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a.parameters(), b.parameters(), strict=True))


def plain_loop(run: Run, loss_of_step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> LlamaForCausalLM:
    return train_plainly(tiny_model(), run, of_last_token(run, loss_of_step))


# --- schedule


def test_checkpoints_are_dense_first_then_log_spaced_and_end_at_the_last_step() -> None:
    training = replace(TRAINING, steps=160, dense_until=40, dense_every=5, sparse_checkpoints=4)
    assert checkpoint_steps(training) == (5, 10, 15, 20, 25, 30, 35, 40, 57, 80, 113, 160)
    short = replace(TRAINING, steps=3, dense_until=40, dense_every=5, sparse_checkpoints=4)
    assert checkpoint_steps(short) == (3,)


def test_every_row_is_used_once_before_any_is_used_again() -> None:
    order = prompt_order(8, TRAINING, seed=0)
    assert order.shape == (4, 6)
    assert sorted(order.flatten()[:8]) == list(range(8)) == sorted(order.flatten()[8:16])
    assert not np.array_equal(order, prompt_order(8, TRAINING, seed=1))


def test_warm_up_rises_to_a_constant_rate_and_its_first_step_moves() -> None:
    training = replace(TRAINING, warmup_steps=3)
    adamw, schedule = optimiser(tiny_model(), training, 0.4)
    rates = []
    for _ in range(6):
        rates.append(adamw.param_groups[0]["lr"])
        adamw.step()
        schedule.step()
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


# --- arms


ARMS_THAT_TRAIN = [
    sft_gold, sft_far, sft_oracle, self_sft, iterative_sft, reinforce, dr_grpo, rloo, random_reward, sft_replay, joint,
]  # fmt: skip


@pytest.mark.parametrize("arm", ARMS_THAT_TRAIN)
def test_all_arms_see_the_same_prompts_in_the_same_order(arm) -> None:  # type: ignore[no-untyped-def]
    section = section_with(fraction=0.2, every=2, probability=0.5)
    run = tiny_run(arm.__name__.rpartition(".")[2], section=section)
    seen: list[torch.Tensor] = []

    def note(module, args) -> None:  # type: ignore[no-untyped-def]
        if run.model.training:
            seen.append(args[0][:, :LENGTH])

    run.model.get_input_embeddings().register_forward_pre_hook(note)
    arm.train(run)
    assert len(seen) == TRAINING.steps  # and so one forward pass a step, over each prompt once
    for rows, ids in zip(run.order, seen, strict=True):
        asked = {tuple(prompt) for prompt in run.train.input_ids[rows].tolist()}
        extra = 1 if arm is sft_replay else len(rows) if arm is joint else 0
        assert len(ids) == len(rows) + extra
        assert asked <= {tuple(prompt) for prompt in ids.tolist()}


def test_supervised_equals_a_plain_loop() -> None:
    run = tiny_run("sft_gold")
    sft_gold.train(run)
    oracle = plain_loop(run, lambda logp, rows: -logp.gather(1, run.train.canonical[rows, None]).mean())
    error = largest_difference(run.model, oracle)
    moved = largest_difference(run.model, tiny_model())
    print(f"maximum error {error:.1e}, largest change {moved:.1e}")
    assert error < 1e-6 < 1e-3 < moved


@pytest.mark.parametrize(
    ("baseline", "scale_rewards"), [(True, "none"), (True, "group"), (True, "batch"), (False, "none")]
)
def test_reinforcement_equals_a_plain_loop(baseline: bool, scale_rewards: str) -> None:
    run = tiny_run("grpo", section=section_with(scale_rewards=scale_rewards))
    generator = run.draw("samples")
    reinforcement.fit(run, validity(run.train.valid), baseline)

    def loss(logp: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        draws = torch.multinomial(logp.detach().exp().repeat_interleave(4, 0), 1, generator=generator).view(-1, 4)
        reward = (draws[:, :, None] == run.train.valid[rows][:, None, :]).any(-1).float()
        advantage = reward - reward.mean(1, keepdim=True) * baseline
        if scale_rewards != "none":
            advantage /= (reward.std() if scale_rewards == "batch" else reward.std(1, keepdim=True)) + 1e-4
        return -(advantage * logp.gather(1, draws)).mean()

    error = largest_difference(run.model, plain_loop(run, loss))
    moved = largest_difference(run.model, tiny_model())
    print(f"maximum error {error:.1e}, largest change {moved:.1e}")
    assert error < 1e-6 < 1e-3 < moved


def test_a_stream_of_draws_is_shared_by_those_that_name_it() -> None:
    """GRPO with and without the division see the same samples at first; all others draw by their own names."""
    params = load_params(REPOSITORY / "params.yaml").finetune
    draws = {
        arm: torch.rand(3, generator=tiny_run(arm, section=params.of(arm)).draw("samples")).tolist()
        for arm in ("grpo", "dr_grpo", "dr_grpo_kl", "reinforce", "rloo")
    }
    assert draws["grpo"] == draws["dr_grpo"] == torch.rand(3, generator=tiny_run("grpo").draw("samples")).tolist()
    assert len({tuple(drawn) for drawn in draws.values()}) == 4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_pass_trainer_equals_the_plain_trl_trainer_on_the_same_samples(temperature: float, tmp_path: Path) -> None:
    run, plain = (tiny_run("dr_grpo", section=section_with(temperature=temperature)) for _ in range(2))
    reward = validity(run.train.valid)
    samples: list[dict] = []
    original = reinforcement._roll_out
    try:
        reinforcement._roll_out = lambda prompts, trainer: samples.append(original(prompts, trainer)) or samples[-1]
        reinforcement.fit(run, reward)
    finally:
        reinforcement._roll_out = original
    replayed = iter(samples)
    arguments = common_arguments(plain, str(tmp_path)) | reinforcement.grpo_arguments(plain.section, 6)
    GRPOTrainer(
        model=plain.model,
        reward_funcs=reward,
        args=GRPOConfig(**arguments),
        train_dataset=Dataset.from_dict({"prompt": [str(row) for row in plain.order.flatten()]}),
        processing_class=plain.tokenizer,
        optimizers=optimiser(plain.model, plain.training, plain.learning_rate),
        rollout_func=lambda prompts, trainer: next(replayed),
    ).train()
    error, moved = largest_difference(run.model, plain.model), largest_difference(run.model, tiny_model())
    print(f"maximum error {error:.1e}, largest change {moved:.1e}")
    assert error < 1e-6 < 1e-3 < moved


def test_self_sft_targets_are_valid_fixed_and_drawn_from_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    monkeypatch.setattr(supervised, "fit", lambda run, answers: seen.__setitem__(run.learning_rate, answers))
    for rate in RATES:
        run = tiny_run("self_sft", rate)
        self_sft.train(run)
    first, second = seen.values()
    assert torch.equal(first, second)
    used = np.unique(run.order)
    assert (first[used, None] == run.train.valid[used]).any(-1).all()
    assert len({int(run.train.valid[row].tolist().index(first[row])) for row in used}) == 2  # both answers occur


def test_sft_far_takes_the_valid_answer_that_the_base_finds_least_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(supervised, "fit", lambda run, answers: seen.append(answers))
    run = tiny_run("sft_far")
    sft_far.train(run)
    log_probs = last_log_probs(tiny_model(), run.train.input_ids)
    for row in np.unique(run.order):
        valid = [int(token) for token in run.train.valid[row] if token >= 0]
        assert int(seen[0][row]) == min(valid, key=lambda token: float(log_probs[row, token]))


def test_sft_oracle_equals_a_plain_loop_on_the_base_restricted_to_valid_answers() -> None:
    run = tiny_run("sft_oracle")
    sft_oracle.train(run)
    base = last_log_probs(tiny_model(), run.train.input_ids).exp()
    targets = torch.zeros_like(base)
    for row, valid in enumerate(run.train.valid.tolist()):
        for token in valid:
            if token >= 0:
                targets[row, token] = base[row, token]
    targets = (targets / targets.sum(1, keepdim=True)).float()
    oracle = plain_loop(run, lambda logp, rows: -(targets[rows] * logp).sum(1).mean())
    error = largest_difference(run.model, oracle)
    moved = largest_difference(run.model, tiny_model())
    print(f"maximum error {error:.1e}, largest change {moved:.1e}")
    assert error < 1e-6 < 1e-3 < moved


def test_restriction_is_to_the_valid_answers_of_the_rows_that_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [2.0, 0.0, 1.0]])
    monkeypatch.setattr(answers, "last_logits", lambda model, ids: logits[: len(ids)])
    run = tiny_run("sft_oracle")
    valid = torch.tensor([[2, -1], [0, 2], [1, -1]])
    train = replace(run.train.select(slice(0, 3)), valid=valid, canonical=valid[:, 0].clamp(min=0))
    run = replace(run, train=train, order=np.array([[0, 1]]))
    found = answers.shares_of_valid(run, answers.used_rows(run))
    assert found[0].tolist() == [1, 0] and found[2].tolist() == [0, 0]
    assert found[1].tolist() == pytest.approx([math.exp(2) / (math.exp(2) + math.exp(1)), 1 / (1 + math.exp(1))])


def test_iterative_sft_with_one_draw_learns_fixed_valid_answers() -> None:
    section = SimpleNamespace(temperature=1.0, every=TRAINING.steps)
    run = tiny_run("iterative_sft", section=section)
    generator = run.draw("answers")
    iterative_sft.train(run)
    rows = torch.from_numpy(np.unique(run.order))
    valid = run.train.valid[rows]
    logits = last_log_probs(tiny_model(), run.train.input_ids[rows]).float().gather(1, valid.clamp(min=0))
    choice = torch.multinomial(logits.masked_fill(valid < 0, -torch.inf).softmax(-1), 1, generator=generator)
    answers = torch.full((len(run.train.input_ids),), -1)
    answers[rows] = valid.gather(1, choice)[:, 0]
    oracle = plain_loop(run, lambda logp, rows: -logp.gather(1, answers[rows, None]).mean())
    error = largest_difference(run.model, oracle)
    print(f"maximum error {error:.1e}")
    assert error < 1e-6
    again = tiny_run("iterative_sft", section=SimpleNamespace(temperature=1.0, every=1))
    iterative_sft.train(again)
    assert largest_difference(again.model, run.model) > 1e-4, "answers drawn anew are others"


def test_accepted_answers_are_those_that_the_policy_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written down while `dr_grpo` learns, as in its own run; the model learns them from where it began, by their mean
    in each step. Most steps of the tiny model have none, so every token is valid at some prompts."""
    train = tiny_prompts()
    valid = torch.full((len(train), VOCAB), -1)
    valid[:, :3] = train.valid
    valid[::2] = torch.arange(VOCAB)
    train = replace(train, valid=valid)
    section = load_params(REPOSITORY / "params.yaml").finetune.of("sft_accepted")
    unclipped = replace(TRAINING, clip=1e9, epsilon=1.0)  # so that the size of a gradient matters
    run, policy = (
        replace(tiny_run("sft_accepted", 1.0, of, unclipped), train=train) for of in (section, section_with())
    )
    drawn: list[tuple[list[int], list[int]]] = []

    def noted(prompts: list[str], completion_ids: list[list[int]], **rest: object) -> list[float | None]:
        drawn.append(([int(row) for row in prompts], [ids[0] for ids in completion_ids]))
        return validity(train.valid)(prompts, completion_ids, **rest)

    settings = DrGRPO.model_validate(vars(section_with(samples_per_prompt=8)))
    reinforcement.fit(replace(policy, arm="grpo", section=settings), noted)  # its stream
    sft_accepted.train(run)

    taken: list[torch.Tensor] = []
    step = iter(drawn)

    def loss(logp: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        asked, answers = next(step)
        at = {int(row): place for place, row in enumerate(rows)}
        accepted = [(at[row], said) for row, said in zip(asked, answers, strict=True) if said in train.valid[row]]
        taken.append(torch.tensor(len(accepted)))
        places, said = zip(*accepted, strict=True)
        return -logp[list(places), list(said)].mean()

    error = largest_difference(run.model, plain_loop(run, loss))
    print(f"accepted {[int(n) for n in taken]}, maximum error {error:.1e}")
    assert error < 1e-6 < 1e-3 < largest_difference(run.model, tiny_model())
    assert largest_difference(run.model, policy.model) > 1e-3
    assert len(run.recorder.steps) == TRAINING.steps and run.recorder.rows[0]["weight_norm"] == 0.0


def test_every_step_is_written_down() -> None:
    run, policy = tiny_run("sft_gold"), tiny_run("dr_grpo")
    sft_gold.train(run)
    dr_grpo.train(policy)
    for steps in (run.recorder.steps, policy.recorder.steps):
        assert [row["step"] for row in steps] == [1, 2, 3, 4]
        assert all(set(row) <= set(STEP_COLUMNS) and row["update_norm"] >= 0 for row in steps)
        assert all(math.isfinite(row["entropy"]) and row["gradient_norm"] >= 0 for row in steps)
    assert [row["gradient_norm"] for row in policy.recorder.rows[1:3]] == [
        row["gradient_norm"] for row in policy.recorder.steps[:2]
    ]
    assert all("reward" in row and row["clip_fraction"] == 0.0 for row in policy.recorder.steps)
    assert run.recorder.steps[0]["entropy"] == pytest.approx(policy.recorder.steps[0]["entropy"], rel=1e-5)
    first, start = checkpoint(run, 1), dict(tiny_model().named_parameters())
    far = math.sqrt(sum(float((weight - start[name]).double().square().sum()) for name, weight in first.items()))
    assert run.recorder.steps[0]["update_norm"] == pytest.approx(far, rel=1e-6)


def test_rloo_equals_a_plain_loop_with_the_other_samples_as_baseline() -> None:
    run = tiny_run("rloo")
    generator = run.draw("samples")
    rloo.train(run)

    def loss(logp: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        draws = torch.multinomial(logp.detach().exp().repeat_interleave(4, 0), 1, generator=generator).view(-1, 4)
        reward = (draws[:, :, None] == run.train.valid[rows][:, None, :]).any(-1).float()
        others = (reward.sum(1, keepdim=True) - reward) / 3
        return -((reward - others) * logp.gather(1, draws)).mean()

    error = largest_difference(run.model, plain_loop(run, loss))
    moved = largest_difference(run.model, tiny_model())
    print(f"maximum error {error:.1e}, largest change {moved:.1e}")
    assert error < 1e-6 < 1e-3 < moved


def test_dr_grpo_kl_equals_a_plain_loop_against_the_base_on_disk(tmp_path: Path) -> None:
    save_model(tiny_model(), tiny_tokenizer(), tmp_path / "base")
    beta = 0.5
    run = tiny_run("dr_grpo_kl", section=section_with(beta=beta))
    run.model.config._name_or_path = str(tmp_path / "base")  # as it is for a model that was loaded
    generator = run.draw("samples")
    dr_grpo_kl.train(run)
    base = last_logits(tiny_model(), run.train.input_ids).log_softmax(-1)

    def loss(logp: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        draws = torch.multinomial(logp.detach().exp().repeat_interleave(4, 0), 1, generator=generator).view(-1, 4)
        reward = (draws[:, :, None] == run.train.valid[rows][:, None, :]).any(-1).float()
        ours = logp.gather(1, draws)
        above = base[rows].gather(1, draws) - ours
        # TRL's estimate of KL(policy || base), with the factor 1 that lets its gradient see the change of the samples
        divergence = (above.exp() - above - 1) * (ours - ours.detach()).exp()
        return (beta * divergence - (reward - reward.mean(1, keepdim=True)) * ours).mean()

    error = largest_difference(run.model, plain_loop(run, loss))
    unpenalised = tiny_run("dr_grpo_kl")
    dr_grpo_kl.train(unpenalised)
    matters = largest_difference(run.model, unpenalised.model)
    print(f"maximum error {error:.1e}, the penalty changes {matters:.1e}")
    assert error < 1e-6 < 1e-4 < matters


@pytest.mark.parametrize(("arm", "extra"), [(sft_replay, 1), (joint, 6)])
def test_rehearsed_prompts_are_the_old_task_s_with_their_answers(
    monkeypatch: pytest.MonkeyPatch, arm: Any, extra: int
) -> None:
    run = tiny_run("joint", section=SimpleNamespace(fraction=0.2))
    given: list[Any] = []
    monkeypatch.setattr(supervised, "fit", lambda *arguments: given.extend(arguments))
    arm.train(run)
    _, answers, ids, old_answers = given
    assert answers is run.train.canonical
    assert ids.shape == (*old_answers.shape, LENGTH) and old_answers.shape == (len(run.order), extra)
    known = {
        tuple(row.tolist()): int(answer)
        for row, answer in zip(run.rehearsal.input_ids, run.rehearsal.canonical, strict=True)
    }
    for row, answer in zip(ids.flatten(0, 1), old_answers.flatten(), strict=True):
        assert known[tuple(row.tolist())] == answer


def test_noise_moves_every_tensor_by_its_fraction_along_one_direction() -> None:
    run = tiny_run("noise", section=SimpleNamespace(scales=[0.1, 0.2]))
    noise.train(run)
    first, second = checkpoint(run, 1), checkpoint(run, 2)
    for name, weight in tiny_model().named_parameters():
        one, two = first[name] - weight, second[name] - weight
        assert (one.norm() / weight.norm()).item() == pytest.approx(0.1, rel=1e-4)
        assert (two.norm() / weight.norm()).item() == pytest.approx(0.2, rel=1e-4)
        assert torch.cosine_similarity(one.flatten(), two.flatten(), 0).item() == pytest.approx(1.0, abs=1e-4)
    assert [row["gradient_steps"] for row in run.recorder.rows] == [0, 0, 0]


def test_recorder_writes_what_the_model_was_at_each_checkpoint() -> None:
    run = tiny_run("sft_gold")
    sft_gold.train(run)
    rows = run.recorder.rows
    assert [row["step"] for row in rows] == [0, 1, 2, 4]
    assert [row["completions"] for row in rows] == [0, 6, 12, 24]
    assert rows[0]["weight_norm"] == 0.0 and rows[0]["kl_new"] == pytest.approx(0.0, abs=1e-12)
    model = tiny_model()
    final = checkpoint(run, 4)
    model.load_state_dict(final)
    probe = Probe.of(tiny_model(), tiny_examples(), run.train)
    assert largest_difference(model, run.model) == 0.0
    assert probe.measure(model) == {key: rows[-1][key] for key in probe.measure(model)}
    assert not torch.equal(checkpoint(run, 1)["lm_head.weight"], final["lm_head.weight"])


def test_dropout_is_refused() -> None:
    with pytest.raises(Invalid, match="attention_dropout = 0.1"):
        refuse_dropout(tiny_model(attention_dropout=0.1))


# --- matching


def rows_of(*accuracies: float) -> list[dict[str, float]]:
    return [{"step": float(10 * i), "new_accuracy": a, "old_accuracy": 1.0} for i, a in enumerate(accuracies)]


def test_pick_needs_confirmation_and_never_takes_the_base() -> None:
    level = Matching("new_accuracy", 0.7)
    assert pick(rows_of(0.9, 0.5, 0.8, 0.6, 0.8, 0.9), level, confirm=1).step == 40
    assert pick(rows_of(0.9, 0.5, 0.8, 0.6, 0.8, 0.9), level, confirm=0).step == 20
    lucky_end = pick(rows_of(0.9, 0.5, 0.6, 0.6, 0.6, 0.9), level, confirm=1)
    assert (lucky_end.reached, lucky_end.step) == (False, 50)


def test_no_checkpoint_of_the_warm_up_is_picked() -> None:
    level, far = Matching("new_accuracy", 0.7), Matching("weight_norm", 2.0)
    rows = [row | {"weight_norm": row["step"] / 10} for row in rows_of(0.9, 0.8, 0.8, 0.9, 0.9, 0.6)]
    assert [pick(rows, level, confirm=1, warmup=warmup).step for warmup in (0, 20, 30)] == [10, 30, 50]
    assert not pick(rows, level, confirm=1, warmup=30).reached
    assert pick(rows, far, confirm=1, warmup=30).step == 40
    late = pick(rows, level, confirm=0, warmup=90)  # a run that ends in its warm-up
    assert (late.reached, late.step) == (False, 50)


def test_a_sham_goes_as_far_as_the_other_arm_s_pick() -> None:
    rows = [row | {"weight_norm": row["step"] / 10} for row in rows_of(*[0.1] * 6)]
    there = Pick(True, {"step": 20.0, "weight_norm": 2.5}, 1.0)
    assert (pick_as_far(rows, there).step, pick_as_far(rows, there).reached) == (30, True)
    assert pick_as_far(rows, there, warmup=30).step == 40
    assert not pick_as_far(rows, replace(there, reached=False)).reached
    assert not pick_as_far(rows, replace(there, row={"weight_norm": 9.0})).reached


def test_moved_as_far_copies_the_norm_of_each_tensor_and_not_its_direction() -> None:
    draw = np.random.default_rng(0)
    base, direction, reference = ({n: draw.normal(size=(3, 4)) for n in "ab"} for _ in range(3))
    moved = moved_as_far(base, direction, reference)
    for name in "ab":
        along, far = moved[name] - base[name], np.linalg.norm(reference[name] - base[name])
        assert np.linalg.norm(along) == pytest.approx(far)
        np.testing.assert_allclose(
            along / far, (direction[name] - base[name]) / np.linalg.norm(direction[name] - base[name])
        )


@dataclass(frozen=True)
class FakeCell(Cell):
    """A cell with given params, by dotted path."""

    values: dict[str, Any]

    def params(self, path: str) -> object:
        return self.values[path]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    save_model(tiny_model(), tiny_tokenizer(), folder / "models/base/5")
    for split in ("train", "selection", "evaluation"):
        (folder / "data/new/adjacent").mkdir(parents=True, exist_ok=True)
        write_prompts(folder / f"data/new/adjacent/{split}.parquet", tiny_prompts())
    (folder / "data/old").mkdir()
    write_prompts(folder / "data/old/train.parquet", tiny_prompts(30))
    write_examples(folder / "data/old/selection.parquet", tiny_examples())
    return folder


def test_a_cell_gives_the_weights_of_an_ordinary_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    section = SimpleNamespace(**vars(SECTION), trained=True)
    params = {"finetune.common": vars(TRAINING), "finetune.dr_grpo": section, "new_task": "adjacent"}
    finetune.main(FakeCell("finetune", {"arm": "dr_grpo", "seed": "5", "learning_rate": "1e-05"}, params))
    run = tiny_run("dr_grpo", 1e-5)
    with last_layer_at_the_end(run.model, tokens=2):  # as a cell does; another order of additions
        dr_grpo.train(run)
    names = sorted(path.name for path in run.recorder.folder.iterdir())
    assert names == ["000001.safetensors", "000002.safetensors", "000004.safetensors"]
    written = Path("models/runs/dr_grpo/5/1e-05")
    assert names == sorted(path.name for path in written.iterdir())
    for name in names:
        assert (written / name).read_bytes() == (run.recorder.folder / name).read_bytes()
    [(rate, curve)] = read_curves(Path("reports/cells/finetune/dr_grpo/5"), [1e-5]).items()
    assert rate == 1e-5 and [row["step"] for row in curve] == [0, 1, 2, 4]
    assert [row["completions"] for row in curve] == [0, 24, 48, 96]


def test_an_arm_without_a_rate_gives_the_same_at_every_one(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    params = {"finetune.common": vars(TRAINING), "finetune.noise": noise.Settings(scales=(0.1, 0.2))}
    for rate in RATES:
        cell = FakeCell("finetune", {"arm": "noise", "seed": "5", "learning_rate": str(rate)}, params)
        finetune.main(replace(cell, values=cell.values | {"new_task": "adjacent"}))
    written = [sorted(Path(f"models/runs/noise/5/{rate}").iterdir()) for rate in RATES]
    curves = [Path(f"reports/cells/finetune/noise/5/{rate}.csv").read_bytes() for rate in RATES]
    assert [[file.read_bytes() for file in files] for files in written] == 2 * [[f.read_bytes() for f in written[0]]]
    assert len(written[0]) == 2 and curves[0] == curves[1]
    assert list(read_curves(Path("reports/cells/finetune/noise/5"), RATES)) == [NO_RATE]


def invented_curve(arm: str, rate: float, written: float, run: Run) -> None:
    """Skill is invented: the tiny model learns nothing in four steps."""
    lines = ["arm,seed,learning_rate,step,old_accuracy,new_accuracy,kl_new,weight_norm,gradient_steps"]
    lines += [
        f"{arm},5,{written},{row['step']},1.0,{0.2 * i},{0.1 * i},{i},{row['step']}"
        for i, row in enumerate(run.recorder.rows)
    ]
    curve = Path(f"reports/cells/finetune/{arm}/5/{rate}.csv")
    curve.parent.mkdir(parents=True, exist_ok=True)
    curve.write_text("\n".join(lines) + "\n")


def test_match_writes_the_picked_checkpoint_and_its_noise_twin(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    Path("data/tasks.json").write_text(json.dumps({"new_tasks": {"adjacent": {"shortcuts": {"any_object": 0.286}}}}))
    rates = (1e-5, *RATES)
    for arm, module in (("sft_gold", sft_gold), ("noise", noise)):
        for rate in rates:
            folder = Path(f"models/runs/{arm}/5/{rate}")
            run = tiny_run(arm, rate, SimpleNamespace(scales=[0.1, 0.2]), folder=folder)
            module.train(run)
            invented_curve(arm, rate, 0.0 if arm == "noise" else rate, run)

    def params(**changed: Any) -> dict[str, object]:
        settings = {"level": 0.35, "learning_rate": 3e-3, "confirm": 1, "like": "sft_gold", "shams": ("noise",)}
        # kl and norm: the same checkpoint as the level, the next one (twice), and one that is not there
        settings |= {"levels": (0.3, 0.35), "kl": (0.15, 0.25), "norm": (3.0, 9.0), "steps": (2,)} | changed
        found: dict[str, object] = {"match": SimpleNamespace(**settings), "new_task": "adjacent"}
        return found | {"learning_rates": RATES, "finetune.common.warmup_steps": 0}

    for arm in ("sft_gold", "noise"):  # the curve of 1e-5 is of another time, say
        match.main(FakeCell("match", {"arm": arm, "seed": "5"}, params()))
    record = json.loads(Path("reports/cells/match/sft_gold/5.json").read_text())
    assert (record["reached"], record["step"], record["learning_rate"]) == (True, 2, 3e-3)
    entries = record["matchings"]
    assert set(entries[record["matching"]]["by_learning_rate"]) == {"0.001", "0.003"}
    as_primary = {name for name, entry in entries.items() if entry["as_primary"]}
    assert as_primary == {"accuracy_0_3", "accuracy_0_35", "kl_0_15", "steps_2"}
    assert not entries["norm_9"]["reached"] and entries["norm_9"]["by_learning_rate"]["0.003"]["furthest"] == 3.0
    for arm in ("sft_gold", "noise"):  # stored once, although two matchings pick it
        index = json.loads(Path(f"models/matched/5/{arm}/index.json").read_text())
        both = {"0.001": "0.001/000004.safetensors", "0.003": "0.003/000004.safetensors"}
        assert {index[name].get("0.003") for name in ("kl_0_25", "norm_3")} == {"0.003/000004.safetensors"}
        assert index["kl_0_25"] == both and index["accuracy_0_35"] == {"0.001": "0.001/000002.safetensors"}
        files = sorted(
            str(path.relative_to(f"models/matched/5/{arm}")) for path in Path("models/matched/5", arm).rglob("*.safe*")
        )
        assert files == ["0.001/000002.safetensors", "0.001/000004.safetensors", "0.003/000004.safetensors"]
    last, twin_of_last = (
        load_file(f"models/matched/5/{arm}/0.003/000004.safetensors") for arm in ("sft_gold", "noise")
    )
    of_run = load_file("models/runs/sft_gold/5/0.003/000004.safetensors")
    assert last.keys() == of_run.keys() and all(torch.equal(last[name], of_run[name]) for name in last)
    start = dict(tiny_model().named_parameters())
    for name, weight in last.items():
        far = (weight - start[name]).norm().item()
        assert (twin_of_last[name] - start[name]).norm().item() == pytest.approx(far, rel=1e-3)
    tuned, twin = load_model("models/sft_gold/5"), load_model("models/noise/5")
    kept = load_file("models/runs/sft_gold/5/0.003/000002.safetensors")
    base = tiny_model()
    for name, weight in tuned.named_parameters():
        assert torch.equal(weight, kept[name])
        far = (weight - dict(base.named_parameters())[name]).norm().item()
        twin_far = (dict(twin.named_parameters())[name] - dict(base.named_parameters())[name]).norm().item()
        assert twin_far == pytest.approx(far, rel=1e-3)
    twin_record = json.loads(Path("reports/cells/match/noise/5.json").read_text())
    assert twin_record["weight_norm"] == pytest.approx(record["weight_norm"], rel=1e-4)

    written = [Path(part, name) for part in ("models", "models/matched/5") for name in ("sft_gold", "noise")]
    before = {
        file: file.read_bytes()
        for folder in written
        for file in folder.rglob("*")
        if file.is_file() and file.name != "index.json"
    }
    for arm in ("sft_gold", "noise"):
        match.main(FakeCell("match", {"arm": arm, "seed": "5"}, params() | {"learning_rates": rates}))
    record = json.loads(Path("reports/cells/match/sft_gold/5.json").read_text())
    assert list(record["matchings"]["norm_3"]["by_learning_rate"]) == ["0.001", "0.003", "1e-05"]
    assert {"model.safetensors", "000004.safetensors"} <= {file.name for file in before}
    assert before == {file: file.read_bytes() for file in before}, "one more rate, the same models"

    with pytest.raises(Invalid, match=r"match.levels: 0.2 must be above 0.286"):
        match.main(FakeCell("match", {"arm": "sft_gold", "seed": "5"}, params(levels=(0.2, 0.35))))


def test_a_sham_that_trains_is_picked_where_it_is_as_far(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    for arm, module in (("sft_gold", sft_gold), ("random_reward", random_reward)):
        for rate in RATES:
            section = section_with(probability=0.5)
            run = tiny_run(arm, rate, section, folder=Path(f"models/runs/{arm}/5/{rate}"))
            module.train(run)
            lines = ["arm,seed,learning_rate,step,old_accuracy,new_accuracy,kl_new,weight_norm,gradient_steps"]
            skill, far = ((0, 0.4, 0.5, 0.6), (0, 1, 3, 4)) if arm == "sft_gold" else ((0, 0, 0, 0), (0, 0.5, 1.5, 2))
            for i, row in enumerate(run.recorder.rows):
                lines.append(f"{arm},5,{rate},{row['step']},1.0,{skill[i]},0.1,{far[i]},{row['step']}")
            curve = Path(f"reports/cells/finetune/{arm}/5/{rate}.csv")
            curve.parent.mkdir(parents=True, exist_ok=True)
            curve.write_text("\n".join(lines) + "\n")
    settings = {"level": 0.35, "learning_rate": 3e-3, "confirm": 1, "like": "sft_gold", "shams": ("random_reward",)}
    settings |= {"levels": (0.35, 0.45), "kl": (), "norm": (), "steps": (4,)}
    params = {"match": SimpleNamespace(**settings), "new_task": "adjacent", "learning_rates": RATES}
    params |= {"finetune.common.warmup_steps": 0}
    records = {}
    for arm in ("sft_gold", "random_reward"):
        match.main(FakeCell("match", {"arm": arm, "seed": "5"}, params))
        records[arm] = json.loads(Path(f"reports/cells/match/{arm}/5.json").read_text())
    assert (records["sft_gold"]["step"], records["sft_gold"]["like"]) == (1, None)
    sham = records["random_reward"]
    assert (sham["reached"], sham["step"], sham["like"]) == (True, 2, "sft_gold")  # 1.5 is the first beyond 1
    assert sham["matchings"]["accuracy_0_35"]["by_learning_rate"]["0.001"]["step"] == 2
    assert not sham["matchings"]["accuracy_0_45"]["reached"]  # gold is at 3 there
    index = json.loads(Path("models/matched/5/random_reward/index.json").read_text())
    assert index["steps_4"] == {"0.001": "0.001/000004.safetensors", "0.003": "0.003/000004.safetensors"}
    assert index["accuracy_0_35"] == {"0.001": "0.001/000002.safetensors"}


def test_scores_of_several_valid_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    log_probs = torch.tensor([[2.0, 1.0, 0.0], [0.0, 5.0, 1.0]], dtype=torch.float64).log_softmax(-1)
    monkeypatch.setattr(probes, "last_log_probs", lambda model, ids: log_probs)
    valid = torch.tensor([[1, 0], [2, -1]])  # the second prompt has one valid answer
    found = probes.score_answers(tiny_model(), Prompts(torch.zeros(2, 4).long(), valid, valid[:, 0], valid))
    assert found.right.tolist() == [True, False]
    mass = found.valid_mass.tolist()
    assert mass[0] == pytest.approx((math.exp(2) + math.e) / (math.exp(2) + math.e + 1))
    assert mass[1] == pytest.approx(math.e / (1 + math.exp(5) + math.e))
