"""Where the time and the memory of steps went, by number of active blocks and in parts."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from bench.pages.bars import Bar, Part, bars, bars_legend
from bench.pages.cells import swatches
from bench.pages.chart import Drawing, Series, figure, text
from bench.pages.evidence import Evidence, Run
from bench.pages.looks import look
from bench.pages.slots import (
    Schedule,
    blocks,
    boxes,
    columns,
    dashed,
    dashes,
    schedules_legend,
    slot_axes,
    slot_frame,
    slots,
    table_of,
)
from bench.results import quantile

T = TypeVar("T")
_MIB = 2**20
_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
_PARTS = {
    "prefix forward": ("input and frozen blocks, forward", "light"),
    "suffix forward": ("blocks that train, head and loss, forward", "middle"),
    "backward": ("backward", "full"),
    "measure": ("measuring and planning", "warm"),
    "update": ("the optimizer's update", "lines"),
    "other": ("the rest", "dots"),
}


class _Times(NamedTuple):
    """Steps of one schedule with as many active blocks: how many, the quantiles of their times,
    and what they should take, None where that is not known: for other kernels than it was measured
    with, and where not all steps were of suffixes."""

    steps: int
    ms: Sequence[float]
    expected: float | None


def step_times(evidence: Evidence) -> str:
    """The figure of step times by number of active blocks; "" without any."""
    found = _schedules(evidence, lambda run: _times(evidence, run))
    if not found:
        return ""
    every = [times for schedule in found for times in schedule.values.values()]
    laid, top = slots(found), max(max(t.ms[-1], t.expected or 0.0) for t in every)

    def draw(width: float) -> Drawing:
        frame = slot_frame(width, laid, top)
        svg, series = slot_axes(frame, laid, "step time, ms"), []
        for i, schedule in enumerate(found):
            places = [(laid.places[k, i], k, t) for k, t in sorted(schedule.values.items())]
            svg += boxes(frame, [(x, t.ms) for x, _, t in places], schedule.look)
            svg += dashes(frame, [(x, t.expected) for x, _, t in places if t.expected is not None])
            points = [(frame.px(x), frame.py(t.ms[2]), _times_said(k, t)) for x, k, t in places]
            series.append(Series(schedule.name, points))
        return Drawing(frame.height, svg, series)

    expected = any(times.expected is not None for times in every)
    return figure(
        "step-times",
        "Step time by number of blocks that train",
        draw,
        note=_times_note(evidence, expected),
        legend=schedules_legend(found) + (_EXPECTED if expected else ""),
        table=_times_table(found),
    )


def _schedules(evidence: Evidence, values: Callable[[Run], Mapping[int, T]]) -> list[Schedule[T]]:
    """The schedules that have any of what `values` gives by number of active blocks."""
    found = [
        Schedule(run.name, look(run.name, i), values(run)) for i, run in enumerate(evidence.runs)
    ]
    return [schedule for schedule in found if schedule.values]


def _times(evidence: Evidence, run: Run) -> dict[int, _Times]:
    found = evidence.times_by_active(run)
    expected = _expected(evidence, run, {k: len(times) for k, times in found.items()})
    return {
        k: _Times(
            len(times),
            [quantile(times, share) for share in _SHARES],
            expected.get(k),
        )
        for k, times in found.items()
    }


def _expected(evidence: Evidence, run: Run, steps: Mapping[int, int]) -> Mapping[int, float]:
    """What steps should take by number of active blocks, which is of suffixes: {} if the mean over
    the run's steps is not what its row says, so that some were of another kind."""
    said, known = run.row["expected_step_ms"], evidence.expected_ms
    if said is None or not steps or not set(steps) <= set(known):
        return {}
    mean = sum(count * known[k] for k, count in steps.items()) / sum(steps.values())
    return known if math.isclose(mean, said, rel_tol=1e-6) else {}


_EXPECTED = swatches([("what such a step should take", dashed("M1 7h20"))])


def _times_said(k: int, times: _Times) -> str:
    low, _, median, _, high = map(_ms, times.ms)
    expected = "" if times.expected is None else f"; expected {_ms(times.expected)} ms"
    steps = "1 step" if times.steps == 1 else f"{times.steps:,} steps"
    return f"{blocks(k)}: {steps}, median {median} ms, 10-90 %: {low}-{high} ms{expected}"


def _times_note(evidence: Evidence, expected: bool) -> str:
    warming = evidence.config.get("warmup_ignore_steps", 0)
    return (
        "Marker: the median; box: the middle half of the steps; line: from 10 to 90 % of them."
        + (f" The first {warming} steps of each schedule are left out." if warming else "")
        + (
            " Dashed: the sum of a step's parts, each timed alone in the same run, for the"
            " schedules on the kernels that this was measured with."
            if expected
            else ""
        )
    )


def _times_table(found: Sequence[Schedule[_Times]]) -> str:
    shares = [f"{100 * share:g} %, ms" for share in _SHARES]
    rows = [
        [text(schedule.name), str(k), f"{times.steps:,}", *map(_ms, [*times.ms, times.expected])]
        for schedule in found
        for k, times in sorted(schedule.values.items())
    ]
    return table_of(["schedule", "blocks", "steps", *shares, "expected, ms"], rows)


def parts(evidence: Evidence) -> str:
    """The figure of where the mean step of each schedule went; "" where that was not recorded."""
    sums = {run.name: _summed(run.parts_ms.values()) for run in evidence.runs if run.parts_ms}
    if not sums:
        return ""
    found = [_parts_bar(name, of) for name, of in sums.items()]
    rows = [
        [text(run.name), label, f"{of['steps']:,}", *(_ms(of[p] / of["steps"]) for p in _PARTS)]
        for run in evidence.runs
        if run.parts_ms
        for label, of in [
            *((str(k), of) for k, of in sorted(run.parts_ms.items())),
            ("all", sums[run.name]),
        ]
    ]
    return figure(
        "step-parts",
        "Where the time of a step went",
        lambda width: bars(width, found, "ms of a mean step", "step-parts"),
        note="Means over all steps but the first ones, which warm up. Measuring and planning is "
        "what the schedule itself costs, with the search for numbers that are not finite; where "
        "blocksched's own optimizer takes a probe's sums, they are in its update.",
        legend=bars_legend(list(_PARTS.values()), "step-parts"),
        table=table_of(["schedule", "blocks", "steps", *(f"{p}, ms" for p in _PARTS)], rows),
    )


def _summed(by_active: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {part: sum(of[part] for of in by_active) for part in ("steps", *_PARTS)}


def _parts_bar(name: str, sums: Mapping[str, float]) -> Bar:
    means = {part: sums[part] / sums["steps"] for part in _PARTS}
    total = sum(means.values())
    pieces = [
        Part(means[part], pattern, f"{words}: {_ms(means[part])} of {_ms(total)} ms a step")
        for part, (words, pattern) in _PARTS.items()
    ]
    return Bar(name, f"{_ms(total)} ms", pieces)


def memory(evidence: Evidence) -> str:
    """The figure of memory by number of active blocks or, where only the most is known, by
    schedule; "" without either."""
    found = _schedules(evidence, lambda run: run.memory)
    what = "kept for backward" if evidence.on_cpu else "peak"
    if not found:
        return _peaks(evidence, what)
    laid, top = slots(found), max(max(s.values.values()) for s in found) / _MIB

    def draw(width: float) -> Drawing:
        frame = slot_frame(width, laid, top)
        svg, series = slot_axes(frame, laid, f"{what}, MiB"), []
        for i, schedule in enumerate(found):
            places = [(laid.places[k, i], k, size) for k, size in sorted(schedule.values.items())]
            svg += columns(frame, [(x, size / _MIB) for x, _, size in places], schedule.look)
            points = [
                (frame.px(x), frame.py(size / _MIB), f"{blocks(k)}: {_mib(size)} MiB {what}")
                for x, k, size in places
            ]
            series.append(Series(schedule.name, points))
        return Drawing(frame.height, svg, series)

    rows = [
        [text(s.name), str(k), _mib(size)] for s in found for k, size in sorted(s.values.items())
    ]
    return figure(
        "memory",
        "Memory of a step by number of blocks that train",
        draw,
        note=_memory_note(evidence),
        legend=schedules_legend(found),
        table=table_of(["schedule", "blocks", f"{what}, MiB"], rows),
    )


def _peaks(evidence: Evidence, what: str) -> str:
    sizes = {run.name: run.row["peak_bytes"] for run in evidence.runs if run.row["peak_bytes"]}
    if not sizes:
        return ""
    found = [
        Bar(name, f"{_mib(size)} MiB", [Part(size / _MIB, "full", f"{_mib(size)} MiB {what}")])
        for name, size in sizes.items()
    ]
    return figure(
        "memory",
        "Memory of a step, at most",
        lambda width: bars(width, found, f"{what}, MiB", "memory"),
        note=_memory_note(evidence),
        table=table_of(
            ["schedule", f"{what}, MiB"], [[text(n), _mib(size)] for n, size in sizes.items()]
        ),
    )


def _memory_note(evidence: Evidence) -> str:
    if evidence.on_cpu:
        return (
            "On a CPU: what one forward keeps for backward, its inputs too. Weights, gradients, "
            "moments and what backward itself takes are not in it."
        )
    return (
        "On a GPU: the most that a step held at once, weights, gradients and moments of this "
        "schedule included."
    )


def _ms(ms: float | None) -> str:
    """To a tenth or, of short times, to three digits."""
    if ms is None:
        return "-"
    return f"{ms:,.1f}" if ms >= 10 else f"{ms:.3g}"


def _mib(size: int) -> str:
    return f"{size / _MIB:,.1f}"
