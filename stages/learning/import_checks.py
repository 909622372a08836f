"""Is a model one that the base could have become by training: the same config, parameters and tokens?

Asked twice of every imported arm: of what its files say, before any base is trained (`refuse_unfit`), and of the whole
model when it is brought (`importing.py`). Tokens that were added behind those of the base, as a pad token is, are left
out with their rows of the embeddings: no prompt has them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.learning.checkpoints import ADAPTER_PREFIX
from stages.pipeline.hub import online
from stages.pipeline.stage import Cell, Invalid

if TYPE_CHECKING:
    from stages.pipeline.described import Shapes
    from stages.pipeline.params.finetuning import Imported

MUST = "must be a fine-tuned model of the base"
# what a config may say otherwise: it changes nothing that the model computes
NEUTRAL = {"architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "initializer_range"}
NEUTRAL |= {"max_position_embeddings", "pad_token_id", "pretraining_tp", "transformers_version", "use_cache"}
TOKENS = "vocab_size"


def imported_as(arm: str, section: "Imported") -> str:
    """How a sentence on an imported arm begins."""
    return f"finetune.{arm}.import = '{section.model}'"


def refuse_unfit(cell: Cell, base: Path, thoroughly: bool) -> None:
    """Refuse imported arms of params that do not fit the base, from the heads of their files.

    Args:
        cell: of the stage that asks.
        base: folder with the tokenizer of the bases; if they are made of a model, with that as well.
        thoroughly: also read the weights that are on this machine, for numbers that are not finite.

    Raises:
        Invalid: one cannot be had, or does not fit.
    """
    from stages.pipeline.params.finetuning import Imported

    finetune = cell.undeclared("finetune")
    sections = {arm: finetune.of(arm) for arm in cell.undeclared("arms")}
    for arm, section in sections.items():
        if isinstance(section, Imported):
            with online():
                _refuse_unfit(arm, section, base, thoroughly)


def _refuse_unfit(arm: str, section: "Imported", base: Path, thoroughly: bool) -> None:
    from stages.pipeline.checkpoints import load_tokenizer
    from stages.pipeline.described import describe, described_adapter, not_finite

    refuse_revision_of_folder(arm, section)
    where = imported_as(arm, section)
    try:
        theirs = describe(section.model, section.revision)
        adapter = None if section.adapter is None else described_adapter(section.adapter)
    except Invalid as error:
        raise Invalid(f"{where}: {error}") from None
    refuse_other_tokens(arm, section, load_tokenizer(base).get_vocab())
    if (base / "config.json").is_file():
        ours = describe(base)
        refuse_other_config(where, ours.config, theirs.config, may_have_more_tokens=True)
        _refuse_other_shapes(where, ours.shapes, theirs.shapes, ours.config.get(TOKENS))
        if adapter is not None:
            _refuse_other_base(f"finetune.{arm}.adapter = '{section.adapter}'", ours.shapes, adapter[0])
    files = (*theirs.files, *(() if adapter is None else (adapter[1],)))
    name = not_finite(files) if thoroughly else None
    if name is not None:
        raise Invalid(f"{where}: {name} holds numbers that are not finite: must be a whole model")


def refuse_revision_of_folder(arm: str, section: "Imported") -> None:
    if section.revision is not None and Path(section.model).is_dir():
        raise Invalid(f"finetune.{arm}.revision = '{section.revision}': must be null where a folder is imported")


def refuse_other_tokens(arm: str, section: "Imported", tokens: Mapping[str, int]) -> None:
    """What a model without a tokenizer of its own means by its tokens is what the base does."""
    from stages.pipeline.checkpoints import load_pretrained_tokenizer

    try:
        tokenizer: Any = load_pretrained_tokenizer(section.model, section.revision)
    except Invalid:
        return
    theirs, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    where, must = imported_as(arm, section), "must have the tokens of the base, and others only added to them"
    other = sorted((at, word) for word, at in tokens.items() if theirs.get(word) != at)
    if other:
        at, word = other[0]
        raise Invalid(
            f"{where}: in its tokenizer '{word}' is {theirs.get(word, 'no token')}, in that of the base {at} "
            f"({len(other)} such tokens): {must}"
        )
    more = sorted((at, word) for word, at in theirs.items() if word not in tokens and word not in added)
    if more:
        raise Invalid(
            f"{where}: its tokenizer has '{more[0][1]}', which that of the base has not ({len(more)} such tokens), "
            f"among those that texts are cut into: {must}"
        )


def refuse_other_config(
    where: str, base: Mapping[str, Any], theirs: Mapping[str, Any], may_have_more_tokens: bool = False
) -> None:
    """With the same parameters, another number of heads or other rotary angles make another model; what is written
    has the base's."""
    for key in sorted(base.keys() | theirs.keys()):
        if may_have_more_tokens and key == TOKENS and (theirs.get(key) or 0) > (base.get(key) or 0):
            continue
        if base.get(key) != theirs.get(key) and key not in NEUTRAL and not key.startswith("_"):
            raise Invalid(
                f"{where}: {key} = {theirs.get(key)} in its config, that of the base has {base.get(key)}: {MUST}"
            )


def _refuse_other_shapes(where: str, ours: "Shapes", theirs: "Shapes", tokens: int | None) -> None:
    for name, shape in ours.items():
        found = theirs.get(name)
        longer = found is not None and tokens == shape[0] < found[0] and found[1:] == shape[1:]
        if found is not None and found != shape and not longer:
            raise Invalid(f"{where}: {name} has the shape {found}, that of the base is {shape}: {MUST}")
    missing = sorted(ours.keys() - theirs.keys())
    # names of older files are others, which are understood when the model is loaded
    if missing and not theirs.keys() - ours.keys():
        raise Invalid(f"{where}: it has no weights for {missing[0]} ({len(missing)} such entries): {MUST}")


def _refuse_other_base(where: str, ours: "Shapes", adapter: "Shapes") -> None:
    """Whether the matrices A [rank, in] and B [out, rank] of LoRA sit on matrices of the base."""
    for name, shape in adapter.items():
        module, dot, which = name.removeprefix(ADAPTER_PREFIX).partition(".lora_")
        if not dot or f"{module}.weight" not in ours:
            raise Invalid(
                f"{where}: it holds weights for {module}, which the base lacks: must be an adapter of this base"
            )
        side = shape[1] if which.startswith("A") else shape[0]
        if side not in ours[f"{module}.weight"]:
            raise Invalid(
                f"{where}: on {module} it has a matrix of {shape}, which does not go with the base's "
                f"{ours[f'{module}.weight']}: must be an adapter of this base"
            )
