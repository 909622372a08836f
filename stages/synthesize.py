"""Stage `synthesize`: sets of the old task and of new tasks, and desiderata pairs, in disjoint splits, for the
tokenizer of the base.

Which prompts may occur in which file (a context has one split, see `tasks/contexts.py`):

    old/{selection,discovery,pruning,evaluation,relearning}   the split of that name;  old/means: pruning
    old/train                                                 as a new task, to be rehearsed or taught: train
    new/<task>/{train,selection,evaluation}                   the split of that name
    desiderata/<name>/{train,selection,test}                  discovery, selection, evaluation

A new task that the tokenizer is not made for has no folder in new/; `tasks.json` says why. What other stages are told
of the old task is in `old_task.json`.
"""

from pathlib import Path
from zlib import crc32

import numpy as np

from stages.pipeline.checkpoints import load_tokenizer
from stages.pipeline.files import replacing_directory, write_json
from stages.pipeline.stage import Cell, Invalid, run
from stages.tasks.contexts import SPLITS, Split
from stages.tasks.examples import write_examples, write_pairs, write_prompts
from stages.tasks.new_tasks import NEW_TASKS, impossible
from stages.tasks.old_tasks import old_tasks
from stages.tasks.vocabulary import LABELS, OBJECTS, vocabulary_of

SOURCE = Path("models/source")
DATA = Path("data")
OLD_SPLITS = {
    "selection": Split.SELECTION,
    "discovery": Split.DISCOVERY,
    "pruning": Split.PRUNING,
    "evaluation": Split.EVALUATION,
    "relearning": Split.RELEARNING,
    "means": Split.PRUNING,
}
PAIR_SPLITS = {"train": Split.DISCOVERY, "selection": Split.SELECTION, "test": Split.EVALUATION}


def main(cell: Cell) -> None:
    settings = cell.params("synthesize")
    tokenizer = load_tokenizer(SOURCE)
    words, boxes = vocabulary_of(tokenizer, cell.params("source.bos")), settings.boxes
    chosen, asked = cell.params("new_task"), cell.params("old_task")
    try:
        old_task = old_tasks()[asked](words, boxes)
        old_task.examples(np.random.default_rng(0), Split.DISCOVERY, 1)
    except Invalid as error:
        raise Invalid(f"old_task = '{asked}': {error}") from None

    def rng(name: str) -> np.random.Generator:
        """One stream a file, so that the size of one set changes no other set."""
        return np.random.default_rng([settings.seed, crc32(name.encode())])

    desiderata = (*cell.params("dcm.desiderata"), *cell.params("dcm.of_base"))
    for name in desiderata:
        try:
            old_task.pairs(np.random.default_rng(0), name, Split.DISCOVERY, 2 * boxes)  # whatever is asked for
        except Invalid as error:
            raise Invalid(f"dcm: '{name}' cannot be asked with this tokenizer: {error}") from None
    cannot = impossible(words, boxes)
    if chosen in cannot:
        raise Invalid(f"new_task = '{chosen}': {cannot[chosen]}")
    prompt_tokens = 0
    with replacing_directory(DATA / "old") as folder:
        for name, split in OLD_SPLITS.items():
            draw = old_task.means if name == "means" else old_task.examples
            examples = draw(rng(f"old/{name}"), split, settings.old[name])
            write_examples(folder / f"{name}.parquet", examples)
            prompt_tokens = examples.input_ids.shape[1]
        # the stream of the new task that asks the same
        train = old_task.prompts(rng(f"new/{old_task.same_as}/train"), Split.TRAIN, settings.new["train"])
        write_prompts(folder / "train.parquet", train)
    tasks = {}
    with replacing_directory(DATA / "new") as folder:
        for name, task in NEW_TASKS.items():
            if name in cannot:
                continue
            (folder / name).mkdir()
            for split, size in settings.new.items():
                prompts = task.draw(rng(f"new/{name}/{split}"), words, Split(split), size, boxes)
                write_prompts(folder / name / f"{split}.parquet", prompts)
                if split == "train":
                    scores = task.shortcuts(prompts, words)
                    tasks[name] = {
                        "sign": task.sign(words),
                        "prompt_tokens": prompts.input_ids.shape[1],
                        "valid_answers": prompts.valid.shape[1],
                        "shortcuts": scores,
                        "best_shortcut": max(scores.values()),
                    }
    chance = {}
    with replacing_directory(DATA / "desiderata") as folder:
        for desideratum in desiderata:
            (folder / desideratum).mkdir()
            for name, size in settings.desiderata.items():
                stream = rng(f"desiderata/{desideratum}/{name}")
                pairs = old_task.pairs(stream, desideratum, PAIR_SPLITS[name], size)
                write_pairs(folder / desideratum / f"{name}.parquet", pairs)
                if name == "test":
                    chance[desideratum] = old_task.floors(pairs)
    write_json(DATA / "old_task.json", old_task.described())
    write_json(
        DATA / "tasks.json",
        {
            "vocabulary": {
                "tokens": len(tokenizer),
                "objects": [word for word, usable in zip(OBJECTS, words.pool.objects, strict=True) if usable],
                "labels": [word for word, usable in zip(LABELS, words.pool.labels, strict=True) if usable],
            },
            "boxes": boxes,
            "prompt_tokens": prompt_tokens,
            "splits": list(SPLITS),
            "sizes": {
                "old": dict(settings.old),
                "new": dict(settings.new),
                "desiderata": dict(settings.desiderata),
            },
            "new_tasks": tasks,
            "impossible": cannot,
            "desiderata": {name: {"floors": chance[name]} for name in desiderata},
        },
    )


if __name__ == "__main__":
    run("synthesize", (), main)
