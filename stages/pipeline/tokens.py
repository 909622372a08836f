"""What is asked of any tokenizer."""

from typing import Any

from stages.pipeline.stage import Invalid


def bos_ids(tokenizer: Any, bos: str | None) -> tuple[int, ...]:
    """The token to put in front of every prompt, by its text; none for None.

    Raises:
        Invalid: the tokenizer has no such token.
    """
    if bos is None:
        return ()
    token = tokenizer.get_vocab().get(bos)
    if token is None:
        raise Invalid(
            f"bos = '{bos}': must be one token of the tokenizer's vocabulary, or None (in params.yaml null) for none"
        )
    return (token,)
