"""static_suffix: the top blocks train on every step, the others never."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from blocksched.schedules.base import (
    Depth,
    Plan,
    Progress,
    Reading,
    Want,
    from_plain,
    require_blocks,
    suffix,
)
from blocksched.schedules.numbers import check_numbers, number


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticSuffix:
    """Update only the top `active` blocks."""

    active: int = number(6, "static_suffix: how many of the top blocks train", ge=1)

    history = 0
    needs_loss = False
    metric = None

    def __post_init__(self) -> None:
        check_numbers(self)

    def init(self, n_blocks: int) -> Depth:
        require_blocks(n_blocks)
        if self.active > n_blocks:
            raise ValueError(
                f"active must be 1..{n_blocks}, got {self.active}: lower it or train a deeper model"
            )
        return Depth(n_blocks)

    def wants(self, _state: Depth, _progress: Progress) -> frozenset[Want]:
        return frozenset()

    def plan(self, state: Depth, _progress: Progress) -> Plan:
        return Plan(suffix(state.n_blocks, self.active), phase="suffix", freezing=True)

    def observe(self, state: Depth, _plan: Plan, _reading: Reading) -> Depth:
        return state

    def restore(self, plain: Mapping[str, Any]) -> Depth:
        return from_plain(Depth, plain)
