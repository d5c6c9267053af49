"""What happened in a run, in sentences for those who cannot see its map."""

import math
import statistics
from collections.abc import Sequence

from bench.pages.columns import percent, ranges, running_by_step, sets_by_step, stage
from bench.pages.evidence import Evidence, Run

_TOLD = 8  # sets of running blocks that are named one by one


def story(evidence: Evidence, run: Run) -> list[str]:
    """Sentences of what trained when; plain text, to be escaped. [] where it is not recorded."""
    sets = sets_by_step(run)
    if not sets:
        return []
    n = evidence.n_blocks
    return [
        f"It took {_counted(len(sets), 'step')}.",
        *_running(run, n),
        *_training(sets, n),
        *_freezing(run, sets, n),
        *_probes(run),
        *_recovery(run),
    ]


def _running(run: Run, n: int) -> list[str]:
    """Which blocks ran at all, until when."""
    total = len(run.active)
    changes = [change for change in run.running if change.step < total]
    if not changes or all(len(change.blocks) == n for change in changes):
        return []
    if len(changes) > _TOLD:
        sizes = [len(blocks) for blocks in running_by_step(run, n)]
        return [
            f"{min(sizes)} to {max(sizes)} of {n} blocks ran, {statistics.fmean(sizes):.1f} on "
            "average of all steps."
        ]
    *before, last = [_of_them(change.blocks, n) for change in changes]
    if not before:
        return [f"Only {last} ran."]
    ends = (change.step - 1 for change in changes[1:])
    parts = [f"{blocks} ran until step {end}" for blocks, end in zip(before, ends, strict=True)]
    return [f"{', '.join(parts)}, then {last}.".capitalize()]


def _of_them(blocks: Sequence[int], n: int) -> str:
    """Blocks by number and by name."""
    if len(blocks) == n:
        return f"all {n}"
    return f"{_counted(len(blocks), 'block')} ({', '.join(ranges(blocks))})"


def _training(sets: list[tuple[int, ...]], n: int) -> list[str]:
    different = set(sets)
    if different == {tuple(range(n))}:
        return ["Every block trained in every step: none was ever frozen."]
    if len(different) == 1:
        always = different.pop()
        never = sorted(set(range(n)) - set(always))
        return [f"{_named(always)} trained in every step; {_named(never).lower()} never did."]
    sizes = [len(blocks) for blocks in sets]
    found = [f"{statistics.fmean(sizes):.1f} of {n} blocks trained on average of all steps."]
    never = sorted(set(range(n)).difference(*different))
    return found + ([f"{_named(never)} never trained."] if never else [])


def _freezing(run: Run, sets: list[tuple[int, ...]], n: int) -> list[str]:
    """When freezing began, and how much trained from there to the recovery."""
    begun = run.freezing
    if begun is None or begun >= len(sets):
        return []
    found = f"Freezing began at step {begun}, {_after(run, begun)}"
    end = min([len(sets), *(step for step, _ in run.recovery if step >= begun)])
    if end == begun:
        return [f"{found}, together with the recovery."]
    frozen = [len(blocks) for blocks in sets[begun:end]]
    found += f"; from there to step {end - 1} on average {statistics.fmean(frozen):.1f} of {n}"
    found += " blocks trained"
    probes = {probe.step for probe in run.probes}
    others = [len(sets[step]) for step in range(begun, end) if step not in probes]
    if others and len(others) < len(frozen):
        found += f" ({statistics.fmean(others):.1f} in the steps that were no probes)"
    return [f"{found}."]


def _probes(run: Run) -> list[str]:
    probes = [probe for probe in run.probes if probe.step < len(run.active)]
    if not probes:
        return []
    found = f"{_counted(len(probes), 'step')} measured how much each block matters (probes)"
    begun = run.freezing
    if begun is not None:
        before = sum(probe.step < begun for probe in probes)
        found += f": {before} before freezing began, {len(probes) - before} from then on"
    return [f"{found}."]


def _recovery(run: Run) -> list[str]:
    stages = [(step, name) for step, name in run.recovery if step < len(run.active)]
    if not stages:
        return []
    begun = stages[0][0]
    named = ", ".join(f"{stage(name)} from step {step} on" for step, name in stages)
    return [f"The recovery at the end began at step {begun}, {_after(run, begun)}: {named}."]


def _after(run: Run, step: int) -> str:
    """How far into the run a step is."""
    steps = f"after {percent(step / len(run.active))} of the steps"
    times = [ms for ms in run.step_ms if ms is not None and math.isfinite(ms)]
    if len(times) < len(run.active) or not sum(times):
        return steps
    return f"{steps} and {percent(sum(times[:step]) / sum(times))} of their time"


def _named(blocks: tuple[int, ...] | list[int]) -> str:
    if not blocks:
        return "No block"
    return f"Block{'s' * (len(blocks) > 1)} {', '.join(ranges(blocks))}"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"
