"""A study's arms over the time that all had: their losses, and how far they are ahead."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from bench.pages.chart import Drawing, Frame, Series, figure, legend_of, text
from bench.pages.columns import percent
from bench.pages.curves import START, Curve, Point, loss_text, reach
from bench.pages.looks import Look
from bench.pages.losses import unit_of
from bench.pages.study_numbers import change, failed, label, window

_TOGETHER = 5  # arms on a figure, beside the baseline

Trace = Sequence[tuple[float, float]]  # shares of the time, each with the value then


class Spread(NamedTuple):
    """What the seeds have at a share of the time."""

    share: float
    mean: float
    low: float
    high: float
    seeds: int


class Chart(NamedTuple):
    """What is drawn of the arms together: figures that share an id's beginning, title and axes.

    `say` writes a value. `zero`: with a line at 0.
    """

    name: str
    title: str
    y_label: str
    limits: tuple[float, float]
    say: Callable[[float], str]
    note: str
    zero: bool


def losses(name: str, task: Mapping[str, Any], baseline: str, looks: Mapping[str, Look]) -> str:
    """Figures of the losses; "" without a curve. All have the same axes and the baseline."""
    arms = task["arms"]
    drawn = _drawn({arm: [_trace(cell) for cell in _sound(each)] for arm, each in arms.items()})
    unit = unit_of(task["flags"].get("task"))
    tops = [Curve(arm, looks[arm], [Point(100 * s.share, 0, s.low, s.high) for s in found])
            for arm, found in drawn.items()]  # fmt: skip
    note = "The axis leaves out the steep beginning."
    chart = Chart(name, "Validation loss over the time", f"validation loss, {unit}",
                  reach(tops) or (0.0, 1.0), loss_text, note, zero=False)  # fmt: skip
    return _figures(chart, drawn, baseline, arms, looks)


def leads(
    name: str, task: Mapping[str, Any], baseline: str, looks: Mapping[str, Look], margin: float
) -> str:
    """Figures of how far each arm is ahead of the baseline; "" without a pair."""
    arms = task["arms"]
    base = {cell["seed"]: _trace(cell) for cell in _sound(arms[baseline])}
    drawn = _drawn({
        arm: [_against(_trace(cell), base[cell["seed"]]) for cell in _sound(each)
              if base.get(cell["seed"])]
        for arm, each in arms.items() if arm != baseline
    })  # fmt: skip
    late = [s for found in drawn.values() for s in found if s.share >= START]
    reached = [x for s in late for x in (s.low, s.high)]
    limits = window(reached, min([s.mean for s in late], default=0.0), 100 * margin)
    note = "Against the baseline's loss at the same time, seed by seed; below 0 is better."
    if any(not limits[0] <= x <= limits[1] for x in reached):
        note += " What lies beyond the axis is in the table."
    chart = Chart(name, f"Ahead of {baseline} or behind", "difference of the validation loss (%)",
                  limits, lambda x: change(x / 100), note, zero=True)  # fmt: skip
    return _figures(chart, drawn, baseline, arms, looks)


def spread(traces: Sequence[Trace]) -> list[Spread]:
    """Over the seeds, at even shares of the time, as many as there are validations."""
    traces = [trace for trace in traces if trace]
    most = max(map(len, traces), default=0)
    found = []
    for i in range(most):
        at = i / max(1, most - 1)
        values = [_value_at(trace, at) for trace in traces]
        found.append(Spread(at, statistics.fmean(values), min(values), max(values), len(values)))
    return found


def _drawn(traces: Mapping[str, Sequence[Trace]]) -> dict[str, list[Spread]]:
    """The arms that have a curve."""
    spreads = {arm: spread(its) for arm, its in traces.items()}
    return {arm: found for arm, found in spreads.items() if found}


def _sound(arm: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [cell for cell in arm["cells"] if not failed(cell)]


def _against(trace: Trace, base: Trace) -> Trace:
    """In percent of the other's loss at the same time."""
    pairs = [(at, loss, _value_at(base, at)) for at, loss in trace]
    return [(at, 100 * (loss / other - 1)) for at, loss, other in pairs if other]


def _trace(cell: Mapping[str, Any]) -> Trace:
    """The last step may end a little after the time that was given: that is its end too."""
    budget = cell["budget_ms"]
    return [(min(1.0, point["elapsed_ms"] / budget), point["val_loss"])
            for point in cell["val_trace"] if point["val_loss"] is not None]  # fmt: skip


def _value_at(trace: Trace, at: float) -> float:
    """On the line between two validations, and before the first and behind the last their own."""
    before = max((point for point in trace if point[0] <= at), default=trace[0])
    after = min((point for point in trace if point[0] >= at), default=trace[-1])
    width = after[0] - before[0]
    if width <= 0:
        return before[1]
    return before[1] + (at - before[0]) / width * (after[1] - before[1])


def _figures(
    chart: Chart,
    drawn: Mapping[str, Sequence[Spread]],
    baseline: str,
    arms: Mapping[str, Any],
    looks: Mapping[str, Look],
) -> str:
    """So many that each can be read, in the order of the file."""
    if not drawn:
        return ""
    base = [baseline] if baseline in drawn else []
    others = [arm for arm in drawn if arm != baseline]
    count = max(1, -(-len(others) // _TOGETHER))
    size = -(-len(others) // count)
    lacking = [arm for arm in arms if arm not in drawn and (arm != baseline or not chart.zero)]
    note = f"{chart.note} No curve: {', '.join(lacking)}." if lacking else chart.note
    made = []
    for i in range(count):
        shown = {arm: drawn[arm] for arm in [*base, *others[size * i : size * (i + 1)]]}
        part = f" ({i + 1} of {count})" if count > 1 else ""
        names = {arm: label(arm, arms[arm]) for arm in shown}
        made.append(_figure(chart._replace(note=note), i, part, shown, names, looks))
    return "".join(made)


def _figure(
    chart: Chart,
    i: int,
    part: str,
    drawn: Mapping[str, Sequence[Spread]],
    names: Mapping[str, str],
    looks: Mapping[str, Look],
) -> str:
    def draw(width: float) -> Drawing:
        height = min(380.0, 200.0 + 0.35 * width)
        frame = Frame(width, height, x=(0.0, 100.0), y=chart.limits)
        svg = frame.axes("share of the time that all have (%)", chart.y_label)
        if chart.zero:
            across = f"M{frame.left:g} {frame.py(0):.1f}H{width - frame.right:g}"
            svg += f'<path class="axis" d="{across}"/>'
        for arm, found in drawn.items():
            svg += frame.inside(_band(frame, found, looks[arm]))
        for arm, found in drawn.items():
            means = [(100 * s.share, s.mean) for s in found]
            svg += frame.inside(frame.line(means, looks[arm])) + frame.markers(means, looks[arm])
        series = [_series(frame, chart, names[arm], found) for arm, found in drawn.items()]
        return Drawing(height, svg, series)

    return figure(
        f"{chart.name}-{i}",
        chart.title + part,
        draw,
        note=f"{_note([s for found in drawn.values() for s in found])} {chart.note}",
        legend=legend_of([(names[arm], looks[arm]) for arm in drawn]),
        table=_table(chart, {names[arm]: found for arm, found in drawn.items()}),
    )


def _band(frame: Frame, found: Sequence[Spread], look: Look) -> str:
    edges = [(s.share, s.high) for s in found] + [(s.share, s.low) for s in reversed(found)]
    path = "L".join(f"{frame.px(100 * at):.1f} {frame.py(value):.1f}" for at, value in edges)
    return f'<path style="fill:var(--c{look.color});fill-opacity:.13" d="M{path}z"/>'


def _series(frame: Frame, chart: Chart, name: str, found: Sequence[Spread]) -> Series:
    floor, top = frame.height - frame.bottom, frame.top
    points = [
        (
            frame.px(100 * s.share),
            min(max(frame.py(s.mean), top), floor),
            f"{percent(s.share)} of the time: {_in_words(chart, s)}",
        )
        for s in found
    ]
    return Series(name, points)


def _in_words(chart: Chart, s: Spread) -> str:
    if s.seeds == 1:
        return chart.say(s.mean)
    return f"{chart.say(s.mean)} ({chart.say(s.low)} to {chart.say(s.high)})"


def _note(spreads: Sequence[Spread]) -> str:
    said = "Lines: the mean over the seeds. Bands: from the lowest seed to the highest."
    if max(s.seeds for s in spreads) == 1:
        said = "One seed, so no bands."
    return f"{said} Cells that failed are not in it."


def _table(chart: Chart, drawn: Mapping[str, Sequence[Spread]]) -> str:
    head = '<th>arm</th><th class="number">time</th><th class="number">mean (range)</th>'
    rows = [
        f'<td>{text(name)}</td><td class="number">{percent(s.share)}</td>'
        f'<td class="number">{_in_words(chart, s)}</td>'
        for name, found in drawn.items()
        for s in found
    ]
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in [head, *rows]) + "</table>"
