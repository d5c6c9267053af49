"""What another schedule would have done on a recorded run: which blocks, and at what cost.

It sees the run's losses and times, and on its probes the relevance that was last measured before.
What it cannot see is how the loss would have gone under it.
"""

import collections
import dataclasses
import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from blocksched.schedules.base import Plan, Progress, Reading, Schedule
from blocksched.schedules.flags import base_name, from_flags
from blocksched.schedules.recording import Recording, Run, read_recording


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a schedule would have done.

    Attributes:
        schedule: its name.
        active: how many blocks trained in each step.
        probes: steps that measured relevance.
        shares: for each block, the share of the steps in which it trained.
        cost: of a full update's, with forward : backward = 1 : 2, (n + 2 k) / (3 n) for a suffix.
        notes: in what it was given something else than in a run of its own.
    """

    schedule: str
    active: tuple[int, ...]
    probes: int
    shares: tuple[float, ...]
    cost: float
    notes: tuple[str, ...]


def what_if(
    content: Any, names: Sequence[str], flags: Mapping[str, Any]
) -> tuple[str, list[Outcome]]:
    """Run the schedules `names` over one run of a result file, given as the parsed JSON.

    `flags` stand before those of the recording; random_suffix has its sizes from the run. The run
    is the file's dynamic_suffix, else the one with most probes, else full_update.

    Returns its name and what each schedule would have done.
    Raises ValueError if `content` is not a whole result file, for an unknown schedule, and for
    numbers that do not fit the model.
    """
    recording = read_recording(content)
    run = max(recording.runs, key=_worth)
    if not run.active:
        raise ValueError(f"traces.{run.name} has no steps: give a result file of a run that began")
    sizes = collections.Counter(run.active)
    counts = ",".join(str(sizes[k]) for k in range(1, recording.n_blocks + 1))
    config = {"random_counts": counts, **_given(recording.config), **_given(flags)}
    return run.name, [_outcome(name, config, recording, run) for name in names]


def _worth(run: Run) -> tuple[bool, int, bool]:
    base = base_name(run.name)
    return base == "dynamic_suffix", len(run.readings or ()), base == "full_update"


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Without the list of sizes where it is empty."""
    return {key: value for key, value in flags.items() if (key, value) != ("random_counts", "")}


def _outcome(name: str, config: Mapping[str, Any], recording: Recording, run: Run) -> Outcome:
    try:
        schedule, notes = from_flags(name, config)
        state = schedule.init(recording.n_blocks)
    except ValueError as error:
        raise ValueError(f"--schedules {name}: {error}") from None
    plans, elapsed, latest, blind = [], 0.0, Reading(), 0
    for step, loss in enumerate(run.losses):
        plan = schedule.plan(state, Progress(step, recording.limit, elapsed, recording.budget_ms))
        latest = (run.readings or {}).get(step, latest)
        reading = Reading(loss)
        if plan.probe:
            reading = _measured(latest, loss, plan, schedule)
            blind += reading.relevance is None
        state = schedule.observe(state, plan, reading)
        plans.append(plan)
        elapsed += run.times[step]
    n = recording.n_blocks
    kinds = collections.Counter(dataclasses.replace(plan, probe=False) for plan in plans)
    trained = collections.Counter[int]()
    for kind, steps in kinds.items():
        trained.update(dict.fromkeys(kind.active, steps))
    return Outcome(
        name,
        active=tuple(len(plan.active) for plan in plans),
        probes=sum(plan.probe for plan in plans),
        shares=tuple(trained[block] / len(plans) for block in range(n)),
        cost=sum(steps * kind.cost(n) for kind, steps in kinds.items()) / len(plans),
        notes=(*notes, *_notes(schedule, run, blind)),
    )


def _measured(latest: Reading, loss: float, plan: Plan, schedule: Schedule[Any]) -> Reading:
    """What a probe would have measured: 0 where a block does not train. Where no times of blocks
    are recorded, forward and backward take 1 and 2 ms."""
    if latest.relevance is None:
        return Reading(loss)
    active, n = set(plan.active), len(latest.relevance)
    relevance = tuple(v if b in active else 0.0 for b, v in enumerate(latest.relevance))
    if not schedule.timed:
        return Reading(loss, relevance)
    return Reading(
        loss, relevance, latest.forward_ms or (1.0,) * n, latest.backward_ms or (2.0,) * n
    )


def _notes(schedule: Schedule[Any], run: Run, blind: int) -> list[str]:
    if schedule.metric is None:
        return []
    said = []
    recorded = None if run.schedule.metric is None else run.schedule.metric[0]
    if recorded is not None and recorded != schedule.metric[0]:
        said.append(f"it decides by {schedule.metric[0]}, recorded is {recorded}")
    if blind:
        said.append(f"{blind} of its probes found no relevance recorded before them")
    if schedule.timed and not any(r.forward_ms for r in (run.readings or {}).values()):
        said.append("times of blocks are not recorded: forward 1 ms and backward 2 ms are taken")
    return said


def spread(shares: Sequence[float], most: int = 24) -> list[float]:
    """The shares, or the means of `most` groups of neighbours where there are more of them."""
    if len(shares) <= most:
        return list(shares)
    ends = [round(i * len(shares) / most) for i in range(most + 1)]
    return [statistics.fmean(shares[a:b]) for a, b in itertools.pairwise(ends)]
