"""Whether relevance tells the blocks apart: what share of it each has, beside equal shares."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from bench.pages.cells import slug, swatches
from bench.pages.chart import Drawing, Frame, Series, figure
from bench.pages.columns import percent
from bench.pages.evidence import Evidence, Probe, Run
from bench.pages.looks import SHAPES

_HEIGHT = 260.0


class Share(NamedTuple):
    """Of a block over all probes, 0..1."""

    mean: float
    lowest: float
    highest: float
    last: float


def shares(probe: Probe) -> list[float]:
    """Of the sum of the relevance, by block; [] where there is none that can be shared out."""
    scores = probe.relevance or ()
    total = sum(scores)
    if not (0 < total < math.inf) or min(scores) < 0:
        return []
    return [score / total for score in scores]


def by_block(evidence: Evidence, run: Run, usable: Sequence[Probe]) -> str:
    """The figure: each block's share over the probes that have one."""
    by_probe = [shares(probe) for probe in usable]
    found = [
        Share(sum(block) / len(block), min(block), max(block), block[-1])
        for block in zip(*by_probe, strict=True)
    ]
    last = usable[-1].step
    return figure(
        slug("shares", evidence.name, run.name),
        f"Does relevance tell the blocks apart? {run.name}",
        lambda width: _draw(width, found, len(usable), last),
        note=_note(found, by_probe),
        legend=_legend(last),
        table=_table(found, last),
    )


def _draw(width: float, found: Sequence[Share], probes: int, last: int) -> Drawing:
    n = len(found)
    top = 105 * max(share.highest for share in found)  # %, and a little room
    frame = Frame(width, _HEIGHT, x=(-0.5, n - 0.5), y=(0, top))
    apart = math.ceil(n * 28 / (width - frame.left))
    svg = frame.axes(
        "block (0 is next to the input)", "share of the relevance (%)", x_ticks=range(0, n, apart)
    )
    xs = [frame.px(block) for block in range(n)]
    ranges, means, lasts = "", "", ""
    for x, share in zip(xs, found, strict=True):
        ranges += f"M{x:.1f} {frame.py(100 * share.lowest):.1f}V{frame.py(100 * share.highest):.1f}"
        means += f"M{x:.1f} {frame.py(100 * share.mean):.1f}{SHAPES['o']}"
        lasts += f"M{x:.1f} {frame.py(100 * share.last):.1f}{_LAST}"
    even = frame.py(100 / n)
    svg += f'<path {_RANGE} d="{ranges}"/><path {_MEAN} d="{means}"/>'
    svg += f'<path {_OPEN} d="{lasts}"/>'
    svg += f'<path {_EVEN} d="M{frame.left:g} {even:.1f}H{width - frame.right:g}"/>'
    points = [
        (x, frame.py(100 * share.mean), _in_words(block, share, probes, last))
        for block, (x, share) in enumerate(zip(xs, found, strict=True))
    ]
    return Drawing(_HEIGHT, svg, [Series("", points)])


_LAST = "m-6 0h12"
_RANGE = 'style="stroke:var(--trained);stroke-width:4;stroke-opacity:.4;fill:none"'
_MEAN = 'class="mark" style="fill:var(--trained)"'
_OPEN = 'style="stroke:var(--ink);stroke-width:2;fill:none"'
_EVEN = 'style="stroke:var(--ink);stroke-width:1.5;fill:none" stroke-dasharray="5 3"'


def _in_words(block: int, share: Share, probes: int, last: int) -> str:
    mean, lowest, highest, final = map(percent, share)
    return (
        f"block {block}: {mean} on average of {probes} probes, from {lowest} to {highest}; "
        f"{final} in the last, step {last}"
    )


def _legend(last: int) -> str:
    return swatches(
        [
            ("mean of all probes", f'<path {_MEAN} d="M11 7{SHAPES["o"]}"/>'),
            ("lowest to highest", f'<path {_RANGE} d="M11 0v14"/>'),
            (f"the last probe, step {last}", f'<path {_OPEN} d="M11 7{_LAST}"/>'),
            ("if all blocks counted alike", f'<path {_EVEN} d="M0 7h22"/>'),
        ]
    )


def _note(found: Sequence[Share], by_probe: Sequence[Sequence[float]]) -> str:
    means = [share.mean for share in found]
    highest = means.index(max(means))
    first = sum(row.index(max(row)) == highest for row in by_probe)
    return (
        f"If all blocks counted alike, each would have {percent(1 / len(found))}. On average of "
        f"the probes the blocks lie between {_ends(means)}, in the last one between "
        f"{_ends(by_probe[-1])}. Block {highest} had the largest share in {first} of "
        f"{len(by_probe)} probes."
    )


def _ends(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return (
        f"{percent(low)} (block {values.index(low)}) and {percent(high)} "
        f"(block {values.index(high)})"
    )


def _table(found: Sequence[Share], last: int) -> str:
    heads = ("block", "mean", "lowest", "highest", f"last, step {last}")
    rows = ["".join(f'<th class="number">{head}</th>' for head in heads)]
    for block, share in enumerate(found):
        cells = "".join(f'<td class="number">{percent(each)}</td>' for each in share)
        rows.append(f'<td class="number">{block}</td>{cells}')
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
