"""lisa: a few blocks, drawn anew every so many steps, train with the stem and the head.

LISA (Pan et al., arXiv 2403.17919) for fine-tuning: instead of the backward of all blocks, only the
weight gradients of some; in expectation every block trains equally often.
"""

import dataclasses

from blocksched.schedules.base import Depth, Memoryless, Plan, Progress, require_active
from blocksched.schedules.draw import permutation
from blocksched.schedules.numbers import check_numbers, number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lisa(Memoryless):
    """Update blocks drawn uniformly without replacement, for an interval; stem and head always.

    As the paper's algorithm 1, with its gamma = `active` and K = `interval`. The paper starts each
    interval with an optimizer of its own, so that the moments of the blocks begin anew
    (LMFlow#729). Its implementation, a callback of LMFlow, keeps them (LMFlow#768), and trains
    whatever is outside the blocks. So does this: a block that was frozen goes on with its old
    moments. LMFlow draws from numpy's global state, so that a resume or a rank may draw otherwise;
    here a draw depends on the seed and the number of the interval alone. Its defaults are 2 blocks
    and 20 steps; with those 18 % of runs of 250 steps never train some block of 8.

    The stem trains, so backward goes down to it: what is saved is the weight gradients and updates
    of the frozen blocks, about a third of the step at most.
    """

    active: int = number(2, "how many blocks train in an interval", ge=1)
    interval: int = number(10, "steps until blocks are drawn anew", ge=1)
    seed: int = number(0, "of the draws")

    def __post_init__(self) -> None:
        check_numbers(self)

    def init(self, n_blocks: int) -> Depth:
        require_active(self.active, n_blocks)
        return Depth(n_blocks)

    def plan(self, state: Depth, progress: Progress) -> Plan:
        order = permutation(state.n_blocks, self.seed, f"lisa {progress.step // self.interval}")
        active = tuple(sorted(order[: self.active]))
        return Plan(active, phase="drawn", freezing=True, stem=True)
