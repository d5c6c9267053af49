"""grow: only some blocks run at first; the stack grows by copies of trained blocks, or by new ones.

Depthwise stacking, G_stack of arXiv 2405.15319: a shallow model is trained first, and copies of its
blocks begin the deeper one. Forward, backward and update of the blocks that do not run yet are
saved. A copy disturbs what was learnt; a block as it was built does not, if it was built to begin
near the identity (arXiv 2305.02869 calls that function-preserving growth).
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from blocksched.schedules.base import (
    Metric,
    Plan,
    Progress,
    Reading,
    Schedule,
    Want,
    from_plain,
    require_blocks,
)
from blocksched.schedules.full_update import FullUpdate
from blocksched.schedules.numbers import check_numbers, choice, number, text
from blocksched.schedules.readings import usable


@dataclasses.dataclass(frozen=True, slots=True)
class GrowState:
    """What grow remembers. `steps`, `count`, `total`, `mean`, `fall` and `spent` stand still unless
    stages end by the loss.

    Attributes:
        n_blocks: blocks of the model.
        stage: the last stage seen at work; as many as there are once all blocks have run.
        then: the state of the schedule that follows.
        steps: steps while growing.
        count, total: losses in the current window, and their sum.
        mean: mean loss of the window before in this stage, None where there is none.
        fall: largest fall of that mean in this stage.
        spent: whether the stage has stopped paying.
        not_finite: losses discarded because they were missing, a NaN, an infinity or above 1e150.
    """

    n_blocks: int
    stage: int
    then: Any
    steps: int = 0
    count: int = 0
    total: float = 0.0
    mean: float | None = None
    fall: float = 0.0
    spent: bool = False
    not_finite: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grow:
    """Run few blocks first and grow in stages, by copies or new blocks, until all run.

    Blocks that run all train, with stem and head. `then` sees the progress of the whole run.

    arXiv 2405.15319 stacks once and recommends a factor of 4: blocks=(n // 4,). Several stages, an
    end by the loss, and optimizer state that is copied with its block are choices of this library.
    """

    blocks: tuple[int, ...] = text(
        (), "how many blocks run in each stage, ascending (none: a quarter and a half of them)"
    )
    until: tuple[float, ...] = text(
        (),
        "fraction of the run at which each stage ends, ascending (none: the last at half of the "
        "run, each stage longer than the one before: 0.2 and 0.5 for two)",
    )
    when: str = choice(
        "clock",
        "what ends a stage: clock = its fraction of the run, loss = also, before that, that the "
        "loss has stopped falling",
        ("clock", "loss"),
    )
    window: int = number(50, "when=loss: steps over which the loss is averaged", ge=1)
    gain: float = number(
        0.05,
        "when=loss: a stage ends once the mean loss falls from one window to the next by no more "
        "than this share of its largest such fall in the stage",
        ge=0,
        lt=1,
    )
    copy: str = choice(
        "stack",
        "where new blocks come from: stack = the blocks again, from the first, on top of "
        "themselves, interleave = each block again, right above itself, none = as they were built, "
        "for blocks that begin near the identity, on top",
        ("stack", "interleave", "none"),
    )
    then: Schedule[Any] = dataclasses.field(
        default=FullUpdate(), metadata={"help": "the schedule once all blocks run"}
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        _check_ascending("blocks", self.blocks, int, "whole numbers >= 1")
        _check_ascending("until", self.until, (int, float), "fractions, above 0 to 1")
        if self.until and self.until[-1] > 1:
            raise ValueError(
                f"until must be fractions, above 0 to 1, got {self.until}: give shares of the run"
            )
        if isinstance(self.then, Grow):
            raise ValueError("then must not grow again: list all stages in blocks")

    @property
    def history(self) -> int:
        return max(self.then.history, self.window if self.when == "loss" else 0)

    @property
    def needs_loss(self) -> bool:
        return self.when == "loss" or self.then.needs_loss

    @property
    def metric(self) -> tuple[Metric, float] | None:
        return self.then.metric

    @property
    def timed(self) -> bool:
        return self.then.timed

    @property
    def anneals(self) -> bool:
        return self.then.anneals

    def init(self, n_blocks: int) -> GrowState:
        require_blocks(n_blocks)
        depths, until = self.depths(n_blocks), self.ends(n_blocks)
        if depths and depths[-1] >= n_blocks:
            raise ValueError(
                f"blocks must be below {n_blocks}, the depth of the model, got {self.blocks}: "
                "leave out what is not smaller, all blocks run in the end"
            )
        if len(until) != len(depths):
            raise ValueError(
                f"until must give an end for each of the {len(depths)} stages, of "
                f"{_listed(depths)} blocks, got {_listed(until)}: give as many numbers as blocks"
            )
        for small, large in itertools.pairwise((*depths, n_blocks)):
            if self.copy == "interleave" and large % small:
                fitting = [k for k in range(1, large) if large % k == 0]
                raise ValueError(
                    f"with copy='interleave' each of blocks must divide the next, and the last the "
                    f"model's {n_blocks}, got {small} before {large}: take one of "
                    f"{_listed(fitting)}, or copy='stack'"
                )
        return GrowState(n_blocks, 0, self.then.init(n_blocks))

    def wants(self, state: GrowState, progress: Progress) -> frozenset[Want]:
        stage = self._stage(state, progress)
        grown = stage == len(self.depths(state.n_blocks))
        wanted = self.then.wants(state.then, progress) if grown else frozenset()
        judged = self.when == "loss" and not grown and progress.step > 0
        judged = judged and progress.step % self.window == 0
        # What runs at the moment is known from the readings, and a growth copies from that.
        return wanted | {"losses"} if judged or stage > state.stage else wanted

    def plan(self, state: GrowState, progress: Progress) -> Plan:
        n, stage = state.n_blocks, self._stage(state, progress)
        depths = self.depths(n)
        if stage == len(depths):
            plan = self.then.plan(state.then, progress)
            running = tuple(range(n))
        else:
            running = self.slots(n, depths[stage])
            plan = Plan(running, phase="grow", running=running)
        if stage == state.stage:
            return plan
        sources = self.sources(n, depths[state.stage], running)
        return dataclasses.replace(plan, sources=sources)

    def observe(self, state: GrowState, plan: Plan, reading: Reading) -> GrowState:
        depths = self.depths(state.n_blocks)
        if state.stage == len(depths) or plan.running is None:
            then = self.then.observe(state.then, plan, reading)
            return dataclasses.replace(state, stage=len(depths), then=then)
        stage = depths.index(len(plan.running))
        if stage > state.stage:
            state = dataclasses.replace(
                state, stage=stage, count=0, total=0.0, mean=None, fall=0.0, spent=False
            )
        return self._judge(state, reading.loss) if self.when == "loss" else state

    def restore(self, plain: Mapping[str, Any]) -> GrowState:
        state = from_plain(GrowState, plain)
        return dataclasses.replace(state, then=self.then.restore(plain["then"]))

    def depths(self, n_blocks: int) -> tuple[int, ...]:
        """How many of `n_blocks` run in each stage before all do."""
        if self.blocks:
            return self.blocks
        half, quarter = n_blocks // 2, n_blocks // 4
        if self.copy == "interleave":
            half = _largest_divisor(n_blocks, half)
            quarter = _largest_divisor(half, quarter)
        return tuple(sorted({max(1, quarter), half})) if half else ()

    def ends(self, n_blocks: int) -> tuple[float, ...]:
        """The fraction of the run at which each stage ends."""
        count = len(self.depths(n_blocks))
        parts = [sum(range(2, i + 3)) for i in range(count)]  # stages of 2, 3, 4 ... parts
        return self.until or tuple(part / (2 * parts[-1]) for part in parts)

    def slots(self, n_blocks: int, depth: int) -> tuple[int, ...]:
        """The blocks that run while `depth` of `n_blocks` do."""
        if self.copy == "interleave":
            return tuple(range(0, n_blocks, n_blocks // depth))
        return tuple(range(depth))

    def sources(self, n_blocks: int, depth: int, running: Sequence[int]) -> tuple[int, ...]:
        """For each of `running` the block it takes over, where `depth` blocks ran before; those
        stay what they are. () where none are copied."""
        if self.copy == "none":
            return ()
        apart = n_blocks // depth
        return tuple(b % depth if self.copy == "stack" else b - b % apart for b in running)

    def _stage(self, state: GrowState, progress: Progress) -> int:
        """The stage of the step at `progress`: never an earlier one than before."""
        ends = self.ends(state.n_blocks)
        if state.stage == len(ends):
            return state.stage
        by_clock = sum(progress.fraction >= end for end in ends)
        return max(state.stage + state.spent, by_clock)

    def _judge(self, state: GrowState, loss: float | None) -> GrowState:
        """The state after one more loss; at the end of a window it is compared with the last."""
        if loss is None or not usable(loss):
            state = dataclasses.replace(state, not_finite=state.not_finite + 1)
        else:
            state = dataclasses.replace(state, count=state.count + 1, total=state.total + loss)
        state = dataclasses.replace(state, steps=state.steps + 1)
        if state.steps % self.window or not state.count:
            return state
        last = state.mean
        mean = state.total / state.count
        state = dataclasses.replace(state, count=0, total=0.0, mean=mean)
        if last is None:
            return state
        fall = max(state.fall, last - mean)
        return dataclasses.replace(state, fall=fall, spent=last - mean <= self.gain * fall)


def _check_ascending(name: str, values: Any, kinds: Any, what: str) -> None:
    numbers = isinstance(values, tuple) and all(
        isinstance(value, kinds) and not isinstance(value, bool) for value in values
    )
    if not (numbers and all(low < high for low, high in zip((0, *values), values, strict=False))):
        raise ValueError(
            f"{name} must be a tuple of {what}, ascending, got {values!r}: list one for each stage"
        )


def _largest_divisor(number: int, limit: int) -> int:
    return next((k for k in range(limit, 0, -1) if number % k == 0), 0)


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(map(str, numbers)) or "none"
