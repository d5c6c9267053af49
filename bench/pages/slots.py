"""Figures by number of active blocks: a group for each number, a slot in it for each schedule."""

import math
from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from bench.pages.chart import Frame, legend_of, mark, stroke
from bench.pages.looks import Look

T = TypeVar("T")
_THIN = 6.0  # pixels: in less room a line stands for a box, without a marker
_WIDE = 0.76  # of a slot
_BETWEEN = 1.0  # slots left free between two groups


class Schedule(NamedTuple, Generic[T]):
    """A schedule's name, how it looks, and what it has by number of active blocks."""

    name: str
    look: Look
    values: Mapping[int, T]


class Slots(NamedTuple):
    """Where the slots are, in slots from the left.

    Attributes:
        places: the middle of the slot of schedule i with k blocks, by (k, i).
        middles: of the group of k blocks.
        width: of all.
    """

    places: Mapping[tuple[int, int], float]
    middles: Mapping[int, float]
    width: float


def slots(schedules: Sequence[Schedule[T]]) -> Slots:
    """A slot for each number of blocks that a schedule has, fewest blocks on the left."""
    places: dict[tuple[int, int], float] = {}
    middles = {}
    at = _BETWEEN / 2
    for k in sorted({k for schedule in schedules for k in schedule.values}):
        start = at
        for i, schedule in enumerate(schedules):
            if k in schedule.values:
                places[k, i] = at + 0.5
                at += 1.0
        middles[k] = (start + at) / 2
        at += _BETWEEN
    return Slots(places, middles, at - _BETWEEN / 2)


def slot_frame(width: float, laid: Slots, top: float) -> Frame:
    """A frame of all slots, and from 0 to a little more than `top`."""
    return Frame(width, min(360.0, 200.0 + 0.3 * width), x=(0.0, laid.width), y=(0.0, 1.06 * top))


def slot_axes(frame: Frame, laid: Slots, y_label: str) -> str:
    """Axes with as many groups numbered as there is room for."""
    each = (frame.width - frame.left - frame.right) / len(laid.middles)
    numbers = "".join(
        f'<text class="tick" x="{frame.px(x):.1f}" y="{frame.height - frame.bottom + 18:g}" '
        f'text-anchor="middle">{k}</text>'
        for k, x in list(laid.middles.items())[:: math.ceil(22 / each)]
    )
    return frame.axes("number of blocks that train", y_label, x_ticks=()) + numbers


def boxes(frame: Frame, places: Sequence[tuple[float, Sequence[float]]], its: Look) -> str:
    """From the 10 to the 90 % a line, from the 25 to the 75 % a box, at the median a marker."""
    half = _bar_width(frame) / 2
    lines, areas, middles = "", "", []
    for x, ms in places:
        at = frame.px(x)
        low, lower, median, upper, high = map(frame.py, ms)
        lines += f"M{at:.1f} {low:.1f}V{high:.1f}"
        areas += f"M{at - half:.1f} {lower:.1f}h{2 * half:.1f}V{upper:.1f}h{-2 * half:.1f}z"
        middles.append((at, median))
    solid = its._replace(dash="")
    if 2 * half < _THIN:
        ticks = "".join(f"M{at - half:.1f} {y:.1f}h{2 * half:.1f}" for at, y in middles)
        return stroke(lines + ticks, solid)
    fill = f'<path style="fill:var(--c{its.color});fill-opacity:.3" d="{areas}"/>'
    return stroke(lines, solid) + fill + stroke(areas, solid) + mark(middles, its)


def dashes(frame: Frame, places: Sequence[tuple[float, float]]) -> str:
    """A dashed line, somewhat longer than a box is wide, at each place."""
    half = _bar_width(frame) * 0.5 / _WIDE
    line = "".join(
        f"M{frame.px(x) - half:.1f} {frame.py(ms):.1f}h{2 * half:.1f}" for x, ms in places
    )
    return dashed(line) if line else ""


def dashed(path: str) -> str:
    """An SVG path as a line that no schedule has."""
    return f'<path style="stroke:var(--ink);stroke-width:1.5" stroke-dasharray="4 2" d="{path}"/>'


def columns(frame: Frame, places: Sequence[tuple[float, float]], its: Look) -> str:
    """Columns from 0 up, each with a marker on top."""
    wide = _bar_width(frame)
    path = "".join(
        f"M{frame.px(x) - wide / 2:.1f} {frame.py(0):.1f}V{frame.py(y):.1f}h{wide:.1f}"
        f"V{frame.py(0):.1f}z"
        for x, y in places
    )
    fill = f'<path style="fill:var(--c{its.color});fill-opacity:.3" d="{path}"/>'
    solid = its._replace(dash="")
    tops = mark([(frame.px(x), frame.py(y)) for x, y in places], its) if wide >= _THIN else ""
    return fill + stroke(path, solid) + tops


def schedules_legend(found: Sequence[Schedule[T]]) -> str:
    """The schedules as they look in slots."""
    return legend_of([(s.name, s.look._replace(dash="")) for s in found])


def _bar_width(frame: Frame) -> float:
    """Pixels of what is drawn in a slot."""
    return min(26.0, _WIDE * (frame.px(1.0) - frame.px(0.0)))


def blocks(k: int) -> str:
    """A number of blocks in words."""
    return "1 block trains" if k == 1 else f"{k} blocks train"


def table_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """HTML of a table whose first column is a name that is safe in HTML, all others numbers."""
    lines = [
        f"<t{tag}>{row[0]}</t{tag}>"
        + "".join(f'<t{tag} class="number">{cell}</t{tag}>' for cell in row[1:])
        for tag, row in [("h", head), *(("d", row) for row in rows)]
    ]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
