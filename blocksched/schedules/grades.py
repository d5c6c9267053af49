"""a block stops when its gradient hardly changes.

GradES (Wen, Zeng, Zhou, Liu, Hosseinzadeh, Su and Rawassizadeh, arXiv 2509.01842; code: PyPI
`grades`) watches each weight matrix. After a grace period, the share alpha of the run, a matrix
whose change is below a threshold tau is frozen for good; gradients go on through it. The change is
the L1 norm of g_t - g_(t-1), element by element; in the paper's first version it was that of g_t,
and in the authors' code it is that of the weights.

Here whole blocks stop, and the change is not measured but estimated from the Euclidean norms at two
probes,

    |g_t - g_s|  ~  sqrt(|g_t|^2 + |g_s|^2),

since the exact one would need a copy of all gradients, saved with every checkpoint. The two are
equal where the gradients are orthogonal, as those of different batches nearly are once noise
outweighs what they share. On the benchmark's text tasks (preset small, 8 blocks; pretraining and
fine-tuning), from step to step, the true change was 0.7 to 1.2 of the estimate in at least 96 % of
cases, and the estimate ordered the blocks as the L1 norm of the change did (rank correlations 0.97
and 0.94). The change of the norm, as cheap, was a tenth of the true change and ordered them
otherwise (0.51 and 0.21).

The authors set tau for each model, from 0.001 to 9, because the size of gradients depends on model,
loss and precision. Here it is a share of what is measured in the grace period: the mean change of
all blocks. In that fine-tuning no block stopped at a tau of 0.5; by 0.4 of the run five of eight
had at 0.75, and all but one at 1.
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
class GradESState:
    """What grades remembers.

    Attributes:
        n_blocks: blocks of the model.
        active: the blocks that have not stopped.
        taken: probes so far, without those that were not finite.
        before: the norm of each block's gradient at the last of them, () before the first.
        total: mean changes of all blocks, added up over the grace period.
        changes: how many they are.
        not_finite: readings discarded because they held a NaN, an infinity or more than 1e150.
    """

    n_blocks: int
    active: tuple[int, ...]
    taken: int = 0
    before: tuple[float, ...] = ()
    total: float = 0.0
    changes: int = 0
    not_finite: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradES(Measuring):
    """Stop each block for good once its gradient hardly changes from probe to probe.

    Blocks that stopped may lie anywhere; those above an active one pass the gradient on. The stem
    stops with block 0. The block that changes most is never stopped. Probes thaw nothing; one that
    was not finite is made up for by the next step.
    """

    tau: float = number(
        0.75,
        "a block stops when its gradient's change is below this x the mean change of all "
        "blocks in the grace period",
        gt=0,
    )
    alpha: float = number(
        0.3, "grace period, as a share of the run, in which no block stops", ge=0, lt=1
    )
    probes: int = number(
        50, "steps of the run, evenly spread, on which the gradients are measured", ge=2
    )

    def __post_init__(self) -> None:
        check_numbers(self)

    @property
    def metric(self) -> tuple[Metric, float]:
        return "grad_norm", 0.0

    def init(self, n_blocks: int) -> GradESState:
        require_blocks(n_blocks)
        return GradESState(n_blocks, suffix(n_blocks, n_blocks))

    def plan(self, state: GradESState, progress: Progress) -> Plan:
        stopped = len(state.active) < state.n_blocks
        return Plan(
            state.active,
            probe=self._probes(state, progress),
            phase="stopping" if stopped else "full",
            freezing=progress.fraction >= self.alpha,
        )

    def observe(self, state: GradESState, plan: Plan, reading: Reading) -> GradESState:
        if not plan.probe:
            return state
        norms = measured(reading, state.n_blocks)
        if norms is None:
            return dataclasses.replace(state, not_finite=state.not_finite + 1)
        before = state.before
        state = dataclasses.replace(state, taken=state.taken + 1, before=norms)
        if not before:
            return state
        changes = [math.sqrt(a * a + b * b) for a, b in zip(before, norms, strict=True)]
        if not plan.freezing or not state.changes:
            return dataclasses.replace(
                state,
                total=state.total + math.fsum(changes) / state.n_blocks,
                changes=state.changes + 1,
            )
        least = self.tau * state.total / state.changes
        still = tuple(b for b in state.active if changes[b] >= least)
        most = max(state.active, key=lambda b: changes[b])
        return dataclasses.replace(state, active=still or (most,))

    def restore(self, plain: Mapping[str, Any]) -> GradESState:
        return from_plain(GradESState, plain)

    def _probes(self, state: GradESState, progress: Progress) -> bool:
        due = progress.fraction >= (state.taken + 1) / self.probes
        return due and len(state.active) > 1
