"""Old tasks: what each one must say of itself, IOI sets for tokenizers of two kinds, and rehearsal of other lengths."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from stages import cmap, dcm, discover, evaluate, synthesize
from stages.circuits.circuit import Circuit, Component, Group
from stages.learning.arms import joint
from stages.pipeline.checkpoints import load_tokenizer, save_model
from stages.pipeline.files import write_json
from stages.pipeline.params import load_params
from stages.pipeline.stage import Cell, Invalid
from stages.tasks import ioi_sets
from stages.tasks.contexts import SPLITS, Split
from stages.tasks.examples import Examples, read_examples, write_examples
from stages.tasks.ioi import NAMES, PLACES, POSITIONS, THINGS
from stages.tasks.new_tasks import NEW_TASKS, impossible
from stages.tasks.old.ioi import Ioi
from stages.tasks.old_task import OldTask
from stages.tasks.old_tasks import FOLDER, old_tasks
from stages.tasks.tokenizer import build_tokenizer
from stages.tasks.vocabulary import FUNCTION, LABELS, OBJECTS, TextVocabulary, vocabulary, vocabulary_of
from tests.conftest import REPOSITORY
from tests.plain_loop import train_plainly
from tests.test_ioi import byte_level
from tests.test_learning import largest_difference, tiny_model, tiny_prompts, tiny_run

TASKS = old_tasks()


def word_level() -> PreTrainedTokenizerFast:
    """One token a word, for all words of IOI and of boxes."""
    said = " ".join(ioi_sets.ALIGNED.values()).replace(",", " ,")
    words = {*said.split(), *NAMES, *PLACES, *THINGS, *OBJECTS, *LABELS, *FUNCTION}
    ids = {word: number for number, word in enumerate(["<pad>", "<s>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<pad>", eos_token="<s>")


@pytest.fixture(params=["words", "words behind a token", "SmolLM2"])
def said(request: pytest.FixtureRequest) -> TextVocabulary:
    if request.param == "SmolLM2":
        found = vocabulary_of(load_tokenizer(request.getfixturevalue("smollm2")), None)
    else:
        found = vocabulary_of(word_level(), "<s>" if "behind" in request.param else None)
    assert isinstance(found, TextVocabulary)
    return found


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def text(vocabulary: TextVocabulary, ids: Any) -> list[str]:
    """The words of a prompt, less what stands in front."""
    return [word(vocabulary, token) for token in ids[len(vocabulary.bos) :]]


def word(vocabulary: TextVocabulary, token: Any) -> str:
    return str(vocabulary.tokenizer.decode([int(token)])).strip()


# --- any old task


def test_a_task_is_registered_by_being_there() -> None:
    assert set(TASKS) == {path.stem for path in FOLDER.glob("*.py")} - {"__init__"} >= {"boxes", "ioi"}


@pytest.mark.parametrize("name", TASKS)
def test_what_a_task_says_of_itself_holds(name: str) -> None:
    """Positions, hops and desiderata agree with what it draws, and the new task that it equals draws its prompts."""
    kind = TASKS[name]
    assert kind.name == name and kind.same_as in NEW_TASKS
    assert json.loads(json.dumps(kind.described())) == kind.described()
    words = vocabulary_of(word_level(), None)
    task: OldTask = kind(words, 3)
    examples = task.examples(rng(1), Split.DISCOVERY, 24)
    assert set(examples.positions) == set(examples.corrupt_positions) == set(kind.positions) >= set(kind.display)
    assert list(kind.positions)[-1] == examples.readout, "in reading order"
    assert set(examples.every_clause) < set(kind.positions)
    assert (examples.answer[:, None] != examples.others).all() and len(task.means(rng(), Split.PRUNING, 5)) == 5
    assert task.means(rng(), Split.PRUNING, 5).input_ids.shape[1] == examples.input_ids.shape[1]
    groups = ["logits"]
    for hop in kind.paper_hops:
        assert hop.position in kind.positions and hop.receiver in groups
        assert (hop.component is None) == (hop.receiver == "logits")
        groups.append(hop.name)
    for hypothesis in kind.desiderata:
        pairs = task.pairs(rng(2), hypothesis, Split.EVALUATION, 12)
        floors = task.floors(pairs)
        assert floors.pop("clean_answer") == 0.0 and all(0 <= floor < 1 for floor in floors.values())
    with pytest.raises(Invalid, match="desideratum 'taste': must be one of"):
        task.pairs(rng(), "taste", Split.EVALUATION, 2)
    prompts, new = task.prompts(rng(3), Split.TRAIN, 30), NEW_TASKS[kind.same_as]
    assert torch.equal(prompts.input_ids, new.draw(rng(3), words, Split.TRAIN, 30, 3).input_ids)
    assert new.shortcuts(prompts, words) == task.shortcuts(prompts) and new.sign(words) == task.sign()
    assert (prompts.objects == prompts.canonical[:, None]).sum(1).eq(1).all()
    kinds = {(kind, variant): ids for kind, variant, ids, _ in task.variants(rng(4), 6)}
    assert len(kinds) > 3 and all(len(ids) == 6 for ids in kinds.values())


# --- IOI


def test_examples_say_what_they_mean(said: TextVocabulary) -> None:
    task = Ioi(said, 7)
    examples = task.examples(rng(), Split.EVALUATION, 40)
    orders = set()
    for row in range(40):
        words, corrupt = text(said, examples.input_ids[row]), text(said, examples.corrupt_ids[row])
        at = {name: int(places[row]) - len(said.bos) for name, places in examples.positions.items()}
        io, s = word(said, examples.answer[row]), word(said, examples.others[row, 0])
        assert list(at) == list(POSITIONS) and [words[at[name]] for name in ("io", "s1", "s2")] == [io, s, s]
        assert at["s1+1"] == at["s1"] + 1 and at["end"] == len(words) - 1 and words.count(io) == 1
        differ = {place for place, pair in enumerate(zip(words, corrupt, strict=True)) if pair[0] != pair[1]}
        assert differ == {at["io"], at["s1"], at["s2"]} and len({*(corrupt[place] for place in differ), io, s}) == 5
        orders.add((words[0], at["io"] < at["s1"]))
    assert orders == {(word, order) for word in ("When", "After") for order in (True, False)}
    means = task.means(rng(), Split.EVALUATION, 40).input_ids
    assert torch.equal(means, examples.corrupt_ids)


def test_a_pair_of_names_is_in_one_split(said: TextVocabulary) -> None:
    """In whichever order, and whoever is repeated; and the splits do not depend on the tokenizer."""
    sentences = ioi_sets.sentences_of(said)
    assert list(sentences.wordings) == ["gave", "met"] and len(sentences.places) == len(PLACES)
    seen: dict[frozenset[int], str] = {}
    for split in SPLITS:
        prompts = ioi_sets.draw_prompts(rng(), sentences, split, 300)
        for pair in prompts.objects:
            assert seen.setdefault(frozenset(pair.tolist()), split) == split
        for hypothesis in Ioi.desiderata:
            pairs = ioi_sets.draw_pairs(rng(1), sentences, hypothesis, split, 60)
            for ids in torch.cat([pairs.base_ids, pairs.source_ids]):
                names = frozenset(token for token in ids.tolist() if token in set(sentences.names.tolist()))
                assert len(names) == 2 and seen.setdefault(names, split) == split
    first = [(NAMES[a], NAMES[b]) for a, b in sentences.pairs[Split.TRAIN][:3]]
    # for ever, or a base that was taught would have seen pairs of other splits
    assert first == [("Mary", "John"), ("Mary", "James"), ("Mary", "Martin")]


@pytest.mark.parametrize("hypothesis", Ioi.desiderata)
def test_desiderata_cannot_be_confused(said: TextVocabulary, hypothesis: str) -> None:
    """What each hypothesis says of every pair, worked out from the words: the target is what this one says alone."""
    task = Ioi(said, 7)
    pairs = task.pairs(rng(), hypothesis, Split.EVALUATION, 50)
    target = [word(said, token) for token in pairs.target]
    for row in range(50):
        base, source = text(said, pairs.base_ids[row]), text(said, pairs.source_ids[row])
        (io, s1, _, s2, _), (other_io, other_s1, _, other_s2, _) = (
            [int(places[row]) - len(said.bos) for places in at.values()]
            for at in (pairs.base_positions, pairs.source_positions)
        )
        assert base[s1] == base[s2] and source[other_s1] == source[other_s2] and base[0] == source[0]
        # inhibiting the name at the place, or of the identity, of the source's repeated one leaves the other
        by_position = base[s1] if other_s1 == io else base[io]
        by_identity = base[s1] if source[other_s1] == base[io] else base[io]
        says = {"name_value": source[other_io], "s_position": by_position, "s_identity": by_identity}
        assert target[row] == says.pop(hypothesis) and target[row] not in says.values()
        shared = set(base) & set(source) & set(NAMES)
        assert shared == ({base[io]} if hypothesis == "s_identity" else set())


def test_only_wordings_of_one_length_are_used() -> None:
    """For this tokenizer the words of the second wording are several tokens."""
    few = vocabulary_of(byte_level(), None)
    sentences = ioi_sets.sentences_of(few)
    assert list(sentences.wordings) == ["gave"] and int((sentences.names >= 0).sum()) >= 5
    assert set(dict(few_wordings(Ioi(few, 7)))) == {"gave"}


def few_wordings(task: Ioi) -> list[tuple[str, int]]:
    return [(variant, len(ids)) for kind, variant, ids, _ in task.variants(rng(), 3) if kind == "wordings"]


def test_shortcuts_are_at_chance_and_the_toy_has_no_names(said: TextVocabulary) -> None:
    task = Ioi(said, 7)
    scores = task.shortcuts(task.prompts(rng(), Split.TRAIN, 1000))
    assert scores.pop("last_name") == 0.0 and scores.pop("most_frequent_answer") < 0.1
    assert all(score == pytest.approx(0.5, abs=0.02) for score in scores.values()) and len(scores) == 3
    with pytest.raises(Invalid, match="the word-level tokenizer has no names"):
        Ioi(vocabulary(), 7)
    assert "no names" in impossible(vocabulary_of(build_tokenizer(), "<bos>"), 7)["ioi"]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"old_task": "ioi"}, "old_task = 'ioi': must be boxes with source.kind = curriculum"),
    (
        {"source": "package"},
        "dcm.desiderata: desideratum 'positional': must be one of name_value, s_pos",
    ),
    ({"source": "package", "of_base": ["s_position-met"]}, "dcm.of_base: desideratum 's_position-met': must be one of"),
    ({"source": "package", "hops": "paper"}, "discover.hops = paper: must be auto with old_task = ioi"),
]


@pytest.mark.parametrize(("changes", "sentence"), BAD)
def test_params_are_checked_against_the_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], sentence: str
) -> None:
    params = yaml.safe_load((REPOSITORY / "params.yaml").read_text()) | {"old_task": "ioi"}
    params["source"] = params["source"] | {"kind": changes.get("source", "curriculum"), "bos": None}
    if "of_base" in changes or "hops" in changes:
        params["dcm"] |= {"desiderata": list(Ioi.desiderata), "of_base": changes.get("of_base", [])}
    params["discover"] |= {"hops": changes.get("hops", "auto")}
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(params))
    if "hops" in changes:
        load_params(file)  # the paper's hops are there
        monkeypatch.setattr(Ioi, "paper_hops", ())
    with pytest.raises(Invalid) as caught:
        load_params(file)
    assert sentence in str(caught.value)


def test_the_readme_says_how_to_ask_for_ioi(tmp_path: Path) -> None:
    """Its row of the table of questions, as params."""
    [row] = [line for line in (REPOSITORY / "README.md").read_text().splitlines() if "`old_task: ioi`" in line]
    params: dict[str, Any] = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    for setting in re.findall(r"`([a-z_.]+: [^`]+)`", row):
        key, value = next(iter(yaml.safe_load(setting).items()))
        *sections, last = key.split(".")
        target = params
        for name in sections:
            target = target[name]
        target[last] = value
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(params))
    read = load_params(file)
    assert (read.old_task, read.source.kind, set(read.dcm.desiderata)) == ("ioi", "package", set(Ioi.desiderata))


# --- through the stages


def test_a_task_without_clauses_goes_through_the_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """IOI with a model that knows nothing: sets, search by the paper's hops, evaluation, masks and transplants."""
    monkeypatch.chdir(tmp_path)
    tokenizer = word_level()
    tokenizer.save_pretrained("models/source")
    model = tiny_model(vocab_size=len(tokenizer))
    for name in ("base", "arm"):
        save_model(model, tokenizer, Path(f"models/{name}/0"))
    found: dict[str, Any] = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    found["discover"] |= {"examples": 8, "hops": "paper", "identifiable_accuracy": 0.0}
    found["dcm"] |= {"desiderata": list(Ioi.desiderata), "steps": 2, "batch": 4}
    found["evaluate"] |= {"greedy_examples": 4}
    found["synthesize"] |= {
        "old": dict.fromkeys(synthesize.OLD_SPLITS, 8),
        "new": dict.fromkeys(("train", "selection", "evaluation"), 16),
        "desiderata": dict.fromkeys(synthesize.PAIR_SPLITS, 6),
        "boxes": 3,
    }
    given: dict[str, Any] = {"old_task": "ioi", "new_task": "adjacent", "source.bos": None}
    given |= {key: section(found[key]) for key in ("synthesize", "discover", "evaluate", "dcm", "cmap")}
    given |= {"dcm.desiderata": found["dcm"]["desiderata"], "dcm.of_base": []}
    monkeypatch.setattr(Cell, "params", lambda self, path: given[path])

    synthesize.main(Cell("synthesize", {}))
    assert json.loads(Path("data/old_task.json").read_text()) == Ioi.described()
    assert read_examples("data/old/discovery.parquet").every_clause == {}
    assert Path("data/new/ioi").is_dir() and Path("data/new/adjacent").is_dir()
    discover.main(Cell("discover", {"model": "base", "seed": "0"}))
    folder = Path("reports/cells/discover/base/0")
    record = json.loads((folder / "record.json").read_text())
    assert [hop["name"] for hop in record["hops"]] == [hop.name for hop in Ioi.paper_hops]
    groups = (
        Group("move_name", "end", "logits", None, ((1, 0),), (1.0,), 1),
        Group("q_end", "s2", "move_name", Component.Q, ((0, 1),), (0.5,), 1),
    )
    write_json(folder / "circuit.json", Circuit(groups, 2, 4).to_json())
    evaluate.main(Cell("evaluate", {"model": "base", "seed": "0"}))
    scores = json.loads(Path("reports/cells/evaluate/base/0.json").read_text())
    assert scores["circuit_in_queried_clause"] is None and scores["circuit"]["size"] == 2
    assert len(scores["random"]["accuracies"]) == found["evaluate"]["random_circuits"]
    paths = set(scores["inspection"]["knockout"]["paths"])
    assert {path.split(">")[0] for path in paths} == {"s2", "end"} and "end>another_clause" not in paths
    dcm.main(Cell("dcm", {"model": "base", "seed": "0"}))
    carried = json.loads(Path("reports/cells/dcm/base/0.json").read_text())["groups"]
    assert set(carried) == {"move_name", "q_end"} and set(carried["q_end"]) == set(Ioi.desiderata)
    cmap.main(Cell("cmap", {"arm": "arm", "seed": "0"}))
    assert json.loads(Path("reports/cells/cmap/arm/0.json").read_text())["n"] == 8


def section(values: dict[str, Any]) -> Any:
    return SimpleNamespace(**values, model_dump=lambda mode: values)


def test_a_set_without_clauses_is_read_as_it_was_written(tmp_path: Path) -> None:
    at = {"end": torch.tensor([2, 2])}
    rows = Examples(
        torch.arange(6).view(2, 3), torch.tensor([1, 2]), torch.tensor([[3], [4]]), at, {}, torch.zeros(2, 3).long(), at
    )
    write_examples(tmp_path / "rows.parquet", rows)
    again = read_examples(tmp_path / "rows.parquet")
    assert again.every_clause == {} and again.readout == "end" and torch.equal(again.input_ids, rows.input_ids)


# --- rehearsal


@pytest.mark.parametrize("length", [5, 19])
def test_rehearsed_prompts_of_another_length_equal_a_plain_loop(length: int) -> None:
    """Shorter and longer than those of the new task; every sequence in a pass of its own, no padding anywhere."""
    run = tiny_run("joint")
    old = tiny_prompts(30)
    ids = old.input_ids.repeat(1, 2)[:, :length].contiguous()
    object.__setattr__(run, "rehearsal", type(old)(ids, old.valid, old.canonical, old.objects))
    joint.train(run)

    rows = torch.randint(len(ids), run.order.shape, generator=run.draw("old task"))

    def loss(model: Any, step: int, new_rows: torch.Tensor) -> torch.Tensor:
        asked = [(run.train.input_ids[row], run.train.canonical[row]) for row in new_rows]
        asked += [(ids[row], old.canonical[row]) for row in rows[step]]
        losses = [-model(input_ids=prompt[None]).logits[0, -1].log_softmax(-1)[answer] for prompt, answer in asked]
        return torch.stack(losses).mean()

    model = train_plainly(tiny_model(), run, loss)
    error, moved = largest_difference(run.model, model), largest_difference(run.model, tiny_model())
    print(f"{length} tokens: maximum error {error:.1e}, largest change {moved:.1e}")
    assert error < 1e-6 < 1e-3 < moved
