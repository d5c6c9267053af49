"""static_suffix: the top blocks train on every step, the others never."""

import dataclasses

from blocksched.schedules.base import Depth, Memoryless, Plan, Progress, require_active, suffix
from blocksched.schedules.numbers import check_numbers, number


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticSuffix(Memoryless):
    """Update only the top `active` blocks."""

    active: int = number(6, "how many of the top blocks train", ge=1)

    def __post_init__(self) -> None:
        check_numbers(self)

    def init(self, n_blocks: int) -> Depth:
        require_active(self.active, n_blocks)
        return Depth(n_blocks)

    def plan(self, state: Depth, _progress: Progress) -> Plan:
        return Plan(suffix(state.n_blocks, self.active), phase="suffix", freezing=True)
