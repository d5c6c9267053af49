"""each block is annealed to a learning rate of zero, the lowest first, and then frozen.

FreezeOut (Brock, Lim, Ritchie and Weston, arXiv 1706.04983; code: github.com/ajbrock/FreezeOut).
Block i trains up to the share t_i of the run, with the learning rate

    a_i(t) = a_i (1 + cos(pi t / t_i)) / 2,

where t_i goes from t0 for block 0 to 1 for the top block in even steps, or in cubes of even steps,
and a_i is the optimizer's own learning rate, or that / t_i, so that all blocks travel as far. (The
paper's formula lacks the 1/2, which the code's README corrects.) The head is annealed to the end of
the run, the stem with block 0: it is what the paper freezes first.
"""

import dataclasses
import math

from blocksched.schedules.base import Depth, Memoryless, Plan, Progress
from blocksched.schedules.numbers import check_numbers, choice, number, text


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreezeOut(Memoryless):
    """Anneal the learning rate of each block to zero, from below, and freeze what has got there.

    The defaults are those of the authors' code.
    """

    t0: float = number(
        0.8,
        "share of the run after which block 0 is frozen (cubic: its cube root)",
        ge=0.01,
        le=1,
    )
    spacing: str = choice(
        "cubic",
        "the blocks are frozen evenly from t0 to the end of the run, or at the cubes of "
        "those shares",
        ("linear", "cubic"),
    )
    scale_rates: bool = text(True, "divide a block's learning rate by its share of the run")

    def __post_init__(self) -> None:
        check_numbers(self)

    @property
    def anneals(self) -> bool:
        return True

    def plan(self, state: Depth, progress: Progress) -> Plan:
        n, t = state.n_blocks, progress.fraction
        ends = [self.end(block, n) for block in range(n)]
        active = tuple(b for b in range(n) if t < ends[b]) or (n - 1,)
        frozen = len(active) < n
        return Plan(
            active,
            phase="suffix" if frozen else "full",
            freezing=frozen,
            rates=tuple(self._rate(t, end) for end in (*ends, 1.0)),
        )

    def end(self, block: int, n_blocks: int) -> float:
        """The share of the run for which `block` of `n_blocks` trains."""
        left = (n_blocks - 1 - block) / max(1, n_blocks - 1)  # so written the top's is 1 exactly
        share = 1.0 - (1.0 - self.t0) * left
        return share**3 if self.spacing == "cubic" else share

    def _rate(self, t: float, end: float) -> float:
        if t >= end:
            return 0.0
        rate = 0.5 * (1.0 + math.cos(math.pi * t / end)) / (end if self.scale_rates else 1.0)
        return round(rate, 12)  # the last bits of a cosine differ between machines, plans must not
