"""What a probe measured, for schedules that compare readings."""

from blocksched.schedules.base import Reading
from blocksched.schedules.dynamic_suffix import usable


def measured(reading: Reading, n_blocks: int) -> tuple[float, ...] | None:
    """The relevance of each block, or None if the probe gave none or one of the numbers is not
    finite or beyond 1e150.

    Raises ValueError unless there is one number >= 0 per block.
    """
    values = reading.relevance
    if values is None or not all(map(usable, values)):
        return None
    if len(values) != n_blocks or any(value < 0 for value in values):
        raise ValueError(
            f"relevance must be {n_blocks} numbers >= 0, one per block, got {list(values)!r}: "
            "measure every block of the model"
        )
    return tuple(values)
