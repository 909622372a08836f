"""What params.yaml may say: every section, its types and ranges, checked as a whole before any work.

There are no defaults here: a value that a stage uses is written in params.yaml, where DVC tracks it. So this package
can refuse a run, but never change what one computes.
"""

from stages.pipeline.params.bases import Synthesize
from stages.pipeline.params.circuits import Cmap
from stages.pipeline.params.reading import load_params, parse_yaml
from stages.pipeline.params.tasks import LEARNED_LATE, MOST_BOXES
from stages.pipeline.params.whole import Params

__all__ = [
    "LEARNED_LATE",
    "MOST_BOXES",
    "Cmap",
    "Params",
    "Synthesize",
    "load_params",
    "parse_yaml",
]
