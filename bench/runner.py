"""The schedules of one run, in turn or interleaved, with what can interrupt them."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.config import Config, UserError
from bench.expected import Expected
from bench.live import Live
from bench.lora import Lora
from bench.preflight import preflight
from bench.processes import Processes
from bench.provenance import commit
from bench.results import document, write
from bench.resume import Checkpoints
from bench.tasks.parts import Task
from bench.train import Arm
from blocksched.schedules import FullUpdate, Schedule
from blocksched.schedules.flags import base_name, flags_of, from_flags

GROUP = 5  # steps a schedule advances at a time when interleaved


class Terminated(KeyboardInterrupt):
    """SIGTERM."""


class Termination:
    """What SIGTERM does: it ends the run at once or, where a checkpoint can be written, after the
    step it comes in.

    Attributes:
        gentle: whether to wait for the step's end.
        asked: whether SIGTERM has come.
    """

    def __init__(self) -> None:
        self.gentle = self.asked = False

    def __call__(self, _signal: int, _frame: Any) -> None:
        self.asked = True
        if not self.gentle:
            raise Terminated


class Run:
    """The schedules of one run, in turn or interleaved."""

    def __init__(
        self,
        config: Config,
        task: Task,
        schedules: dict[str, tuple[Schedule[Any], bool]],
        path: Path,
        processes: Processes,
    ) -> None:
        self.config, self.task, self.schedules, self.path = config, task, schedules, path
        self.arms: list[Arm] = []
        self.expected: Expected | None = None
        self.budget_ms: float | None = None
        self.termination = Termination()
        self._processes = processes
        self._checkpoints: Checkpoints | None = None
        self._live = Live()
        self._validations = 0
        commit()  # the result is to name the code that runs now

    def all(self) -> None:
        """Run everything; the result file is renewed whenever a schedule ends."""
        config, processes = self.config, self._processes
        if config.resume:
            self._checkpoints = Checkpoints(config, self.task, processes)
        processes.local_first(lambda: self.task.model(fused=False))  # which may be pretrained
        if config.preflight:
            arms = {name: fused for name, (_, fused) in self.schedules.items()}
            processes.together(lambda: preflight(self.task, config, arms, processes.world))
        fused = any(fused for _, fused in self.schedules.values())
        # Its first round also compiles, before any clock starts, every graph that steps run.
        self.expected = Expected(self.task, config, fused)
        if config.budget_known:
            saved_ms = None if self._checkpoints is None else self._checkpoints.budget_ms
            self.budget_ms = config.time_budget_ms or saved_ms or self._measured_budget_ms()
            print(f"Every schedule gets {self.budget_ms / 1e3:.1f} s of step time.\n")
        if self._checkpoints is not None:
            self._checkpoints.begin(self.budget_ms)
            self.termination.gentle = True
        for part, names in enumerate(self._parts()):
            self._run_part(part, names)
            if config.equal_time_budget and self.budget_ms is None:
                return  # full_update, whose time the others were to get, has failed

    def save(self, status: str) -> dict[str, Any]:
        """Write the result file (rank 0 does), and return its content, schedules in the order
        asked for. Raises UserError if it cannot be written; what was there before then stays."""
        order = list(self.schedules)
        arms = sorted(self.arms, key=lambda arm: order.index(arm.name))
        result = document(self.config, self.task, arms, self.expected, self.budget_ms, status)
        if self._processes.rank == 0:
            try:
                write(self.path, result)
            except OSError as error:
                raise UserError(
                    f"the result file {self.path} cannot be written ({error.strerror}): make room, "
                    "or choose another place with --json-out"
                ) from None
        return result

    def save_together(self, status: str) -> dict[str, Any]:
        """The same where all processes do it, so that all of them stop if it fails."""
        return self._processes.together(lambda: self.save(status))

    def efficiency_line(self) -> str:
        """How whole steps compare with the sum of their parts, measured in this run."""
        assert self.expected is not None
        found = ", ".join(f"k={k} {over:.3f}" for k, over in self.expected.efficiency().items())
        where = "" if self._processes.world == 1 else ", on one process without communication"
        return (
            f"Whole steps over the sum of their parts, in {self.expected.rounds} rounds of their "
            f"own{where}: {found} (bench/steps.py takes more rounds)."
        )

    def _parts(self) -> list[list[str]]:
        """The schedules that run side by side."""
        names = list(self.schedules)
        if self.config.interleave:
            return [names]
        if self.config.equal_time_budget and not self.config.budget_known:
            names.sort(key=lambda name: name != "full_update")
        return [[name] for name in names]

    def _run_part(self, part: int, names: Sequence[str]) -> None:
        arms = [self._arm(name) for name in names]
        self.arms += arms
        checkpoints = self._checkpoints
        if checkpoints is not None:
            self._go_on(checkpoints.load(part, arms), arms)
        while running := [arm for arm in arms if not arm.finished]:
            arm = min(running, key=lambda arm: arm.elapsed_ms)
            self._advance(arm)
            if checkpoints is not None and (arm.asked_to_stop or checkpoints.due(arms)):
                checkpoints.save(arms, self._shared())
            if arm.asked_to_stop:
                raise Terminated
        if checkpoints is not None:
            checkpoints.save(arms, self._shared())
        gives_the_budget = self.config.equal_time_budget and self.budget_ms is None
        if gives_the_budget and arms[0].failure is None:
            self.budget_ms = arms[0].elapsed_ms

    def _shared(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the schedules."""
        assert self.expected is not None
        return {
            "budget_ms": self.budget_ms,
            "validations": self._validations,
            "expected": self.expected.state(),
        }

    def _go_on(self, shared: dict[str, Any] | None, arms: Sequence[Arm]) -> None:
        if shared is None:
            return
        if shared["budget_ms"] != self.budget_ms:
            raise UserError(
                f"--resume {self.config.resume} holds schedules that ran on another time budget "
                f"({shared['budget_ms']} ms, now {self.budget_ms}): delete it to start again"
            )
        assert self.expected is not None
        self.expected.load_state(shared["expected"])
        self._validations = shared["validations"]
        steps = ", ".join(f"{arm.name} {arm.taken}" for arm in arms)
        print(f"Going on from a checkpoint, after the steps: {steps}.")

    def _arm(self, name: str) -> Arm:
        schedule, fused = self.schedules[name]
        return Arm(name, schedule, self.task, self.config, self.budget_ms, fused)

    def _advance(self, arm: Arm) -> None:
        validated = arm.advance(GROUP, lambda: self.termination.asked)
        if validated and self.expected is not None:
            self._validations += 1
            if self._validations % len(self.schedules) == 0:
                self.expected.round()
        waiting = len(self.schedules) - len(self.arms)
        self._live.update(self.arms, arm, validated, self.config.n_layers, waiting)
        if arm.finished:
            self.save_together("running")

    def _measured_budget_ms(self) -> float:
        fused = self.schedules["full_update"][1] if "full_update" in self.schedules else False
        return measured_budget_ms(self.task, self.config, fused)


def measured_budget_ms(task: Task, config: Config, fused: bool) -> float:
    """--steps times the median of a few full steps, which are then discarded."""
    few = dataclasses.replace(config, steps=10)
    sample = Arm("full_update", FullUpdate(), task, few, None, fused)
    sample.advance(few.steps)
    return config.steps * statistics.median(step.ms for step in sample.steps[3:])


def schedule_of(name: str, config: Config) -> tuple[Schedule[Any], list[str]]:
    """The schedule that runs under `name`, and a warning for each number that was clamped.

    Raises UserError for an unknown name, or numbers that do not fit.
    """
    try:
        schedule, warnings = from_flags(name, dataclasses.asdict(config))
        if base_name(name) == "lora":
            numbers = {flag.field: getattr(config, flag.key) for flag in flags_of("lora", Lora)}
            schedule = Lora(**numbers)
        schedule.init(config.n_layers)
    except ValueError as error:
        raise UserError(f"--schedules {name}: {error}") from None
    return schedule, warnings
