"""Answers of several tokens: scores, supervised and reinforcement steps against plain loops over single sequences."""

import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from stages.learning import reinforcement
from stages.learning.answers import draw_valid
from stages.learning.arms import (
    dr_grpo,
    grpo,
    iterative_sft,
    joint,
    random_reward,
    reinforce,
    self_sft,
    sft_far,
    sft_gold,
    sft_oracle,
    sft_replay,
)
from stages.learning.knowledge import new_task
from stages.learning.policy_gradient import Loss
from stages.learning.probes import Probe, canonical_logits, score_answers
from stages.learning.rewards import validity
from stages.learning.run import Recorder, Run
from stages.learning.schedule import checkpoint_steps, prompt_order
from stages.measures.divergence import divergences, kl
from stages.pipeline.stage import Invalid
from stages.tasks.examples import Prompts
from tests.plain_loop import train_plainly
from tests.test_learning import (
    TRAINING,
    largest_difference,
    new_folder,
    section_with,
    tiny_examples,
    tiny_model,
    tiny_prompts,
    tiny_tokenizer,
)
from tests.test_learning import tiny_run as one_token_run

STOP = 42
SECTION = section_with(fraction=0.2, probability=0.5, every=2)


def sequence_prompts(n: int = 40, options: int = 2, seed: int = 3) -> Prompts:
    """Prompts with valid answers of one to three tokens and the stop; every third has one answer only."""
    draw = torch.Generator().manual_seed(seed)
    ids = tiny_prompts(n).input_ids
    valid = torch.full((n, options, 4), -1)
    for row in range(n):
        tokens = torch.randperm(30, generator=draw)[: 3 * options].view(options, 3) + 3
        for option in range(1 if row % 3 == 0 else options):
            length = int(torch.randint(1, 4, (1,), generator=draw))
            valid[row, option, :length] = tokens[option, :length]
            valid[row, option, length] = STOP
    return Prompts(ids, valid, valid[:, 0], valid[:, :, 0].clamp(min=0))


def stopping_model() -> LlamaForCausalLM:
    """After an answer's first token it likes to say the stop."""
    model: Any = tiny_model()
    texts = torch.cat([tiny_prompts().input_ids, torch.arange(1, 41)[:, None]], 1)
    with torch.no_grad():
        states = model.model(input_ids=texts).last_hidden_state[:, -1]
        model.lm_head.weight[STOP] = torch.linalg.lstsq(states, torch.full((len(states), 1), 4.0)).solution[:, 0]
    return model


def a_run(arm: str, prompts: Prompts | None = None, model: LlamaForCausalLM | None = None) -> Run:
    base, prompts = model or tiny_model(), prompts or sequence_prompts()
    probe = Probe.of(base, tiny_examples(), prompts)
    recorder = Recorder(base, probe, checkpoint_steps(TRAINING), lambda step, row: None, new_folder())
    order = prompt_order(len(prompts), TRAINING, seed=5)
    rehearsal = tiny_prompts(30)
    rehearsal = replace(rehearsal, input_ids=rehearsal.input_ids[:, :9])  # of another length
    return Run(arm, 5, 1e-3, TRAINING, SECTION, base, tiny_tokenizer(), prompts, rehearsal, order, recorder)


def log_prob(model: Any, prompt: torch.Tensor, answer: list[int]) -> torch.Tensor:
    """Of one answer, token by token, each with a pass of its own."""
    text, parts = prompt.tolist(), []
    for token in answer:
        parts.append(model(input_ids=torch.tensor([text])).logits[0, -1].log_softmax(-1)[token])
        text.append(token)
    return torch.stack(parts)


def said(answer: torch.Tensor) -> list[int]:
    return [token for token in answer.reshape(-1).tolist() if token >= 0]


@torch.no_grad()
def test_scores_are_those_of_answers_generated_token_by_token() -> None:
    model: Any = stopping_model().double()
    prompts = sequence_prompts()
    greedy = model.generate(
        prompts.input_ids, max_new_tokens=4, do_sample=False, eos_token_id=STOP, pad_token_id=0,
        attention_mask=torch.ones_like(prompts.input_ids),
    )[:, prompts.input_ids.shape[1] :]  # fmt: skip
    for row in range(0, 20, 2):  # what the model says by itself becomes a valid answer of every other prompt
        cut = greedy[row].tolist()
        cut = cut[: cut.index(STOP) + 1] if STOP in cut else [*cut[:3], STOP]
        answer = torch.tensor(cut + [-1] * (4 - len(cut)))
        prompts.valid[row, 0] = prompts.canonical[row] = answer
    found = score_answers(model, prompts)
    errors = []
    for row, valid in enumerate(prompts.valid):
        expected = [log_prob(model, prompts.input_ids[row], said(answer)).sum() for answer in valid if said(answer)]
        errors += [abs(float(found.log_probs[row, i] - value)) for i, value in enumerate(expected)]
        assert found.valid_mass[row] == pytest.approx(float(torch.stack(expected).exp().sum()), rel=1e-9)
        own = greedy[row].tolist()
        own = own[: own.index(STOP) + 1] if STOP in own else own
        assert bool(found.right[row]) == any(said(answer) == own for answer in valid)
    print(f"largest error {max(errors):.1e}; right {int(found.right.sum())}")
    assert max(errors) < 1e-12
    assert (found.log_probs == -torch.inf).any() and 0 < int(found.right.sum()) < 20
    assert len(found.canonical) == int((prompts.canonical >= 0).sum())
    scores = new_task(model, prompts)
    assert scores["valid_mass"] == pytest.approx(float(found.valid_mass.mean()))
    first = model(prompts.input_ids).logits[:, -1].double().softmax(-1).gather(1, prompts.objects).sum(1).mean()
    assert scores["context_mass"] == pytest.approx(float(first))


@torch.no_grad()
def test_a_greedy_answer_of_several_tokens_counts_as_right() -> None:
    """The model is made to say one answer: its weights do not matter, its output does."""
    model, prompts = tiny_model(), sequence_prompts(6)
    wanted = {tuple(row.tolist()): said(prompts.valid[i, -1]) or said(prompts.valid[i, 0])
              for i, row in enumerate(prompts.input_ids)}  # fmt: skip

    def forced(input_ids: torch.Tensor, logits_to_keep: int, **_: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, 43)
        for row, text in enumerate(input_ids.tolist()):
            for place, token in enumerate(wanted[tuple(text[:12])]):
                logits[row, 11 + place : 12 + place, token] = 5.0
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])

    fake: Any = forced
    fake.config, fake.device = model.config, model.device
    assert score_answers(fake, prompts).right.all()
    wanted[tuple(prompts.input_ids[2].tolist())][-1] = 7  # another end
    assert score_answers(fake, prompts).right.tolist() == [True, True, False, True, True, True]


def test_divergence_is_summed_over_the_places_of_the_canonical_answer() -> None:
    prompts, base, tuned = sequence_prompts(), tiny_model(), tiny_model()
    with torch.no_grad():
        for weight in tuned.parameters():
            weight.mul_(1.1)
    of_base, of_tuned = canonical_logits(base, prompts), canonical_logits(tuned, prompts)
    expected = []
    with torch.no_grad():
        for row, answer in enumerate(prompts.canonical):
            text, total = prompts.input_ids[row].tolist(), 0.0
            for token in said(answer):
                p, q = (model(input_ids=torch.tensor([text])).logits[0, -1:] for model in (base, tuned))
                total += float(kl(p, q))
                text.append(token)
            expected.append(total)
    found = divergences(of_base, of_tuned, len(prompts))["kl"]
    measured = Probe.of(base, tiny_examples(), prompts).measure(tuned)
    print(f"KL {found:.4f}, error {abs(found - np.mean(expected)):.1e}")
    assert found == pytest.approx(np.mean(expected), rel=1e-5) and found > 1e-3
    assert measured["kl_new"] == pytest.approx(found, rel=1e-9)


def test_supervised_learns_from_the_tokens_of_the_answers_alone() -> None:
    run = a_run("sft_gold")
    sft_gold.train(run)

    def loss(model: Any, step: int, rows: torch.Tensor) -> torch.Tensor:
        return -torch.cat([log_prob(model, run.train.input_ids[r], said(run.train.canonical[r])) for r in rows]).mean()

    error = largest_difference(run.model, train_plainly(tiny_model(), run, loss))
    moved = largest_difference(run.model, tiny_model())
    print(f"maximum error {error:.1e}, largest change {moved:.1e}")
    assert error < 1e-6 < 1e-3 < moved
    assert all(row["gradient_norm"] > 0 for row in run.recorder.rows[1:])


@pytest.mark.parametrize(("arm", "extra"), [(sft_replay, 1), (joint, 6)])
def test_rehearsal_of_one_token_stands_beside_answers_of_several(arm: Any, extra: int) -> None:
    run = a_run("joint")
    drawn = torch.randint(30, (4, extra), generator=run.draw("replay" if arm is sft_replay else "old task"))
    arm.train(run)

    def loss(model: Any, step: int, rows: torch.Tensor) -> torch.Tensor:
        new = [log_prob(model, run.train.input_ids[r], said(run.train.canonical[r])) for r in rows]
        old = [log_prob(model, run.rehearsal.input_ids[r], [int(run.rehearsal.canonical[r])]) for r in drawn[step]]
        return -torch.cat([*new, *old]).mean()

    error = largest_difference(run.model, train_plainly(tiny_model(), run, loss))
    print(f"maximum error {error:.1e}")
    assert error < 1e-6 and [row["completions"] for row in run.recorder.rows] == [s * (6 + extra) for s in (0, 1, 2, 4)]


def record_samples(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Any], list[list[int]]]]:
    """Prompts and completions of every draw."""
    samples: list[tuple[list[Any], list[list[int]]]] = []
    original = reinforcement.AnswersTrainer._generate_single_turn

    def note(self: Any, prompt_ids: list[list[int]], *args: Any) -> Any:
        found = original(self, prompt_ids, *args)
        samples.append((prompt_ids, found[0]))
        return found

    monkeypatch.setattr(reinforcement.AnswersTrainer, "_generate_single_turn", note)
    return samples


@pytest.mark.parametrize(
    ("arm", "loss_type"),
    [(dr_grpo, "dr_grpo"), (reinforce, "dr_grpo"), (grpo, "grpo"), (grpo, "bnpo"), (reinforce, "dapo")],
)
def test_reinforcement_equals_a_plain_loop_on_what_trl_generates(
    monkeypatch: pytest.MonkeyPatch, arm: Any, loss_type: str
) -> None:
    samples = record_samples(monkeypatch)
    # many answers are right, so that rewards differ: all of one token and the stop
    prompts = sequence_prompts()
    valid = torch.full((40, 40, 4), -1)
    valid[:, :, 0], valid[:, :, 1] = torch.arange(1, 41), STOP
    prompts = Prompts(prompts.input_ids, valid, valid[:, 0], valid[:, :, 0])
    section = section_with(loss_type=loss_type, scale_rewards="group" if arm is grpo else "none")
    run, again = (replace(a_run("dr_grpo", prompts, stopping_model()), section=section) for _ in range(2))
    again.model.load_state_dict(run.model.state_dict())
    arm.train(run)
    lengths = {len(completion) for _, completions in samples for completion in completions}
    assert max(lengths) == 4 and min(lengths) < 4  # cut at the stop
    reward = validity(prompts.valid)
    won = []

    def loss(model: Any, step: int, rows: torch.Tensor) -> torch.Tensor:
        given, completions = samples[step]
        tokens = sum(map(len, completions))
        total = torch.zeros(())
        for place, row in enumerate(rows.repeat_interleave(4).tolist()):
            assert given[place] == prompts.input_ids[row].tolist()
            group = [completions[i] for i in range(place - place % 4, place - place % 4 + 4)]
            rewards = [float(r or 0) for r in reward(prompts=[str(row)] * 4, completion_ids=group)]
            won.append(rewards[place % 4])
            advantage = rewards[place % 4] - (0 if arm is reinforce else sum(rewards) / 4)
            if arm is grpo:
                advantage /= float(np.std(rewards, ddof=1)) + 1e-4
            size = {"dr_grpo": 4 * len(completions), "grpo": len(completions[place]) * len(completions)}
            log_p = log_prob(model, prompts.input_ids[row], completions[place]).sum()
            total = total - advantage * log_p / size.get(loss_type, tokens)
        return total

    oracle = train_plainly(stopping_model(), run, loss)
    error = largest_difference(run.model, oracle)
    print(f"maximum error {error:.1e}, {np.mean(won):.2f} of the answers won")
    assert error < 2e-6 and 0.02 < np.mean(won) < 0.98
    arm.train(again)
    assert largest_difference(again.model, run.model) == 0.0  # the samples are drawn again


POLICIES = [
    (baseline, section_with(loss_type=loss_type, scale_rewards=scale_rewards, num_iterations=iterations, epsilon=0.001))
    for baseline, scales in ((True, ("none", "group", "batch")), (False, ("none",)))
    for loss_type, scale_rewards, iterations in product(get_args(Loss), scales, (1, 2))
]


@pytest.mark.parametrize(
    ("baseline", "section"),
    POLICIES,
    ids=lambda value: ", ".join(map(str, list(vars(value).values())[2:5])) if value not in (True, False) else None,
)
def test_one_pass_and_trl_take_the_same_steps_on_the_same_samples(
    monkeypatch: pytest.MonkeyPatch, baseline: bool, section: SimpleNamespace
) -> None:
    """With every value that params allow."""
    fast, plain = (one_token_run("dr_grpo", section=section) for _ in range(2))
    half = torch.arange(0, 43, 2).expand(40, -1)  # of the vocabulary is right
    samples: list[dict[str, Any]] = []
    original = reinforcement._roll_out
    monkeypatch.setattr(
        reinforcement, "_roll_out", lambda prompts, trainer: samples.append(original(prompts, trainer)) or samples[-1]
    )
    reinforcement.fit(fast, validity(half), baseline)
    replayed = iter(samples)

    def replay(self: Any, prompt_ids: list[list[int]], *args: Any) -> Any:
        known = next(replayed)
        assert known["prompt_ids"] == prompt_ids
        return known["completion_ids"], None

    monkeypatch.setattr(reinforcement.AnswersTrainer, "_generate_single_turn", replay)
    reinforcement.fit(plain, validity(half), baseline, one_pass=False)
    assert len(samples) == TRAINING.steps // section.num_iterations
    error, moved = largest_difference(fast.model, plain.model), largest_difference(fast.model, tiny_model())
    clipped = [[row["clip_fraction"] for row in run.recorder.rows[1:]] for run in (fast, plain)]
    print(f"maximum error {error:.1e}, largest change {moved:.1e}, clipped {clipped[0]}")
    assert error < 1e-6 < 1e-3 < moved
    assert clipped[0] == pytest.approx(clipped[1])
    assert (max(clipped[0]) > 0) == (section.num_iterations > 1)  # the first step on a batch clips nothing
    norms = [[row["gradient_norm"] for row in run.recorder.rows[1:]] for run in (fast, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    expected = [24 * -(-step // section.num_iterations) for step in (1, 2, 4)]
    assert [row["completions"] for row in fast.recorder.rows[1:]] == expected


def test_own_answers_are_drawn_as_whole_sequences() -> None:
    prompts = sequence_prompts()
    run = a_run("self_sft", prompts)
    rows = torch.arange(40)
    drawn = torch.stack([draw_valid(run, rows, torch.Generator().manual_seed(seed)) for seed in range(300)])
    own = score_answers(run.model, prompts).log_probs
    p = (own - own.logsumexp(1, keepdim=True)).exp()
    counts = (drawn[:, :, None, :] == prompts.valid).all(-1).double().mean(0)
    print(f"largest deviation {float((counts - p).abs().max()):.3f}")
    assert float((counts - p).abs().max()) < 4.5 * math.sqrt(0.25 / 300)
    assert (prompts.valid[rows[::3], 0] == drawn[0, ::3]).all()  # the one answer


def test_far_answers_and_one_right_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[torch.Tensor] = []
    monkeypatch.setattr("stages.learning.supervised.fit", lambda run, answers: given.append(answers))
    run = a_run("sft_far")
    sft_far.train(run)
    scores = score_answers(tiny_model(), run.train).log_probs
    for row in np.unique(run.order):
        least = min((i for i in range(2) if scores[row, i] > -torch.inf), key=lambda i: float(scores[row, i]))
        assert torch.equal(given[0][row], run.train.valid[row, least])
    one = sequence_prompts(options=1)
    for arm in (self_sft, sft_far, sft_gold):  # all the same answers where one is right
        arm.train(a_run(arm.__name__, one))
    used = np.unique(run.order)
    assert all(torch.equal(answers[used], one.canonical[used]) for answers in given[1:])


@pytest.mark.parametrize("arm", [sft_oracle, iterative_sft], ids=["sft_oracle", "iterative_sft"])
def test_arms_for_one_token_are_refused_before_training(arm: Any) -> None:
    run = a_run(arm.__name__.rpartition(".")[2])
    with pytest.raises(Invalid, match=f"'{run.arm}' learns from answers of one token, .* must be left out of arms"):
        arm.train(run)
    assert largest_difference(run.model, tiny_model()) == 0.0


def test_a_random_reward_is_given_to_sequences_too() -> None:
    run = a_run("random_reward")
    random_reward.train(run)
    assert [row["completions"] for row in run.recorder.rows] == [0, 24, 48, 96]
    assert largest_difference(run.model, tiny_model()) > 1e-4
