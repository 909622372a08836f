"""Pairs of any lengths and answers of several tokens: against whole teacher-forced passes with hooks, in float64."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from stages.circuits.circuit import Component
from stages.circuits.pairs import AlignedPairs, Pairs
from stages.circuits.patching import GroupedPatcher, path_patcher
from stages.circuits.path_patching import PathPatcher, Receivers
from stages.circuits.scores import Metric, measure_of
from stages.circuits.texts import Words
from stages.pipeline.stage import Invalid
from tests.oracles import VOCAB, head_outputs, hooked_logits, naive_path_patching, random_model, random_pairs, walker_of

RECEIVERS = [
    Receivers(),
    Receivers(Component.Q, ((2, 0), (1, 1))),
    Receivers(Component.K, ((1, 1), (2, 2))),
    Receivers(Component.V, ((1, 0), (2, 3))),
]


def ragged_pairs(seed: int = 0, n: int = 6) -> Pairs:
    """Prompts, partners, positions, answers and others of several lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: int) -> tuple[int, ...]:
        return tuple(torch.randint(low, high, (size,), generator=generator).tolist())

    clean = tuple(draw(3, VOCAB, length) for length in (7, 9, 7, 8, 9, 7)[:n])
    corrupt = tuple(draw(3, VOCAB, length) for length in (7, 8, 7, 8, 9, 8)[:n])
    answer = ((5,), (6, 7), (8,), (9, 10, 11), (5, 6), (12,))[:n]
    others = (
        ((7,),),
        ((6, 9), (8,)),  # begins like the answer
        ((9,), (10,)),
        ((9, 10, 12), (9, 13), (4, 4, 4)),
        ((5, 7), (5, 8)),
        ((13, 14),),
    )[:n]
    spans = {
        "name": ((1, 2), (3,), (0,), (2, 3), (1, 4, 5), (4,))[:n],
        "end": tuple((len(ids) - 1,) for ids in clean),
    }
    corrupt_spans = {
        "name": ((3, 4), (2,), (5,), (0, 1), (6, 7, 2), (4,))[:n],
        "end": tuple((len(ids) - 1,) for ids in corrupt),
    }
    return Pairs(clean, corrupt, answer, others, spans, corrupt_spans)


class Everywhere(nn.Module):
    """A model whose logits "at the last position" are those at all positions."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(**inputs).logits[:, None])

    def get_submodule(self, target: str) -> nn.Module:
        return self.model.get_submodule(target)


def naive_measure(model: Any, pairs: Pairs, example: int, logits_of: Any) -> float:
    """d of one example; `logits_of` gives the logits of one whole pass over a clean and a corrupt text."""

    def log_probability(continuation: tuple[int, ...]) -> float:
        logits = logits_of(pairs.clean[example] + continuation, pairs.corrupt[example] + continuation)
        read = logits.log_softmax(-1)[len(pairs.clean[example]) - 1 :]
        return sum(float(read[at, token]) for at, token in enumerate(continuation))

    others = [log_probability(other) for other in pairs.others[example]]
    return log_probability(pairs.answer[example]) - sum(others) / len(others)


def naive_runs(model: Any, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """d of clean and of corrupt prompts."""

    def of_clean(clean: tuple[int, ...], corrupt: tuple[int, ...]) -> Tensor:
        return hooked_logits(Everywhere(model), torch.tensor([clean]))[0]  # type: ignore[arg-type]

    other = replace(
        pairs, clean=pairs.corrupt, corrupt=pairs.clean, spans=pairs.corrupt_spans, corrupt_spans=pairs.spans
    )
    return tuple(  # type: ignore[return-value]
        torch.tensor([naive_measure(model, of, row, of_clean) for row in range(len(of))], dtype=torch.float64)
        for of in (pairs, other)
    )


def naive_effect(model: Any, pairs: Pairs, position: str, heads: list[tuple[int, int]], receivers: Receivers) -> Tensor:
    """d of every example, patched."""
    found = []
    for example in range(len(pairs)):
        at = {position: torch.tensor([pairs.spans[position][example]])}
        corrupt_at = {position: torch.tensor([pairs.corrupt_spans[position][example]])}

        def logits_of(clean: Any, corrupt: Any, at: Any = at, corrupt_at: Any = corrupt_at) -> Tensor:
            texts = AlignedPairs(torch.tensor([clean]), torch.tensor([corrupt]), at, corrupt_at)
            outputs = head_outputs(model, texts.clean_ids), head_outputs(model, texts.corrupt_ids)
            whole: Any = Everywhere(model)
            return naive_path_patching(whole, texts, position, heads, receivers, *outputs)[0]

        found.append(naive_measure(model, pairs, example, logits_of))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["llama_gqa", "gemma2"])
@pytest.mark.parametrize("memory", [64.0, 0.1])
def test_effects_equal_whole_teacher_forced_passes(kind: str, memory: float) -> None:
    model, pairs = random_model(kind), ragged_pairs()
    patcher = GroupedPatcher(walker_of(model), pairs, memory)
    clean, corrupt = naive_runs(model, pairs)
    error = max(float((patcher.clean - clean).abs().max()), float((patcher.corrupt - corrupt).abs().max()))
    print(f"{kind}: clean {clean.tolist()}, max error {error:.1e}")
    assert error <= 1e-11
    sets = [[(0, 1)], [(0, 0), (1, 3)]]
    senders = torch.zeros(2, 3, 4, dtype=torch.bool)
    for row, heads in enumerate(sets):
        for head in heads:
            senders[row][head] = True
    for position in ("end", "name"):
        for receivers, effects in zip(RECEIVERS, patcher.effects(position, senders, RECEIVERS), strict=True):
            expected = torch.stack([naive_effect(model, pairs, position, heads, receivers) - clean for heads in sets])
            error, largest = float((effects - expected).abs().max()), float(expected.abs().max())
            print(f"{kind} {position} -> {receivers}: max error {error:.1e}, max effect {largest:.1e}")
            assert error <= 1e-11
            assert largest > 1e-3 or (position == "name" and receivers.component is None)


def test_single_tokens_of_one_length_are_the_logit_difference() -> None:
    aligned, model = random_pairs(length=11), random_model("llama")
    answer, others = torch.arange(5), torch.arange(5)[:, None] + torch.tensor([7, 8])
    walker = walker_of(model)
    plain = PathPatcher(walker, aligned, measure_of(Metric.LOGIT_DIFFERENCE, answer, others), 64.0)
    pairs = Pairs(
        tuple(map(tuple, aligned.clean_ids.tolist())),
        tuple(map(tuple, aligned.corrupt_ids.tolist())),
        tuple((token,) for token in answer.tolist()),
        tuple(tuple((token,) for token in row) for row in others.tolist()),
        {name: tuple((place,) for place in at.tolist()) for name, at in aligned.positions.items()},
        {name: tuple((place,) for place in at.tolist()) for name, at in aligned.corrupt_positions.items()},
    )
    ours = path_patcher(walker, pairs)
    assert list(ours.positions) == list(aligned.positions)
    assert all(torch.equal(ours.positions[name], at) for name, at in aligned.positions.items())
    assert torch.equal(ours.correct, plain.correct)
    both = path_patcher(walker, pairs, processes=2)
    assert torch.equal(both.correct, plain.correct)
    for position in aligned.positions:
        expected = plain.head_effects(position, RECEIVERS)
        for other in (ours, both):
            for mine, theirs in zip(other.head_effects(position, RECEIVERS), expected, strict=True):
                assert float((mine - theirs).abs().max()) <= 1e-12
    scores, same = ours.scores("last"), plain.scores("last", to="logits")
    assert float((scores.score - same.score).abs().max()) <= 1e-12
    (strongest, value), second = scores.strongest(2)
    assert abs(value) == float(scores.score.abs().max()) >= abs(second[1])
    frame = scores.frame()
    assert list(frame.columns) == ["layer", "head", "score", "noise"] and len(frame) == 12
    of_heads: Any = dict(zip(zip(frame.layer, frame["head"], strict=True), frame.score, strict=True))
    assert of_heads[strongest] == value
    assert float(frame.noise[5]) == float(scores.noise[1, 1])
    assert float(ours.scores("earlier", RECEIVERS[3]).score.abs().max()) > 0


def test_right_answers_are_those_that_greedy_decoding_gives() -> None:
    model, pairs = random_model("llama"), ragged_pairs()
    rows = list(pairs.answer)
    for example in (1, 3, 5):  # what the model itself would say
        said: tuple[int, ...] = ()
        for _ in pairs.answer[example]:
            said += (int(hooked_logits(model, torch.tensor([pairs.clean[example] + said]))[0].argmax()),)
        rows[example] = said
    pairs = replace(pairs, answer=tuple(rows))
    assert GroupedPatcher(walker_of(model), pairs, 64.0).correct.tolist() == [False, True] * 3


def test_progress_of_all_lengths_together() -> None:
    patcher = GroupedPatcher(walker_of(random_model("llama")), ragged_pairs(), 64.0)
    told: list[Any] = []
    patcher.watch = told.append
    patcher.head_effects("end", RECEIVERS[1:2])
    assert [entry.done for entry in told] == sorted(entry.done for entry in told)
    assert told[-1].done == pytest.approx(told[-1].total)


TEXTS = [
    ("When Mary and John went to the store, John gave a drink to", " Mary", " John"),
    ("When Christopher and Mary went to the old park, Mary gave a drink to", " Christopher", " Mary"),
]
CORRUPT = [
    "When Anna and Paul went to the store, Kate gave a drink to",
    "When Anna and Paul went to the old park, Kate gave a drink to",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose names are one token or several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False, initial_alphabet=alphabet
    )
    frequent = "When Mary and John went to the store, Anna and Paul and Kate gave a drink to Mary John Anna Paul Kate"
    tokenizer.train_from_iterator([frequent] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="</s>", eos_token="</s>")


def from_text(tokenizer: Any, **change: Any) -> Pairs:
    given: dict[str, Any] = dict(
        clean=[text for text, _, _ in TEXTS],
        corrupt=CORRUPT,
        answer=[answer for _, answer, _ in TEXTS],
        others=[other for *_, other in TEXTS],
        positions={"end": -1, "subject": [Words("John", 1), Words("Mary", -1)], "went": "went"},
        corrupt_positions={"subject": "Kate"},
    )
    given.update(change)
    return Pairs.from_text(tokenizer, given.pop("clean"), given.pop("corrupt"), **given)


@pytest.mark.parametrize("bos", [None, "<s>"])
@pytest.mark.parametrize("fast", [True, False])
def test_words_become_the_tokens_that_hold_them(tokenizer: Any, bos: str | None, fast: bool) -> None:
    if not fast:  # one without offsets

        def only_ids(text: str, **options: Any) -> Any:
            assert "return_offsets_mapping" not in options
            return tokenizer(text, **options)

        slow: Any = only_ids
        slow.get_vocab = tokenizer.get_vocab
        pairs = from_text(slow, bos=bos)
    else:
        pairs = from_text(tokenizer, bos=bos)
    assert pairs.record() == {
        "examples": 2,
        "lengths": pairs.record()["lengths"],
        "tokens_of_answers": {"1": 1, str(len(pairs.answer[1])): 1},
        "tokens_of_others": {"1": 2},
        "tokens_of_positions": {"end": {"1": 2}, "subject": {"1": 2}, "went": {"1": 2}},
        "bos": bos,
        "dropped": {},
    }
    assert len(pairs.answer[1]) > 1
    for row, (text, answer, _) in enumerate(TEXTS):
        ids = pairs.clean[row]
        assert tokenizer.decode(ids) == (bos or "") + text and tokenizer.decode(pairs.answer[row]) == answer
        assert (ids[0] == tokenizer.bos_token_id) == (bos is not None)
        said = {name: [tokenizer.decode([ids[at]]) for at in spans[row]] for name, spans in pairs.spans.items()}
        assert said == {"end": [" to"], "subject": [[" John"], [" Mary"]][row], "went": [" went"]}
        (place,) = pairs.spans["subject"][row]
        assert place > pairs.spans["went"][row][0]  # the second time that the name is said
        assert [tokenizer.decode([pairs.corrupt[row][at]]) for at in pairs.corrupt_spans["subject"][row]] == [" Kate"]


def test_what_does_not_fit_is_refused_or_counted(tokenizer: Any) -> None:
    with pytest.raises(Invalid, match="example 0: 'John' found 2 times: must occur once in 'When Mary .*occurrence"):
        from_text(tokenizer, positions={"subject": "John"})
    with pytest.raises(Invalid, match="example 1: 'store' not found: must occur in 'When Christopher"):
        from_text(tokenizer, positions={"place": "store"})
    with pytest.raises(Invalid, match="example 0: no such token: 99 in 'When Mary .* must be indices from -"):
        from_text(tokenizer, positions={"place": 99})
    with pytest.raises(Invalid, match="example 1: 'name' has another number of tokens in the corrupt prompt: it has"):
        name = {"name": ["Mary", "Christopher"]}
        from_text(tokenizer, positions=name, corrupt_positions={"name": "Anna"})
    with pytest.raises(Invalid, match="'s' after 'When Mary .* changes the last token|does not begin a new token"):
        from_text(tokenizer, clean=["When Mary went t", "When John went t"], answer=["o", "o"], positions={"end": -1})
    with pytest.raises(Invalid, match="bos = '<start>': must be one token of the tokenizer's vocabulary"):
        from_text(tokenizer, bos="<start>")
    with pytest.raises(Invalid, match="position 'end' has 3 places: must be one for all examples, or a list of 2"):
        from_text(tokenizer, positions={"end": [1, 2, 3]})
    with pytest.raises(Invalid, match="answer has 1 entries: must be a list of one for each of the 2 clean prompts"):
        from_text(tokenizer, answer=[" Mary"])
    with pytest.raises(Invalid, match="example 0 has answer .* must be one answer and at least one other"):
        from_text(tokenizer, others=[" Mary", " Mary"])
    name = {"name": ["Mary", "Christopher"]}
    fitting = from_text(tokenizer, positions=name, corrupt_positions={"name": "Anna"}, unfit="drop")
    assert len(fitting) == 1
    assert fitting.record()["dropped"] == {"'name' has another number of tokens in the corrupt prompt": 1}
    with pytest.raises(Invalid, match="clean has 0 entries|must be one for each of the 0 clean prompts"):
        from_text(tokenizer, positions={"place": "nowhere"}, unfit="drop")


def test_padded_prompts_are_refused() -> None:
    model = random_model("llama")
    model.config.pad_token_id = model.config.eos_token_id = 2
    walker, pairs = walker_of(model), ragged_pairs()
    padded = replace(pairs, clean=((2, *pairs.clean[0][1:]), *pairs.clean[1:]))
    with pytest.raises(Invalid, match="starts or ends with the padding token 2"):
        path_patcher(walker, padded)
    assert len(path_patcher(walker, pairs).clean) == len(pairs)


def test_numbers_out_of_range() -> None:
    walker, pairs = walker_of(random_model("llama")), ragged_pairs()
    with pytest.raises(Invalid, match="processes = 7: must be from 1 to the number of examples, 6"):
        path_patcher(walker, pairs, processes=7)
    with pytest.raises(Invalid, match="memory_mib = 0: must be above 0"):
        path_patcher(walker, pairs, memory_mib=0)
    for change, sentence in (
        (dict(answer=pairs.answer[1:]), "answer has 5 entries"),
        (dict(spans={}), "positions is empty"),
        (dict(spans={"end": ((9,), *pairs.spans["end"][1:])}), r"position 'end' of example 0 = \[9\]: .* from 0 to 6"),
        (dict(spans={"end": ((1, 2), *pairs.spans["end"][1:])}), "'end' of example 0 has 2 tokens in the clean prompt"),
        (dict(spans={"other": pairs.spans["end"]}), "'other' has 6 spans, 0 in the corrupt prompts"),
    ):
        with pytest.raises(Invalid, match=sentence):
            replace(pairs, **change)


def test_no_tensor_is_made_on_the_default_device() -> None:
    model, pairs = random_model("llama"), ragged_pairs()
    walker = walker_of(model)
    plain = [path_patcher(walker, pairs).head_effects(position, RECEIVERS) for position in ("end", "name")]
    with torch.device("meta"):
        patcher = path_patcher(walker, pairs)
        for position, expected in zip(("end", "name"), plain, strict=True):
            for mine, theirs in zip(patcher.head_effects(position, RECEIVERS), expected, strict=True):
                assert torch.equal(mine, theirs)
        assert patcher.scores("end").strongest(1) and len(patcher.correct) == 6
