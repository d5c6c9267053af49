"""The numbers of a scheduled run for any logger: Metrics in one's own loop, Counts in callbacks."""

from collections.abc import Sequence

from torch import Tensor

from blocksched.scheduler import BlockScheduler
from blocksched.schedules.base import Plan

_WARM_UP = 5  # steps that allocate, compile and tune, and say nothing about later ones


class Metrics:
    """Takes the scheduler's steps, and says every `every` of them what they did.

    Call `step` in the place of `scheduler.step`. A line has, of the steps since the last one:

    - blocksched/active: blocks trained, mean;
    - blocksched/boundary: index of the first active block in the last step;
    - blocksched/probes: how many measured relevance;
    - blocksched/step_ms: mean time of a step in milliseconds, by the scheduler's clock: without
      what runs in off_clock(), on a CUDA device what the device has done, and under a time budget
      that of the slowest rank;
    - blocksched/expected_step_ms: what that should have been, `Plan.cost` of a full step's time,
      (n + 2 k) / (3 n) where the top k of n blocks train: forward is taken to cost as much as the
      gradients of activations and as much as those of weights. Head, stem, optimizer and
      PrefixCache are not in this rule. A full step's time is the mean in this process so far, over
      full steps that follow a full step, without the first 5 steps; before there is one (with
      StaticSuffix: ever, after a resume: until the recovery) there is no expected time;
    - blocksched/loss: the last step's alone, if given; of several ranks, the first one's;
    - blocksched/skipped: updates that `scheduler.finite` has had left out so far, if any.

    blocksched/relevance/0 and so on, one number a block, come in the step that measured them, on a
    line of their own between those lines.

    Nothing waits for the device but the reading of a loss that is a tensor, once a line.

    Args:
        scheduler: whose steps they are, at the step that the run goes on from: load its state
            first.
        every: optimizer steps from line to line, >= 1; lines are at its multiples.

    Raises:
        ValueError: `every` is less than 1.
    """

    def __init__(self, scheduler: BlockScheduler, *, every: int = 10) -> None:
        if every < 1:
            raise ValueError(f"every must be >= 1, got {every}: give the steps from line to line")
        self._scheduler, self._every = scheduler, every
        self._counts = Counts(scheduler)
        self._times = _Times(scheduler)
        self._at = scheduler.progress.step

    def step(self, loss: Tensor | float | None = None) -> dict[str, float]:
        """Have the scheduler end a step and plan the next.

        Args:
            loss: as scheduler.step takes it.

        Returns:
            The line to log at step `scheduler.progress.step`; mostly empty, and always so on ranks
            other than the first.

        Raises:
            RuntimeError: the scheduler has taken steps without it, or has loaded a state.
            What scheduler.step raises.
        """
        scheduler = self._scheduler
        at = scheduler.progress.step
        if at != self._at:
            raise RuntimeError(
                f"the scheduler is at step {at}, its metrics are at {self._at}: build them after "
                "scheduler.load_state_dict, and call their step in the place of scheduler.step"
            )
        plan = scheduler.plan
        self._counts.step(loss)
        self._at = at + 1
        due = self._at % self._every == 0
        numbers: dict[str, float] = {}
        if due and loss is not None:
            # Before the clock is read: the device has caught up by then.
            numbers["blocksched/loss"] = loss.item() if isinstance(loss, Tensor) else loss
        self._times.add(plan)
        numbers |= self._counts.relevance()
        if due:
            numbers |= self._counts.take() | self._times.take()
            if scheduler.skipped:
                numbers["blocksched/skipped"] = scheduler.skipped
        return numbers if is_first(scheduler) else {}


def is_first(scheduler: BlockScheduler) -> bool:
    """Whether this process writes for all that train the model."""
    return scheduler.ranks is None or scheduler.ranks.rank == 0


class Counts:
    """What the steps since the last line trained and measured; `step` is the scheduler's."""

    def __init__(self, scheduler: BlockScheduler) -> None:
        self._scheduler = scheduler
        self._steps = self._active = self._probes = self._boundary = 0
        self._measured: Sequence[float] = ()

    def step(self, loss: Tensor | float | None) -> None:
        plan, before = self._scheduler.plan, self._scheduler.relevance
        self._scheduler.step(loss)
        self._steps += 1
        self._active += len(plan.active)
        self._probes += plan.probe
        self._boundary = plan.boundary
        measured = self._scheduler.relevance
        if measured is not None and measured is not before:  # a skipped update measures nothing
            self._measured = measured

    def relevance(self) -> dict[str, float]:
        """The relevance that was measured since it was last asked for."""
        numbers = {f"blocksched/relevance/{i}": value for i, value in enumerate(self._measured)}
        self._measured = ()
        return numbers

    def take(self) -> dict[str, float]:
        """The line, empty if there was no step; the next one begins."""
        if not self._steps:
            return {}
        numbers = {
            "blocksched/active": self._active / self._steps,
            "blocksched/boundary": self._boundary,
            "blocksched/probes": self._probes,
        }
        self._steps = self._active = self._probes = 0
        return numbers | self.relevance()


class _Times:
    """Measured and expected time of the steps since the last line."""

    def __init__(self, scheduler: BlockScheduler) -> None:
        self._scheduler = scheduler
        self._n = len(scheduler.blocks)
        self._elapsed_ms = scheduler.progress.elapsed_ms
        self._taken = 0
        self._full_ms, self._full_steps = 0.0, 0
        self._was_full = False
        self._clear()

    def add(self, plan: Plan) -> None:
        """A step that did `plan` has ended."""
        now = self._scheduler.progress.elapsed_ms
        ms = now - self._elapsed_ms
        self._elapsed_ms = now
        self._taken += 1
        self._ms += ms
        self._share += plan.cost(self._n)
        self._steps += 1
        full = plan.cost(self._n) == 1.0
        # A CUDA device lags behind, so that a lone full step gets the time of others.
        if full and self._was_full and self._taken > _WARM_UP:
            self._full_ms += ms
            self._full_steps += 1
        self._was_full = full

    def take(self) -> dict[str, float]:
        numbers = {"blocksched/step_ms": self._ms / self._steps}
        if self._full_steps:
            full_ms = self._full_ms / self._full_steps
            numbers["blocksched/expected_step_ms"] = full_ms * self._share / self._steps
        self._clear()
        return numbers

    def _clear(self) -> None:
        self._ms, self._share, self._steps = 0.0, 0.0, 0
