"""Ranks that fail together and tell each other what they have."""

import contextlib
from collections.abc import Iterator

from blocksched.agreement import Ranks
from blocksched.checkpoint.folders import CheckpointError


@contextlib.contextmanager
def together(ranks: Ranks | None) -> Iterator[None]:
    """What fails inside on one rank fails on all. No rank may wait for another in there."""
    wrong: Exception | None = None
    try:
        yield
    except Exception as error:
        wrong = error
    said = told(ranks, "" if wrong is None else f"{type(wrong).__name__}: {wrong}")
    if wrong is not None:
        raise wrong
    for rank, why in enumerate(said):
        if why:
            raise CheckpointError(f"rank {rank}: {why}")


def told(ranks: Ranks | None, text: str) -> list[str]:
    """The text of every rank, on all of them."""
    if ranks is None:
        return [text]
    codes = list(text.encode())
    longest = int(max(length for (length,) in ranks.gather([len(codes)])))
    rows = ranks.gather([*codes, *[0] * (longest - len(codes))])
    return [bytes(int(code) for code in row if code).decode() for row in rows]
