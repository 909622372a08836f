"""What a model is, without loading it: its config, and the shapes that the heads of its safetensors files say.

Of a model on the hub that takes a few kilobytes, so that one that does not fit is refused before anything is trained.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stages.pipeline.checkpoints import (
    ADAPTER_WEIGHTS,
    adapter_folder,
    adapter_of,
    cannot_be_had,
    found_at,
    refuse_no_model,
)

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Described:
    """A model on disk or on the hub.

    Attributes:
        config: of Hugging Face, as a dict.
        shapes: name of a tensor in its files -> shape.
        files: its safetensors files, those of an adapter as well; none where they were not downloaded.
    """

    config: dict[str, Any]
    shapes: Shapes
    files: tuple[Path, ...]


def describe(model: str | Path, revision: str | None = None) -> Described:
    """A model in a folder or on the hub; of a folder that holds an adapter alone, the adapter's base.

    Raises:
        Invalid: it cannot be had, or has no safetensors weights.
    """
    from huggingface_hub import constants, get_safetensors_metadata, snapshot_download
    from transformers.models.auto.configuration_auto import AutoConfig

    model = adapter_of(model) or model
    refuse_no_model(model)
    folder = Path(model)
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False, **found_at(model, revision))
        if not folder.is_dir() and constants.HF_HUB_OFFLINE:
            folder = Path(snapshot_download(str(model), revision=revision, local_files_only=True))
        if folder.is_dir():
            files = tuple(path for path in sorted(folder.glob("*.safetensors")) if path.name != ADAPTER_WEIGHTS)
            shapes = {name: shape for path in files for name, shape in heads(path)}
        else:
            files, of_files = (), get_safetensors_metadata(str(model), revision=revision).files_metadata.values()
            shapes = {name: tuple(info.shape) for file in of_files for name, info in file.tensors.items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise cannot_be_had(model, "", revision, error) from error
    return Described(config.to_dict(), shapes, files)


def described_adapter(adapter: str | Path) -> tuple[Shapes, Path]:
    """The shapes in an adapter's file, by the names of PEFT's format, and the file.

    Raises:
        Invalid: it cannot be had, or has no safetensors weights.
    """
    file = adapter_folder(adapter, None) / ADAPTER_WEIGHTS
    try:
        return dict(heads(file)), file
    except SafetensorError as error:
        raise cannot_be_had(adapter, "", None, error) from error


def heads(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor in a file, of which only the head is read."""
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118 (it is no mapping)
            yield name, tuple(opened.get_slice(name).get_shape())


def not_finite(files: tuple[Path, ...]) -> str | None:
    """The first tensor with a number that is not finite; one tensor is in memory at a time."""
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                weight = opened.get_tensor(name)
                if weight.is_floating_point() and not bool(weight.isfinite().all()):
                    return str(name)
    return None
