"""The plots for a paper, each on a matplotlib Figure of its own."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from bench.pages.columns import columns
from bench.pages.curves import Clock, Curve, clock, curves_of, reach, trained, validated
from bench.pages.evidence import Evidence, Run
from bench.pages.looks import LIGHT, Look, look
from bench.pages.shares import shares
from bench.results import quantile

_APART = 0.14  # blocks, between the markers of two schedules
_ROOM = 30  # characters of a legend that has several columns
_LABEL = 50  # characters of a name at most


def loss_curves(evidences: Sequence[Evidence]) -> tuple[list[Curve], list[Curve]]:
    """Lines and single markers: validations or, where no file has any on the way, training losses
    and what is known of the validations at the end."""
    found = curves_of(evidences, validated)
    if any(run.validations for evidence in evidences for run in evidence.runs):
        return found, []
    return curves_of(evidences, trained), found


def losses(
    figure: Any,
    evidences: Sequence[Evidence],
    lines: Sequence[Curve],
    ends: Sequence[Curve],
    unit: str,
) -> None:
    """Loss over time; on the page's scale, so that the curves' beginnings may lie above it."""
    axes = figure.subplots()
    time = clock(max(curve.points[-1].ms for curve in [*lines, *ends]))
    averaged = any(point.smooth is not None for curve in lines for point in curve.points)
    shown = []
    for curve in lines:
        y = [p.smooth if averaged else p.loss for p in curve.points]
        style = _style(curve.look, marker=not averaged)
        (line,) = axes.plot([p.ms / time.ms for p in curve.points], _gaps(y), **style)
        shown.append((line, _label(curve.label)))
    for curve in ends:
        (point,) = curve.points
        style = _style(curve.look, line=False)
        (end,) = axes.plot([point.ms / time.ms], _gaps([point.loss]), **style)
    shown += [(end, "validation loss at the end")] if ends else []
    shown += _goals(axes, evidences, time)
    low, high = reach([*lines, *ends]) or (0.0, 1.0)
    room = 0.0 if low < high else abs(low) / 10 or 1.0
    axes.set_ylim(low - room, high + room)
    axes.set_xlim(left=0.0)
    axes.set_xlabel(f"time in steps ({time.name})")
    what = "training loss, averaged" if averaged else "validation loss"
    axes.set_ylabel(f"{what}\n{unit}")
    axes.grid()
    where = ("upper center", 2) if len(evidences) == 1 else ("right upper", 1)
    _legend(figure, shown, *where)


def block_map(figure: Any, evidence: Evidence, run: Run) -> None:
    """Which blocks trained in which steps, with probes, freezing's start and the recovery's."""
    from matplotlib.colors import LinearSegmentedColormap, ListedColormap
    from matplotlib.patches import Patch

    axes = figure.subplots()
    found = columns(run, evidence.n_blocks)
    edges = [column.first for column in found] + [len(run.active)]
    often = [[c.trained[block] / c.steps for c in found] for block in range(evidence.n_blocks)]
    shades = LinearSegmentedColormap.from_list("trained", [LIGHT["frozen"], LIGHT["trained"]])
    axes.pcolormesh(edges, _edges(evidence.n_blocks), often, cmap=shades, vmin=0, vmax=1)
    shown = [(Patch(color=LIGHT[name]), name) for name in ("trained", "frozen")]
    absent = [
        [1.0 if 2 * c.absent[block] > c.steps else math.nan for c in found]
        for block in range(evidence.n_blocks)
    ]
    if run.running:
        one = ListedColormap([LIGHT["absent"]])
        axes.pcolormesh(edges, _edges(evidence.n_blocks), absent, cmap=one)
        shown.append((Patch(color=LIGHT["absent"]), "did not run"))
    if run.probes:
        above = evidence.n_blocks - 0.5 + 0.04 * evidence.n_blocks
        at = [probe.step + 0.5 for probe in run.probes]
        ticks = axes.scatter(
            at, [above] * len(at), s=9, marker="|", color=LIGHT["warm"], lw=0.6, clip_on=False
        )
        shown.append((ticks, "probe: all blocks, measured"))
    if run.freezing is not None:
        line = axes.axvline(run.freezing, color=LIGHT["ink"], ls="--")
        shown.append((line, "freezing begins"))
    lines = [axes.axvline(step, color=LIGHT["ink"], ls=":") for step, _ in run.recovery]
    shown += [(line, "a stage of the recovery begins") for line in lines[:1]]
    _by_block(axes, evidence, run)
    _legend(figure, shown, "upper center", len(shown))


def relevance(figure: Any, evidence: Evidence, run: Run) -> None:
    """Each block's share of the relevance, from a probe to the next; blank where it has none."""
    from matplotlib.colors import LinearSegmentedColormap

    axes = figure.subplots()
    edges = [probe.step for probe in run.probes]
    edges.append(max(len(run.active), edges[-1] + 1))
    found = [shares(probe) or [math.nan] * evidence.n_blocks for probe in run.probes]
    percents = [[100 * share for share in row] for row in zip(*found, strict=True)]
    shades = LinearSegmentedColormap.from_list(
        "relevance", [LIGHT["paper"], LIGHT["trained"], LIGHT["ink"]]
    )
    drawn = axes.pcolormesh(edges, _edges(evidence.n_blocks), percents, cmap=shades, vmin=0)
    figure.colorbar(drawn, ax=axes, label="relevance (%)", pad=0.01)
    _by_block(axes, evidence, run)


def steps(figure: Any, evidence: Evidence) -> None:
    """Step times by number of blocks trained, beside what their parts take.

    A marker is the median, its bar reaches from the 10th to the 90th percentile; without the first
    steps, which warm up.
    """
    axes = figure.subplots()
    count, shown = len(evidence.runs), []
    for i, run in enumerate(evidence.runs):
        times = evidence.times_by_active(run)
        if times:
            x = [k + _APART * (i - (count - 1) / 2) for k in times]
            middle = [statistics.median(ms) for ms in times.values()]
            low, high = ([quantile(ms, q) for ms in times.values()] for q in (0.1, 0.9))
            bars = [
                [m - least for m, least in zip(middle, low, strict=True)],
                [most - m for m, most in zip(middle, high, strict=True)],
            ]
            style = _style(look(run.name, i), line=False)
            drawn = axes.errorbar(x, middle, bars, elinewidth=0.8, **style)
            shown.append((drawn, _label(run.name)))
    if evidence.expected_ms:
        ks, expected = list(evidence.expected_ms), list(evidence.expected_ms.values())
        half = _APART * (count + 1) / 2
        ends = [k - half for k in ks], [k + half for k in ks]
        drawn = axes.hlines(expected, *ends, color=LIGHT["warm"], lw=1.0)
        shown.append((drawn, "expected of a suffix: sum of its parts"))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlim(0.0, evidence.n_blocks + 1.0)
    axes.set_ylim(0.0, 1.05 * axes.get_ylim()[1])
    axes.set_xlabel("blocks trained in the step")
    axes.set_ylabel("step time (ms)")
    axes.grid(axis="y")
    _legend(figure, shown, "upper center", 2)


def _goals(axes: Any, evidences: Sequence[Evidence], time: Clock) -> list[tuple[Any, str]]:
    """full_update's final loss, and the end of the time that every schedule had."""
    shown = {}
    for evidence in evidences:
        for run in evidence.runs:
            loss = run.row["final_val_loss"]
            if run.name == "full_update" and loss is not None:
                line = axes.axhline(loss, color=LIGHT["soft"], lw=0.7, ls=":")
                shown["full_update's final loss"] = line
        if evidence.budget_ms is not None:
            line = axes.axvline(evidence.budget_ms / time.ms, color=LIGHT["soft"], lw=0.7, ls="--")
            shown["equal time"] = line
    return [(line, name) for name, line in shown.items()]


def _by_block(axes: Any, evidence: Evidence, run: Run) -> None:
    axes.set_xlim(0, len(run.active))
    axes.set_ylim(-0.5, evidence.n_blocks - 0.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(f"step of {_label(run.name)}")
    axes.set_ylabel("block")


def _edges(n_blocks: int) -> list[float]:
    return [block - 0.5 for block in range(n_blocks + 1)]


def _style(look: Look, *, line: bool = True, marker: bool = True) -> dict[str, Any]:
    dashes = [float(length) / 2 for length in look.dash.split()]  # there in px of lines of 2 px
    return {
        "color": LIGHT[f"c{look.color}"],
        "marker": look.marker if marker else "",
        "linestyle": ((0, dashes) if dashes else "-") if line else "",
    }


def _legend(figure: Any, shown: Sequence[tuple[Any, str]], where: str, columns: int) -> None:
    lines, names = zip(*shown, strict=True)
    if max(map(len, names)) > _ROOM:
        columns = 1
    figure.legend(lines, names, loc=f"outside {where}", ncols=columns)


def _label(name: str) -> str:
    """Letters that the font has, no formula, and not hidden from a legend by a first "_"."""
    shown = ascii(name)[1:-1].replace("$", r"\$")[:_LABEL]
    return f" {shown}" if shown.startswith("_") else shown


def _gaps(values: Sequence[float | None]) -> list[float]:
    """NaN, which breaks a line, where a loss was not finite."""
    return [math.nan if value is None else value for value in values]
