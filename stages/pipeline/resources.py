"""What a cell may take of the machine. The environment says it, not params.yaml, so that a change makes nothing stale.

    STAGES_PROCESSES     processes of a cell, of one thread each: a whole number, at least 1; 2 if unset
    STAGES_MEMORY_MIB    limit on what path patching and evaluation (discover, evaluate, matchings, dcm, cmap, drift's
                         hops) take beside the models, in MiB: above 0; 512 if unset. It is for all processes of a cell
                         together: each has an equal share, 256 by default

Bases and tuned models do not depend on them. Other results may by rounding alone, since the limit and the number of
processes say how many examples go at once. There is no variable for a device: processes are forked, which the state of
a GPU does not survive, so the stages run on the CPU.
"""

import math
import os
from dataclasses import dataclass

from stages.pipeline.stage import Invalid

PROCESSES, MEMORY_MIB = "STAGES_PROCESSES", "STAGES_MEMORY_MIB"  # environment variables


@dataclass(frozen=True)
class Resources:
    """What one cell may take.

    Attributes:
        processes: of one thread each.
        memory_mib: of all processes together, beside the models.
    """

    processes: int = 2
    memory_mib: float = 512.0

    @property
    def share_mib(self) -> float:
        """Memory of each process, in MiB."""
        return self.memory_mib / self.processes


def resources() -> Resources:
    """What the environment says now, with the defaults for what it does not say.

    Raises:
        Invalid: a variable is no number or out of range.
    """
    default = Resources()
    processes = os.environ.get(PROCESSES, str(default.processes))
    memory_mib = os.environ.get(MEMORY_MIB, str(default.memory_mib))
    if not (processes.isdecimal() and int(processes) >= 1):
        raise Invalid(f"{PROCESSES} = '{processes}': must be a whole number, at least 1")
    try:
        limit = float(memory_mib)
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise Invalid(f"{MEMORY_MIB} = '{memory_mib}': must be a number of MiB above 0")
    return Resources(int(processes), limit)
