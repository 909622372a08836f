"""The network: stages work offline, but for the two that bring models, which may ask the Hugging Face hub."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

OFFLINE = "HF_HUB_OFFLINE"  # environment variable


@contextmanager
def online() -> Iterator[None]:
    """Let the hub be asked, also where its library is loaded and has read the environment, as under `make repro`."""
    from huggingface_hub import constants

    before, loaded = os.environ.get(OFFLINE), constants.HF_HUB_OFFLINE
    os.environ[OFFLINE], constants.HF_HUB_OFFLINE = "0", False
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = loaded
        if before is None:
            del os.environ[OFFLINE]
        else:
            os.environ[OFFLINE] = before
