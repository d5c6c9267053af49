"""What a schedule is: a pure state machine over plain numbers.

No clock, no randomness, no torch: the same state and the same numbers give the same plan, in a
test, on every rank, after a resume and in a replay.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

Want = Literal["losses", "relevance"]
Metric = Literal["grad_ratio", "saliency_abs_gp", "grad_norm"]


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What one step does.

    Attributes:
        active: indices of the blocks that train, ascending; never empty. Block 0 is nearest the
            input; the boundary is `active[0]`.
        probe: whether the step measures relevance, of the blocks that train.
        phase: "full", "suffix", or "recovery:" and the stage ("full", "stage1", "stage2",
            "stage3_full"), or a schedule's own word.
        freezing: whether blocks may be left out from this step on.
        stem: whether the stem trains; None: exactly when block 0 does. If it trains, no block is
            below the boundary: those that are frozen pass the gradient on.
        running: the blocks that run at all, ascending, the active ones among them; None for all.
            The others pass on what they are given.
        sources: for each running block the one whose weights, buffers and optimizer state it takes
            over at the moment it starts to run (itself: none); () where none does.
        fresh: active blocks whose optimizer state begins anew before this step.
        rates: factors on the learning rate of each block (the stem has block 0's) and, last, of the
            head; () for 1 everywhere.
        lower: how many of the lowest blocks get their gradient, with the stem, from only `rows` of
            the batch's rows.
        rows: the share of rows, above 0 to 1.
    """

    active: tuple[int, ...]
    probe: bool = False
    phase: str = "full"
    freezing: bool = False
    stem: bool | None = None
    running: tuple[int, ...] | None = None
    sources: tuple[int, ...] = ()
    fresh: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    lower: int = 0
    rows: float = 1.0

    @property
    def stem_trains(self) -> bool:
        """Whether the stem trains."""
        return self.active[0] == 0 if self.stem is None else self.stem

    @property
    def boundary(self) -> int:
        """The first block that backward reaches; 0 where it goes on into the stem."""
        return 0 if self.stem_trains else self.active[0]

    def cost(self, n_blocks: int) -> float:
        """What the step costs of a full one, by a rule of thumb: a block's forward, the gradient of
        its input and that of its weights cost alike. (n + 2 k) / (3 n) where the top k train."""
        active, parts = set(self.active), 0.0
        for block in range(n_blocks) if self.running is None else self.running:
            rows = self.rows if block < self.lower else 1.0
            parts += 1.0 + rows * ((block >= self.boundary) + (block in active))
        return parts / (3 * n_blocks)


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """How far the run is.

    Attributes:
        step: steps taken so far; the index of the step to be planned.
        limit: steps the run may take; None where only the clock bounds it.
        elapsed_ms: time of the steps so far, in milliseconds.
        budget_ms: the run's time in milliseconds, or None in step mode.
    """

    step: int
    limit: int | None = None
    elapsed_ms: float = 0.0
    budget_ms: float | None = None

    @property
    def fraction(self) -> float:
        """How much of the run is over, 0..1: of its time, or in step mode of its steps.

        Raises ValueError if it has neither.
        """
        if self.budget_ms is not None:
            return min(1.0, self.elapsed_ms / self.budget_ms) if self.budget_ms > 0 else 1.0
        return min(1.0, self.step / self.known_limit)

    @property
    def known_limit(self) -> int:
        """`limit`, which a run without a time budget needs. Raises ValueError if it has none."""
        if self.limit is None:
            raise ValueError(
                "a run without a time budget needs a number of steps, got neither: pass "
                "total_steps or time_budget_s"
            )
        return self.limit


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """What a step gives back to the schedule.

    Attributes:
        loss: the step's training loss, or None where nobody read it.
        relevance: one number >= 0 per block, block 0 first; None where the step did not measure.
        forward_ms, backward_ms: time of each block's part of the step, for schedules with `timed`;
            None where it was not measured.
    """

    loss: float | None = None
    relevance: Sequence[float] | None = None
    forward_ms: Sequence[float] | None = None
    backward_ms: Sequence[float] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Depth:
    """The state of a schedule that remembers nothing but the number of blocks."""

    n_blocks: int


State = TypeVar("State", bound=Any)


class Schedule(Protocol[State]):
    """The rule that decides, step by step, which blocks train.

    Attributes:
        history: how many of the latest losses a later decision may look back on.
        needs_loss: whether the loss of each step has to be given.
        metric: the relevance measured on probes, and `eps` its guard against division by zero;
            None for a schedule that never probes.
        timed: whether probes also measure the time of each block.
        anneals: whether the plans' `rates` are the decay of the learning rate, so that the loop's
            own has to be left out.
    """

    @property
    def history(self) -> int: ...
    @property
    def needs_loss(self) -> bool: ...
    @property
    def metric(self) -> tuple[Metric, float] | None: ...
    @property
    def timed(self) -> bool: ...
    @property
    def anneals(self) -> bool: ...

    def init(self, n_blocks: int) -> State:
        """The state before step 0. Raises ValueError if the numbers do not fit `n_blocks`."""

    def wants(self, state: State, progress: Progress) -> frozenset[Want]:
        """Which numbers the decision at `progress` needs: the last losses before it is taken
        ("losses"), the relevance of the step it plans ("relevance"), or none."""

    def plan(self, state: State, progress: Progress) -> Plan:
        """What the step at `progress` does."""

    def observe(self, state: State, plan: Plan, reading: Reading) -> State:
        """The state after a step that did `plan` and gave `reading`."""

    def restore(self, plain: Mapping[str, Any]) -> State:
        """The state that `to_plain` wrote."""


class Measuring:
    """A schedule that asks for nothing but, on its probes, its `metric`."""

    def wants(self: Schedule[State], state: State, progress: Progress) -> frozenset[Want]:
        return frozenset({"relevance"} if self.plan(state, progress).probe else ())

    @property
    def history(self) -> int:
        return 0

    @property
    def needs_loss(self) -> bool:
        return False

    @property
    def timed(self) -> bool:
        return False

    @property
    def anneals(self) -> bool:
        return False


class Memoryless(Measuring):
    """A schedule that never measures, and remembers nothing but the number of blocks."""

    metric = None

    def init(self, n_blocks: int) -> Depth:
        require_blocks(n_blocks)
        return Depth(n_blocks)

    def observe(self, state: Depth, _plan: Plan, _reading: Reading) -> Depth:
        return state

    def restore(self, plain: Mapping[str, Any]) -> Depth:
        return from_plain(Depth, plain)


def to_plain(state: Any) -> dict[str, Any]:
    """A state, or a plan, as JSON-plain values; a state inside it too."""
    return {field.name: _plain(getattr(state, field.name)) for field in dataclasses.fields(state)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_plain(value)
    return list(value) if isinstance(value, tuple) else value


def plan_from_plain(plain: Mapping[str, Any]) -> Plan:
    """The plan that `to_plain` wrote."""
    fields: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()}
    return Plan(**fields)


def from_plain(kind: type[State], plain: Mapping[str, Any]) -> State:
    """The state of class `kind` that `to_plain` wrote. Raises ValueError if it is another's."""
    names = {field.name for field in dataclasses.fields(kind)}
    if set(plain) != names:
        raise ValueError(
            f"a saved state of {kind.__name__} holds {', '.join(sorted(names))}, got "
            f"{', '.join(sorted(plain))}: load it with the schedule that saved it"
        )
    state: State = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()})
    return state


def require_blocks(n_blocks: int) -> None:
    if n_blocks < 1:
        raise ValueError(f"a schedule needs at least 1 block, got {n_blocks}: pass the model's own")


def require_active(active: int, n_blocks: int) -> None:
    """Raise ValueError unless `active` blocks of `n_blocks` can train."""
    require_blocks(n_blocks)
    if not 1 <= active <= n_blocks:
        raise ValueError(
            f"active must be 1..{n_blocks}, got {active}: lower it or train a deeper model"
        )


def suffix(n_blocks: int, active: int) -> tuple[int, ...]:
    """The indices of the top `active` of `n_blocks` blocks."""
    return tuple(range(n_blocks - active, n_blocks))
