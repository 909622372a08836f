"""Run one cell of a stage: `python -m stages <stage> [axis values]`, the same as `python -m stages.<stage> ...`.

Inside `python -m stages.pipeline.warm_start <command>` it starts from a process that has torch and transformers
imported already.
"""

import os
import runpy
import sys


def main() -> None:
    if len(sys.argv) < 2:
        print("usage: python -m stages <stage> [axis values]", file=sys.stderr)
        raise SystemExit(2)
    address = os.environ.get("STAGES_WARM_START")
    if address:
        from stages.pipeline.warm_start import ask

        status = ask(address, sys.argv[1:])
        if status is not None:
            raise SystemExit(status)
    stage = sys.argv.pop(1)
    runpy.run_module(f"stages.{stage}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
