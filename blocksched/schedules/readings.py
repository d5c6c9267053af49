"""What a step measured, checked before a schedule calculates with it."""

from collections.abc import Sequence

from blocksched.schedules.base import Reading

_HUGE = 1e150  # sums of squares of larger numbers overflow


def usable(value: float) -> bool:
    """Whether a loss, relevance or time is finite, and small enough to calculate with."""
    return abs(value) < _HUGE


def require_relevance(values: Sequence[float], n_blocks: int) -> None:
    """Raise ValueError unless there is one number >= 0 per block."""
    if len(values) != n_blocks or any(value < 0 for value in values):
        raise ValueError(
            f"relevance must be {n_blocks} numbers >= 0, one per block, got {list(values)!r}: "
            "measure every block of the model"
        )


def measured(reading: Reading, n_blocks: int) -> tuple[float, ...] | None:
    """The relevance of each block, or None if the probe gave none or one of the numbers is not
    finite or beyond 1e150.

    Raises ValueError unless there is one number >= 0 per block.
    """
    values = reading.relevance
    if values is None or not all(map(usable, values)):
        return None
    require_relevance(values, n_blocks)
    return tuple(values)
