"""row_suffix: every block trains on every step, the lower ones on a part of the batch's rows.

The top `active` blocks and the head have their full gradient. The blocks below them and the stem
have it from a share `rows` of the rows, drawn anew for each step and scaled up, so that its average
over the draws is the full gradient; the other rows only run forward there. With forward : backward
= 1 : 2, a step of n blocks costs n + 2 k + 2 rows (n - k), of which a full one costs 3 n.

VCAS (arXiv 2402.17227) drops rows too, more of them from block to block and by their gradients'
norms; here the draw is uniform and made once, so that no forward of the others keeps a graph.
"""

import dataclasses

from blocksched.schedules.base import Depth, Memoryless, Plan, Progress, require_active, suffix
from blocksched.schedules.numbers import check_numbers, number


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSuffix(Memoryless):
    """Train the top `active` blocks on all rows of a batch, the others on some.

    A block's first tensor, and what it gives, hold one row of the batch at each index of their
    first dimension. Raises ValueError where a block cannot be run on some rows alone.
    """

    active: int = number(4, "how many of the top blocks train on every row", ge=1)
    rows: float = number(0.25, "share of the rows that the other blocks train on", gt=0, le=1)

    def __post_init__(self) -> None:
        check_numbers(self)

    def init(self, n_blocks: int) -> Depth:
        require_active(self.active, n_blocks)
        return Depth(n_blocks)

    def plan(self, state: Depth, _progress: Progress) -> Plan:
        n = state.n_blocks
        return Plan(suffix(n, n), phase="rows", lower=n - self.active, rows=self.rows)
