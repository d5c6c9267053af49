"""What all figures are made of: drawn by hand as SVG, at two widths, with values on hover."""

import html
import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bench.pages.looks import SHAPES, Look

WIDE, NARROW = 880, 350  # pixels: on a screen, on a phone; text has the same size on both
_FAR = 9999.0  # pixels: a loss of 1e38 is as far out, and browsers refuse such numbers


class Series(NamedTuple):
    """The points of a figure that say their values: pixel x, pixel y and plain text.

    On hover they show "name, text", or the text alone where the name is empty.
    """

    name: str
    points: Sequence[tuple[float, float, str]]


class Drawing(NamedTuple):
    """What stands inside an <svg> element, its height in pixels, and what it says on hover."""

    height: float
    svg: str
    series: Sequence[Series]


def text(s: str) -> str:
    """`s` for HTML: every name from a file goes through here."""
    return html.escape(s)


def figure(
    name: str,
    title: str,
    draw: Callable[[float], Drawing],
    *,
    note: str = "",
    legend: str = "",
    table: str = "",
) -> str:
    """A figure of the page, with the id `name`.

    Args:
        title: plain text, as `note`, which says how to read the figure.
        draw: given a width in pixels, WIDE or NARROW; the same series and texts for both.
        legend: HTML, from `legend_of`.
        table: HTML of a <table>, shown on demand: the values without the picture.
    """
    drawn = {"wide": draw(WIDE), "narrow": draw(NARROW)}
    one, other = ([_texts(s) for s in d.series] for d in drawn.values())
    if one != other:
        raise ValueError(f"figure {name!r} must say the same on a phone as on a screen")
    data = {"series": one} | {
        kind: [[round(v, 1) for p in s.points for v in p[:2]] for s in drawing.series]
        for kind, drawing in drawn.items()
    }
    # Inside of <script> nothing is escaped, so nothing in it may end it.
    values = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    plots = "".join(
        f'<svg class="{kind}" role="img" aria-label="{text(title)}" '
        f'viewBox="0 0 {width} {drawing.height:g}">{drawing.svg}</svg>'
        for (kind, drawing), width in zip(drawn.items(), (WIDE, NARROW), strict=True)
    )
    return (
        f'<figure class="chart" id="{text(name)}" tabindex="0" aria-label="{text(title)}">'
        f"<figcaption>{text(title)}</figcaption>{legend}"
        f'<div class="plot">{plots}<div class="dot" hidden></div><div class="tip" hidden></div>'
        f'</div><p class="said" aria-live="polite"></p>'
        + (f'<p class="note">{text(note)}</p>' if note else "")
        + (f"<details><summary>as a table</summary>{scrolling(table)}</details>" if table else "")
        + f'<script type="application/json">{values}</script></figure>\n'
    )


def scrolling(table: str) -> str:
    """A box in which a wide table scrolls, so that the page does not."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="table">{table}</div>'


def legend_of(entries: Sequence[tuple[str, Look]]) -> str:
    """Names, each with its line and marker."""
    items = "".join(
        f'<li><svg width="44" height="14" aria-hidden="true">'
        f"{stroke('M1 7h42', look)}{mark([(22, 7)], look)}</svg>{text(name)}</li>"
        for name, look in entries
    )
    return f'<ul class="legend">{items}</ul>'


def stroke(path: str, look: Look) -> str:
    """An SVG path as a schedule's line."""
    dash = f' stroke-dasharray="{look.dash}"' if look.dash else ""
    return f'<path class="line" style="stroke:var(--c{look.color})"{dash} d="{path}"/>'


def mark(points: Sequence[tuple[float, float]], look: Look) -> str:
    """A schedule's markers at pixels."""
    path = "".join(f"M{x:.1f} {y:.1f}{SHAPES[look.marker]}" for x, y in points)
    return f'<path class="mark" style="fill:var(--c{look.color})" d="{path}"/>' if path else ""


class Frame:
    """Linear scales of a plot, from values to pixels, and what stands around it.

    `x` and `y` are the lowest and the highest value; equal ones are spread a little.
    """

    left, right, top, bottom = 60.0, 16.0, 30.0, 46.0  # pixels for labels

    def __init__(
        self, width: float, height: float, *, x: tuple[float, float], y: tuple[float, float]
    ) -> None:
        self.width, self.height = width, height
        self.x, self.y = _spread(*x), _spread(*y)

    def px(self, x: float) -> float:
        """The pixel of a value on the horizontal axis."""
        low, high = self.x
        return self.left + (x - low) / (high - low) * (self.width - self.left - self.right)

    def py(self, y: float) -> float:
        """The pixel of a value on the vertical axis, which grows upwards."""
        low, high = self.y
        pixel = self.height - self.bottom - (y - low) / (high - low) * self._room
        return min(max(pixel, -_FAR), _FAR)

    @property
    def _room(self) -> float:
        return self.height - self.top - self.bottom

    def axes(
        self,
        x_label: str,
        y_label: str,
        *,
        x_ticks: Sequence[float] | None = None,
        y_ticks: Sequence[float] | None = None,
    ) -> str:
        """Light grid, numbers and labels, which name the units. Ticks are round by default."""
        across = ticks(*self.x, (self.width - self.left) / 80) if x_ticks is None else x_ticks
        up = ticks(*self.y, self._room / 40) if y_ticks is None else y_ticks
        right, floor = self.width - self.right, self.height - self.bottom
        parts = [
            f'<path class="grid" d="M{self.left:g} {self.py(y):.1f}H{right:g}"/>'
            f'<text class="tick" x="{self.left - 8:g}" y="{self.py(y) + 4:.1f}" '
            f'text-anchor="end">{number}</text>'
            for y, number in zip(up, _numbers(up), strict=True)
        ]
        parts += [
            f'<path class="grid" d="M{self.px(x):.1f} {self.top:g}V{floor + 4:g}"/>'
            f'<text class="tick" x="{self.px(x):.1f}" y="{floor + 18:g}" '
            f'text-anchor="middle">{number}</text>'
            for x, number in zip(across, _numbers(across), strict=True)
        ]
        parts.append(f'<path class="axis" d="M{self.left:g} {floor:g}H{right:g}"/>')
        parts.append(f'<text class="label" x="4" y="14">{text(y_label)}</text>')
        middle = (self.left + right) / 2
        parts.append(
            f'<text class="label" x="{middle:g}" y="{self.height - 8:g}" '
            f'text-anchor="middle">{text(x_label)}</text>'
        )
        return "".join(parts)

    def inside(self, svg: str) -> str:
        """`svg` without what lies outside of the axes."""
        box = (self.left, self.top, self.width - self.left - self.right, self._room)
        x, y, width, height = (f"{v:g}" for v in box)
        return (
            f'<svg x="{x}" y="{y}" width="{width}" height="{height}" '
            f'viewBox="{x} {y} {width} {height}">{svg}</svg>'
        )

    def path(self, points: Sequence[tuple[float, float | None]]) -> str:
        """The `d` of a line through values; it breaks where there is none."""
        parts = []
        for known, group in itertools.groupby(points, key=lambda point: point[1] is not None):
            if known:
                pixels = [f"{self.px(x):.1f} {self.py(y):.1f}" for x, y in group if y is not None]
                parts.append("M" + "L".join(pixels) + ("h0" if len(pixels) == 1 else ""))
        return "".join(parts)

    def line(self, points: Sequence[tuple[float, float | None]], look: Look) -> str:
        """A schedule's line through values; it breaks where there is none."""
        path = self.path(points)
        return stroke(path, look) if path else ""

    def markers(self, points: Sequence[tuple[float, float | None]], look: Look) -> str:
        """A schedule's markers at values, without those that lie above or below the axes."""
        low, high = self.y
        seen = [(x, y) for x, y in points if y is not None and low <= y <= high]
        return mark([(self.px(x), self.py(y)) for x, y in seen], look)


def ticks(low: float, high: float, most: float) -> list[float]:
    """Round numbers from `low` to `high`: 2 or more, some `most` at most."""
    rough = (high - low) / max(most, 2)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(m for m in (1, 2, 5, 10) if m * unit >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _numbers(values: Sequence[float]) -> list[str]:
    """Numbers of one axis, all with as many decimals as their distance needs."""
    if any(abs(v) >= 1e7 for v in values):
        return [f"{v:g}" for v in values]
    step = min((b - a for a, b in itertools.pairwise(values)), default=1.0)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if digits > 5:
        return [f"{v:g}" for v in values]
    return [f"{v + 0.0:,.{digits}f}" for v in values]


def _spread(low: float, high: float) -> tuple[float, float]:
    if high - low > 1e-12 * max(1.0, abs(low)):
        return low, high
    aside = abs(low) * 0.05 or 0.5
    return low - aside, low + aside


def _texts(series: Series) -> dict[str, str | list[str]]:
    return {"name": series.name, "texts": [point[2] for point in series.points]}
