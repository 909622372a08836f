"""An arm that was trained elsewhere: its model is brought, and takes the place of the checkpoints of a run.

It must be a model that the base could have become by training: the same parameters, of the same shapes, and the same
tokens. Beside its one checkpoint stands IMPORTED, which says where it came from.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.learning.checkpoints import run_folder
from stages.learning.settings import CurveRow
from stages.pipeline.files import write_json
from stages.pipeline.hub import online
from stages.pipeline.stage import Invalid

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from stages.pipeline.params.finetuning import Imported

IMPORTED = "imported.json"
RATE = 0.0  # stands in the curve for the learning rate, which is not known
STEP = 1  # of the one checkpoint
# what a config may say otherwise: it changes nothing that the model computes
NEUTRAL = {"architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "initializer_range"}
NEUTRAL |= {"max_position_embeddings", "pad_token_id", "pretraining_tp", "transformers_version", "use_cache"}


def bring(arm: str, section: "Imported", base: Path, old: Path, new: Path, probed: int, folder: Path) -> list[CurveRow]:
    """Write the model of an arm as the one checkpoint of its run.

    Args:
        arm: its name.
        section: where the model is.
        base: folder of the base.
        old, new: selection splits of the old and the new task.
        probed: so many prompts of each are scored.
        folder: of the arm's runs.

    Returns:
        two rows of a curve: the base and the model.

    Raises:
        Invalid: it cannot be had, or is no model that the base could have become.
    """
    from stages.learning.probes import Probe
    from stages.learning.run import Recorder
    from stages.pipeline.checkpoints import load_model, load_tokenizer
    from stages.tasks.examples import read_examples, read_prompts

    if section.revision is not None and Path(section.model).is_dir():
        raise Invalid(f"finetune.{arm}.revision = '{section.revision}': must be null where a folder is imported")
    with online():
        try:
            model = load_model(section.model, section.adapter, section.revision)
        except Invalid as error:
            raise Invalid(f"finetune.{arm}.import = '{section.model}': {error}") from None
        _refuse_other_tokens(arm, section, load_tokenizer(base).get_vocab())
    start = load_model(base)
    theirs = dict(model.named_parameters())
    _refuse_other_config(arm, section, start.config.to_dict(), model.config.to_dict())
    _refuse_other_parameters(arm, section, start, theirs)
    first = slice(0, probed)
    probe = Probe.of(start, read_examples(old).select(first), read_prompts(new).select(first))
    target = run_folder(folder, 0)
    target.mkdir(parents=True)
    recorder = Recorder(start, probe, (), lambda *_: None, target)
    start.load_state_dict(model.state_dict())
    recorder.keep(STEP, gradient_steps=0, completions=0)
    said = {"import": section.model, "adapter": section.adapter, "revision": section.revision}
    write_json(folder / IMPORTED, said)
    return recorder.rows


def _refuse_other_tokens(arm: str, section: "Imported", tokens: Mapping[str, int]) -> None:
    """What a model without a tokenizer of its own means by its tokens is what the base does."""
    from stages.pipeline.checkpoints import load_pretrained_tokenizer

    try:
        theirs: Any = load_pretrained_tokenizer(section.model, section.revision)
    except Invalid:
        return
    other = sorted(set(tokens.items()) ^ set(theirs.get_vocab().items()), key=lambda item: (item[1], item[0]))
    if other:
        word, place = other[0]
        raise Invalid(
            f"finetune.{arm}.import = '{section.model}': its tokenizer and that of the base differ in {len(other)} "
            f"entries ('{word}', {place}, is in one alone): must have the tokens of the base"
        )


def _refuse_other_config(arm: str, section: "Imported", base: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """With the same parameters, another number of heads or other rotary angles make another model; what is written
    has the base's."""
    for key in sorted(base.keys() | theirs.keys()):
        if base.get(key) != theirs.get(key) and key not in NEUTRAL and not key.startswith("_"):
            raise Invalid(
                f"finetune.{arm}.import = '{section.model}': {key} = {theirs.get(key)} in its config, that of the base "
                f"has {base.get(key)}: must be a fine-tuned model of the base"
            )


def _refuse_other_parameters(
    arm: str, section: "Imported", base: "PreTrainedModel", theirs: Mapping[str, "Tensor"]
) -> None:
    ours = {name: tuple(weight.shape) for name, weight in base.named_parameters()}
    where = f"finetune.{arm}.import = '{section.model}'"
    for name in sorted(ours.keys() ^ theirs.keys()):
        which = "the base" if name in ours else "it"
        raise Invalid(f"{where}: {name} is a parameter of {which} alone: must be a fine-tuned model of the base")
    for name, shape in ours.items():
        if tuple(theirs[name].shape) != shape:
            raise Invalid(
                f"{where}: {name} has the shape {tuple(theirs[name].shape)}, that of the base is {shape}: must be a "
                "fine-tuned model of the base"
            )
        if not bool(theirs[name].isfinite().all()):
            raise Invalid(f"{where}: {name} holds numbers that are not finite: must be a whole model")
