"""Exact path patching against the paper's algorithm, side by side in one run: `python -m tests.benchmark`."""
