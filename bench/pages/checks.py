"""Checks of what a result file holds, each a ValueError in words."""

from collections.abc import Mapping, Sequence
from typing import Any

_MOST = 1e30  # what is larger overflows in sums and scales


def mapping(value: Any, what: str) -> Mapping[str, Any]:
    """An object."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must be an object, got {short(value)}")
    return value


def listed(value: Any, what: str) -> Sequence[Any]:
    """A list."""
    if not isinstance(value, list):
        raise ValueError(f"{what} must be a list, got {short(value)}")
    return value


def number(value: Any, what: str) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MOST:
        raise ValueError(f"{what} must be a number of at most {_MOST:g}, got {short(value)}")
    return value


def number_or_none(value: Any, what: str) -> float | None:
    """None too for NaN, which Python's own json writes, and for a loss that ran away."""
    if value is None or (isinstance(value, float) and not abs(value) <= _MOST):
        return None
    return number(value, what)


def count(value: Any, what: str, most: int = 2**53) -> int:
    """A whole number, 0 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"{what} must be 0..{most}, got {short(value)}")
    return value


def short(value: Any) -> str:
    """The beginning of a value, for a message."""
    return "nothing" if value is None else f"{str(value)[:40]!r}"
