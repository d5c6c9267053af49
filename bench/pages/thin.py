"""Fewer points of a long run, all of them real: no figure needs more than its pixels show."""

import itertools
from collections.abc import Sequence


def buckets(count: int, most: int) -> list[range]:
    """The places 0..count - 1 in order, in at most `most` ranges of nearly equal length."""
    number = min(count, most)
    edges = [i * count // number for i in range(number + 1)] if number else []
    return [range(a, b) for a, b in itertools.pairwise(edges)]


def extremes(values: Sequence[float | None], most: int) -> list[int]:
    """The places of values that draw the same line: all, if there are at most `most` (>= 5).

    Else the first, the last, and of each bucket the lowest, the highest and the first None, so that
    a gap stays one; together at most `most`.
    """
    if len(values) <= most:
        return list(range(len(values)))
    kept = {0, len(values) - 1}
    for bucket in buckets(len(values), (most - 2) // 3):
        known = [(value, i) for i in bucket if (value := values[i]) is not None]
        if known:
            kept |= {min(known)[1], max(known)[1]}
        if len(known) < len(bucket):
            kept.add(next(i for i in bucket if values[i] is None))
    return sorted(kept)
