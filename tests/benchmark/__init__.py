"""Exact path patching against the paper's algorithm, side by side on one machine: `python -m tests.benchmark --help`."""
