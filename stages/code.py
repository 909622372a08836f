"""Stage `code`: the digests of what every other stage runs, so that DVC reruns exactly what an edit touches.

reads  the modules in stages/, and the pinned requirements
writes data/code/<stage>.json, data/code/finetune/<arm>.json, also for the arms that are imported models
"""

from pathlib import Path

from stages.pipeline.dependencies import manifests
from stages.pipeline.files import replacing_directory, write_json
from stages.pipeline.stage import Cell, run


def main(cell: Cell) -> None:
    stages = sorted(path.stem for path in Path("stages").glob("*.py") if path.stem not in ("__init__", cell.stage))
    with replacing_directory("data/code") as folder:
        for name, digests in manifests(stages, cell.params("arms")).items():
            write_json(folder / f"{name}.json", digests)


if __name__ == "__main__":
    run("code", (), main)
