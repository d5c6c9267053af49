"""What a step should cost, from its parts measured apart in the same run.

Expected time of a step: stem and prefix forward without a graph, forward and backward of the blocks
from the boundary on, head and loss, update of what trains. Each part is timed at a few anchors
(bench/costs.py) in rounds spread over the run, beside whole steps; medians are compared. Of several
processes each does so by itself, on its share of a batch, without communication.
"""

import collections
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.config import Config
from bench.costs import PARTS, Costs, Shape, anchors
from bench.models import model_of, optimizer
from bench.processes import alone
from bench.tasks.parts import Stack, Task
from blocksched import BlockScheduler
from blocksched.finite import all_finite
from blocksched.schedules import Depth, Plan, Progress
from blocksched.schedules.base import Memoryless


@dataclasses.dataclass(frozen=True)
class Fixed(Memoryless):
    """Every step does `every`."""

    every: Plan

    def plan(self, _state: Depth, _progress: Progress) -> Plan:
        return self.every


class Expected:
    """Times the parts of a step; `round` once in a while, `step_ms` at the end.

    Args:
        beside: plans, of other shapes than the anchors', of which whole steps are timed too.
    """

    def __init__(
        self, task: Task, config: Config, fused: bool, beside: Sequence[Plan] = ()
    ) -> None:
        self._task, self._n, self.fused = task, config.n_layers, fused
        self._anchors = anchors(self._n)
        self._plans = self._anchors | {Shape.of(plan, self._n): plan for plan in beside}
        self._suffixes = {
            s.active: s for s in self._anchors if s == Shape.suffix(s.active, self._n)
        }
        self._parts: dict[tuple[str, Shape], list[float]] = collections.defaultdict(list)
        self._model: Stack = model_of(task, config, fused)
        self._optimizer = optimizer(self._model, config, fused)
        self._batch = task.batch(0)
        self._group = alone()
        self.rounds = -1  # the first only warms up
        self._now: dict[tuple[str, Shape], float] = {}
        self.round()

    def round(self) -> None:
        """Time every part at each anchor, and whole steps, once."""
        self._now = {}
        for shape, plan in self._plans.items():
            scheduler = BlockScheduler(
                self._model,
                self._optimizer,
                Fixed(plan),
                total_steps=1 << 40,
                blocks="blocks",
                group=self._group,
            )
            for _ in range(2):  # the second, on memory and caches that the first has warmed, counts
                if shape in self._anchors:
                    self._apart(shape, plan.boundary)
            # In a run steps follow steps. After the parts the first two are slower, by up to 4 %.
            for _ in range(3):
                self._whole_step(scheduler, shape)
            scheduler.close()
        if self.rounds == 0:
            self._parts.clear()
        for key, ms in self._now.items():
            self._parts[key].append(ms)
        self.rounds += 1

    def step_ms(self, active: int) -> float:
        """The expected time of a step in which the top `active` blocks train."""
        return self.shape_ms(Shape.suffix(active, self._n))

    def shape_ms(self, shape: Shape) -> float:
        """The expected time of a step of this shape."""
        medians = {key: statistics.median(times) for key, times in self._parts.items()}
        return Costs(self._n, medians).step_ms(shape)

    def measured_over_expected(self) -> dict[Shape, float]:
        """Of whole steps, round by round: a slow moment of the machine then hits both. The medians
        over the rounds."""
        ratios: dict[Shape, list[float]] = {shape: [] for shape in self._plans}
        for times in zip(*self._parts.values(), strict=True):
            now = dict(zip(self._parts, times, strict=True))
            costs = Costs(self._n, now)
            for shape, found in ratios.items():
                found.append(now["step", shape] / costs.step_ms(shape))
        return {shape: statistics.median(found) for shape, found in ratios.items()}

    def efficiency(self) -> dict[int, float]:
        """The same of suffixes, by number of active blocks."""
        found = self.measured_over_expected()
        return {k: found[shape] for k, shape in self._suffixes.items()}

    def parts_ms(self) -> dict[str, dict[int, float]]:
        """The median of each part, and of a whole step, of suffixes by number of active blocks."""
        return {
            name: {k: statistics.median(self._parts[name, s]) for k, s in self._suffixes.items()}
            for name in (*PARTS, "step")
        }

    def state(self) -> dict[str, Any]:
        """What was measured so far, as plain values."""
        parts = [[name, list(shape), times] for (name, shape), times in self._parts.items()]
        return {"rounds": self.rounds, "parts": parts}

    def load_state(self, saved: dict[str, Any]) -> None:
        """Go on where `saved` was."""
        self.rounds = saved["rounds"]
        self._parts.clear()
        self._parts.update({(name, Shape(*shape)): times for name, shape, times in saved["parts"]})

    def _whole_step(self, scheduler: BlockScheduler, shape: Shape) -> None:
        inputs, targets = self._batch

        def step() -> None:
            loss = self._task.loss(self._task.forward(self._model, inputs), targets)
            loss.backward()
            if scheduler.finite(loss):
                self._optimizer.step()
            self._optimizer.zero_grad()
            scheduler.step(loss.item())

        self._timed("step", shape, step)

    def _apart(self, shape: Shape, boundary: int) -> None:
        task, model = self._task, self._model
        inputs, targets = self._batch

        def run_stem() -> Tensor:
            x = task.forward(model.stem, inputs)
            for block in model.blocks[:boundary]:
                x = task.forward(block, x)
            return x

        def run_suffix(x: Tensor) -> Tensor:
            for block in model.blocks[boundary:]:
                x = task.forward(block, x)
            return x

        with torch.no_grad():
            if shape.stem:  # it is timed with the blocks, since backward runs through both
                stem = run_stem()
                self._now["stem and prefix", shape] = 0.0
            else:
                stem = self._timed("stem and prefix", shape, run_stem).detach()
        grad = torch.randn_like(stem)

        def suffix() -> Tensor:
            x = run_suffix(run_stem() if shape.stem else stem)
            x.backward(grad)
            return x

        top = self._timed("suffix", shape, suffix).detach().requires_grad_()

        def head() -> float:
            loss = task.loss(task.forward(model.head, top), targets)
            loss.backward()
            return loss.item()

        self._timed("head", shape, head)

        def update() -> None:
            if all_finite([p.grad for p in model.parameters() if p.grad is not None], 0.0):
                self._optimizer.step()
            self._optimizer.zero_grad()

        self._timed("update", shape, update)

    def _timed(self, name: str, shape: Shape, part: Callable[[], Any]) -> Any:
        self._synchronize()
        start = time.perf_counter()
        result = part()
        self._synchronize()
        self._now[name, shape] = (time.perf_counter() - start) * 1e3
        return result

    def _synchronize(self) -> None:
        if self._task.device.type == "cuda":
            torch.cuda.synchronize(self._task.device)
