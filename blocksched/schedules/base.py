"""What a schedule is: a pure state machine over plain numbers.

No clock, no randomness, no torch: the same state and the same numbers give the same plan, in a
test, on every rank, after a resume and in a replay.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

Want = Literal["losses", "relevance"]
Metric = Literal["grad_ratio", "saliency_abs_gp"]


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What one step does.

    Attributes:
        active: indices of the blocks that train, ascending; never empty. Block 0 is nearest the
            input; the boundary is `active[0]`.
        probe: whether the step measures relevance (it then has full gradients).
        phase: "full", "suffix", or "recovery:" and the stage ("full", "stage1", "stage2",
            "stage3_full").
        freezing: whether blocks may be left out from this step on.
    """

    active: tuple[int, ...]
    probe: bool = False
    phase: str = "full"
    freezing: bool = False


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


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """What a step gives back to the schedule.

    Attributes:
        loss: the step's training loss, or None where nobody read it.
        relevance: one number >= 0 per block, block 0 first; None where the step did not measure.
    """

    loss: float | None = None
    relevance: Sequence[float] | None = None


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
    """

    @property
    def history(self) -> int: ...
    @property
    def needs_loss(self) -> bool: ...
    @property
    def metric(self) -> tuple[Metric, float] | None: ...

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


def to_plain(state: Any) -> dict[str, Any]:
    """A state as JSON-plain values."""
    return {
        field.name: list(value) if isinstance(value, tuple) else value
        for field in dataclasses.fields(state)
        for value in [getattr(state, field.name)]
    }


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


def suffix(n_blocks: int, active: int) -> tuple[int, ...]:
    """The indices of the top `active` of `n_blocks` blocks."""
    return tuple(range(n_blocks - active, n_blocks))
