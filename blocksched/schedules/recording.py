"""What a result file holds of its runs: this project's, or the original experiment's.

The experiment's recordings, and ours before they had `readings`, hold the smoothed relevance of
each probe; the raw one that the schedule was given follows from two of them.
"""

import dataclasses
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from blocksched.schedules.base import Reading, Schedule
from blocksched.schedules.dynamic_suffix import DynamicSuffix
from blocksched.schedules.flags import from_flags

_MOST_BLOCKS = 100_000  # a schedule keeps a number for each
_MOST_MS = 1e15
_WHOLE = "give a whole result file"
Sets = list[tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Run:
    """One schedule of a recording.

    Attributes:
        times, losses, active: of each step, in milliseconds, and how many blocks trained.
        sets: the blocks that trained in each step; None where that was not recorded.
        running: the blocks that ran in each step; None where that was not recorded.
        entries: its dynamic_trace.
        readings: what the probes measured, by step; None where that was not recorded.
    """

    name: str
    schedule: Schedule[Any]
    times: Sequence[float]
    losses: Sequence[float]
    active: Sequence[float]
    sets: Sets | None
    running: Sets | None
    entries: Mapping[int, list[Mapping[str, Any]]]
    readings: Mapping[int, Reading] | None


@dataclasses.dataclass(frozen=True)
class Recording:
    """A result file.

    Attributes:
        config: its flags.
        runs: its schedules.
        budget_ms: the time budget of the runs, None in step mode.
    """

    config: Mapping[str, Any]
    runs: Sequence[Run]
    budget_ms: float | None

    @property
    def n_blocks(self) -> int:
        n: int = self.config["n_layers"]
        return n

    @property
    def limit(self) -> int:
        """Steps that a run may take."""
        steps: int = self.config["steps"]
        if self.budget_ms is None:
            return steps
        multiplier: float = self.config.get("max_steps_multiplier") or 3.0
        return max(steps, round(steps * multiplier))


def read_recording(content: Any) -> Recording:
    """The runs of a result file, given as the parsed JSON.

    Raises ValueError if it is not a whole one.
    """
    config, traces = _parts(content)
    runs = [_run(name, trace, config) for name, trace in traces.items()]
    return Recording(config, runs, _budget_ms(config, traces))


def _parts(content: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    if not isinstance(content, Mapping) or not isinstance(content.get("config"), Mapping):
        raise ValueError("not a result file: it lacks `config`; give a file that --json-out wrote")
    config, traces = content["config"], content.get("traces")
    if not isinstance(traces, Mapping) or not traces:
        raise ValueError(f"lacks `traces`, so there is nothing to replay: {_WHOLE}")
    for flag, most in (("n_layers", _MOST_BLOCKS), ("steps", 2**53)):
        value = config.get(flag)
        if not _is_whole(value, 1, most):
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
    if not config.get("equal_time_budget", False):
        return None
    fixed: float | None = config.get("time_budget_ms")
    if fixed is not None:
        return fixed
    if "full_update" not in traces:
        raise ValueError(
            f"its time budget is unknown, it has neither time_budget_ms nor full_update: {_WHOLE}"
        )
    total = 0.0
    for ms in numbers("full_update", traces["full_update"], "step_times_ms"):
        total += ms
    return total


def _run(name: str, trace: Any, config: Mapping[str, Any]) -> Run:
    times = numbers(name, trace, "step_times_ms")
    losses = numbers(name, trace, "train_losses")
    active = numbers(name, trace, "active_layers_hist")
    if not len(times) == len(losses) == len(active):
        raise ValueError(
            f"traces.{name} is cut off: {len(times)} times, {len(losses)} losses, "
            f"{len(active)} active counts; {_WHOLE}"
        )
    if not all(0 <= ms <= _MOST_MS for ms in times):
        raise ValueError(
            f"traces.{name}.step_times_ms must be numbers >= 0 and <= {_MOST_MS:g}: give a file as "
            "it was written"
        )
    schedule, _ = from_flags(name, config)
    n_blocks, steps = config["n_layers"], len(times)
    entries: dict[int, list[Mapping[str, Any]]] = {}
    for entry in _listed(name, trace, "dynamic_trace", steps):
        entries.setdefault(entry["step"], []).append(entry)
    readings: dict[int, Reading] | None = None
    if trace.get("readings") is not None:
        given = _listed(name, trace, "readings", steps)
        readings = {each["step"]: _reading(name, each, n_blocks) for each in given}
    elif isinstance(schedule, DynamicSuffix):
        readings = _from_smoothed(name, entries, schedule.ema_decay, n_blocks)
    sets = running = None
    if trace.get("active_blocks"):
        where = f"traces.{name}.active_blocks"
        sets = _sets(where, trace["active_blocks"], steps, n_blocks, ())
    if trace.get("running_blocks") is not None:
        where = f"traces.{name}.running_blocks"
        running = _sets(where, trace["running_blocks"], steps, n_blocks, tuple(range(n_blocks)))
    return Run(name, schedule, times, losses, active, sets, running, entries, readings)


def numbers(name: str, trace: Any, key: str) -> list[float]:
    """The list of numbers `key` of a trace, with NaN for null."""
    values = trace.get(key) if isinstance(trace, Mapping) else None
    if not isinstance(values, list) or not all(v is None or _is_number(v) for v in values):
        raise ValueError(f"traces.{name} lacks a list of numbers `{key}`: {_WHOLE}")
    return [math.nan if v is None else v for v in values]


def _listed(name: str, trace: Mapping[str, Any], key: str, steps: int) -> list[Mapping[str, Any]]:
    """The list of entries `key` of a trace, each with its step."""
    entries = trace.get(key, [])
    if not isinstance(entries, list) or not all(
        isinstance(e, Mapping) and isinstance(e.get("step"), int) for e in entries
    ):
        raise ValueError(f"traces.{name}.{key} must be a list of entries with a step: {_WHOLE}")
    for entry in entries:
        if not 0 <= entry["step"] < steps:
            raise ValueError(
                f"traces.{name}.{key} speaks of step {entry['step']}, of which there are {steps}; "
                f"{_WHOLE}"
            )
    return entries


def _sets(where: str, changes: Any, steps: int, n_blocks: int, blocks: tuple[int, ...]) -> Sets:
    """The blocks of each step, recorded as [step from which on, blocks]; `blocks` before that."""
    sets: Sets = []
    for change in changes if isinstance(changes, list) else [None]:
        if not (
            isinstance(change, list)
            and len(change) == 2
            and _is_whole(change[0], len(sets), steps - 1)
            and isinstance(change[1], list)
            and all(_is_whole(block, 0, n_blocks - 1) for block in change[1])
        ):
            raise ValueError(
                f"{where} must be a list of steps, ascending, each with the blocks "
                f"from it on, got {reprlib.repr(change)}: {_WHOLE}"
            )
        sets += [blocks] * (change[0] - len(sets))
        blocks = tuple(sorted(change[1]))
    return sets + [blocks] * (steps - len(sets))


def _reading(name: str, entry: Mapping[str, Any], n_blocks: int) -> Reading:
    measured: dict[str, list[float]] = {}
    for key in ("relevance", "forward_ms", "backward_ms"):
        if entry.get(key) is None:
            continue
        measured[key] = numbers(f"{name}.readings", entry, key)
        if len(measured[key]) != n_blocks or any(value < 0 for value in measured[key]):
            raise ValueError(
                f"traces.{name}.readings step {entry['step']}: {key} must be {n_blocks} numbers "
                f">= 0, one a block: {_WHOLE}"
            )
    return Reading(None, **measured)


def _from_smoothed(
    name: str, entries: Mapping[int, list[Mapping[str, Any]]], keep: float, n_blocks: int
) -> dict[int, Reading]:
    """The raw relevance of each probe, from the smoothed one and the one before it."""
    raw: dict[int, Reading] = {}
    before = [0.0] * n_blocks
    for step, found in entries.items():
        for entry in (e for e in found if "probe" in e):
            smooth = numbers(name, entry, "ema_scores")
            if len(smooth) != n_blocks:
                raise ValueError(
                    f"traces.{name} step {step}: {len(smooth)} ema_scores for "
                    f"{n_blocks} blocks; {_WHOLE}"
                )
            relevance = [math.nan] * n_blocks
            if entry.get("reading_finite", True):
                relevance = [
                    _not_negative((new - keep * old) / (1.0 - keep))
                    for new, old in zip(smooth, before, strict=True)
                ]
                before = smooth
            raw[step] = Reading(None, relevance)
    return raw


def _is_number(value: Any) -> bool:
    """Whether it is a number of JSON that can be calculated with; a boolean is none."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= 2**53
    return isinstance(value, float)


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _not_negative(value: float) -> float:
    """Undo the tiny negative that rounding leaves where a relevance is zero; NaN stays NaN."""
    return 0.0 if value < 0 else value
