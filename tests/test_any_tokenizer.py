"""The tasks in the tokens of any tokenizer: ids, positions and answers, against the text that the ids decode to."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stages.pipeline.checkpoints import load_tokenizer
from stages.pipeline.stage import Invalid
from stages.tasks.contexts import SPLITS, Contexts, Split, draw_absent_label, draw_contexts, splits
from stages.tasks.desiderata import draw_pairs, floors
from stages.tasks.entity_tracking import draw_examples, draw_queries
from stages.tasks.new_tasks import NEW_TASKS, RELATIONS
from stages.tasks.old.boxes import Boxes
from stages.tasks.relations import draw_prompts, query_words
from stages.tasks.shortcuts import shortcut_scores
from stages.tasks.templates import TEMPLATES, context_pattern, places, render
from stages.tasks.tokenizer import build_tokenizer
from stages.tasks.vocabulary import BOS, LABELS, OBJECTS, TextVocabulary, vocabulary, vocabulary_of

STARTS = "<|start|>"


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def split_words_tokenizer(more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows objects, labels and verbs, and `more`, as one token, and cuts all other words to
    pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=5000,
        special_tokens=[STARTS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    known = [f" {word}" for word in (*OBJECTS, *LABELS, "contains", "borders", "lacks", "precedes", *more)]
    tokenizer.train_from_iterator(known * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=STARTS, eos_token=STARTS)


@pytest.fixture(params=["word-level as any other", "words in pieces", "SmolLM2", "SmolLM2 with a start"])
def said(request: pytest.FixtureRequest) -> TextVocabulary:
    if request.param == "word-level as any other":
        plain = vocabulary()
        return TextVocabulary(plain.objects, plain.labels, build_tokenizer(), (plain.ids[BOS],))
    if request.param == "words in pieces":
        found = vocabulary_of(split_words_tokenizer(), STARTS)
    else:
        tokenizer = load_tokenizer(request.getfixturevalue("smollm2"))
        found = vocabulary_of(tokenizer, "<|endoftext|>" if "start" in request.param else None)
    assert isinstance(found, TextVocabulary)
    return found


def text_of(vocabulary: TextVocabulary, ids: torch.Tensor) -> str:
    assert tuple(ids[: len(vocabulary.bos)].tolist()) == vocabulary.bos
    text = vocabulary.tokenizer.decode(ids[len(vocabulary.bos) :], clean_up_tokenization_spaces=False)
    return re.sub(r" ([,.])", r"\1", text)  # the word-level tokenizer decodes with a space before a mark


def read(text: str) -> tuple[list[tuple[str, str]], str, str]:
    """(object, label) of each clause, and label and verb of the query, of a text in the standard wording."""
    context, _, query = text.rpartition(". ")
    match = re.fullmatch(r"Box (\w) (\w+) the", query)
    assert match, text
    clauses = [re.fullmatch(r"[Tt]he (\w+) is in Box (\w)", clause) for clause in context.split(", ")]
    return [(clause[1], clause[2]) for clause in clauses if clause], match[1], match[2]


def of_unequal_length(vocabulary: TextVocabulary, template: str) -> bool:
    """The text begins with the clause that is said differently, in capitals, and these are other tokens."""
    return template == "other_order" and len(vocabulary.pieces((BOS, "The"))[1]) > 1


def word_at(vocabulary: TextVocabulary, ids: torch.Tensor, at: torch.Tensor) -> str:
    return vocabulary.tokenizer.decode([int(ids[at])]).strip()


def test_word_level_prompts_are_the_same_both_ways() -> None:
    plain = vocabulary()
    as_text = TextVocabulary(plain.objects, plain.labels, build_tokenizer(), (plain.ids[BOS],))
    assert vocabulary_of(build_tokenizer(), BOS) is plain
    contexts = draw_contexts(rng(), Split.TRAIN, 5, 4)
    extra = draw_absent_label(rng(), contexts)
    for template in TEMPLATES:
        words = context_pattern(template, 4, 2).words + query_words(2, "contains")
        assert (render(plain, words, contexts, extra) == render(as_text, words, contexts, extra)).all()
        assert (places(plain, words) == places(as_text, words)).all()


@pytest.mark.parametrize("boxes", [3, 7])
def test_examples_say_in_text_what_they_mean(said: TextVocabulary, boxes: int) -> None:
    examples = draw_examples(rng(1), said, Split.EVALUATION, 21, boxes)
    for i in range(len(examples)):
        ids = examples.input_ids[i]
        text = text_of(said, ids)
        whole = said.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert [*said.bos, *whole] == ids.tolist()
        context, label, verb = read(text)
        assert verb == "contains" and len(context) == boxes
        answer = dict((where, name) for name, where in context)[label]
        assert said.tokenizer.decode([int(examples.answer[i])]).strip() == answer
        others = [said.tokenizer.decode([int(other)]).strip() for other in examples.others[i]]
        assert others == [name for name, _ in context if name != answer]
        # an answer is the very token that follows the prompt
        assert said.tokenizer(f"{text} {answer}", add_special_tokens=False)["input_ids"] == [
            *whole,
            int(examples.answer[i]),
        ]
        at = {name: index[i] for name, index in examples.positions.items()}
        assert int(at["last"]) == len(ids) - 1
        assert word_at(said, ids, at["query_label"]) == word_at(said, ids, at["earlier_label"]) == label
        assert int(at["query_label"]) > int(at["earlier_label"])
        assert word_at(said, ids, at["earlier_object"]) == answer
        assert word_at(said, ids, at["earlier_separator"]) in {",", "."}
        corrupt, asked, _ = read(text_of(said, examples.corrupt_ids[i]))
        assert asked not in {where for _, where in context + corrupt}
        assert not {name for name, _ in context} & {name for name, _ in corrupt}
        there = examples.corrupt_positions["query_label"][i]
        assert word_at(said, examples.corrupt_ids[i], there) == asked


def test_words_of_several_tokens_are_not_drawn(smollm2: Any) -> None:
    found = vocabulary_of(load_tokenizer(smollm2), None)
    left_out = [word for word, usable in zip(OBJECTS, found.pool.objects, strict=True) if not usable]
    assert left_out == ["bracelet", "scarf", "zipper"]
    drawn = draw_contexts(rng(), Split.TRAIN, 2000, 7, pool=found.pool).objects
    assert set(drawn.ravel()) == set(np.flatnonzero(found.pool.objects))
    assert floors(draw_pairs(rng(), found, "positional", Split.TRAIN, 8, 3), found, 3)["random_object"] == 1 / 82


@pytest.mark.parametrize("task", RELATIONS)
def test_relations_are_as_long_as_the_old_task_and_right(said: TextVocabulary, task: str) -> None:
    relation = RELATIONS[task]
    prompts = draw_prompts(relation, rng(2), said, Split.SELECTION, 24, 4)
    assert prompts.input_ids.shape[1] == draw_examples(rng(), said, Split.TRAIN, 1, 4).input_ids.shape[1]
    own = []
    for i in range(len(prompts)):
        context, label, verb = read(text_of(said, prompts.input_ids[i]))
        assert verb == relation.sign(said)
        clause = [where for _, where in context].index(label)
        right = [context[c][0] for c in relation.valid(4, clause)]
        valid = [said.tokenizer.decode([int(index)]).strip() for index in prompts.valid[i] if index >= 0]
        assert valid == right and int(prompts.canonical[i]) == int(prompts.valid[i][0])
        own.append(clause in relation.valid(4, clause))
    scores = shortcut_scores(prompts, said)
    assert scores.get("own_object", 1.0) == np.mean(own)


def test_repeats_has_the_object_of_two_boxes_as_its_answer(said: TextVocabulary) -> None:
    task = NEW_TASKS["repeats"]
    if not said.is_one_token("Two"):
        with pytest.raises(Invalid, match="no token for 'Two': must have one"):
            task.draw(rng(), said, Split.TRAIN, 1, 4)
        return
    prompts = task.draw(rng(2), said, Split.SELECTION, 24, 4)
    assert prompts.input_ids.shape[1] == draw_examples(rng(), said, Split.TRAIN, 1, 4).input_ids.shape[1]
    pairs = Counter[tuple[int, ...]]()
    for i in range(len(prompts)):
        text, _, question = text_of(said, prompts.input_ids[i]).rpartition(". ")
        assert question == "Two boxes contain the"
        context = read(f"{text}. Box A contains the")[0]
        objects, labels = ([word for word, _ in context], [label for _, label in context])
        again = [index for index, word in enumerate(objects) if objects.count(word) > 1]
        assert len(again) == 2 and len(set(labels)) == 4
        pairs[tuple(again)] += 1
        assert int(prompts.canonical[i]) == int(prompts.valid[i][0])
        assert said.tokenizer.decode([int(prompts.canonical[i])]).strip() == objects[again[0]]
        named = [said.tokenizer.decode([int(index)]).strip() for index in prompts.objects[i]]
        assert sorted(named) == sorted(set(objects))
        where = Contexts(
            *(np.array([[of.index(word) for word in row]]) for of, row in ((OBJECTS, objects), (LABELS, labels)))
        )
        assert SPLITS[int(splits(where)[0])] == Split.SELECTION
    assert len(pairs) == 6
    assert task.shortcuts(prompts, said) == {"random_object": 1 / 3, "random_clause": 2 / 4}


@pytest.mark.parametrize("wording", ["", *Boxes.wordings])
def test_desiderata_in_every_wording(said: TextVocabulary, wording: str) -> None:
    if of_unequal_length(said, wording):
        with pytest.raises(Invalid, match=rf"wording '{wording}': prompts of 3 boxes have \d+ to \d+ tokens"):
            draw_pairs(rng(3), said, f"positional-{wording}", Split.DISCOVERY, 6, 3)
        return
    for hypothesis in Boxes.desiderata:
        pairs = draw_pairs(rng(3), said, f"{hypothesis}-{wording}".rstrip("-"), Split.DISCOVERY, 6, 3)
        for i in range(len(pairs)):
            base, source = pairs.base_ids[i], pairs.source_ids[i]
            assert [*said.bos, *said.tokenizer(text_of(said, source), add_special_tokens=False)["input_ids"]] == (
                source.tolist()
            )
            here, there = pairs.base_positions, pairs.source_positions
            asked = word_at(said, source, there["query_label"][i])
            assert word_at(said, source, there["earlier_label"][i]) == asked
            assert int(there["last"][i]) == len(source) - 1 and int(here["last"][i]) == len(base) - 1
            assert word_at(said, base, here["earlier_object"][i]) == (
                said.tokenizer.decode([int(pairs.clean_answer[i])]).strip()
            )


@pytest.mark.parametrize("template", TEMPLATES)
def test_queries_of_every_template_have_their_answer(said: TextVocabulary, template: str) -> None:
    if of_unequal_length(said, template):
        return
    ids, answers = draw_queries(rng(4), said, template, Split.SELECTION, 6, 3)
    for row, answer in zip(ids, answers, strict=True):
        text, word = text_of(said, row), said.tokenizer.decode([int(answer)]).strip()
        label = re.search(r"Box (\w) contains the$", text)
        assert label
        says = (rf"\b{word},? is (contained in the|in) Box {label[1]}\b", rf"Box {label[1]} contains the {word}\b")
        assert any(re.search(pattern, text) for pattern in says), (text, word)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: vocabulary_of(split_words_tokenizer(), "<bos>"), "bos = '<bos>': must be one token"),
        (lambda: vocabulary_of(build_tokenizer(), None), "bos = None: must be '<bos>' with the word-level tokenizer"),
        (
            lambda: NEW_TASKS["arithmetic"].draw(
                rng(), vocabulary_of(split_words_tokenizer(), STARTS), Split.TRAIN, 1, 3
            ),
            "numbers must be one token each",
        ),
    ],
)
def test_what_cannot_be_said_is_one_sentence(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(Invalid, match=re.escape(sentence)):
        make()


def test_a_tokenizer_without_the_words_is_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "fan": 1, "A": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    found = vocabulary_of(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]"), None)
    with pytest.raises(Invalid, match="boxes = 3: 1 objects and 1 labels are left"):
        draw_examples(rng(), found, Split.TRAIN, 4, 3)


def test_a_tokenizer_that_joins_words_is_refused() -> None:
    """One that merges across spaces gives the whole text other tokens than its words."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=2000, show_progress=False)
    words = [f" {word}" for word in (*OBJECTS, *LABELS, "contains")]
    tokenizer.train_from_iterator([*words * 9, "The is in Box, the is in Box." * 50], trainer)
    found = vocabulary_of(PreTrainedTokenizerFast(tokenizer_object=tokenizer), None)
    with pytest.raises(Invalid, match="makes other tokens of .* as a whole than of its words one by one"):
        draw_examples(rng(), found, Split.TRAIN, 4, 3)
