"""Replay: feed a recorded run through the schedules and compare every decision.

Reads this project's result files and those of the original experiment. A recording holds the
smoothed relevance of each probe; the raw one that the schedule is fed follows from two of them.
"""

import collections
import dataclasses
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from blocksched.schedules.base import Plan, Progress, Reading, Schedule
from blocksched.schedules.dynamic_suffix import DynamicSuffix
from blocksched.schedules.flags import base_name, from_flags
from blocksched.schedules.trace import DynamicTrace

_PROBE_DECISIONS = ("freeze_enabled", "active_budget", "active_start_next", "active_layers_next")
_MOST_BLOCKS = 100_000  # a schedule keeps a number for each
_RECOVERY_DECISIONS = ("final_recovery_stage", "final_recovery_active_layers")


@dataclasses.dataclass(frozen=True)
class Difference:
    """A step at which the schedule decides otherwise than the recorded run did."""

    schedule: str
    step: int
    what: str

    def __str__(self) -> str:
        return f"{self.schedule} step {self.step}: {self.what}"


def replay(recording: Any) -> tuple[int, list[Difference]]:
    """Replay every schedule of a result file, given as the parsed JSON.

    Returns the number of steps and the differences, one per step at most.
    Raises ValueError if `recording` is not a whole result file.
    """
    config, traces = _parts(recording)
    steps, differences = 0, []
    for name, trace in traces.items():
        run = _Run(name, config, trace, _budget_ms(config, traces))
        steps += len(run.active)
        differences += run.differences()
    return steps, differences


def _parts(recording: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    if not isinstance(recording, Mapping) or not isinstance(recording.get("config"), Mapping):
        raise ValueError("not a result file: it lacks `config`; give a file that --json-out wrote")
    config, traces = recording["config"], recording.get("traces")
    if not isinstance(traces, Mapping) or not traces:
        raise ValueError("lacks `traces`, so there is nothing to replay: give a whole result file")
    for flag, most in (("n_layers", _MOST_BLOCKS), ("steps", 2**53)):
        value = config.get(flag)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ValueError(
                f"its config's {flag} must be a whole number >= 1 and <= {most}, got "
                f"{reprlib.repr(value)}: give a file as it was written"
            )
    for flag, least, high in (("max_steps_multiplier", 1, 1e6), ("time_budget_ms", 0, 1e300)):
        value = config.get(flag)
        if value is not None and not (_is_number(value) and least <= value <= high):
            raise ValueError(
                f"its config's {flag} must be a number >= {least} and <= {high:g}, got "
                f"{reprlib.repr(value)}: give a file as it was written"
            )
    return config, traces


def _budget_ms(config: Mapping[str, Any], traces: Mapping[str, Any]) -> float | None:
    """The time budget of the recorded run, None in step mode."""
    if not config.get("equal_time_budget", False):
        return None
    fixed: float | None = config.get("time_budget_ms")
    if fixed is not None:
        return fixed
    if "full_update" not in traces:
        raise ValueError(
            "its time budget is unknown, it has neither time_budget_ms nor full_update: give a "
            "whole result file"
        )
    total = 0.0
    for ms in _numbers("full_update", traces["full_update"], "step_times_ms"):
        total += ms
    return total


def _numbers(name: str, trace: Any, key: str) -> list[float]:
    values = trace.get(key) if isinstance(trace, Mapping) else None
    if not isinstance(values, list) or not all(v is None or _is_number(v) for v in values):
        raise ValueError(f"traces.{name} lacks a list of numbers `{key}`: give a whole result file")
    return [math.nan if v is None else v for v in values]


def _is_number(value: Any) -> bool:
    """Whether it is a number of JSON that can be calculated with; a boolean is none."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= 2**53
    return isinstance(value, float)


class _Run:
    """One schedule of a recording."""

    def __init__(
        self, name: str, config: Mapping[str, Any], trace: Any, budget_ms: float | None
    ) -> None:
        self.name = name
        self.config = config
        self.budget_ms = budget_ms
        self.times = _numbers(name, trace, "step_times_ms")
        self.losses = _numbers(name, trace, "train_losses")
        self.active = _numbers(name, trace, "active_layers_hist")
        if not len(self.times) == len(self.losses) == len(self.active):
            raise ValueError(
                f"traces.{name} is cut off: {len(self.times)} times, {len(self.losses)} losses, "
                f"{len(self.active)} active counts; give a whole result file"
            )
        self.schedule: Schedule[Any] = from_flags(name, config)[0]
        self.entries: dict[int, list[Mapping[str, Any]]] = collections.defaultdict(list)
        for entry in _entries(name, trace):
            if not 0 <= entry["step"] < len(self.active):
                raise ValueError(
                    f"traces.{name}.dynamic_trace speaks of step {entry['step']}, of which there "
                    f"are {len(self.active)}; give a whole result file"
                )
            self.entries[entry["step"]].append(entry)
        self.relevance = self._raw_relevance()

    def differences(self) -> list[Difference]:
        """Every step decided otherwise, with what differs."""
        schedule, n_blocks = self.schedule, self.config["n_layers"]
        trace = DynamicTrace(schedule) if isinstance(schedule, DynamicSuffix) else None
        state = schedule.init(n_blocks)
        found, elapsed = [], 0.0
        for step in range(len(self.active)):
            progress = Progress(step, self._limit(), elapsed, self.budget_ms)
            plan = schedule.plan(state, progress)
            reading = Reading(self.losses[step], self.relevance.get(step) if plan.probe else None)
            # A probe that the recording did not make has no relevance to go on with.
            skip = plan.probe and step not in self.relevance
            new = state if skip else schedule.observe(state, plan, reading)
            made: Sequence[Mapping[str, Any]] = ()
            if trace is not None:
                known = len(trace.entries)
                trace.planned(progress, plan)
                trace.observed(step, plan, reading, state, new)
                made = trace.entries[known:]
            what = self._compare(step, plan, made)
            if what:
                found.append(Difference(self.name, step, "; ".join(what)))
            state, elapsed = new, elapsed + self.times[step]
        return found

    def _compare(self, step: int, plan: Plan, made: Sequence[Mapping[str, Any]]) -> list[str]:
        what = []
        if len(plan.active) != self.active[step]:
            what.append(f"{len(plan.active)} active, recorded {self.active[step]:g}")
        if base_name(self.name) != "dynamic_suffix":
            return what
        recorded = self.entries.get(step, [])
        kinds: list[tuple[str, tuple[str, ...]]] = [("probe", _PROBE_DECISIONS)]
        if "dyn_freeze_start_frac" in self.config:
            kinds.append(("freeze_trigger", ()))
        if "dyn_final_full_frac" in self.config:
            kinds.append(("final_recovery_stage", _RECOVERY_DECISIONS))
        for kind, decisions in kinds:
            ours = next((e for e in made if kind in e), None)
            theirs = next((e for e in recorded if kind in e), None)
            if (ours is None) != (theirs is None):
                what.append(f"{kind} {'not ' if theirs is None else ''}recorded, ours otherwise")
            elif ours is not None and theirs is not None:
                what += [
                    f"{key} {ours[key]}, recorded {theirs[key]}"
                    for key in decisions
                    if key in theirs and ours[key] != theirs[key]
                ]
        return what

    def _limit(self) -> int:
        steps: int = self.config["steps"]
        if self.budget_ms is None:
            return steps
        multiplier: float = self.config.get("max_steps_multiplier") or 3.0
        return max(steps, round(steps * multiplier))

    def _raw_relevance(self) -> dict[int, list[float]]:
        """Relevance of each recorded probe, from the smoothed one and the one before it."""
        if not isinstance(self.schedule, DynamicSuffix):
            return {}
        keep, n_blocks = self.schedule.ema_decay, self.config["n_layers"]
        raw: dict[int, list[float]] = {}
        before = [0.0] * n_blocks
        for step, entries in self.entries.items():
            for entry in (e for e in entries if "probe" in e):
                smooth = _numbers(self.name, entry, "ema_scores")
                if len(smooth) != n_blocks:
                    raise ValueError(
                        f"traces.{self.name} step {step}: {len(smooth)} ema_scores for "
                        f"{n_blocks} blocks; give a whole result file"
                    )
                if entry.get("reading_finite", True):
                    raw[step] = [
                        _not_negative((new - keep * old) / (1.0 - keep))
                        for new, old in zip(smooth, before, strict=True)
                    ]
                    before = smooth
                else:
                    raw[step] = [math.nan] * n_blocks
        return raw


def _not_negative(value: float) -> float:
    """Undo the tiny negative that rounding leaves where a relevance is zero; NaN stays NaN."""
    return 0.0 if value < 0 else value


def _entries(name: str, trace: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    entries = trace.get("dynamic_trace", [])
    if not isinstance(entries, list) or not all(
        isinstance(e, Mapping) and isinstance(e.get("step"), int) for e in entries
    ):
        raise ValueError(
            f"traces.{name}.dynamic_trace must be a list of entries with a step: give a whole "
            "result file"
        )
    return entries
