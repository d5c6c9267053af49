"""A curve in a line of text."""

import math
from collections.abc import Sequence
from typing import TextIO

BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"  # lower one eighth to full block
DIGITS = "01234567"


def spark(
    values: Sequence[float | None],
    width: int,
    levels: str = BLOCKS,
    span: tuple[float, float] | None = None,
) -> str:
    """A character a value; of more than `width` values the means of as many even parts.

    Args:
        values: None or what is not finite is left out; where nothing is left stands a space.
        width: at most so many characters.
        levels: characters from the lowest to the highest value.
        span: the values that they stand for, else the smallest and the largest of those drawn.
            What lies outside is drawn at the end that it is nearer to.
    """
    cells = min(width, len(values))
    edges = [len(values) * i // max(cells, 1) for i in range(cells + 1)]
    means = [_mean(values[edges[i] : edges[i + 1]]) for i in range(cells)]
    known = [mean for mean in means if mean is not None]
    low, high = span or (min(known, default=0.0), max(known, default=0.0))
    return "".join(" " if mean is None else _character(mean, low, high, levels) for mean in means)


def levels_of(stream: TextIO) -> str:
    """The block elements, or digits where the stream's encoding lacks them."""
    try:
        BLOCKS.encode(stream.encoding or "ascii")
    except UnicodeEncodeError:
        return DIGITS
    return BLOCKS


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def _character(value: float, low: float, high: float, levels: str) -> str:
    if high <= low:
        return levels[len(levels) // 2]  # a constant has no height of its own
    share = min(max((value - low) / (high - low), 0.0), 1.0)
    return levels[min(int(share * len(levels)), len(levels) - 1)]
