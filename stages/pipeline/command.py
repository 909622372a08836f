"""What the commands beside the stages share: how DVC is called, and the exit status."""

import sys
from collections.abc import Callable

from stages.pipeline.stage import Invalid

DVC = [sys.executable, "-m", "dvc"]


def exit_status(work: Callable[[], int]) -> int:
    """What `work` returns; 2, and one sentence, on bad input; 130 after Ctrl-C."""
    try:
        return work()
    except Invalid as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
