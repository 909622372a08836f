"""What a cell may take of the machine. The environment says it, not params.yaml, so that a change makes nothing stale.

    STAGES_PROCESSES     processes of a cell, of one thread each: a whole number, at least 1; 2 if unset. On a GPU it is
                         1, since processes are forked, which the state of a GPU does not survive
    STAGES_MEMORY_MIB    limit on what path patching and evaluation (discover, evaluate, matchings, dcm, cmap, drift's
                         hops) take beside the models, in MiB: above 0; 512 if unset, 4096 on a GPU. It is for all
                         processes of a cell together: each has an equal share
    STAGES_DEVICE        cpu, cuda or cuda:N: where models are trained and looked into; cpu if unset
    STAGES_DTYPE         float32, bfloat16 or float64: in what the models are that path patching and evaluation look
                         into; float32 if unset. Training, probes of checkpoints, relearning and weight changes are in
                         float32 always

Results depend on the first two by rounding alone, since they say how many examples go at once; bases and tuned models
do not depend on them. Another device rounds differently, too. Random draws are made on the CPU, so that they are the
same everywhere. Small models of the curriculum are trained on the CPU, whatever the device. bfloat16 does more than
round: stage `discover` says how far it ranks the heads as float32 does.
"""

import math
import os
import re
from dataclasses import dataclass

from stages.pipeline.stage import Invalid

PROCESSES, MEMORY_MIB = "STAGES_PROCESSES", "STAGES_MEMORY_MIB"  # environment variables
DEVICE, DTYPE = "STAGES_DEVICE", "STAGES_DTYPE"
DTYPES = ("float32", "bfloat16", "float64")
VISIBLE = "CUDA_VISIBLE_DEVICES"  # of CUDA


@dataclass(frozen=True)
class Resources:
    """What one cell may take.

    Attributes:
        processes: of one thread each.
        memory_mib: of all processes together, beside the models.
        device: where models are.
        dtype: in what they are looked into.
    """

    processes: int = 2
    memory_mib: float = 512.0
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def share_mib(self) -> float:
        """Memory of each process, in MiB."""
        return self.memory_mib / self.processes

    def stated(self) -> dict[str, str]:
        """What a record says of device and precision: nothing of a float32 model on the CPU."""
        default = Resources()
        given = {"device": self.device.partition(":")[0], "dtype": self.dtype}
        return {name: value for name, value in given.items() if value != getattr(default, name)}


def resources() -> Resources:
    """What the environment says now, with the defaults for what it does not say.

    Raises:
        Invalid: a variable is no number or out of range, or names what there is not.
    """
    device, dtype = os.environ.get(DEVICE, "cpu"), os.environ.get(DTYPE, "float32")
    if dtype not in DTYPES:
        raise Invalid(f"{DTYPE} = '{dtype}': must be one of {', '.join(DTYPES)}")
    _check_device(device)
    default = Resources() if device == "cpu" else Resources(1, 4096.0)
    processes = os.environ.get(PROCESSES, str(default.processes))
    memory_mib = os.environ.get(MEMORY_MIB, str(default.memory_mib))
    if not (processes.isdecimal() and int(processes) >= 1):
        raise Invalid(f"{PROCESSES} = '{processes}': must be a whole number, at least 1")
    if device != "cpu" and int(processes) > 1:
        raise Invalid(
            f"{PROCESSES} = '{processes}': must be 1 with {DEVICE} = '{device}', whose state no forked process has"
        )
    try:
        limit = float(memory_mib)
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise Invalid(f"{MEMORY_MIB} = '{memory_mib}': must be a number of MiB above 0")
    return Resources(int(processes), limit, device, dtype)


def claim_device() -> None:
    """Leave to this process, and to those that it starts, the one GPU that the environment names, as `cuda`: trainers
    take the first that they see, or all. To be called before CUDA is used.

    Raises:
        Invalid: there is no such device.
    """
    device = os.environ.get(DEVICE, "cpu")
    _check_device(device)
    if device == "cpu":
        return
    number = int(device.partition(":")[2] or 0)
    visible = os.environ.get(VISIBLE)
    os.environ[VISIBLE] = str(number) if visible is None else visible.split(",")[number].strip()
    os.environ[DEVICE] = "cuda"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # its sums have one order, as torch asks of it


def _check_device(device: str) -> None:
    if device == "cpu":
        return
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise Invalid(f"{DEVICE} = '{device}': must be cpu, cuda or cuda:N")
    import torch  # seconds, which who stays on the CPU should not pay here

    found = torch.cuda.device_count()  # without starting CUDA, which a fork would not survive
    if int(device.partition(":")[2] or 0) >= found:
        valid = ["cpu", *(["cuda"] if found else []), *(f"cuda:{number}" for number in range(found))]
        raise Invalid(
            f"{DEVICE} = '{device}': torch {torch.__version__} sees {found or 'no'} CUDA device"
            f"{'' if found == 1 else 's'}: must be {' or '.join(valid)}"
        )
