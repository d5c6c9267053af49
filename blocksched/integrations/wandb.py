"""Weights & Biases: a writer for one's own loop."""

from typing import Any, Protocol

from torch import Tensor

from blocksched.integrations.metrics import Metrics, is_first
from blocksched.scheduler import BlockScheduler


class Run(Protocol):
    """What is used of a wandb.Run."""

    def define_metric(self, name: str, *, step_metric: str) -> Any: ...
    def log(self, data: dict[str, Any]) -> None: ...


class WandbWriter:
    """Logs what a schedule does: `writer.step(loss)` in the place of `scheduler.step(loss)`.

    The numbers are those of Metrics, each line a row of its own, drawn over blocksched/step, the
    optimizer steps: the loop may log its own numbers as often as it likes. Where it numbers its
    rows itself, run.log(..., step=step), those of a step have to come before writer.step: W&B drops
    what comes for a row that is closed. Of several ranks the first logs.

    Args:
        scheduler: with its state loaded.
        run: what wandb.init returned; None on ranks other than the first.
        every: optimizer steps from line to line, >= 1.

    Raises:
        ValueError: `every` is less than 1, or the first rank has no run.
    """

    def __init__(self, scheduler: BlockScheduler, run: Run | None, *, every: int = 10) -> None:
        if run is None and is_first(scheduler):
            raise ValueError("run must be a wandb.Run here, got None: pass what wandb.init returns")
        self._scheduler, self._run = scheduler, run
        self._metrics = Metrics(scheduler, every=every)
        if run is not None:
            run.define_metric("blocksched/*", step_metric="blocksched/step")

    def step(self, loss: Tensor | float | None = None) -> None:
        """End a step and plan the next, as scheduler.step does; log what is due."""
        numbers = self._metrics.step(loss)
        if numbers and self._run is not None:
            self._run.log({"blocksched/step": self._scheduler.progress.step, **numbers})
