"""Maps of blocks: a row a block, the one next to the head on top, painted in few SVG paths."""

import itertools
import math
import re
from collections.abc import Sequence

from bench.pages.chart import Frame, text

_TALLEST = 22.0  # pixels of a row
LINE = 16.0  # pixels that a label of `rules` takes


def slug(*names: str) -> str:
    """Names as an id of the page, another one for other names."""
    return "-".join(re.sub(r"[^A-Za-z0-9]", lambda c: f"_{ord(c[0]):x}_", name) for name in names)


def map_frame(
    width: float, across: int, n_blocks: int, *, room: float, above: float = 0, below: float = 0
) -> Frame:
    """A frame whose vertical axis is the block and whose horizontal one goes from 0 to `across`.

    Args:
        room: pixels that all rows take at most.
        above, below: pixels left free over and under the rows.
    """
    row = min(_TALLEST, room / n_blocks)
    frame = Frame(width, 0, x=(0, across), y=(-0.5 - below / row, n_blocks - 0.5))
    frame.left, frame.top = 52, 24 + above
    frame.height = frame.top + n_blocks * row + below + frame.bottom
    return frame


def axes(frame: Frame, n_blocks: int, x_label: str, x_ticks: Sequence[float]) -> str:
    """The axes of a map, as many blocks numbered as there is room for."""
    every = math.ceil(14 / _row(frame))
    y_label = f"block ({n_blocks - 1}, on top, is next to the head)" if n_blocks > 1 else "block"
    return frame.axes(x_label, y_label, x_ticks=x_ticks, y_ticks=range(0, n_blocks, every))


def paint(
    frame: Frame,
    rows: Sequence[Sequence[int]],
    opacities: Sequence[float],
    *,
    columns: float,
    ground: str,
) -> str:
    """Cells as SVG.

    Args:
        rows: levels, block 0 first; of level 0 only the ground is seen, level i has
            opacities[i - 1], and the level above these is a block that did not run.
        columns: how many columns are as wide as the frame; less than the number of cells in a row
            where the last one is narrower than the others.
        ground: the colour of the ground, a CSS variable's name.
    """
    right, floor, row = frame.px(frame.x[1]), frame.py(-0.5), _row(frame)
    box = f"M{frame.left:g} {frame.top:g}H{right:g}V{floor:.1f}H{frame.left:g}z"
    scale = f"scale({(right - frame.left) / columns:.6g},{row:.6g})"
    styles = [*(f"stroke-opacity:{opacity}" for opacity in opacities), "stroke:var(--absent)"]
    paths = "".join(
        f'<path style="{style}" d="{path}"/>'
        for style, path in zip(styles, _paths(rows, len(styles), columns), strict=True)
        if path
    )
    between = ""
    if row >= 6:
        edges = (frame.py(block - 0.5) for block in range(1, len(rows)))
        lines = "".join(f"M{frame.left:g} {y:.1f}H{right:g}" for y in edges)
        between = f'<path style="stroke:var(--paper);stroke-opacity:.6" d="{lines}"/>'
    return (
        f'<path style="fill:var(--{ground})" d="{box}"/>'
        f'<g transform="translate({frame.left:g},{frame.top:g}) {scale}" '
        f'shape-rendering="crispEdges" style="fill:none;stroke:var(--trained)">{paths}</g>{between}'
    )


def rules(frame: Frame, marked: Sequence[tuple[float, str]]) -> str:
    """A vertical line for each label, from a line of text of its own, LINE high, down the map."""
    left: list[tuple[float, str, bool]] = []  # of its line, where the label has room
    right: list[tuple[float, str, bool]] = []
    for value, label in marked:
        x = frame.px(value)
        fits = x < frame.width / 2 or x + 7 * len(label) < frame.width
        (right if fits else left).append((x, label, fits))
    lines, labels = "", ""
    # In this order no line goes through the label of another on the same side.
    for i, (x, label, fits) in enumerate([*reversed(left), *right]):
        y = 32 + LINE * i
        aside, anchor = (4, "start") if fits else (-4, "end")
        lines += f"M{x:.1f} {y - 10:g}V{frame.py(-0.5):.1f}"
        labels += (
            f'<text x="{x + aside:.1f}" y="{y:g}" text-anchor="{anchor}" style="stroke:'
            f'var(--paper);stroke-width:4;paint-order:stroke">{text(label)}</text>'
        )
    if not lines:
        return ""
    return (
        f'<path style="stroke:var(--paper);stroke-width:4;fill:none" d="{lines}"/>'
        f'<path style="stroke:var(--ink);stroke-width:1.5;fill:none" stroke-dasharray="5 3" '
        f'd="{lines}"/>{labels}'
    )


def swatches(entries: Sequence[tuple[str, str]]) -> str:
    """A legend: texts, each with what it explains, SVG for 22 x 14 pixels."""
    items = "".join(
        f'<li><svg width="22" height="14" aria-hidden="true">{svg}</svg>{words}</li>'
        for words, svg in entries
    )
    return f'<ul class="legend">{items}</ul>'


def swatch(ground: str, opacity: float = 0) -> str:
    """A cell of a legend."""
    box = 'd="M1 1h20v12h-20z"'
    return (
        f'<path style="fill:var(--{ground});stroke:var(--soft)" {box}/>'
        f'<path style="fill:var(--trained);fill-opacity:{opacity}" {box}/>'
    )


def _row(frame: Frame) -> float:
    """Pixels of a row."""
    return frame.py(0) - frame.py(1)


def _paths(rows: Sequence[Sequence[int]], levels: int, columns: float) -> list[str]:
    """A path a level, in units of a cell: strokes through the cells that have it."""
    paths = [""] * levels
    for y, row in enumerate(reversed(rows)):
        ends: dict[int, float] = {}
        x = 0.0
        for level, group in itertools.groupby(row):
            end = min(x + len(list(group)), columns)
            if level:
                gap = f"m{x - ends[level]:g} 0" if level in ends else f"M{x:g} {y}.5"
                paths[level - 1] += f"{gap}h{end - x:g}"
                ends[level] = end
            x = end
    return paths
