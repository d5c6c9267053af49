"""What a step should cost, from its parts measured apart in the same run.

Expected time of a step whose suffix has k of n blocks: stem and prefix forward without a graph,
forward and backward of the suffix, head and loss, update of the active share. Each part is timed on
a model of its own in rounds spread over the run, beside whole steps; medians are compared. Of
several processes each does so by itself, on its share of a batch, without communication.
"""

import collections
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.config import Config
from bench.models import model_of, optimizer
from bench.processes import alone
from bench.tasks.parts import Stack, Task
from blocksched import BlockScheduler, StaticSuffix
from blocksched.finite import all_finite

_PARTS = ("stem and prefix", "suffix", "head", "update")


class Expected:
    """Times the parts of a step; `round` once in a while, `step_ms` at the end."""

    def __init__(self, task: Task, config: Config, fused: bool) -> None:
        n = config.n_layers
        self.anchors = sorted({max(1, round(n * share)) for share in (0.25, 0.5, 0.75, 1.0)})
        self._task, self._n, self.fused = task, n, fused
        self._parts: dict[tuple[str, int], list[float]] = collections.defaultdict(list)
        self._model: Stack = model_of(task, config, fused)
        self._optimizer = optimizer(self._model, config, fused)
        self._batch = task.batch(0)
        self._group = alone()
        self.rounds = -1  # the first only warms up
        self._now: dict[tuple[str, int], float] = {}
        self.round()

    def round(self) -> None:
        """Time every part, and a whole step at each anchor, once."""
        self._now = {}
        for k in self.anchors:
            scheduler = BlockScheduler(
                self._model,
                self._optimizer,
                StaticSuffix(active=k),
                total_steps=1 << 40,
                blocks="blocks",
                group=self._group,
            )
            for _ in range(2):  # the second, on memory and caches that the first has warmed, counts
                self._apart(k)
            for _ in range(2):
                self._whole_step(scheduler, k)
            scheduler.close()
        if self.rounds == 0:
            self._parts.clear()
        for key, ms in self._now.items():
            self._parts[key].append(ms)
        self.rounds += 1

    def step_ms(self, active: int) -> float:
        """The expected time of a step with `active` blocks in the suffix."""
        return sum(self._at(name, active) for name in _PARTS)

    def efficiency(self) -> dict[int, float]:
        """Measured over expected time of a whole step at each anchor, round by round: a slow
        moment of the machine then hits both. The median over the rounds."""
        return {
            k: statistics.median(
                whole / sum(parts)
                for whole, *parts in zip(
                    self._parts["step", k], *(self._parts[name, k] for name in _PARTS), strict=True
                )
            )
            for k in self.anchors
        }

    def parts_ms(self) -> dict[str, dict[int, float]]:
        """The median of each part at each anchor."""
        found: dict[str, dict[int, float]] = {}
        for name, k in self._parts:
            found.setdefault(name, {})[k] = self._median(name, k)
        return found

    def state(self) -> dict[str, Any]:
        """What was measured so far, as plain values."""
        parts = [[name, k, times] for (name, k), times in self._parts.items()]
        return {"rounds": self.rounds, "parts": parts}

    def load_state(self, saved: dict[str, Any]) -> None:
        """Go on where `saved` was."""
        self.rounds = saved["rounds"]
        self._parts.clear()
        self._parts.update({(name, k): times for name, k, times in saved["parts"]})

    def _whole_step(self, scheduler: BlockScheduler, k: int) -> None:
        inputs, targets = self._batch

        def step() -> None:
            loss = self._task.loss(self._task.forward(self._model, inputs), targets)
            loss.backward()
            if scheduler.finite(loss):
                self._optimizer.step()
            self._optimizer.zero_grad()
            scheduler.step(loss.item())

        self._timed("step", k, step)

    def _apart(self, k: int) -> None:
        task, model, n = self._task, self._model, self._n
        inputs, targets = self._batch
        whole = k == n

        def run_stem() -> Tensor:
            x = task.forward(model.stem, inputs)
            for block in model.blocks[: n - k]:
                x = task.forward(block, x)
            return x

        def run_suffix(x: Tensor) -> Tensor:
            for block in model.blocks[n - k :]:
                x = task.forward(block, x)
            return x

        with torch.no_grad():
            if whole:  # the stem is timed with the suffix, since backward runs through both
                stem = run_stem()
                self._now["stem and prefix", k] = 0.0
            else:
                stem = self._timed("stem and prefix", k, run_stem).detach()
        grad = torch.randn_like(stem)

        def suffix() -> Tensor:
            x = run_suffix(run_stem() if whole else stem)
            x.backward(grad)
            return x

        top = self._timed("suffix", k, suffix).detach().requires_grad_()

        def head() -> float:
            loss = task.loss(task.forward(model.head, top), targets)
            loss.backward()
            return loss.item()

        self._timed("head", k, head)

        def update() -> None:
            if all_finite([p.grad for p in model.parameters() if p.grad is not None], 0.0):
                self._optimizer.step()
            self._optimizer.zero_grad()

        self._timed("update", k, update)

    def _timed(self, name: str, k: int, part: Callable[[], Any]) -> Any:
        self._synchronize()
        start = time.perf_counter()
        result = part()
        self._synchronize()
        self._now[name, k] = (time.perf_counter() - start) * 1e3
        return result

    def _median(self, name: str, k: int) -> float:
        return statistics.median(self._parts[name, k])

    def _at(self, name: str, active: int) -> float:
        """A part's time at `active` blocks: on the line through the two nearest anchors."""
        if active in self.anchors:
            return self._median(name, active)
        # The full step differs in kind (the stem trains), so it anchors no line.
        below = [k for k in self.anchors if k < self._n]
        if len(below) < 2:
            return self._median(name, min(self.anchors, key=lambda k: abs(k - active)))
        low, high = sorted(sorted(below, key=lambda k: abs(k - active))[:2])
        slope = (self._median(name, high) - self._median(name, low)) / (high - low)
        return self._median(name, low) + slope * (active - low)

    def _synchronize(self) -> None:
        if self._task.device.type == "cuda":
            torch.cuda.synchronize(self._task.device)
