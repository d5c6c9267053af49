"""The timed loop: one arm trains one model under one schedule, a few steps at a time."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed import ProcessGroup

from bench import memory
from bench.config import Config
from bench.costs import Shape
from bench.lora import Lora
from bench.models import model_of, optimizer, parallel, weights_sha256
from bench.phases import Phases
from bench.tasks.parts import Task
from blocksched import BlockScheduler
from blocksched.distributed import Traffic, prepare_ddp
from blocksched.finite import NotFiniteError
from blocksched.schedules import DynamicSuffix, Plan, Reading, Schedule, to_plain
from blocksched.schedules.trace import DynamicTrace

EVALUATIONS = 8  # validations of a run after the one at its start, spread evenly over its clock


class StepRecord(NamedTuple):
    """What is kept of a step. On several processes its time is the slowest's, its loss the mean,
    and this one gave so many bytes of gradients to all-reduce, and of numbers to be agreed on."""

    ms: float
    loss: float
    active: int
    probe: bool
    gradient_bytes: int = 0
    agreement_bytes: int = 0
    shape: tuple[Any, ...] = ()  # of which a Shape is made; plain, as a checkpoint wants it


class StepClock:
    """The benchmark's clock: the sum of the step times, advanced by the arm itself."""

    def __init__(self) -> None:
        self.elapsed_ms = 0.0

    def tick(self) -> None:
        """Nothing to do: the arm adds each step's time."""

    pause = resume = tick


class Arm:
    """A schedule's run, on `budget_ms` of step time or, if that is None, for `config.steps`.

    On the processes of `group`, by default all there are, which share each batch. A step counts
    the milliseconds it took or, if there is `counted`, what that makes of its plan and of those.
    """

    def __init__(
        self,
        name: str,
        schedule: Schedule[Any],
        task: Task,
        config: Config,
        budget_ms: float | None,
        fused: bool,
        group: ProcessGroup | None = None,
        counted: Callable[[Plan, float], float] | None = None,
    ) -> None:
        self.name, self.schedule, self.fused = name, schedule, fused
        self._counted = counted
        self.budget_ms = budget_ms
        self.steps: list[StepRecord] = []  # those that have ended, their reading included
        self.changes: list[tuple[int, Sequence[int]]] = []  # from that step on, these blocks train
        self.running: list[tuple[int, Sequence[int]]] = []  # and these run, where not all did
        self.readings: list[dict[str, Any]] = []  # what the probes measured
        self._last: StepRecord | None = None
        self._last_parts: dict[str, float] = {}
        self.val_trace: list[dict[str, float]] = []
        self.failure: str | None = None  # why it stopped before its end
        self.asked_to_stop = False
        self.weights_sha256: str | None = None
        self._task, self._config = task, config
        self.model = model_of(task, config, fused, schedule)
        self._parallel = parallel(self.model, schedule, group)
        self.optimizer = optimizer(self.model, config, fused)
        self._lr = config.lr * (schedule.lr_factor if isinstance(schedule, Lora) else 1.0)
        self._clock = StepClock()
        self.scheduler = BlockScheduler(
            self.model,
            self.optimizer,
            schedule,
            total_steps=config.steps if budget_ms is None else None,
            time_budget_s=None if budget_ms is None else budget_ms / 1e3,
            blocks="blocks",
            clock=self._clock,
            group=group,
            max_skipped=config.max_skipped,
        )
        self._traffic: Traffic | None = None
        if self._parallel is not None and self._parallel.find_unused_parameters:
            self._traffic = prepare_ddp(self._parallel, self.scheduler)
        self._agreed_bytes = 0
        self._trace = DynamicTrace(schedule) if isinstance(schedule, DynamicSuffix) else None
        self.memory = memory.ByActive(task.device, self.model, self.optimizer)
        self.phases = Phases(task.device, config.warmup_ignore_steps)
        # After the scheduler's own hook, which measures.
        self.optimizer.register_step_pre_hook(lambda *_: self.phases.mark("measure"))

    @property
    def elapsed_ms(self) -> float:
        """The sum of the step times so far."""
        return self._clock.elapsed_ms

    @property
    def active(self) -> int:
        """How many blocks the current step trains."""
        return len(self.scheduler.plan.active)

    @property
    def fraction(self) -> float:
        """How far the run is, 0..1, on the clock that ends it."""
        return self.scheduler.fraction

    @property
    def finished(self) -> bool:
        """Whether the steps, or the time, are used up, or the arm failed."""
        count, config = self.taken, self._config
        if self.failure is not None:
            return True
        if self.budget_ms is None:
            return count >= config.steps
        spent = self.elapsed_ms >= self.budget_ms and count >= config.warmup_ignore_steps
        return count >= 1 and (spent or count >= config.limit)

    @property
    def dynamic_trace(self) -> list[dict[str, Any]]:
        """The experiment's dynamic_trace of the steps that have ended, [] without probes."""
        entries = [] if self._trace is None else self._trace.entries
        return [entry for entry in entries if entry["step"] < len(self.steps)]

    @property
    def taken(self) -> int:
        """The steps taken, one that has not ended included."""
        return len(self.steps) + (self._last is not None)

    def advance(self, steps: int, asked: Callable[[], bool] = lambda: False) -> bool:
        """Run up to `steps` more steps; whether a validation fell due (and was made) on the way.

        Once `asked` is true on some process, all end after the same step, `asked_to_stop` set.
        """
        before = len(self.val_trace)
        if not self.val_trace:
            self._evaluate()
        for _ in range(steps):
            self._step(asked)
            if self.finished:
                self._finish()
            elif self.fraction * EVALUATIONS >= len(self.val_trace):
                self._evaluate()
            if self.finished or self.asked_to_stop:
                self.settle()
                break
        return len(self.val_trace) > before

    def settle(self) -> None:
        """End the last step here, off the clock, instead of on that of the next step."""
        if self._last is not None:
            self._end_step(self._last)

    def state(self) -> dict[str, Any]:
        """As plain values, what a checkpoint keeps beside the model, optimizer and scheduler."""
        self.settle()
        return {
            "steps": [list(step) for step in self.steps],
            "changes": [[step, list(active)] for step, active in self.changes],
            "running": [[step, list(running)] for step, running in self.running],
            "readings": self.readings,
            "val_trace": self.val_trace,
            "phases": self.phases.state(),
            "memory": list(self.memory.bytes.items()),
            "trace": None if self._trace is None else self._trace.state_dict(),
            "failure": self.failure,
            "weights_sha256": self.weights_sha256,
        }

    def load_state(self, saved: dict[str, Any]) -> None:
        """Take in what `state` gave, after model, optimizer and scheduler were loaded."""
        self.steps = [StepRecord(*step) for step in saved["steps"]]
        self.changes = [(step, tuple(active)) for step, active in saved["changes"]]
        self.running = [(step, tuple(running)) for step, running in saved["running"]]
        self.readings = saved["readings"]
        self.val_trace = saved["val_trace"]
        self.phases.load_state(saved["phases"])
        self.memory.bytes = dict(saved["memory"])
        if self._trace is not None:
            self._trace.load_state_dict(saved["trace"])
        self.failure = saved["failure"]
        self.weights_sha256 = saved["weights_sha256"]

    def _step(self, asked: Callable[[], bool]) -> None:
        inputs, targets = self._task.batch(self.taken)
        self.memory.begin()
        self._synchronize()
        start = time.perf_counter()
        self.phases.begin()
        if self._last is not None:
            self._end_step(self._last)
        elif self._trace is not None and not self.steps:
            self._trace.planned(self.scheduler.progress, self.scheduler.plan)
        linear = self._config.lr_decay == "linear" and not self.schedule.anneals
        decay = 1.0 - self.fraction if linear else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr * decay
        sent = 0 if self._traffic is None else self._traffic.bytes
        loss = self._forward(inputs, targets)
        loss.backward()
        self.phases.mark("backward")
        if self._finite(loss):
            self.optimizer.step()
            self.phases.mark("update")
        self.optimizer.zero_grad()
        value = loss.item()
        self._synchronize()
        ms = (time.perf_counter() - start) * 1e3
        if self._counted is not None:
            ms = self._counted(self.scheduler.plan, ms)
        rows = self._gather([ms, value, float(asked())])
        slowest, losses, asking = (list(column) for column in zip(*rows, strict=True))
        self.asked_to_stop = any(asking)
        plan, mean = self.scheduler.plan, statistics.fmean(losses)
        traffic = self._bytes_since(sent)
        shape = tuple(Shape.of(plan, len(self.scheduler.blocks)))
        self._last = StepRecord(max(slowest), mean, len(plan.active), plan.probe, *traffic, shape)
        self._last_parts = self.phases.read()
        self._clock.elapsed_ms += max(slowest)
        self.memory.end(self.active, lambda: self._task.forward(self.model, inputs))

    def _forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of a step, with marks where its parts end."""
        first = self.scheduler.plan.boundary

        def before_block(i: int) -> None:
            if i == first:
                self.phases.mark("prefix forward")

        self.phases.mark("other")
        self.model.before_block = before_block
        outputs = self._task.forward(self._parallel or self.model, inputs)
        self.model.before_block = None
        loss = self._task.loss(outputs, targets)
        self.phases.mark("suffix forward")
        return loss

    def _finite(self, loss: torch.Tensor) -> bool:
        """Whether to take the step; too many that are not taken in a row end the arm."""
        try:
            fine = self.scheduler.finite(loss)
        except NotFiniteError as error:
            self.failure, fine = str(error), False
        self.phases.mark("measure")
        return fine

    def _end_step(self, last: StepRecord) -> None:
        """Hand a step's loss to the scheduler, which plans the next; on the clock of that one."""
        scheduler = self.scheduler
        plan, state = scheduler.plan, scheduler.state
        scheduler.step(last.loss)
        self.phases.mark("measure")
        if self._trace is not None:
            reading = Reading(last.loss)
            self._trace.observed(len(self.steps), plan, reading, state, scheduler.state)
            self._trace.planned(scheduler.progress, scheduler.plan)
        self._note(plan)
        self.phases.add(len(self.steps), last.active, last.ms, self._last_parts)
        self.steps.append(last)
        self._last = None

    def _note(self, plan: Plan) -> None:
        """Keep which blocks trained and ran in the step that ends, and what it measured."""
        step, everything = len(self.steps), tuple(range(self._config.n_layers))
        if not self.changes or self.changes[-1][1] != plan.active:
            self.changes.append((step, plan.active))
        running = everything if plan.running is None else plan.running
        if self.running or plan.running is not None:
            if not self.running and step > 0:
                self.running.append((0, everything))
            if not self.running or self.running[-1][1] != running:
                self.running.append((step, running))
        if plan.probe:
            reading = self.scheduler.reading or Reading()
            self.readings.append({"step": step, **to_plain(reading)})
            del self.readings[-1]["loss"]

    def _finish(self) -> None:
        if self.failure is not None:
            return
        self._evaluate()
        if self.budget_ms is None:
            self.weights_sha256 = weights_sha256(self.model)
            if self.scheduler.ranks is not None:
                self.scheduler.ranks.agree(f"{self.name} ends with {self.weights_sha256}")

    def _evaluate(self) -> None:
        self.model.eval()
        with torch.no_grad():
            losses = [
                self._task.loss(self._task.forward(self.model, inputs), targets).item()
                for inputs, targets in self._task.validation()
            ]
        self.model.train()
        means = [mean for (mean,) in self._gather([sum(losses) / len(losses)])]
        self.val_trace.append(
            {
                "step": self.taken,
                "elapsed_ms": self.elapsed_ms,
                "val_loss": sum(means) / len(means),
            }
        )

    def _gather(self, numbers: list[float]) -> list[list[float]]:
        """The numbers of every process."""
        ranks = self.scheduler.ranks
        return [numbers] if ranks is None else ranks.gather(numbers)

    def _bytes_since(self, sent: int) -> tuple[int, int]:
        """Of gradients and of agreement, given to the others since the last step."""
        if self._parallel is None:
            return 0, 0
        assert self.scheduler.ranks is not None
        agreed, self._agreed_bytes = self._agreed_bytes, self.scheduler.ranks.bytes
        if self._traffic is None:
            return memory.weights(self.model), self._agreed_bytes - agreed
        return self._traffic.bytes - sent, self._agreed_bytes - agreed

    def _synchronize(self) -> None:
        if self._task.device.type == "cuda":
            torch.cuda.synchronize(self._task.device)
