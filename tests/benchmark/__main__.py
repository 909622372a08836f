"""Run the benchmark: writes reports/benchmarks.json and the table in README.md.

    python -m tests.benchmark                                   # what two cores can run
    python -m tests.benchmark --cases --output /tmp/b.json      # IOI on the real model alone
    python -m tests.benchmark --quick --output /tmp/b.json      # tiny sizes, to see that it works
    python -m tests.benchmark --cases llama7b --device cuda --dtype bfloat16 --output build/llama7b.json

The README is written only with the default output.
"""

import argparse
import json
import os
import platform
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stages.pipeline.packaged_model import missing
from tests.benchmark.cases import CASES, ON_TWO_CORES
from tests.benchmark.measuring import compare
from tests.benchmark.real_model import real_model
from tests.benchmark.table import table

OUTPUT = Path("reports/benchmarks.json")
README = Path("README.md")
PAIRS, TIMED_MIB, MEMORY_PAIRS, MEMORY_MIB = 32, 4096.0, 48, 1024.0  # of the part on a real model
START, END = "<!-- benchmark: written by `make bench` -->", "<!-- /benchmark -->"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark", description=__doc__)
    parser.add_argument("--cases", nargs="*", choices=sorted(CASES), default=list(ON_TWO_CORES))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that it works, not for numbers")
    parser.add_argument("--every-sender", action="store_true", help="run the naive side for all senders of every case")
    parser.add_argument("--no-ioi", action="store_true", help="without IOI on the real model")
    parser.add_argument("--repetitions", type=int, help="instead of each case's own")
    parser.add_argument("--examples", type=int, help="instead of each case's own")
    parser.add_argument(
        "--receivers",
        choices=["published", "spread"],
        default="published",
        help="at the depths of the published heads, or ten over all layers",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)

    record: dict[str, Any] = {"machine": _machine(options.device, options.threads), "models": []}
    for name in options.cases:
        case = CASES[name].quick() if options.quick else CASES[name]
        case = replace(case, receivers=options.receivers)
        if options.every_sender:
            case = replace(case, timed_heads=None)
        if options.repetitions:
            case = replace(case, repetitions=options.repetitions)
        if options.examples:
            case = replace(case, examples=options.examples)
        before = _load()
        print(f"{case.name}: {case.examples} examples, {case.repetitions} repetitions", flush=True)
        measured = compare(case, options.device, getattr(torch, options.dtype), options.threads, not options.quick)
        record["models"].append(measured | {"load": [before, _load()]})
        print(table({"machine": record["machine"], "models": [measured]}), flush=True)

    if not (options.quick or options.no_ioi or options.device != "cpu"):
        if (reason := missing()) is not None:
            print(f"IOI on a real model is left out: {reason}", flush=True)
        else:
            print("IOI on a real model", flush=True)
            record["real"] = real_model(PAIRS, TIMED_MIB, MEMORY_PAIRS, MEMORY_MIB, options.threads)
            print(json.dumps(record["real"], indent=1), flush=True)

    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.output == OUTPUT and record["models"]:
        README.write_text(inserted(README.read_text(encoding="utf-8"), table(record)), encoding="utf-8")


def inserted(text: str, written: str) -> str:
    """The text with what stands between the marks replaced."""
    marks = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
    if not marks.search(text):
        raise ValueError(f"{README}: no place for the table: must hold {START} and {END}")
    return marks.sub(lambda _: f"{START}\n{written}\n{END}", text)


def _machine(device: str, threads: int) -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "torch": torch.__version__,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.machine()


def _load() -> float:
    """Processes that wanted a core over the last minute, this one included."""
    return round(os.getloadavg()[0], 2)


if __name__ == "__main__":
    main()
