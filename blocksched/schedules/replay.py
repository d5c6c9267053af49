"""Replay: feed a recorded run through its schedule and compare every decision."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from blocksched.schedules.base import Plan, Progress, Reading
from blocksched.schedules.dynamic_suffix import DynamicSuffix
from blocksched.schedules.recording import Recording, Run, read_recording
from blocksched.schedules.trace import DynamicTrace

_PROBE_DECISIONS = ("freeze_enabled", "active_budget", "active_start_next", "active_layers_next")
_RECOVERY_DECISIONS = ("final_recovery_stage", "final_recovery_active_layers")


@dataclasses.dataclass(frozen=True)
class Difference:
    """A step at which the schedule decides otherwise than the recorded run did."""

    schedule: str
    step: int
    what: str

    def __str__(self) -> str:
        return f"{self.schedule} step {self.step}: {self.what}"


def replay(content: Any) -> tuple[int, list[Difference], list[str]]:
    """Replay every schedule of a result file, given as the parsed JSON.

    Returns the number of steps, the differences, one per step at most, and the runs left out, which
    decided by readings that the file does not hold.
    Raises ValueError if `content` is not a whole result file.
    """
    recording = read_recording(content)
    steps, differences, left_out = 0, [], []
    for run in recording.runs:
        if run.schedule.metric is not None and run.readings is None:
            left_out.append(run.name)
        else:
            steps += len(run.active)
            differences += _differences(recording, run)
    return steps, differences, left_out


def _differences(recording: Recording, run: Run) -> list[Difference]:
    """Every step decided otherwise, with what differs."""
    schedule, readings = run.schedule, run.readings or {}
    trace = DynamicTrace(schedule) if isinstance(schedule, DynamicSuffix) else None
    state = schedule.init(recording.n_blocks)
    found, elapsed = [], 0.0
    for step, loss in enumerate(run.losses):
        progress = Progress(step, recording.limit, elapsed, recording.budget_ms)
        plan = schedule.plan(state, progress)
        reading = Reading(loss)
        if plan.probe and step in readings:
            reading = dataclasses.replace(readings[step], loss=loss)
        # A probe that the recording did not make has no relevance to go on with.
        skip = plan.probe and step not in readings
        new = state if skip else schedule.observe(state, plan, reading)
        made: Sequence[Mapping[str, Any]] = ()
        if trace is not None:
            known = len(trace.entries)
            trace.planned(progress, plan)
            trace.observed(step, plan, reading, state, new)
            made = trace.entries[known:]
        what = _blocks(run, step, plan, recording.n_blocks)
        if trace is not None:
            what += _decisions(recording.config, run.entries.get(step, []), made)
        if what:
            found.append(Difference(run.name, step, "; ".join(what)))
        state, elapsed = new, elapsed + run.times[step]
    return found


def _blocks(run: Run, step: int, plan: Plan, n_blocks: int) -> list[str]:
    """Whether other blocks train or run."""
    if len(plan.active) != run.active[step]:
        return [f"{len(plan.active)} active, recorded {run.active[step]:g}"]
    ours = tuple(range(n_blocks)) if plan.running is None else plan.running
    return [
        f"blocks {_listed(mine)} {verb}, recorded {_listed(recorded[step])}"
        for verb, mine, recorded in (("train", plan.active, run.sets), ("run", ours, run.running))
        if recorded is not None and mine != recorded[step]
    ]


def _decisions(
    config: Mapping[str, Any],
    recorded: Sequence[Mapping[str, Any]],
    made: Sequence[Mapping[str, Any]],
) -> list[str]:
    """What the entries of a step in dynamic_suffix's trace say otherwise."""
    what = []
    kinds: list[tuple[str, tuple[str, ...]]] = [("probe", _PROBE_DECISIONS)]
    if "dyn_freeze_start_frac" in config:
        kinds.append(("freeze_trigger", ()))
    if "dyn_final_full_frac" in config:
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


def _listed(blocks: Sequence[int]) -> str:
    return " ".join(map(str, blocks))
