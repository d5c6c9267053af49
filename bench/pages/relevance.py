"""How much each block mattered by the schedule's own measure, and whether it tells them apart."""

import bisect
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from bench.pages.cells import LINE, axes, map_frame, paint, rules, slug, swatch, swatches
from bench.pages.chart import Drawing, Series, figure
from bench.pages.columns import percent
from bench.pages.evidence import Evidence, Probe, Run
from bench.pages.shares import by_block, shares

_MOST, _CELLS = 300, 2400  # columns; cells, each of which is 20 bytes of text on hover
_ROOM = 320.0  # pixels of the map
# A share over that of blocks that all count alike: below the first edge the lightest, and so on.
_EDGES = (0.5, 0.75, 0.9, 1.1, 1.35, 2.0)
_OPACITIES = (0.12, 0.24, 0.37, 0.52, 0.68, 0.84, 1.0)


class Reading(NamedTuple):
    """Probes that share a column, as means of the `usable` ones; [] if there is none."""

    probes: Sequence[Probe]
    usable: int
    relevance: Sequence[float]
    shares: Sequence[float]


def relevance(evidence: Evidence, run: Run) -> str:
    """The figures: by probe, and by block. "" without relevance, or one block alone to have it."""
    n = evidence.n_blocks
    usable = [probe for probe in run.probes if shares(probe)]
    if not usable or n == 1:
        return ""
    found = readings(run.probes, n)
    return figure(
        slug("relevance", evidence.name, run.name),
        f"Share of each block in the relevance, probe by probe: {run.name}",
        lambda width: _draw(width, found, run.freezing, n),
        note=_note(evidence, run.probes, len(found[0].probes)),
        legend=_legend(found, n),
    ) + by_block(evidence, run, usable)


def readings(probes: Sequence[Probe], n_blocks: int) -> list[Reading]:
    """All probes, equally many in each column but the last."""
    size = -(-len(probes) // min(_MOST, max(1, _CELLS // n_blocks)))
    return [_reading(probes[i : i + size]) for i in range(0, len(probes), size)]


def _reading(probes: Sequence[Probe]) -> Reading:
    usable = [probe for probe in probes if shares(probe)]
    return Reading(
        probes,
        len(usable),
        _means([probe.relevance or () for probe in usable]),
        _means([shares(probe) for probe in usable]),
    )


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]


def _draw(width: float, found: Sequence[Reading], freezing: int | None, n: int) -> Drawing:
    firsts = [reading.probes[0].step for reading in found]
    begun = [] if freezing is None else [i for i, step in enumerate(firsts) if step >= freezing]
    marked = [(begun[0], f"freezing begins, step {freezing}")] if begun else []
    frame = map_frame(width, len(found), n, room=_ROOM, above=LINE * len(marked))
    svg = axes(frame, n, "probe, named by its step", [])
    rows = [[_level(reading, block, n) for reading in found] for block in range(n)]
    svg += paint(frame, rows, _OPACITIES, columns=len(found), ground="paper")
    svg += rules(frame, marked)
    apart = math.ceil(len(found) * 60 / (width - frame.left))
    for i in range(0, len(found), apart):
        svg += (
            f'<text class="tick" x="{frame.px(i + 0.5):.1f}" y="{frame.height - 28:g}" '
            f'text-anchor="middle">{firsts[i]:,}</text>'
        )
    points = [(frame.px(i + 0.5), frame.top, in_words(reading)) for i, reading in enumerate(found)]
    return Drawing(frame.height, svg, [Series("", points)])


def _level(reading: Reading, block: int, n: int) -> int:
    """1 for the lightest of _OPACITIES, 0 where nothing is known."""
    return bisect.bisect(_EDGES, reading.shares[block] * n) + 1 if reading.shares else 0


def in_words(reading: Reading) -> str:
    """The probes of a column, and by block the share and the relevance itself."""
    first, last = reading.probes[0].step, reading.probes[-1].step
    found = f"probe at step {first}"
    if len(reading.probes) > 1:
        found = f"means of {reading.usable} probes, steps {first}-{last}"
    if not reading.shares:
        return f"{found}: no relevance to share out"
    pairs = zip(reading.shares, reading.relevance, strict=True)
    each = [
        f"{block}: {percent(share)} ({score:.4g})" for block, (share, score) in enumerate(pairs)
    ]
    return f"{found}, block {'; '.join(each)}"


def _legend(found: Sequence[Reading], n: int) -> str:
    """The shares that each shade stands for, of those that are there."""
    edges = [f"{100 * edge / n:.1f}" for edge in _EDGES]
    words = [
        f"under {edges[0]} %",
        *(f"{low}-{high} %" for low, high in itertools.pairwise(edges)),
        f"{edges[-1]} % or more",
    ]
    there = sorted({_level(reading, block, n) for reading in found for block in range(n)} - {0})
    return swatches([(words[i - 1], swatch("paper", _OPACITIES[i - 1])) for i in there])


_MEASURES = {
    "grad_ratio": "the size of a block's gradient over that of its weights",
    "saliency_abs_gp": "the sum of |gradient x weight| over a block's weights",
}


def _note(evidence: Evidence, probes: Sequence[Probe], size: int) -> str:
    measure = _MEASURES.get(str(evidence.config.get("dyn_relevance_metric")))
    found = f"Relevance is {measure}, averaged over the probes so far. " if measure else ""
    if size > 1:
        found += f"A column stands for {size} probes: means. "
    lacking = sum(not shares(probe) for probe in probes)
    if lacking:
        found += (
            f"{lacking} of {len(probes)} probes have no relevance that could be shared out (not "
            "recorded, not finite, negative or all zero) and are left out. "
        )
    return f"{found}On hover: shares, and in brackets the relevance itself to four digits."
