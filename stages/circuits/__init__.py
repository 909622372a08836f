"""The causal engine, and what one needs to ask one's own model:

    from stages.circuits import Pairs, faithfulness, find_circuit, load, path_patcher, picture

`load` a model, make `Pairs` of clean and corrupt prompts, ask a `path_patcher` for `Scores`, let it `find_circuit`,
measure the `faithfulness` of that `Circuit`, and draw a `picture` of it. Each comes from the module that holds it, when
it is first asked for: whoever imports one module of the engine loads no other, and the engine itself knows nothing of
the rooms that measure and draw.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stages.circuits.circuit import Circuit as Circuit
    from stages.circuits.finding import find_circuit as find_circuit
    from stages.circuits.loading import load as load
    from stages.circuits.pairs import Pairs as Pairs
    from stages.circuits.patching import path_patcher as path_patcher
    from stages.circuits.rule import Rule as Rule
    from stages.circuits.scores import Scores as Scores
    from stages.figures.circuit_picture import picture as picture
    from stages.measures.circuit_in_place import faithfulness as faithfulness

_HOMES = {
    "Circuit": "stages.circuits.circuit",
    "Pairs": "stages.circuits.pairs",
    "Rule": "stages.circuits.selection",
    "Scores": "stages.circuits.scores",
    "find_circuit": "stages.circuits.finding",
    "faithfulness": "stages.measures.circuit_in_place",
    "load": "stages.circuits.loading",
    "path_patcher": "stages.circuits.patching",
    "picture": "stages.figures.circuit_picture",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
