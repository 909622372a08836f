"""Tasks: token ids, positions, right answers and splits, against plain-Python readings of the prompts."""

import hashlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from stages import synthesize
from stages.pipeline.checkpoints import load_tokenizer
from stages.pipeline.stage import Cell, Invalid
from stages.synthesize import OLD_SPLITS, PAIR_SPLITS
from stages.tasks import arithmetic
from stages.tasks.contexts import SPLITS, Contexts, Split, draw_absent_label, draw_contexts, splits
from stages.tasks.desiderata import draw_pairs, floors
from stages.tasks.entity_tracking import POSITIONS, draw_examples
from stages.tasks.examples import (
    read_examples,
    read_pairs,
    read_prompts,
    write_examples,
    write_pairs,
    write_prompts,
)
from stages.tasks.new_tasks import NEW_TASKS, RELATIONS
from stages.tasks.old.boxes import Boxes
from stages.tasks.relations import draw_prompts, make_prompts, query_words, target_weights
from stages.tasks.shortcuts import shortcut_scores
from stages.tasks.templates import TEMPLATES, context_pattern, render
from stages.tasks.tokenizer import build_tokenizer
from stages.tasks.vocabulary import LABELS, OBJECTS, SPECIAL, UNK, WORDS, vocabulary

VOCABULARY = vocabulary()
HYPOTHESES = tuple(Boxes.desiderata)


def words_of(ids: torch.Tensor) -> list[str]:
    return [WORDS[int(index)] for index in ids]


def read_context(ids: torch.Tensor) -> list[tuple[str, str]]:
    """(object, label) of each clause, read from the words."""
    words = words_of(ids)
    return [(words[i - 1], words[i + 3]) for i, word in enumerate(words) if word == "is"]


def query_of(ids: torch.Tensor) -> tuple[str, str]:
    """Label and verb of the query."""
    words = words_of(ids)
    return words[-3], words[-2]


def split_of(ids: torch.Tensor) -> int:
    """Split of a prompt, from its words alone."""
    pairs = read_context(ids)
    objects = np.array([[OBJECTS.index(name) for name, _ in pairs]])
    labels = np.array([[LABELS.index(label) for _, label in pairs]])
    return int(splits(Contexts(objects, labels))[0])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_vocabulary_has_85_objects_and_26_labels_of_one_token_each() -> None:
    assert len(set(OBJECTS)) == 85 and len(set(LABELS)) == 26
    assert len(set(WORDS)) == len(WORDS)
    tokenizer = build_tokenizer()
    for word in (*OBJECTS, *LABELS):
        assert tokenizer.encode(word, add_special_tokens=False) == [VOCABULARY.ids[word]]


def test_tokenizer_reads_natural_text_and_loads_from_its_files(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    text = "The fan is in Box Z, the cross is in Box J. Box Z contains the"
    words = "<bos> The fan is in Box Z , the cross is in Box J . Box Z contains the".split()
    assert tokenizer.encode(text) == VOCABULARY.encode(words)
    assert tokenizer.get_vocab() == VOCABULARY.ids
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert special == [0, 1, 2, 3]
    assert tokenizer.encode("zebra", add_special_tokens=False) == [VOCABULARY.ids[UNK]]
    batch = tokenizer(["The fan", text], padding=True, return_tensors="pt")
    assert batch["input_ids"][0, -1] == VOCABULARY.ids["fan"]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("boxes", [2, 7, 25])
def test_every_template_is_what_the_tokenizer_makes_of_its_text(template: str, boxes: int) -> None:
    contexts = draw_contexts(rng(), Split.TRAIN, 2, boxes)
    extra = draw_absent_label(rng(), contexts)
    clause = boxes - 1
    pattern = context_pattern(template, boxes, clause)
    ids = render(VOCABULARY, pattern.words + query_words(clause, "contains"), contexts, extra)
    text = " ".join(WORDS[i] for i in ids[0][1:])
    assert build_tokenizer().encode(text) == ids[0].tolist()
    assert not set(ids.ravel()) & {VOCABULARY.ids[word] for word in SPECIAL if word != "<bos>"}
    for name in ("objects", "labels"):
        at = getattr(pattern, name)
        assert (ids[:, at] == getattr(VOCABULARY, name)[getattr(contexts, name)]).all()
    assert (extra[:, None] != contexts.labels).all()  # a template's own box is not one of the context's


def test_standard_prompt_has_54_tokens_and_the_positions_of_the_paper() -> None:
    examples = draw_examples(rng(), VOCABULARY, Split.DISCOVERY, 70, 7)
    assert examples.input_ids.shape == (70, 54)
    assert examples.corrupt_ids.shape == (70, 54)
    clause = torch.div(examples.positions["earlier_object"] - 2, 7, rounding_mode="floor")
    assert Counter(clause.tolist()) == {c: 10 for c in range(7)}
    for positions, of in ((examples.positions, clause), (examples.corrupt_positions, None)):
        assert tuple(positions) == POSITIONS
        assert (positions["last"] == 53).all() and (positions["query_label"] == 51).all()
        assert (positions["earlier_label"] - positions["earlier_object"] == 4).all()
        assert (positions["earlier_separator"] - positions["earlier_object"] == 5).all()
        assert of is None or (positions["earlier_object"] == 2 + 7 * of).all()


@pytest.mark.parametrize("boxes", [2, 3, 7, 25])
def test_examples_mean_what_they_say(boxes: int) -> None:
    examples = draw_examples(rng(1), VOCABULARY, Split.EVALUATION, 40, boxes)
    assert examples.input_ids.shape[1] == 7 * boxes + 5
    for i in range(len(examples)):
        clean, corrupt = read_context(examples.input_ids[i]), read_context(examples.corrupt_ids[i])
        label, _ = query_of(examples.input_ids[i])
        (answer,) = [name for name, where in clean if where == label]
        assert WORDS[int(examples.answer[i])] == answer
        assert words_of(examples.others[i]) == [name for name, _ in clean if name != answer]
        assert words_of(examples.input_ids[i])[examples.positions["earlier_object"][i]] == answer
        assert words_of(examples.input_ids[i])[examples.positions["earlier_label"][i]] == label
        assert words_of(examples.input_ids[i])[examples.positions["earlier_separator"][i]] in {",", "."}
        for name, inside in (
            ("earlier_object", [name for name, _ in clean]),
            ("earlier_label", [at for _, at in clean]),
        ):
            assert words_of(examples.input_ids[i][examples.every_clause[name][i]]) == inside
        assert len({name for name, _ in clean + corrupt}) == 2 * boxes  # no shared object
        asked, _ = query_of(examples.corrupt_ids[i])
        assert asked not in {where for _, where in clean + corrupt}
        assert split_of(examples.input_ids[i]) == split_of(examples.corrupt_ids[i]) == SPLITS.index("evaluation")
    for name in ("earlier_object", "earlier_label", "earlier_separator"):
        assert (examples.corrupt_positions[name] != examples.positions[name]).all()


def test_prompts_for_means_ask_for_random_letters() -> None:
    examples = draw_examples(rng(), VOCABULARY, Split.PRUNING, 512, 7, random_query=True)
    asked = Counter(query_of(ids)[0] for ids in examples.input_ids)
    assert len(asked) == 26 and max(asked.values()) < 3 * 512 / 26
    absent = [query_of(ids)[0] not in {label for _, label in read_context(ids)} for ids in examples.input_ids]
    assert abs(np.mean(absent) - 19 / 26) < 0.08


def test_splits_are_disjoint_and_stable() -> None:
    seen: dict[bytes, str] = {}
    for split in Split:
        contexts = draw_contexts(rng(0), split, 4000, 2)  # the same seed, and few contexts: collisions are likely
        assert (splits(contexts) == SPLITS.index(split)).all()
        for row in np.c_[contexts.objects, contexts.labels]:
            assert seen.setdefault(row.tobytes(), split) == split
    everything = Contexts(*(np.argsort(rng(2).random((20000, of)), axis=1)[:, :7] for of in (85, 26)))
    shares = np.bincount(splits(everything), minlength=6) / 20000
    assert np.abs(shares - np.array([24, 8, 8, 8, 8, 8]) / 64).max() < 0.015
    # the split of a context may never change: a base trained before would have seen evaluation contexts
    digest = hashlib.sha256(splits(everything)[:1000].astype(np.uint8).tobytes()).hexdigest()
    assert digest.startswith("a9c9539bcbe81e8c")


def test_files_of_different_splits_share_no_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All files of stage `synthesize`: every prompt's context, read from its words, is of the one split that the file
    may have, clean and corrupt prompts alike. Few boxes, so that a draw from elsewhere would collide."""
    monkeypatch.chdir(tmp_path)
    sizes = {
        "old": dict.fromkeys(OLD_SPLITS, 60),
        "new": dict.fromkeys(("train", "selection", "evaluation"), 60),
        "desiderata": dict.fromkeys(PAIR_SPLITS, 60),
    }
    params = {
        "synthesize": SimpleNamespace(seed=0, boxes=3, **sizes),
        "dcm.desiderata": HYPOTHESES[:2],
        "dcm.of_base": HYPOTHESES[2:],
        "old_task": "boxes",
        "source.bos": "<bos>",
        "new_task": "adjacent",
    }
    build_tokenizer().save_pretrained("models/source")
    monkeypatch.setattr(Cell, "params", lambda self, path: params[path])
    synthesize.main(Cell("synthesize", {}))
    allowed = {f"old/{name}": split for name, split in OLD_SPLITS.items()} | {"old/train": Split.TRAIN}
    tasks = set(NEW_TASKS) - {"ioi", "sums", "repeats"}  # names, numbers of several tokens, a question that it lacks
    allowed |= {f"new/{task}/{split}": split for task in tasks for split in ("train", "selection", "evaluation")}
    allowed |= {f"desiderata/{d}/{name}": split for d in HYPOTHESES for name, split in PAIR_SPLITS.items()}
    written = {path.relative_to("data").with_suffix("").as_posix() for path in Path("data").rglob("*.parquet")}
    assert written == set(allowed)
    seen: dict[frozenset[tuple[Any, str]], str] = {}
    for name, split in allowed.items():
        rows = pd.read_parquet(f"data/{name}.parquet")
        prompts = [column for column in rows if column.endswith("_ids")]
        assert prompts, name
        for ids in (ids for column in prompts for ids in rows[column]):
            if name.startswith("new/arithmetic/"):  # sums have no context; a split is one of orders of numbers
                assert seen.setdefault(frozenset(enumerate(words_of(ids))), split) == split, name
                continue
            assert SPLITS[split_of(ids)] == split, name
            assert seen.setdefault(frozenset(read_context(ids)), split) == split, name
    assert len(seen) > 1000 and set(seen.values()) == set(SPLITS)


def test_too_many_boxes_are_refused() -> None:
    with pytest.raises(ValueError, match="boxes = 26"):
        draw_examples(rng(), VOCABULARY, Split.TRAIN, 2, 26)


def test_too_few_boxes_for_desiderata_are_refused() -> None:
    with pytest.raises(Invalid, match="synthesize.boxes = 2: must be at least 3"):
        draw_pairs(rng(), VOCABULARY, "positional", Split.TRAIN, 2, 2)


ORACLE = {  # task -> (clause asked for, all clauses) -> right clauses
    "adjacent": lambda c, k: {(c + 1) % k, (c - 1) % k},
    "lacks": lambda c, k: set(range(k)) - {c},
    "precedes": lambda c, k: {c + 1},
    "contains": lambda c, k: {c},
}
VERB = {"adjacent": "adjoins", "lacks": "lacks", "precedes": "precedes", "contains": "contains"}


@pytest.mark.parametrize("task", RELATIONS)
@pytest.mark.parametrize("boxes", [3, 7, 25])
def test_new_tasks_have_the_right_answers(task: str, boxes: int) -> None:
    prompts = draw_prompts(RELATIONS[task], rng(3), VOCABULARY, Split.SELECTION, 56, boxes)
    assert prompts.input_ids.shape == (56, 7 * boxes + 5)
    asked = Counter()
    for i in range(len(prompts)):
        context = read_context(prompts.input_ids[i])
        label, verb = query_of(prompts.input_ids[i])
        assert verb == VERB[task]
        clause = [where for _, where in context].index(label)
        asked[clause] += 1
        right = {context[c][0] for c in ORACLE[task](clause, boxes)}
        valid = [WORDS[int(index)] for index in prompts.valid[i] if index >= 0]
        assert len(valid) == len(set(valid)) and set(valid) == right
        canonical = min(right, key=[n for n, _ in context].index) if task == "lacks" else None
        expected = canonical or context[(clause + (task != "contains")) % boxes][0]
        assert WORDS[int(prompts.canonical[i])] == expected
        assert words_of(prompts.objects[i]) == [name for name, _ in context]
        assert split_of(prompts.input_ids[i]) == SPLITS.index("selection")
    assert max(asked.values()) - min(asked.values()) <= 1
    assert (boxes - 1 in asked) == (task != "precedes")


def test_two_boxes_have_one_neighbour() -> None:
    prompts = draw_prompts(RELATIONS["adjacent"], rng(), VOCABULARY, Split.TRAIN, 4, 2)
    assert prompts.valid.shape == (4, 1)
    assert (prompts.valid[:, 0] != -1).all()


def test_soft_targets_sum_to_one() -> None:
    weights = target_weights(RELATIONS["adjacent"], 7, 0.4)
    assert weights[0].tolist() == pytest.approx([0.4, 0.3, 0, 0, 0, 0, 0.3])
    assert target_weights(RELATIONS["precedes"], 7, 0.4).sum(axis=1).tolist() == pytest.approx([1] * 6 + [0])


def test_shortcuts_are_scored_from_the_prompts() -> None:
    expected = {"adjacent": 2 / 7, "lacks": 6 / 7, "precedes": 1 / 7, "contains": 1 / 7}
    for task, chance in expected.items():
        scores = shortcut_scores(draw_prompts(RELATIONS[task], rng(4), VOCABULARY, Split.TRAIN, 4200, 7), VOCABULARY)
        print(task, scores)
        assert scores["random_context_object"] == pytest.approx(chance)
        assert scores.get("own_object") == (None if task == "contains" else 0)  # there it is the task itself
        assert max(scores.values()) < chance + 0.05
    # worked by hand: three boxes, always the first one asked for, so its neighbours are clauses 1 and 2
    contexts = draw_contexts(rng(), Split.TRAIN, 8, 3)
    prompts = make_prompts(VOCABULARY, RELATIONS["adjacent"], contexts, np.zeros(8, np.int64))
    by_hand = shortcut_scores(prompts, VOCABULARY)
    assert by_hand["first_object"] == by_hand["own_object"] == 0
    assert by_hand["last_object"] == by_hand["most_frequent_canonical_clause"] == 1
    assert by_hand["random_context_object"] == pytest.approx(2 / 3)


def read_sums(ids: torch.Tensor) -> tuple[list[str], list[list[int]]]:
    """Words of a prompt of arithmetic, and the numbers of its whole sums with their results, the question last."""
    words = words_of(ids)
    *solved, asked = " ".join(words[1:]).split(" , ")
    full = [part for part in solved if len(part.split()) == 2 * arithmetic.NUMBERS + 1]
    sums = [[int(word) for word in part.split() if word.isdigit()] for part in (*full, asked)]
    return words, sums


@pytest.mark.parametrize("boxes", [3, 7, 25])
def test_sums_are_right_as_long_as_old_prompts_and_of_their_split(boxes: int) -> None:
    known = {tuple(row) for row in arithmetic.questions(Split.TRAIN).tolist()}
    for split in (Split.TRAIN, Split.SELECTION, Split.EVALUATION):
        prompts = arithmetic.draw_prompts(rng(3), VOCABULARY, split, 60, boxes)
        assert (
            prompts.input_ids.shape == draw_examples(rng(), VOCABULARY, split, 1, boxes).input_ids.expand(60, -1).shape
        )
        own = {tuple(row) for row in arithmetic.questions(split).tolist()}
        for ids, right, canonical, results in zip(*vars(prompts).values(), strict=True):
            words, (*solved, asked) = read_sums(ids)
            assert words[0] == "<bos>" and words[-1] == "=" and "Box" not in words
            assert all(sum(numbers) == result for *numbers, result in solved)
            assert all(tuple(numbers) in known for *numbers, _ in solved)
            assert tuple(asked) in own and words_of(right) == [str(sum(asked))] == [WORDS[int(canonical)]]
            assert int(canonical) in results.tolist()
            assert not set(asked) & {sum(asked)}  # no number of a question is its answer
            assert build_tokenizer().encode(" ".join(words[1:])) == ids.tolist()


def test_questions_belong_to_one_split_each_for_ever() -> None:
    sets = [
        {tuple(q) for q in arithmetic.questions(s).tolist()} for s in (Split.TRAIN, Split.SELECTION, Split.EVALUATION)
    ]
    sizes = [len(questions) for questions in sets]
    print(sizes)
    assert len(set.union(*sets)) == sum(sizes) == arithmetic.LARGEST**arithmetic.NUMBERS
    assert min(sizes) > 0.12 * sum(sizes) and sizes[0] > 0.5 * sum(sizes)
    digest = hashlib.sha256(repr([sorted(questions) for questions in sets]).encode()).hexdigest()
    assert digest.startswith("12053881e443bc8e")
    with pytest.raises(ValueError, match="no questions in split 'pruning'"):
        arithmetic.questions(Split.PRUNING)


def test_shortcuts_of_arithmetic() -> None:
    prompts = arithmetic.draw_prompts(rng(4), VOCABULARY, Split.TRAIN, 3000, 7)
    scores = arithmetic.shortcut_scores(prompts, VOCABULARY)
    print(scores)
    sums = [read_sums(ids)[1] for ids in prompts.input_ids]
    assert scores["last_result"] == pytest.approx(np.mean([s[-2][-1] == sum(s[-1]) for s in sums]))
    shared = [[sum((Counter(n) & Counter(s[-1])).values()) for *n, _ in s[:-1]] for s in sums]
    alike = [max(range(len(row)), key=lambda i, row=row: (row[i], i)) for row in shared]
    assert scores["result_of_most_alike"] == pytest.approx(
        np.mean([s[i][-1] == sum(s[-1]) for s, i in zip(sums, alike, strict=True)])
    )
    frequent = Counter(sum(s[-1]) for s in sums).most_common(1)[0][1] / len(sums)
    assert scores["most_frequent_answer"] == pytest.approx(frequent)
    assert max(scores.values()) < 0.8


@pytest.mark.parametrize("desideratum", HYPOTHESES)
@pytest.mark.parametrize("boxes", [3, 7, 25])
def test_desiderata_cannot_be_confused(desideratum: str, boxes: int) -> None:
    n = 126 if boxes == 7 else 4 * boxes
    pairs = draw_pairs(rng(5), VOCABULARY, desideratum, Split.EVALUATION, n, boxes)
    shift = Counter()
    for i in range(len(pairs)):
        base, source = read_context(pairs.base_ids[i]), read_context(pairs.source_ids[i])
        base_labels, source_labels = [w for _, w in base], [w for _, w in source]
        base_clause = base_labels.index(query_of(pairs.base_ids[i])[0])
        asked = query_of(pairs.source_ids[i])[0]
        source_clause = source_labels.index(asked)
        assert len(set(source_labels)) == boxes
        shift[(source_clause - base_clause) % boxes] += 1
        hypotheses = {"clean": base[base_clause][0], "positional": base[source_clause][0]}
        hypotheses["object_value"] = source[source_clause][0]
        if desideratum == "next_clause":
            hypotheses["next_clause"] = base[(source_clause + 1) % boxes][0]
        if asked in base_labels:
            hypotheses["box_label_value"] = dict(zip(base_labels, (n for n, _ in base), strict=True))[asked]
        assert len(set(hypotheses.values())) == len(hypotheses)
        assert WORDS[int(pairs.target[i])] == hypotheses[desideratum]
        assert WORDS[int(pairs.clean_answer[i])] == hypotheses["clean"]
        assert ("box_label_value" in hypotheses) == (desideratum == "box_label_value")
        for ids, positions, clause in (
            (pairs.base_ids[i], pairs.base_positions, base_clause),
            (pairs.source_ids[i], pairs.source_positions, source_clause),
        ):
            assert int(positions["earlier_object"][i]) == 2 + 7 * clause
            assert words_of(ids)[positions["earlier_label"][i]] == query_of(ids)[0]
            assert split_of(ids) == SPLITS.index("evaluation")
    assert 0 not in shift  # never the base's own clause
    if boxes == 7:
        print(shift)
        others = 5 if desideratum == "next_clause" else 6  # of the control, not the one before the base's own either
        assert len(shift) == others
        assert max(shift.values()) < 2 * 126 / others
    assert floors(pairs, VOCABULARY, boxes)["clean_answer"] == 0
    in_base = floors(pairs, VOCABULARY, boxes)["random_base_object"]
    assert in_base == pytest.approx(0 if desideratum == "object_value" else 1 / boxes)


@pytest.mark.parametrize("wording", Boxes.wordings)
@pytest.mark.parametrize("boxes", [3, 7, 25])
def test_a_source_of_another_wording_asks_the_same(wording: str, boxes: int) -> None:
    plain, worded = (
        draw_pairs(rng(5), VOCABULARY, name, Split.EVALUATION, 42, boxes)
        for name in ("object_value", f"object_value-{wording}")
    )
    assert torch.equal(plain.base_ids, worded.base_ids) and torch.equal(plain.target, worded.target)
    assert not torch.equal(plain.source_ids, worded.source_ids)
    for i in range(len(worded)):
        words = words_of(worded.source_ids[i])
        at = {name: int(position[i]) for name, position in worded.source_positions.items()}
        label, context = query_of(plain.source_ids[i])[0], words_of(plain.source_ids[i])
        assert at["last"] == len(words) - 1 and words[-4:] == ["Box", label, "contains", "the"]
        assert at["query_label"] == len(words) - 3
        assert words[at["earlier_label"]] == label and words.count(label) == 2
        assert words[at["earlier_object"]] == WORDS[int(worded.target[i])]
        assert at["earlier_separator"] == max(at["earlier_label"], at["earlier_object"]) + 1
        assert {word for word in context if word not in words} <= {"The", "the", "is", "in", ","}


@pytest.mark.parametrize("name", ["position", "positional-", "positional-standard", "positional-loud", ""])
def test_an_unknown_desideratum_is_refused(name: str) -> None:
    with pytest.raises(Invalid, match="desideratum"):
        draw_pairs(rng(), VOCABULARY, name, Split.TRAIN, 3, 7)


def test_files_give_back_what_was_written_and_the_same_bytes(tmp_path: Path) -> None:
    sets: Any = (
        (draw_examples(rng(), VOCABULARY, Split.TRAIN, 9, 7), write_examples, read_examples),
        (draw_prompts(RELATIONS["lacks"], rng(), VOCABULARY, Split.TRAIN, 9, 7), write_prompts, read_prompts),
        (draw_pairs(rng(), VOCABULARY, "positional", Split.TRAIN, 9, 7), write_pairs, read_pairs),
    )
    for rows, write, read in sets:
        write(tmp_path / "a.parquet", rows)
        again = read(tmp_path / "a.parquet")
        write(tmp_path / "b.parquet", again)
        assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
        assert len(again) == 9 and len(again.select(slice(2, 5))) == 3
        for name, value in vars(rows).items():
            other = getattr(again, name)
            if isinstance(value, dict):
                assert all(torch.equal(value[key], other[key]) for key in value) and list(value) == list(other)
            else:
                assert torch.equal(value, other) and other.dtype == torch.int64


def test_the_same_seed_draws_the_same() -> None:
    first, second, other = (draw_examples(rng(s), VOCABULARY, Split.TRAIN, 20, 7) for s in (1, 1, 2))
    assert torch.equal(first.input_ids, second.input_ids)
    assert torch.equal(first.corrupt_ids, second.corrupt_ids)
    assert not torch.equal(first.input_ids, other.input_ids)
