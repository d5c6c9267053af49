"""random_suffix: the suffix sizes of a recorded run in random order. A control.

What a schedule that moves the boundary by what it measures gains over a full update may be due to
its sizes alone, whatever it measured. This trains as many steps with each size as it did, and so at
the same cost, but at other times.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from blocksched.schedules.base import (
    Measuring,
    Plan,
    Progress,
    Reading,
    from_plain,
    require_blocks,
    suffix,
)
from blocksched.schedules.draw import uniform
from blocksched.schedules.numbers import check_numbers, number, text


@dataclasses.dataclass(frozen=True, slots=True)
class Remaining:
    """What random_suffix remembers.

    Attributes:
        n_blocks: blocks of the model.
        counts: how many steps with 1, 2, ... active blocks are left to draw from; never all 0.
    """

    n_blocks: int
    counts: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomSuffix(Measuring):
    """Update the top k blocks, k drawn without replacement from the steps of a recording.

    Over as many steps as were recorded each k comes exactly as often as it did there; then it
    begins again.
    """

    metric = None

    counts: tuple[int, ...] = text(
        (), "how many steps of the recording had 1, 2, ... active blocks, probes included"
    )
    seed: int = number(0, "of the draws")

    def __post_init__(self) -> None:
        check_numbers(self)
        if not isinstance(self.counts, tuple) or not all(map(_is_count, self.counts)):
            raise ValueError(
                f"counts must be a tuple of whole numbers, 0 to 2**53, got {self.counts!r}: give "
                "the numbers of steps with 1, 2, ... active blocks"
            )

    def init(self, n_blocks: int) -> Remaining:
        require_blocks(n_blocks)
        if len(self.counts) != n_blocks or not any(self.counts):
            raise ValueError(
                f"counts must be {n_blocks} numbers, not all 0, got {self.counts}: give how many "
                "steps of a recorded run of this model had 1, 2, ... active blocks"
            )
        return Remaining(n_blocks, self.counts)

    def plan(self, state: Remaining, progress: Progress) -> Plan:
        place = int(uniform(self.seed, f"random_suffix {progress.step}") * sum(state.counts))
        upto = itertools.accumulate(state.counts)
        k = next(k for k, steps in enumerate(upto, start=1) if place < steps)
        return Plan(suffix(state.n_blocks, k), phase="suffix", freezing=True)

    def observe(self, state: Remaining, plan: Plan, _reading: Reading) -> Remaining:
        drawn = len(plan.active)
        left = tuple(count - (k == drawn) for k, count in enumerate(state.counts, start=1))
        return Remaining(state.n_blocks, left if any(left) else self.counts)

    def restore(self, plain: Mapping[str, Any]) -> Remaining:
        return from_plain(Remaining, plain)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 2**53
