"""Sums in the tokens of several tokenizers: prompts, answers, splits and shortcuts, read back from their text."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stages.pipeline.checkpoints import load_tokenizer
from stages.pipeline.params import load_params
from stages.pipeline.stage import Invalid
from stages.tasks import sums
from stages.tasks.contexts import Split
from stages.tasks.examples import Prompts, read_prompts, write_prompts
from stages.tasks.tokenizer import build_tokenizer
from stages.tasks.vocabulary import BOS, TextVocabulary, vocabulary, vocabulary_of

END = "<|end|>"


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def bpe(digits: Any, texts: list[str] | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose padding is its end of text, which knows nothing or the numbers of some texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts or [], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=END, eos_token=END, bos_token=END)


def digits_tokenizer() -> PreTrainedTokenizerFast:
    """Every digit and every space before one is a token, as for SmolLM2."""
    return bpe([pre_tokenizers.Digits(individual_digits=True)])


def numbers_tokenizer() -> PreTrainedTokenizerFast:
    """Every number with the space before it is a token, as are most of GPT-2's."""
    return bpe([], [f" {number} {number}" for number in range(10, 199)] * 3)


@pytest.fixture(params=["digits", "numbers", "SmolLM2"])
def said(request: pytest.FixtureRequest) -> TextVocabulary:
    if request.param == "SmolLM2":
        found = vocabulary_of(load_tokenizer(request.getfixturevalue("smollm2")), None)
    else:
        found = vocabulary_of(digits_tokenizer() if request.param == "digits" else numbers_tokenizer(), END)
    assert isinstance(found, TextVocabulary)
    return found


def read(vocabulary: TextVocabulary, prompts: Prompts, row: int) -> tuple[list[tuple[int, ...]], str]:
    """The numbers of each sum of a prompt, results too, and its answer as it is written."""
    ids = prompts.input_ids[row].tolist()
    assert tuple(ids[: len(vocabulary.bos)]) == vocabulary.bos
    answer = [token for token in prompts.canonical[row].reshape(-1).tolist() if token >= 0]
    prompt = vocabulary.tokenizer.decode(ids[len(vocabulary.bos) :])
    whole = vocabulary.tokenizer.decode(ids[len(vocabulary.bos) :] + answer)
    assert whole.startswith(prompt)
    # the tokenizer makes the same of prompt and answer as one text
    assert [*vocabulary.bos, *vocabulary.tokenizer(whole, add_special_tokens=False)["input_ids"]] == ids + answer
    numbers = [re.fullmatch(r"(\d+) \+ (\d+) = ?(\d*)", line) for line in prompt.split("\n")]
    return [tuple(int(part) for part in found.groups() if part) for found in numbers if found], whole[len(prompt) :]


def test_prompts_are_solved_sums_and_a_question_with_its_right_answer(said: TextVocabulary) -> None:
    seen: dict[Split, set[frozenset[int]]] = {}
    for split in (Split.TRAIN, Split.SELECTION, Split.EVALUATION):
        prompts = sums.draw_prompts(rng(), said, split, 60, 7)
        assert prompts.one_answer and torch.equal(prompts.valid[:, 0], prompts.canonical)
        for row in range(60):
            lines, answer = read(said, prompts, row)
            *solved, asked = lines
            assert len(solved) == sums.SOLVED and len(asked) == 2
            assert all(a + b == c for a, b, c in solved)
            assert answer.strip() == str(sum(asked)) and answer.endswith("\n") == prompts.several_tokens
            assert all(sums.split_of((a, b)) == Split.TRAIN for a, b, _ in solved)
            seen.setdefault(split, set()).add(frozenset(asked))
            first = int(prompts.canonical[row].reshape(-1)[0])
            assert first in prompts.objects[row].tolist()
        if prompts.several_tokens:
            stop = prompts.stop
            assert stop is not None and said.tokenizer.decode([stop]) == "\n"
    assert not seen[Split.TRAIN] & seen[Split.SELECTION] and not seen[Split.TRAIN] & seen[Split.EVALUATION]
    assert not seen[Split.SELECTION] & seen[Split.EVALUATION]


def test_answers_are_one_token_where_all_numbers_are(said: TextVocabulary) -> None:
    prompts = sums.draw_prompts(rng(), said, Split.TRAIN, 8, 7)
    numbers_are_tokens = len(said.tokenizer(" 47", add_special_tokens=False)["input_ids"]) == 1
    assert prompts.several_tokens != numbers_are_tokens
    assert prompts.valid.shape[1:] == ((1,) if numbers_are_tokens else (1, 4))
    assert prompts.stop is None or not numbers_are_tokens


def test_files_hold_answers_of_either_kind(said: TextVocabulary, tmp_path: Any) -> None:
    prompts = sums.draw_prompts(rng(), said, Split.TRAIN, 9, 7)
    write_prompts(tmp_path / "sums.parquet", prompts)
    back = read_prompts(tmp_path / "sums.parquet")
    for name, tensor in vars(prompts).items():
        assert torch.equal(tensor, getattr(back, name)) and tensor.dtype == getattr(back, name).dtype


def test_shortcuts_are_scored_from_the_text(said: TextVocabulary) -> None:
    prompts = sums.draw_prompts(rng(), said, Split.TRAIN, 400, 7)
    scores = sums.shortcut_scores(prompts, said)
    lines = [read(said, prompts, row)[0] for row in range(400)]
    carries = [(a % 10 + b % 10) >= 10 for *_, (a, b) in lines]
    assert scores["without_carrying"] == pytest.approx(1 - np.mean(carries))
    assert scores["last_result"] == pytest.approx(np.mean([row[-2][2] == sum(row[-1]) for row in lines]))
    assert max(scores, key=lambda name: scores[name]) == "without_carrying" and scores["without_carrying"] < 0.65


def test_what_cannot_be_said_is_refused() -> None:
    with pytest.raises(Invalid, match="the word-level tokenizer has too few numbers"):
        sums.draw_prompts(rng(), vocabulary(), Split.TRAIN, 1, 7)
    plain = vocabulary()
    words = TextVocabulary(plain.objects, plain.labels, build_tokenizer(), (plain.ids[BOS],))
    with pytest.raises(Invalid, match="no token for the end of a line"):
        sums.draw_prompts(rng(), words, Split.TRAIN, 1, 7)
    said = vocabulary_of(digits_tokenizer(), END)
    with pytest.raises(Invalid, match="no questions in split 'discovery': must be one of train, selection, evaluation"):
        sums.draw_prompts(rng(), said, Split.DISCOVERY, 1, 7)


def test_answers_without_a_stop_of_their_own_are_refused() -> None:
    valid = torch.tensor([[[5, 6, 9]], [[5, 9, -1]]])
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert Prompts(ids, valid, valid[:, 0], ids).stop == 9
    for wrong in ([[[5, 6, 9]], [[5, 6, -1]]], [[[9, 6, 9]], [[5, 9, -1]]]):
        other = torch.tensor(wrong)
        with pytest.raises(Invalid, match="must all end with the same one, which occurs nowhere else in them"):
            _ = Prompts(ids, other, other[:, 0], ids).stop


@pytest.mark.parametrize("arm", ["sft_oracle", "iterative_sft"])
def test_arms_for_one_token_are_refused_with_the_params(tmp_path: Path, arm: str) -> None:
    params = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text())
    params["new_task"], params["arms"] = "sums", [*params["arms"], arm]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(Invalid, match=f"arms: '{arm}' learns from answers of one token: must be left out"):
        load_params(tmp_path / "params.yaml")
