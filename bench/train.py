"""The timed loop: one arm trains one model under one schedule, a few steps at a time."""

import time
from typing import Any, NamedTuple

import torch
from torch import nn

from bench.config import Config
from bench.tasks.parts import Stack, Task
from blocksched import AdamW, BlockScheduler, compile_blocks
from blocksched.schedules import DynamicSuffix, Reading, Schedule
from blocksched.schedules.trace import DynamicTrace

EVALUATIONS = 8  # validations of a run after the one at its start, spread evenly over its clock


class StepRecord(NamedTuple):
    """What is kept of a step: its time, its training loss and how many blocks it trained."""

    ms: float
    loss: float
    active: int
    probe: bool


def model_of(task: Task, config: Config, fused: bool) -> Stack:
    """A model at the task's start; --backend compile compiles the blocks of those fused."""
    model = task.model(fused)
    if fused and config.backend == "compile":
        compile_blocks(model, "blocks")
    return model


def optimizer(model: nn.Module, config: Config, fused: bool) -> torch.optim.Optimizer:
    """torch's AdamW as it comes, or ours."""
    made = AdamW if fused else torch.optim.AdamW
    return made(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)


class StepClock:
    """The benchmark's clock: the sum of the step times, advanced by the arm itself."""

    def __init__(self) -> None:
        self.elapsed_ms = 0.0

    def tick(self) -> None:
        """Nothing to do: the arm adds each step's time."""

    pause = resume = tick


class Arm:
    """A schedule's run, on `budget_ms` of step time or, if that is None, for `config.steps`."""

    def __init__(
        self,
        name: str,
        schedule: Schedule[Any],
        task: Task,
        config: Config,
        budget_ms: float | None,
        fused: bool,
    ) -> None:
        self.name, self.schedule, self.fused = name, schedule, fused
        self.budget_ms = budget_ms
        self.steps: list[StepRecord] = []  # those that have ended, their reading included
        self._last: StepRecord | None = None
        self.val_trace: list[dict[str, float]] = []
        self.peak_bytes = 0
        self._task, self._config = task, config
        self._model = model_of(task, config, fused)
        self._optimizer = optimizer(self._model, config, fused)
        self._clock = StepClock()
        self._scheduler = BlockScheduler(
            self._model,
            self._optimizer,
            schedule,
            total_steps=config.steps if budget_ms is None else None,
            time_budget_s=None if budget_ms is None else budget_ms / 1e3,
            blocks="blocks",
            clock=self._clock,
        )
        self._trace = DynamicTrace(schedule) if isinstance(schedule, DynamicSuffix) else None
        self._saved_bytes: dict[int, int] = {}

    @property
    def elapsed_ms(self) -> float:
        """The sum of the step times so far."""
        return self._clock.elapsed_ms

    @property
    def model(self) -> nn.Module:
        """The model it trains."""
        return self._model

    @property
    def active(self) -> int:
        """How many blocks the current step trains."""
        return len(self._scheduler.plan.active)

    @property
    def fraction(self) -> float:
        """How far the run is, 0..1, on the clock that ends it."""
        return self._scheduler.fraction

    @property
    def finished(self) -> bool:
        """Whether the steps, or the time, are used up."""
        count, config = self._count, self._config
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
    def _count(self) -> int:
        return len(self.steps) + (self._last is not None)

    def advance(self, steps: int) -> bool:
        """Run up to `steps` more steps; whether a validation fell due (and was made) on the way."""
        before = len(self.val_trace)
        if not self.val_trace:
            self._evaluate()
        for _ in range(steps):
            self._step()
            if self.finished and self._last is not None:
                self._end_step(self._last)
            if self.finished or self.fraction * EVALUATIONS >= len(self.val_trace):
                self._evaluate()
            if self.finished:
                break
        return len(self.val_trace) > before

    def _step(self) -> None:
        inputs, targets = self._task.batch(self._count)
        if self._task.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._task.device)
        standing = self._allocated()
        self._synchronize()
        start = time.perf_counter()
        if self._last is not None:
            self._end_step(self._last)
        elif self._trace is not None:
            self._trace.planned(self._scheduler.progress, self._scheduler.plan)
        decay = 1.0 - self.fraction if self._config.lr_decay == "linear" else 1.0
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.lr * decay
        loss = self._task.loss(self._task.forward(self._model, inputs), targets)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        value = loss.item()
        self._synchronize()
        ms = (time.perf_counter() - start) * 1e3
        plan = self._scheduler.plan
        self._last = StepRecord(ms, value, len(plan.active), plan.probe)
        self._clock.elapsed_ms += ms
        self._note_memory(inputs, standing)

    def _end_step(self, last: StepRecord) -> None:
        """Hand a step's loss to the scheduler, which plans the next; on the clock of that one."""
        scheduler = self._scheduler
        plan, state = scheduler.plan, scheduler.state
        scheduler.step(last.loss)
        if self._trace is not None:
            reading = Reading(last.loss)
            self._trace.observed(len(self.steps), plan, reading, state, scheduler.state)
            self._trace.planned(scheduler.progress, scheduler.plan)
        self.steps.append(last)
        self._last = None

    def _evaluate(self) -> None:
        self._model.eval()
        with torch.no_grad():
            losses = [
                self._task.loss(self._task.forward(self._model, inputs), targets).item()
                for inputs, targets in self._task.validation()
            ]
        self._model.train()
        self.val_trace.append(
            {
                "step": self._count,
                "elapsed_ms": self.elapsed_ms,
                "val_loss": sum(losses) / len(losses),
            }
        )

    def _note_memory(self, inputs: torch.Tensor, standing: int) -> None:
        """On CUDA what a step takes beside what stands before it, plus the arm's own weights,
        gradients and moments; on a CPU the bytes that a forward keeps for backward."""
        device = self._task.device
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) - standing + self._own_bytes()
            self.peak_bytes = max(self.peak_bytes, peak)
            return
        active = len(self._scheduler.plan.active)
        if active not in self._saved_bytes:
            self._saved_bytes[active] = self._bytes_for_backward(inputs)
            self.peak_bytes = max(self._saved_bytes.values())

    def _bytes_for_backward(self, inputs: torch.Tensor) -> int:
        weights = {p.untyped_storage().data_ptr() for p in self._model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = self._task.forward(self._model, inputs)
        del outputs
        return sum(kept.values())

    def _own_bytes(self) -> int:
        moments = [
            value
            for state in self._optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ]
        return sum(t.nbytes for t in [*self._model.parameters(), *moments])

    def _allocated(self) -> int:
        on_gpu = self._task.device.type == "cuda"
        return torch.cuda.memory_allocated(self._task.device) if on_gpu else 0

    def _synchronize(self) -> None:
        if self._task.device.type == "cuda":
            torch.cuda.synchronize(self._task.device)
