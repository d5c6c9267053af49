"""blocks are frozen from below while the norm of their gradient changes little.

AutoFreeze (Liu, Agarwal and Venkataraman, arXiv 2102.01386; code: github.com/YuhanLiu11/AutoFreeze)
splits a fine-tuning into intervals. At the end of each, from the second on, the change of block i
is

    c_i = |before_i - now_i| / before_i

of the norm of its gradient in this interval and the one before, and the boundary moves up to the
first active block whose c_i reaches the percentile of those of all active blocks. What is frozen
stays so. The rule and the defaults are those of the authors' code.

What differs: they add up the gradients of all steps of an interval and take the L1 norm of the sum,
for which a copy of the gradients would have to be kept. Here a few steps of each interval are
probes, and their Euclidean norms are averaged. The noise of single batches, which their sum cancels
out, is still in these; more probes an interval average over it, but do not take it away.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from blocksched.schedules.base import (
    Measuring,
    Metric,
    Plan,
    Progress,
    Reading,
    from_plain,
    require_blocks,
    suffix,
)
from blocksched.schedules.numbers import check_numbers, number
from blocksched.schedules.readings import measured


@dataclasses.dataclass(frozen=True, slots=True)
class AutoFreezeState:
    """What autofreeze remembers.

    Attributes:
        n_blocks: blocks of the model.
        boundary: the first block that trains.
        taken: probes so far, without those that were not finite.
        sums: norms of each block, added up over the probes of this interval.
        before: the same of the whole interval before, () in the first.
        not_finite: readings discarded because they held a NaN, an infinity or more than 1e150.
    """

    n_blocks: int
    boundary: int
    taken: int
    sums: tuple[float, ...]
    before: tuple[float, ...] = ()
    not_finite: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoFreeze(Measuring):
    """Freeze blocks from below, for good, while the norm of their gradient changes little.

    Probes thaw nothing: they measure the blocks that still train. One that was not finite is made
    up for by the next step.
    """

    intervals: int = number(
        10, "how many intervals the run has; each may freeze blocks at its end", ge=1
    )
    probes: int = number(5, "steps of an interval on which the gradients are measured", ge=1)
    percentile: float = number(
        50.0,
        "percentile of the changes of all active blocks below which a block's change "
        "is little (0: nothing is ever frozen)",
        ge=0,
        le=100,
    )

    def __post_init__(self) -> None:
        check_numbers(self)

    @property
    def metric(self) -> tuple[Metric, float]:
        return "grad_norm", 0.0

    def init(self, n_blocks: int) -> AutoFreezeState:
        require_blocks(n_blocks)
        return AutoFreezeState(n_blocks, 0, 0, (0.0,) * n_blocks)

    def plan(self, state: AutoFreezeState, progress: Progress) -> Plan:
        n, boundary = state.n_blocks, state.boundary
        return Plan(
            suffix(n, n - boundary),
            probe=self._probes(state, progress),
            phase="suffix" if boundary else "full",
            freezing=boundary > 0,
        )

    def observe(self, state: AutoFreezeState, plan: Plan, reading: Reading) -> AutoFreezeState:
        if not plan.probe:
            return state
        norms = measured(reading, state.n_blocks)
        if norms is None:
            return dataclasses.replace(state, not_finite=state.not_finite + 1)
        sums = tuple(a + b for a, b in zip(state.sums, norms, strict=True))
        state = dataclasses.replace(state, taken=state.taken + 1, sums=sums)
        if state.taken % self.probes:
            return state
        return dataclasses.replace(
            state,
            boundary=self._next_boundary(state),
            sums=(0.0,) * state.n_blocks,
            before=sums,
        )

    def restore(self, plain: Mapping[str, Any]) -> AutoFreezeState:
        return from_plain(AutoFreezeState, plain)

    def _probes(self, state: AutoFreezeState, progress: Progress) -> bool:
        """Evenly over the run, the last of an interval at its end, while there is a choice left."""
        due = progress.fraction >= (state.taken + 1) / (self.intervals * self.probes)
        return due and state.boundary < state.n_blocks - 1

    def _next_boundary(self, state: AutoFreezeState) -> int:
        """At the end of an interval."""
        if not state.before:
            return state.boundary
        changes = [
            _change(before, now) for before, now in zip(state.before, state.sums, strict=True)
        ][state.boundary :]
        # Interpolated percentiles lie between two of the changes: the upper is what reaches them.
        least = sorted(changes)[math.ceil(self.percentile * (len(changes) - 1) / 100)]
        return state.boundary + next(i for i, change in enumerate(changes) if change >= least)


def _change(before: float, now: float) -> float:
    if before == 0.0:
        return math.inf if now else 0.0
    return abs(before - now) / before
