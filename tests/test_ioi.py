"""IOI prompts with tokenizers of different kinds: where names stand, which are kept, what the corrupt partner says."""

from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from stages.circuits.pairs import Pairs
from stages.pipeline.checkpoints import load_tokenizer
from stages.pipeline.stage import Invalid
from stages.tasks.ioi import NAMES, PLACES, POSITIONS, THINGS, WORDINGS, ioi_prompts
from stages.tasks.tokenizer import build_tokenizer

COMMON = NAMES[:12]  # of the small tokenizers below, the names that occur often enough to be one token


def corpus() -> list[str]:
    """Every wording, place and thing, with the common names only."""
    texts = []
    for number, (wording, place, thing) in enumerate(
        (wording, place, thing) for wording in WORDINGS.values() for place in PLACES for thing in THINGS
    ):
        a, b = COMMON[number % 12], COMMON[(number // 12 + number + 1) % 12]
        texts.append(wording.format(a=a, b=b, s=a, place=place, thing=thing) + f" {b}")
    return texts * 3


def byte_level() -> PreTrainedTokenizerFast:
    """Like GPT-2's: bytes, a space belongs to the word behind it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=620, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def metaspace() -> PreTrainedTokenizerFast:
    """Like Llama 2's: spaces are a letter, one is put in front of the text, and unknown letters are one token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@pytest.fixture(params=["SmolLM2", "byte-level", "metaspace"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    if request.param == "SmolLM2":
        return load_tokenizer(request.getfixturevalue("smollm2"))
    return byte_level() if request.param == "byte-level" else metaspace()


@pytest.mark.parametrize("with_bos", [False, True])
def test_positions_are_the_tokens_that_they_name(tokenizer: PreTrainedTokenizerBase, with_bos: bool) -> None:
    bos = str(tokenizer.bos_token) if with_bos else None
    prompts = ioi_prompts(tokenizer, 60, seed=3, bos=bos)
    lengths = Counter(len(prompt.clean_ids) for prompt in prompts.prompts)
    print(f"{len(prompts.names)} names, lengths {dict(lengths)}")
    for prompt in prompts.prompts:
        clean, corrupt, at = prompt.clean_ids, prompt.corrupt_ids, prompt.positions
        io, s = prompt.answer.strip(), prompt.other.strip()

        def words(ids: tuple[int, ...], at: dict[str, int] = at) -> list[str]:
            return [str(tokenizer.decode([ids[at[name]]])).strip() for name in ("io", "s1", "s2")]

        assert words(clean) == [io, s, s]
        assert [clean[at[name]] for name in ("io", "s1", "s2")] == [prompt.answer_id, prompt.other_id, prompt.other_id]
        assert at["s1+1"] == at["s1"] + 1 and at["end"] == len(clean) - 1 == len(corrupt) - 1
        assert (at["io"] < at["s1"]) == prompt.io_first and at["s1"] < at["s2"] < at["end"]
        # the text says the same, and what is in front of it is the special token
        assert str(tokenizer.decode(list(clean[with_bos:]))).strip() == prompt.clean
        assert not with_bos or clean[0] == tokenizer.bos_token_id
        # the answer goes on from the prompt as one token
        longer = tokenizer(prompt.clean + prompt.answer, add_special_tokens=False)["input_ids"]
        assert longer == [*clean[with_bos:], prompt.answer_id]
        # the corrupt partner: three names, each once, none of them io or s, and the same words
        assert len({*words(corrupt), io, s}) == 5
        differ = {place for place, (a, b) in enumerate(zip(clean, corrupt, strict=True)) if a != b}
        assert differ == {at["io"], at["s1"], at["s2"]}


def test_wordings_and_orders_occur_equally_often_and_seeds_decide(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = ioi_prompts(tokenizer, 60, seed=3)
    counts = Counter((prompt.wording, prompt.io_first) for prompt in prompts.prompts)
    assert set(counts.values()) == {10} and {wording for wording, _ in counts} == set(WORDINGS)
    assert prompts == ioi_prompts(tokenizer, 60, seed=3) != ioi_prompts(tokenizer, 60, seed=4)
    one = ioi_prompts(tokenizer, 8, seed=3, wordings=["argued"])
    assert {prompt.wording for prompt in one.prompts} == {"argued"}


def test_names_that_are_several_tokens_are_dropped_and_counted(smollm2: Path) -> None:
    for small in (byte_level(), metaspace()):
        prompts = ioi_prompts(small, 10, seed=0)
        assert set(prompts.names) <= set(COMMON) and len(prompts.names) >= 5
        assert set(prompts.names) | set(prompts.dropped) == set(NAMES)
        assert not set(prompts.names) & set(prompts.dropped)
    assert ioi_prompts(load_tokenizer(smollm2), 2, seed=0).dropped == ()


@pytest.mark.parametrize("with_bos", [False, True])
def test_pairs_of_its_texts_hold_the_same_tokens(tokenizer: PreTrainedTokenizerBase, with_bos: bool) -> None:
    prompts = ioi_prompts(tokenizer, 12, seed=0, bos=str(tokenizer.bos_token) if with_bos else None)
    pairs = Pairs.from_text(tokenizer, **prompts.texts())
    assert pairs.clean == tuple(prompt.clean_ids for prompt in prompts.prompts)
    assert pairs.corrupt == tuple(prompt.corrupt_ids for prompt in prompts.prompts)
    assert pairs.answer == tuple((prompt.answer_id,) for prompt in prompts.prompts)
    assert pairs.others == tuple(((prompt.other_id,),) for prompt in prompts.prompts)
    for name in POSITIONS:
        expected = tuple((prompt.positions[name],) for prompt in prompts.prompts)
        assert pairs.spans[name] == pairs.corrupt_spans[name] == expected


def test_bad_input_is_refused(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    with pytest.raises(Invalid, match="n = 0"):
        ioi_prompts(tokenizer, 0, seed=0)
    with pytest.raises(Invalid, match=r"wordings = \['sang'\]: must be prompts of some of gave, decided, argued"):
        ioi_prompts(tokenizer, 4, seed=0, wordings=["sang"])
    with pytest.raises(Invalid, match="bos = '<s>': must be one token of the tokenizer's vocabulary"):
        ioi_prompts(tokenizer, 4, seed=0, bos="<s>")
    with pytest.raises(Invalid, match="0 of 50 names are one token for this tokenizer: must be at least 5"):
        ioi_prompts(build_tokenizer(), 4, seed=0)  # words of another task: every name is unknown
