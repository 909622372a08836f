"""Checkpoints of a run on disk: where they are, and their weights, read one tensor at a time.

    models/runs/<arm>/<seed>/<learning rate>/<step:06d>.safetensors   one for every checkpoint
    models/runs/<arm>/<seed>/<learning rate>/adapter_config.json      with LoRA alone: one for the run

A checkpoint holds all weights by parameter name or, with LoRA, those of the adapters alone in PEFT's format: under the
name adapter_model.safetensors, beside a copy of that config, it is a folder that PEFT loads. Either is read as plain
weights, with the adapters merged: W + scale * B A, in float32.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import safe_open

from stages.pipeline.files import read_json

if TYPE_CHECKING:  # stage `match` has no torch unless it needs it
    from torch import nn

Weights = Mapping[str, np.ndarray]  # by parameter name

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
ADAPTER_PREFIX = "base_model.model."  # before the module's name, in PEFT's format


class LazyWeights(Mapping[str, np.ndarray]):
    """Weights that are made when they are asked for, and not kept: each look-up makes the array anew.

    Args:
        names: of all weights.
        make: gives the weight of a name.
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], np.ndarray]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:  # that of the class would make the weight
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def checkpoint_file(folder: Path, step: int) -> Path:
    """The file of one checkpoint in the folder of its run."""
    return folder / f"{step:06d}.safetensors"


def stored_weights(*files: Path) -> Weights:
    """All weights of safetensors files, in float32.

    Raises:
        FileNotFoundError: a file is missing.
    """
    places: dict[str, Path] = {}
    for path in files:
        with safe_open(path, framework="np") as file:
            places |= dict.fromkeys(file.keys(), path)
    return LazyWeights(places, lambda name: _read(places[name], name))


def read_checkpoint(folder: Path, step: int, base: Weights) -> Weights:
    """The plain weights of one checkpoint of a run.

    Args:
        folder: of the run.
        base: weights that the run started from.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        RuntimeError: it does not fit the base.
    """
    path, config = checkpoint_file(folder, step), folder / ADAPTER_CONFIG
    found = stored_weights(path)
    if config.is_file():
        settings = read_json(config)
        found = _merged(base, found, settings["lora_alpha"] / settings["r"])
    if found.keys() != base.keys():
        raise RuntimeError(f"{path} and the base hold different parameters")
    return found


def set_weights(model: "nn.Module", weights: Weights) -> None:
    """Give all parameters of a model other values, one tensor at a time.

    Args:
        model: changes in place.
        weights: a matrix that embedding and head share has one name.

    Raises:
        RuntimeError: these are not the names of the model's parameters.
    """
    import torch

    parameters = dict(model.named_parameters())
    if parameters.keys() != weights.keys():
        raise RuntimeError("the weights have other names than the parameters of the model")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(weights[name]))


def _merged(base: Weights, adapters: Weights, scale: float) -> Weights:
    """The base with adapters in its matrices; a name that it lacks is kept, for the reader to see."""
    import torch  # only where there are adapters; by its product, so that the sum is the same bits as PEFT's

    suffix = ".lora_A.weight"
    modules = {n.removeprefix(ADAPTER_PREFIX).removesuffix(suffix) for n in adapters if n.endswith(suffix)}

    def weight(name: str) -> np.ndarray:
        module = name.removesuffix(".weight")
        if module not in modules:
            return base[name]
        a, b = (torch.from_numpy(adapters[f"{ADAPTER_PREFIX}{module}.lora_{which}.weight"]) for which in "AB")
        return (torch.from_numpy(base[name]) + (b @ a) * scale).numpy()

    return LazyWeights([*base, *(f"{m}.weight" for m in sorted(modules) if f"{m}.weight" not in base)], weight)


def _read(path: Path, name: str) -> np.ndarray:
    with safe_open(path, framework="np") as file:
        if file.get_slice(name).get_dtype() == "F32":
            return file.get_tensor(name)
    with safe_open(path, framework="pt") as file:  # numpy knows no bfloat16
        return file.get_tensor(name).float().numpy()
