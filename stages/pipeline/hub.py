"""The network: stages work offline, but for those that bring models, which may ask the Hugging Face hub.

An environment that says HF_HUB_OFFLINE=1 (or TRANSFORMERS_OFFLINE=1) is believed: then nothing is asked at all, and a
name is looked up among what was downloaded before.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

OFFLINE = "HF_HUB_OFFLINE"  # environment variable
_SAID = (OFFLINE, "TRANSFORMERS_OFFLINE")

_of_ours: set[str] = set()  # environment variables that `stay_offline` has set in this process


def stay_offline() -> None:
    """Work offline unless the environment says otherwise; to be called before the hub's library is loaded."""
    if OFFLINE not in os.environ:
        os.environ[OFFLINE] = "1"
        _of_ours.add(OFFLINE)


@contextmanager
def online() -> Iterator[None]:
    """Let the hub be asked, also where its library is loaded and has read the environment, as under `make repro`;
    unless who started the process wants it offline."""
    from huggingface_hub import constants

    said = [os.environ.get(name, "") for name in _SAID if name not in _of_ours]
    offline = any(value.upper() in constants.ENV_VARS_TRUE_VALUES for value in said)
    before, loaded = os.environ.get(OFFLINE), constants.HF_HUB_OFFLINE
    os.environ[OFFLINE], constants.HF_HUB_OFFLINE = str(int(offline)), offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = loaded
        if before is None:
            del os.environ[OFFLINE]
        else:
            os.environ[OFFLINE] = before


def reason(error: BaseException, name: str) -> str | None:
    """Why the hub does not give what is called `name`, and what to do; None where the error is another one."""
    from huggingface_hub import constants, errors

    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__

    def there_is(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if there_is(errors.GatedRepoError):
        return "it is gated: ask for access on its page there, then log in with `hf auth login`"
    if there_is(errors.RevisionNotFoundError):
        return "it has no such revision: must be a branch, a tag or a commit of it"
    if there_is(errors.RepositoryNotFoundError):
        return (
            "there is none of this name, or it is private: must be as on its page, and for a private one log in first"
        )
    if there_is(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) or there_is(ConnectionError):
        if constants.HF_HUB_OFFLINE:
            return f"{OFFLINE} is set and it was not downloaded before: unset that, or first `hf download {name}`"
        return "the hub cannot be reached: needs a network, or a folder that was downloaded elsewhere"
    return None
