"""A run in columns of steps: how often each block trained in them, and which were probes."""

import collections
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bench.pages.evidence import Change, Run

MOST = 400  # about 2 px each on a wide page
CELLS = 8_000  # of a map: 50 kB where no two neighbours are alike
_NAMED = 4  # of a column's probes, ranges that are named one by one


class Column(NamedTuple):
    """The steps from `first` on.

    `trained` tells by block in how many of them it trained, `absent` in how many it did not run;
    `fewest` and `most` how many blocks trained at once.
    """

    first: int
    steps: int
    trained: tuple[int, ...]
    absent: tuple[int, ...]
    fewest: int
    most: int
    probes: tuple[int, ...]

    @property
    def mean(self) -> float:
        """How many blocks trained at once, on average."""
        return sum(self.trained) / self.steps


def columns(run: Run, n_blocks: int) -> list[Column]:
    """All steps of the run, equally many in each column but the last."""
    sets = sets_by_step(run)
    if not sets:
        return []
    ran = running_by_step(run, n_blocks)
    size = -(-len(sets) // min(MOST, max(1, CELLS // n_blocks)))
    probes = collections.defaultdict(list)
    for probe in run.probes:
        probes[probe.step // size].append(probe.step)
    return [
        _column(first, sets[first : first + size], ran[first : first + size], n_blocks, probes[i])
        for i, first in enumerate(range(0, len(sets), size))
    ]


def sets_by_step(run: Run) -> list[tuple[int, ...]]:
    """Which blocks trained, a set a step; [] if that is not known from the first step on."""
    if not run.changes or run.changes[0].step > 0:
        return []
    return _by_step(run.changes, len(run.active))


def running_by_step(run: Run, n_blocks: int) -> list[tuple[int, ...]]:
    """Which blocks ran, a set a step."""
    every = Change(0, tuple(range(n_blocks)))
    return _by_step(run.running or [every], len(run.active))


def marks(run: Run) -> list[tuple[int, str]]:
    """Where freezing and the stages of the recovery begin, in the order of their steps."""
    found = [] if run.freezing is None else [(run.freezing, "freezing begins")]
    found += [(step, f"recovery: {stage(name)}") for step, name in run.recovery]
    return sorted(mark for mark in found if mark[0] < len(run.active))


def stage(name: str) -> str:
    """A stage of the recovery as a person would call it."""
    known = {"full": "all blocks", "stage3_full": "all blocks"}
    return known.get(name, name.replace("stage", "stage "))


def in_words(column: Column, n_blocks: int) -> str:
    """A column as a line: its steps, what trained in them, its probes."""
    first, last = column.first, column.first + column.steps - 1
    found = f"step {first}: " if first == last else f"steps {first}-{last}: "
    found += _trained_in_words(column, n_blocks)
    if column.probes:
        found += f"; {_probes_in_words(column.probes)}"
    return found


def percent(share: float) -> str:
    """A share, 0..1, in percent with a digit behind the point."""
    return f"{100 * share:.1f} %"


def ranges(numbers: Iterable[int]) -> list[str]:
    """Rising numbers with runs of neighbours drawn together: 0, 2-5, 9."""
    found = []
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        found.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}")
    return found


def _by_step(changes: Sequence[Change], total: int) -> list[tuple[int, ...]]:
    sets: list[tuple[int, ...]] = [()] * total
    for change, after in itertools.pairwise([*changes, Change(total, ())]):
        end = min(after.step, total)
        sets[change.step : end] = [change.blocks] * (end - change.step)
    return sets


def _column(
    first: int,
    sets: list[tuple[int, ...]],
    ran: list[tuple[int, ...]],
    n_blocks: int,
    probes: Iterable[int],
) -> Column:
    sizes = [len(blocks) for blocks in set(sets)]
    absent = tuple(len(sets) - steps for steps in _counted(ran, n_blocks))
    trained = _counted(sets, n_blocks)
    return Column(first, len(sets), trained, absent, min(sizes), max(sizes), tuple(probes))


def _counted(sets: list[tuple[int, ...]], n_blocks: int) -> tuple[int, ...]:
    """By block, how many of the sets it is in."""
    counts = [0] * n_blocks
    for blocks, steps in collections.Counter(sets).items():
        for block in blocks:
            counts[block] += steps
    return tuple(counts)


def _trained_in_words(column: Column, n_blocks: int) -> str:
    count = f"{column.most}"
    if column.fewest < column.most:
        count = f"{column.fewest} to {column.most} (on average {column.mean:.1f})"
    always = ", ".join(ranges(b for b, k in enumerate(column.trained) if k == column.steps))
    at_times = ", ".join(ranges(b for b, k in enumerate(column.trained) if 0 < k < column.steps))
    if at_times:
        always = f"{always} in every step, " if always else ""
        at_times += " in some steps"
    which = f" ({always}{at_times})" if always or at_times else ""
    return f"{count} of {n_blocks} blocks train{which}{_absent_in_words(column)}"


def _absent_in_words(column: Column) -> str:
    always = ranges(b for b, k in enumerate(column.absent) if k == column.steps)
    at_times = ranges(b for b, k in enumerate(column.absent) if 0 < k < column.steps)
    found = f", not running: {', '.join(always)}" if always else ""
    return found + (f", running in some steps: {', '.join(at_times)}" if at_times else "")


def _probes_in_words(steps: tuple[int, ...]) -> str:
    if len(steps) == 1:
        return f"1 probe, step {steps[0]}"
    named = ranges(steps)
    if len(named) > _NAMED:
        return f"{len(steps)} probes, the first at step {steps[0]}, the last at {steps[-1]}"
    return f"{len(steps)} probes, steps {', '.join(named)}"
