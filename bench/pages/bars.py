"""Horizontal bars under their names, stacked of parts that patterns tell apart."""

from collections.abc import Sequence
from typing import NamedTuple

from bench.pages.cells import swatches
from bench.pages.chart import Drawing, Frame, Series, text

_ROW, _BAR = 50.0, 22.0  # pixels of a name with its bar, and of the bar alone
_FILLS = {
    "light": "fill:var(--frozen)",
    "middle": "fill:var(--trained);fill-opacity:.5",
    "full": "fill:var(--trained)",
    "warm": "fill:var(--warm)",
}
_PATTERNS = {  # of 6 x 6 pixels
    "lines": '<path d="M0 0h6v6h-6z" style="fill:var(--trained)"/>'
    '<path d="M-1 7L7 -1M-1 1L1 -1M5 7L7 5" style="stroke:var(--paper);stroke-width:2"/>',
    "dots": '<path d="M0 0h6v6h-6z" style="fill:var(--paper)"/>'
    '<circle cx="3" cy="3" r="1.3" style="fill:var(--soft)"/>',
}


class Part(NamedTuple):
    """A piece of a bar: how much, its pattern, and what it says on hover."""

    amount: float
    pattern: str
    said: str


class Bar(NamedTuple):
    """A bar, its name, what stands behind the name, and its parts from the left."""

    name: str
    total: str
    parts: Sequence[Part]


def bars(width: float, found: Sequence[Bar], x_label: str, name: str) -> Drawing:
    """A drawing of bars from 0 on; `name` is a prefix for ids, one for all of its widths."""
    longest = max(sum(part.amount for part in bar.parts) for bar in found)
    height = Frame.bottom + 4 + _ROW * len(found)
    frame = Frame(width, height, x=(0.0, 1.02 * longest), y=(0.0, len(found)))
    frame.left, frame.top = 14.0, 4.0  # half of a number stands out on the left
    name = f"{name}-{width:g}"
    svg = _definitions(name) + frame.axes(x_label, "", y_ticks=())
    series = []
    for i, bar in enumerate(found):
        top, at, points = frame.top + _ROW * i + 20, 0.0, []
        svg += (
            f'<text class="on" x="{frame.left:g}" y="{top - 6:g}">{text(bar.name)}'
            f'<tspan dx="8" style="fill:var(--soft)">{text(bar.total)}</tspan></text>'
        )
        for part in bar.parts:
            start, end = frame.px(at), frame.px(at + part.amount)
            svg += _box(start, top, end - start, _BAR, part.pattern, name)
            points.append(((start + end) / 2, top + _BAR / 2, part.said))
            at += part.amount
        series.append(Series(bar.name, points))
    return Drawing(height, svg, series)


def bars_legend(entries: Sequence[tuple[str, str]], name: str) -> str:
    """Words, each with its pattern; `name` as in `bars`."""
    name = f"{name}-legend"
    boxes = [(words, _box(1, 1, 20, 12, pattern, name)) for words, pattern in entries]
    (words, first), *others = boxes
    return swatches([(words, _definitions(name) + first), *others])


def _box(x: float, y: float, width: float, height: float, pattern: str, name: str) -> str:
    fill = _FILLS.get(pattern, f"fill:url(#{name}-{pattern})")
    path = f'd="M{x:.1f} {y:g}h{width:.1f}v{height:g}h{-width:.1f}z"'
    return (
        f'<path style="fill:var(--paper)" {path}/>'
        f'<path style="{fill};stroke:var(--soft);stroke-width:.6" {path}/>'
    )


def _definitions(name: str) -> str:
    """The patterns, again in each drawing: those of one that is not shown cannot be used."""
    patterns = "".join(
        f'<pattern id="{name}-{pattern}" width="6" height="6" patternUnits="userSpaceOnUse">'
        f"{svg}</pattern>"
        for pattern, svg in _PATTERNS.items()
    )
    return f"<defs>{patterns}</defs>"
