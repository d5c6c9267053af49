"""Intervals: what the seeds of a study say about the difference between two arms.

Pairs are made by seed, since both arms then have the same start and the same batches. Losses and
step times are compared by the logarithm of their ratio, with Student's t interval. Times to a loss
may be infinite (it was never reached), so that theirs is the median, between two order statistics.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from bench.config import UserError
from bench.results import time_to_loss_ms


class Interval(NamedTuple):
    """An estimate between the bounds of its confidence interval; None: too few values for them."""

    center: float
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """An arm against another.

    Attributes:
        rival: the other one's name.
        runs: seeds that both arms ran.
        pairs: those of them on which both have a final loss, all that the intervals are of.
        failed: those on which the arm has none and the rival has.
        loss: relative change of the final loss; None without pairs, as the others.
        time: time to the rival's final loss as a share of the rival's time; inf: not reached.
        step: mean step time as a ratio to the rival's.
    """

    rival: str
    runs: int
    pairs: int
    failed: int
    loss: Interval | None
    time: Interval | None
    step: Interval | None


def scipy_stats() -> ModuleType:
    """scipy.stats, imported when it is needed. Raises UserError where it is not installed."""
    try:
        from scipy import stats
    except ImportError:
        raise UserError(
            "the intervals of a study need scipy, which is not here: pip install -e '.[bench]'"
        ) from None
    return stats


def corrected(confidence: float, comparisons: int) -> float:
    """The level of each interval so that all hold together with `confidence` (Bonferroni)."""
    return 1 - (1 - confidence) / max(comparisons, 1)


def compare(
    rival: str,
    ours: Mapping[int, Mapping[str, Any]],
    theirs: Mapping[int, Mapping[str, Any]],
    level: float,
) -> Comparison:
    """Compare the cells of two arms, by seed, as a study's result has them."""
    both = [seed for seed in ours if seed in theirs]
    ended = [seed for seed in both if theirs[seed]["final_val_loss"] is not None]
    pairs = [seed for seed in ended if ours[seed]["final_val_loss"] is not None]

    def change(key: str) -> Interval | None:
        ratios = [_ratio(ours[seed][key], theirs[seed][key]) for seed in pairs]
        return relative_change(ratios, level)

    step = change("mean_step_ms")
    return Comparison(
        rival=rival,
        runs=len(both),
        pairs=len(pairs),
        failed=len(ended) - len(pairs),
        loss=change("final_val_loss"),
        time=median([_time_share(ours[seed], theirs[seed]) for seed in pairs], level),
        step=step and Interval(*(None if x is None else 1 + x for x in step)),
    )


def relative_change(ratios: Sequence[float], level: float) -> Interval | None:
    """The geometric mean of ratios, minus 1, with Student's t interval of their logarithms.

    Without bounds for a single ratio; None for none.
    """
    if not ratios:
        return None
    logs = [math.log(ratio) for ratio in ratios]
    mean, n = statistics.fmean(logs), len(logs)
    if n < 2:
        return Interval(math.expm1(mean), None, None)
    # Not ttest_1samp, which warns of differences that are all the same, as on a computed clock.
    t = float(scipy_stats().t.ppf((1 + level) / 2, n - 1))
    half = t * statistics.stdev(logs) / math.sqrt(n)
    return Interval(math.expm1(mean), math.expm1(mean - half), _expm1(mean + half))


def median(values: Sequence[float], level: float) -> Interval | None:
    """The median and its distribution-free interval, whose bounds are two of the values.

    Infinite values are larger than all others. Without bounds where even the least and the greatest
    value are too close for the level: below 6 values at 0.95, 9 at 0.99. None for no values.
    """
    if not values:
        return None
    test = scipy_stats().quantile_test(values, q=1.0, p=0.5)
    low, high = (None if math.isnan(x) else float(x) for x in test.confidence_interval(level))
    return Interval(statistics.median(values), low, high)


def _expm1(x: float) -> float:
    """Infinite where no float is so large: two seeds far apart at a high level."""
    return math.expm1(x) if x < 700 else math.inf


def _ratio(ours: float, theirs: float) -> float:
    if ours <= 0 or theirs <= 0:
        raise UserError(
            f"losses are compared by their ratios and must be above 0, got {min(ours, theirs)}: "
            "take a task that is not solved entirely (teacher: --teacher-noise above 0)"
        )
    return ours / theirs


def _time_share(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    reached = time_to_loss_ms(ours["val_trace"], theirs["final_val_loss"])
    share: float = math.inf if reached is None else reached / theirs["elapsed_ms"]
    return share
