"""Intervals: what the seeds of a study say about the difference between two arms."""

from types import ModuleType

from bench.config import UserError


def scipy_stats() -> ModuleType:
    """scipy.stats, imported when it is needed. Raises UserError where it is not installed."""
    try:
        from scipy import stats
    except ImportError:
        raise UserError(
            "the intervals of a study need scipy, which is not here: pip install -e '.[bench]'"
        ) from None
    return stats
