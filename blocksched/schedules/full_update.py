"""full_update: every block trains on every step. The baseline."""

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullUpdate:
    """Update all blocks on every step."""

    history = 0
    needs_loss = False
    metric = None

    def init(self, n_blocks: int) -> Depth:
        require_blocks(n_blocks)
        return Depth(n_blocks)

    def wants(self, _state: Depth, _progress: Progress) -> frozenset[Want]:
        return frozenset()

    def plan(self, state: Depth, _progress: Progress) -> Plan:
        return Plan(suffix(state.n_blocks, state.n_blocks))

    def observe(self, state: Depth, _plan: Plan, _reading: Reading) -> Depth:
        return state

    def restore(self, plain: Mapping[str, Any]) -> Depth:
        return from_plain(Depth, plain)
