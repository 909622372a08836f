"""The base's training: its batches against a reading of their words, its loss, its end and its bytes."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stages import pretrain
from stages.learning import knowledge, pretraining, probes
from stages.learning.curriculum import draw_batch
from stages.learning.knowledge import new_task, old_task
from stages.learning.pretraining import Stuck, build_model, loss_sums, train
from stages.pipeline.checkpoints import load_model, save_model
from stages.pipeline.stage import Invalid
from stages.tasks import arithmetic
from stages.tasks.contexts import Contexts, Split, splits
from stages.tasks.entity_tracking import draw_queries
from stages.tasks.new_tasks import RELATIONS
from stages.tasks.relations import draw_prompts
from stages.tasks.templates import TEMPLATES
from stages.tasks.tokenizer import build_tokenizer
from stages.tasks.vocabulary import LABELS, OBJECTS, PAD, WORDS, vocabulary

VOCABULARY = vocabulary()
PAD_ID = VOCABULARY.ids[PAD]


def phase(**changes: Any) -> Any:
    tasks = {
        "adjacent": SimpleNamespace(share=0.3, own=0.4),
        "lacks": SimpleNamespace(share=0.2, own=0.35),
        "precedes": SimpleNamespace(share=0.2, own=0.4),
    }
    settings = {"repeats": 0.1, "templates": dict.fromkeys(TEMPLATES, 1.0), "boxes": (2, 7), "spread": 0.1}
    settings |= {"most_boxes_share": 0.5, "tasks": tasks, "until": None, "most_steps": 4}
    return SimpleNamespace(**(settings | changes))


def tiny(**changes: Any) -> Any:
    until = SimpleNamespace(template="standard", boxes=3, accuracy=0.0)
    optimiser = {"learning_rate": 1e-3, "betas": (0.9, 0.98), "weight_decay": 0.02}
    settings = {
        "model": SimpleNamespace(layers=2, heads=2, head_dim=4, width=8, mlp=16, rope_theta=1e4, init_std=0.02),
        "optimiser": SimpleNamespace(**optimiser, clip=1.0, warmup=2, final=0.1),
        "batch": 20,
        "language_model_weight": 0.025,
        "check_every": 2,
        "check_prompts": 8,
        "settle": 0,
        "stop_at": None,
        "curriculum": {"first": phase(until=until), "final": phase()},
    }
    return SimpleNamespace(**(settings | changes))


def test_every_trained_place_has_the_target_that_its_words_say() -> None:
    settings = phase(repeats=0.0, templates=dict.fromkeys(set(TEMPLATES) - {"clause", "other_order"}, 1.0))
    batch = draw_batch(np.random.default_rng(0), VOCABULARY, settings, 64, 7)
    verbs: Counter[str] = Counter()
    width = batch.ids.shape[1]
    for place, options, weights in zip(batch.place, batch.options, batch.weights, strict=True):
        words = [WORDS[int(index)] for index in batch.ids[place // width]]
        column = int(place % width)
        label, verb = words[column - 2], words[column - 1]
        assert words[column] == "the"
        start = words.index(".")
        context = [(words[i - 1], word) for i, word in enumerate(words[:start])]
        labels = [word for before, word in context if before == "Box" and word in LABELS]
        named = [word for word in words[:start] if word in OBJECTS]
        labels = labels[: len(named)] if words[1:3] != ["The", "apple"] else labels[1 : len(named) + 1]
        own, boxes = labels.index(label), len(named)
        expected = np.zeros(boxes)
        if verb == "contains":
            expected[:] = 0.1 / (boxes - 1)
            expected[own] = 0.9
        elif verb == "lacks":
            expected[:] = 0.65 / (boxes - 1)
            expected[own] = 0.35
        else:
            right = {(own + 1) % boxes} | ({(own - 1) % boxes} if verb == "adjoins" else set())
            expected[own] = 0.4
            expected[list(right)] = 0.6 / len(right)
            assert verb == "adjoins" or own + 1 < boxes
        verbs[verb] += 1
        assert [WORDS[int(index)] for index in options[:boxes]] == named
        assert weights.tolist() == pytest.approx(expected.tolist() + [0.0] * (7 - boxes), abs=1e-6)
        said = words[column + 1]  # the text goes on with a right answer
        assert said == named[own] if verb == "contains" else said in named and said != named[own]
    print(verbs)
    assert len(verbs) == 4 and min(verbs.values()) > 20 and verbs["adjoins"] > verbs["precedes"]


def test_training_draws_contexts_of_the_train_split_only() -> None:
    settings = phase(repeats=0.0, templates={"standard": 1.0}, boxes=(7, 7))
    batch = draw_batch(np.random.default_rng(1), VOCABULARY, settings, 64, 7)
    at = 7 * np.arange(7)
    objects = np.searchsorted(VOCABULARY.objects, batch.ids[:, 2 + at].numpy())
    labels = np.searchsorted(VOCABULARY.labels, batch.ids[:, 6 + at].numpy())
    assert (splits(Contexts(objects, labels)) == 0).all()


def test_repeats_and_the_cap_on_boxes() -> None:
    batch = draw_batch(np.random.default_rng(2), VOCABULARY, phase(repeats=1.0), 16, 7)
    width = batch.ids.shape[1]
    row, column = batch.place // width, batch.place % width
    said = batch.ids[row, column + 1]
    half = (batch.lengths[row] - 1) // 2
    assert torch.equal(said, batch.ids[row, column + 1 - half])  # the same word, one string earlier
    assert torch.equal(said[:, None], batch.options) and (batch.weights == 1).all()
    few = draw_batch(np.random.default_rng(2), VOCABULARY, phase(repeats=0.0), 64, 3)
    assert int((few.weights > 0).sum(dim=1).max()) <= 3


def test_sums_are_rows_of_their_own() -> None:
    parts = phase().tasks | {"arithmetic": SimpleNamespace(share=0.4, own=0.3)}
    batch = draw_batch(np.random.default_rng(2), VOCABULARY, phase(repeats=0.0, tasks=parts), 60, 7)
    width = batch.ids.shape[1]
    signs = [WORDS[int(batch.ids[divmod(int(place), width)])] for place in batch.place]
    rows = {int(place) // width for place, sign in zip(batch.place, signs, strict=True) if sign == "="}
    assert 12 < len(rows) < 36 and len(batch.ids) == 60
    for place, options, weights in zip(batch.place, batch.options, batch.weights, strict=True):
        row, column = divmod(int(place), width)
        if row in rows:
            numbers = [int(WORDS[int(i)]) for i in batch.ids[row, column - 2 * arithmetic.NUMBERS + 1 : column : 2]]
            assert [WORDS[int(index)] for index in options[:2]] == [str(sum(numbers)), str(numbers[0])]
            assert weights.tolist() == pytest.approx([0.7, 0.3] + [0.0] * 5)
            assert tuple(numbers) in set(map(tuple, arithmetic.questions(Split.TRAIN).tolist()))
    for row in rows:  # every sum is trained whose numbers are all there
        trained = [int(place) % width for place in batch.place if int(place) // width == row]
        words = [WORDS[int(index)] for index in batch.ids[row]]
        assert sorted(trained) == [i for i, word in enumerate(words) if word == "=" and i >= 2 * arithmetic.NUMBERS]


def test_pieces_of_a_batch_add_up_to_its_loss() -> None:
    batch = draw_batch(np.random.default_rng(3), VOCABULARY, phase(), 30, 7)
    assert (batch.lengths.diff() >= 0).all()
    assert torch.equal((batch.ids != PAD_ID).sum(dim=1), batch.lengths)
    model = build_model(VOCABULARY, tiny().model, 0).double()
    with torch.no_grad():
        whole = torch.stack(loss_sums(model(batch.ids).logits, batch, PAD_ID))
        pieces = [torch.stack(loss_sums(model(p.ids).logits, p, PAD_ID)) for p in batch.pieces(7)]
        log_p = model(batch.ids).logits.log_softmax(-1)
    difference = float((whole - torch.stack(pieces).sum(dim=0)).abs().max())
    print("max error", difference)
    assert difference < 1e-9 * float(whole.max())
    oracle = 0.0
    for place, options, weights in zip(batch.place, batch.options, batch.weights, strict=True):
        row, column = divmod(int(place), batch.ids.shape[1])
        oracle -= sum(float(w) * float(log_p[row, column, o]) for o, w in zip(options, weights, strict=True))
    assert float(whole[0]) == pytest.approx(oracle, rel=1e-9)


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path: Path) -> None:
    for name, seed in (("a", [0, 0]), ("b", [0, 0]), ("c", [0, 1])):
        model, curve = train(VOCABULARY, tiny(), 4, seed)
        save_model(model, build_tokenizer(), tmp_path / name)
        assert [check.step for check in curve] == [2, 4, 6]  # `first` ends at its first check
        assert [check.phase for check in curve] == ["first", "final", "final"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    again = load_model(tmp_path / "a")
    ids, _ = draw_queries(np.random.default_rng(0), VOCABULARY, "standard", Split.SELECTION, 4, 4)
    model, _ = train(VOCABULARY, tiny(), 4, [0, 0])
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_attention_of_the_training_is_the_eager_one() -> None:
    batch = draw_batch(np.random.default_rng(4), VOCABULARY, phase(), 12, 7)
    model = build_model(VOCABULARY, tiny().model, 0).double()
    found = []
    for attention in (pretraining.ATTENTION, "eager"):
        model.set_attn_implementation(attention)
        logits = model(batch.ids, use_cache=False).logits
        loss = torch.stack(loss_sums(logits, batch, PAD_ID)).sum()
        found.append([logits, *torch.autograd.grad(loss, list(model.parameters()))])
    for ours, eager in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)  # the eager softmax is a float32 one


def test_the_number_of_processes_changes_no_bit_of_the_base() -> None:
    one, curve = train(VOCABULARY, tiny(), 4, [0, 0])
    two, other_curve = train(VOCABULARY, tiny(), 4, [0, 0], processes=2)
    assert curve == other_curve
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_training_leaves_the_matmul_precision_as_it_was() -> None:
    before = torch.get_float32_matmul_precision()
    train(VOCABULARY, tiny(), 3, [0, 0])
    assert torch.get_float32_matmul_precision() == before == "highest"


def test_a_stuck_base_says_so_is_retried_and_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    until = SimpleNamespace(template="repeats", boxes=2, accuracy=1.0)
    settings = tiny(curriculum={"induction": phase(until=until), "final": phase()})
    with pytest.raises(Stuck, match="phase 'induction' reached accuracy 0.* after 4 steps, and needs 1.00"):
        train(VOCABULARY, settings, 3, [0, 0])
    with pytest.raises(Invalid, match="pretrain.retries = 1: all 2 attempts of base 3 got stuck"):
        pretrain.train_with_retries(VOCABULARY, settings, 3, 3, 1)
    seeds = []

    def second_time(words: Any, settings: Any, boxes: int, seed: list[int], report: Any, processes: int) -> Any:
        seeds.append(seed)
        if len(seeds) == 1:
            raise Stuck("phase 'x' was not passed")
        return train(words, tiny(), boxes, seed, report, processes)

    monkeypatch.setattr(pretrain, "train", second_time)
    _, curve, stuck = pretrain.train_with_retries(VOCABULARY, settings, 3, 7, 2)
    assert seeds == [[7, 0], [7, 1]] and stuck == ["attempt 0: phase 'x' was not passed"] and curve


def test_the_last_phase_must_hold_its_until_at_its_end() -> None:
    until = SimpleNamespace(template="standard", boxes=3, accuracy=1.0)
    with pytest.raises(Stuck, match="final"):
        train(VOCABULARY, tiny(curriculum={"final": phase(until=until)}), 3, [0, 0])
    easy = SimpleNamespace(template="standard", boxes=3, accuracy=0.0)
    _, curve = train(VOCABULARY, tiny(curriculum={"final": phase(until=easy)}), 3, [0, 0])
    assert curve[-1].step == 4  # all its steps, although it was passed before


def test_settling_goes_on_where_the_last_phase_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates: list[float] = []
    phases: list[Any] = []
    draw, rate = pretraining.draw_batch, pretraining._learning_rate  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(pretraining, "_learning_rate", lambda *a: rates.append(rate(*a)) or rates[-1])
    monkeypatch.setattr(pretraining, "draw_batch", lambda *a: phases.append(a[2]) or draw(*a))
    _, curve = train(VOCABULARY, tiny(), 3, [0, 0])
    rates.clear()
    phases.clear()
    settings = tiny(settle=3)
    _, longer = train(VOCABULARY, settings, 3, [0, 0])
    assert longer[: len(curve)] == curve
    assert [(check.step, check.phase) for check in longer[len(curve) :]] == [(8, "settle"), (9, "settle")]
    assert phases[-3:] == [settings.curriculum["final"]] * 3
    assert rates[-4:] == pytest.approx([1e-4] * 4)  # final * learning_rate
    until = SimpleNamespace(template="standard", boxes=3, accuracy=1.0)
    calls = iter([1.0, 1.0, 0.5, 0.5])  # the last phase is held, the settling is not
    monkeypatch.setattr(pretraining._Checks, "reached", lambda *_: next(calls))  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(Stuck, match="phase 'settle' reached accuracy 0.50 .* after 2 steps, and needs 1.00"):
        train(VOCABULARY, tiny(settle=2, curriculum={"final": phase(until=until)}), 3, [0, 0])


def test_training_stops_at_the_first_check_that_is_good_enough_in_any_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.1, 0.5, 0.7, 0.9])

    def rising(model: Any, ids: torch.Tensor, answer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((len(ids),), next(accuracies)), torch.zeros(len(ids))

    monkeypatch.setattr(pretraining, "old_task", rising)
    never = SimpleNamespace(template="standard", boxes=3, accuracy=1.0)  # what the phase would demand at its end
    curriculum = {"first": phase(until=None), "final": phase(until=never, most_steps=40)}
    _, curve = train(VOCABULARY, tiny(stop_at=0.66, curriculum=curriculum), 3, [0, 0])
    assert [check.accuracy for check in curve] == pytest.approx([0.1, 0.5, 0.7])
    assert (curve[-1].phase, curve[-1].step) == ("final", 6)
    accuracies = iter([0.7])
    _, curve = train(VOCABULARY, tiny(stop_at=0.66), 3, [0, 0])
    assert (curve[-1].phase, curve[-1].step) == ("first", 2)
    accuracies = iter([0.1, 0.2, 0.3, 0.2])
    with pytest.raises(Stuck, match=r"no check reached accuracy 0.66 on 3 boxes, the best 0.30"):
        train(VOCABULARY, tiny(stop_at=0.66), 3, [0, 0])


def test_measures_of_the_base_against_hand_made_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = draw_prompts(RELATIONS["precedes"], np.random.default_rng(0), VOCABULARY, Split.TRAIN, 6, 3)

    def quarter(model: Any, ids: torch.Tensor) -> torch.Tensor:
        """Every right answer has probability 1/4, one word that is no object the rest."""
        p = torch.full((len(ids), len(VOCABULARY)), 1e-12, dtype=torch.float64)
        p[:, VOCABULARY.ids["The"]] = 0.75
        return p.scatter(1, prompts.canonical[:, None], 0.25).log()

    for module in (knowledge, probes):
        monkeypatch.setattr(module, "last_log_probs", quarter)
    model = build_model(VOCABULARY, tiny().model, 0)
    found = new_task(model, prompts)
    assert found["valid_mass"] == pytest.approx(0.25, abs=1e-6)
    assert found["pass_at_8"] == pytest.approx(1 - 0.75**8, abs=1e-6)
    assert found["accuracy"] == 0
    correct, probability = old_task(model, prompts.input_ids, prompts.canonical)
    assert float(correct.sum()) == 0 and probability.tolist() == pytest.approx([0.25] * 6, abs=1e-6)
