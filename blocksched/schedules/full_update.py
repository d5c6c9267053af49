"""full_update: every block trains on every step. The baseline."""

import dataclasses

from blocksched.schedules.base import Depth, Memoryless, Plan, Progress, suffix


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullUpdate(Memoryless):
    """Update all blocks on every step."""

    def plan(self, state: Depth, _progress: Progress) -> Plan:
        return Plan(suffix(state.n_blocks, state.n_blocks))
