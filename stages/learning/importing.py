"""An arm that was trained elsewhere: its model is brought, and takes the place of the checkpoints of a run.

It must be a model that the base could have become by training (`import_checks.py`). Beside its one checkpoint stands
IMPORTED, which says where it came from.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.learning.import_checks import (
    MUST,
    imported_as,
    refuse_other_config,
    refuse_other_tokens,
    refuse_revision_of_folder,
)
from stages.learning.settings import CurveRow
from stages.pipeline.files import write_json
from stages.pipeline.hub import online
from stages.pipeline.stage import Invalid

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from stages.pipeline.params.finetuning import Imported

IMPORTED = "imported.json"
STEP = 1  # of the one checkpoint


def bring(arm: str, section: "Imported", base: Path, old: Path, new: Path, probed: int, folder: Path) -> list[CurveRow]:
    """Write the model of an arm as the one checkpoint of its run.

    Args:
        arm: its name.
        section: where the model is.
        base: folder of the base.
        old, new: selection splits of the old and the new task.
        probed: so many prompts of each are scored.
        folder: of the run.

    Returns:
        two rows of a curve: the base and the model.

    Raises:
        Invalid: it cannot be had, or is no model that the base could have become.
    """
    from stages.learning.probes import Probe
    from stages.learning.run import Recorder
    from stages.pipeline.checkpoints import load_model, load_tokenizer
    from stages.tasks.examples import read_examples, read_prompts

    refuse_revision_of_folder(arm, section)
    with online():
        try:
            model: Any = load_model(section.model, section.adapter, section.revision)
        except Invalid as error:
            raise Invalid(f"{imported_as(arm, section)}: {error}") from None
        refuse_other_tokens(arm, section, load_tokenizer(base).get_vocab())
    start: Any = load_model(base)
    rows = len(start.get_input_embeddings().weight)
    if len(model.get_input_embeddings().weight) > rows:  # of tokens that were added
        model.resize_token_embeddings(rows, mean_resizing=False)
    theirs = dict(model.named_parameters())
    refuse_other_config(imported_as(arm, section), start.config.to_dict(), model.config.to_dict())
    _refuse_other_parameters(arm, section, start, theirs)
    first = slice(0, probed)
    probe = Probe.of(start, read_examples(old).select(first), read_prompts(new).select(first))
    recorder = Recorder(start, probe, (), lambda *_: None, folder)
    start.load_state_dict(model.state_dict())
    recorder.keep(STEP, gradient_steps=0, completions=0)
    said = {"import": section.model, "adapter": section.adapter, "revision": section.revision}
    write_json(folder / IMPORTED, said)
    return recorder.rows


def _refuse_other_parameters(
    arm: str, section: "Imported", base: "PreTrainedModel", theirs: Mapping[str, "Tensor"]
) -> None:
    ours = {name: tuple(weight.shape) for name, weight in base.named_parameters()}
    where = imported_as(arm, section)
    for name in sorted(ours.keys() ^ theirs.keys()):
        which = "the base" if name in ours else "it"
        raise Invalid(f"{where}: {name} is a parameter of {which} alone: {MUST}")
    for name, shape in ours.items():
        if tuple(theirs[name].shape) != shape:
            raise Invalid(
                f"{where}: {name} has the shape {tuple(theirs[name].shape)}, that of the base is {shape}: {MUST}"
            )
        if not bool(theirs[name].isfinite().all()):
            raise Invalid(f"{where}: {name} holds numbers that are not finite: must be a whole model")
