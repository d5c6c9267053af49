"""The chart of a study: a row an arm, with the interval of its loss change and each seed."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bench.pages.cells import swatches
from bench.pages.chart import NARROW, Drawing, Frame, Series, figure, mark, text
from bench.pages.looks import Look
from bench.pages.study_numbers import (
    between,
    by_seed,
    change,
    cut,
    in_order,
    label,
    said_verdict,
    window,
)

_NAMES, _VERDICTS = 260.0, 150.0  # pixels of the columns beside the intervals, on a screen
_LETTER = 7.0  # pixels, rather more than less
_INTERVAL = 'style="stroke:var(--ink);stroke-width:1.5;fill:none"'
_SEED = 'style="fill:var(--soft);fill-opacity:.7"'
_BAND = 'style="fill:var(--frozen)"'
_ZERO = 'style="stroke:var(--ink);stroke-width:1;fill:none"'
_MARGIN = 'style="stroke:var(--soft);stroke-width:1.5;fill:none" stroke-dasharray="5 3"'


class Row(NamedTuple):
    """What is compared, by how much its loss differs, and each seed's difference."""

    name: str
    look: Look
    judged: Mapping[str, Any]
    loss: Mapping[str, Any] | None
    seeds: Sequence[tuple[int, float]]


def arm_rows(arms: Mapping[str, Any], baseline: str, looks: Mapping[str, Look]) -> list[Row]:
    """The arms against the baseline."""
    return [
        Row(label(name, arm), looks[name], arm, arm["loss"], by_seed(arm, arms[baseline]))
        for name in in_order(arms, baseline)
        for arm in [arms[name]]
    ]


def pair_rows(arms: Mapping[str, Any], looks: Mapping[str, Look]) -> list[Row]:
    """The arms against each other, where the study asked for that."""
    rows = [
        Row(f"{name} against {rival}", looks[name], pair, pair, by_seed(arm, arms[rival]))
        for name, arm in arms.items()
        for rival, pair in arm["against"].items()
    ]
    return sorted(rows, key=lambda row: _mean(row) if _known(row) else float("inf"))


def intervals(
    name: str, title: str, rows: Sequence[Row], margin: float, null: Mapping[str, Any] | None,
    note: str,
) -> str:  # fmt: skip
    """The figure; "" without rows. `null` is the loss change of the null arm."""
    if not rows:
        return ""
    span = _span(rows, margin)
    return figure(
        name,
        title,
        lambda width: _draw(width, rows, span, margin, null),
        note=note + _beyond_note(rows, span),
        legend=_legend(margin, null),
    )


def _draw(
    width: float,
    rows: Sequence[Row],
    span: tuple[float, float],
    margin: float,
    null: Mapping[str, Any] | None,
) -> Drawing:
    narrow = width <= NARROW
    tall = 50.0 if narrow else 34.0
    frame = Frame(width, 0, x=(100 * span[0], 100 * span[1]), y=(0, 1))
    frame.left, frame.right, frame.top = (14.0, 14.0, 8.0) if narrow else (_NAMES, _VERDICTS, 8.0)
    frame.height = frame.top + tall * len(rows) + frame.bottom
    svg = _ground(frame, margin, null)
    svg += frame.axes("change of the final loss (%): left of 0 is better", "", y_ticks=())
    series = []
    for i, row in enumerate(rows):
        top = frame.top + tall * i
        y = top + (30 if narrow else 14)
        svg += _words(frame, row, top + 16 if narrow else y + 4, narrow)
        svg += _interval(frame, row, y) + _seeds(frame, row, y + 11)
        series.append(_series(frame, row, y))
    return Drawing(frame.height, svg, series)


def _span(rows: Sequence[Row], margin: float) -> tuple[float, float]:
    known = [row for row in rows if _known(row)]
    values = [x for row in known for x in (*_ends(row.loss), *(x for _, x in row.seeds))]
    return window(values, min([_mean(row) for row in known], default=0.0), margin)


def _ground(frame: Frame, margin: float, null: Mapping[str, Any] | None) -> str:
    """The noise floor, the margin and 0."""
    floor = frame.height - frame.bottom
    svg = ""
    if null is not None and null["low"] is not None and null["high"] is not None:
        left, right = (_at(frame, null[end]) for end in ("low", "high"))
        svg += f'<path {_BAND} d="M{left:.1f} {frame.top:g}H{right:.1f}V{floor:g}H{left:.1f}z"/>'
    for x, style in ((-margin, _MARGIN), (margin, _MARGIN), (0.0, _ZERO)):
        svg += f'<path {style} d="M{_at(frame, x):.1f} {frame.top:g}V{floor:g}"/>'
    return svg


def _words(frame: Frame, row: Row, y: float, narrow: bool) -> str:
    """The name before the interval and the verdict behind it, or both above it."""
    verdict = said_verdict(row.judged)
    room = frame.width - 20 - _LETTER * 1.2 * len(verdict) if narrow else _NAMES - 20
    name = cut(row.name, int(room / _LETTER))
    bold = ' style="font-weight:700"' if verdict == "WIN" else ""
    return (
        f'<text class="on" x="4" y="{y:g}">{text(name)}</text>'
        f'<text class="on" x="{frame.width - 4:g}" y="{y:g}" text-anchor="end"{bold}>'
        f"{text(verdict)}</text>"
    )


def _interval(frame: Frame, row: Row, y: float) -> str:
    if not _known(row):
        where = frame.px(0) + 6
        return f'<text class="on tick" x="{where:.1f}" y="{y + 4:g}">no loss to compare</text>'
    loss = row.loss or {}
    path = ""
    if loss["low"] is not None and loss["high"] is not None:
        path += f"M{_at(frame, loss['low']):.1f} {y:g}H{_at(frame, loss['high']):.1f}"
        path += _end(frame, loss["low"], y) + _end(frame, loss["high"], y)
    elif _outside(frame, loss["mean"]):
        path += _end(frame, loss["mean"], y)
    drawn = f'<path {_INTERVAL} d="{path}"/>' if path else ""
    if _outside(frame, loss["mean"]):
        return drawn
    return drawn + mark([(_at(frame, loss["mean"]), y)], row.look)


def _end(frame: Frame, x: float, y: float) -> str:
    """A bar where the interval ends, an arrow where the axis ends before."""
    at, outside = _at(frame, x), _outside(frame, x)
    if not outside:
        return f"M{at:.1f} {y - 4:g}v8"
    return f"M{at - 5 * outside:.1f} {y - 4:g}l{5 * outside:g} 4l{-5 * outside:g} 4"


def _seeds(frame: Frame, row: Row, y: float) -> str:
    dots = "".join(
        f"M{_at(frame, x) - 2:.1f} {y:g}a2 2 0 1 0 4 0a2 2 0 1 0-4 0z"
        for _, x in row.seeds
        if not _outside(frame, x)
    )
    return f'<path {_SEED} d="{dots}"/>' if dots else ""


def _series(frame: Frame, row: Row, y: float) -> Series:
    verdict = said_verdict(row.judged)
    if not _known(row):
        return Series(row.name, [(frame.px(0), y, f"no loss to compare: {verdict}")])
    loss = row.loss or {}
    said = f"{change(loss['mean'])} ({between(loss['low'], loss['high'])}): {verdict}"
    points = [(_at(frame, loss["mean"]), y, said)]
    points += [(_at(frame, x), y + 11, f"seed {seed}: {change(x)}") for seed, x in row.seeds]
    return Series(row.name, points)


def _legend(margin: float, null: Mapping[str, Any] | None) -> str:
    dot = f'<path {_SEED} d="M9 7a2 2 0 1 0 4 0a2 2 0 1 0-4 0z"/>'
    line = f'<path {_INTERVAL} d="M2 7h18M2 3v8M20 3v8"/>'
    mean = '<circle cx="11" cy="7" r="3.6" style="fill:var(--ink)"/>'
    entries = [("mean and interval", line + mean), ("one seed", dot)]
    if null is not None:
        entries.append(
            ("noise floor: the null arm's interval", f'<path {_BAND} d="M1 0h20v14H1z"/>')
        )
    edges = f'<path {_MARGIN} d="M4 0v14M18 0v14"/>'
    entries.append((f"margin: +-{100 * margin:g} %", edges))
    return swatches([*entries, ("0: no difference", f'<path {_ZERO} d="M11 0v14"/>')])


def _beyond_note(rows: Sequence[Row], span: tuple[float, float]) -> str:
    points = [x for row in rows for _, x in row.seeds]
    points += [x for row in rows if _known(row) for x in _ends(row.loss)]
    if all(span[0] <= x <= span[1] for x in points):
        return ""
    return (
        " The axis ends where the best arms can still be told apart: arrows point to what lies "
        f"beyond, up to {change(max(points, key=abs))}, and seeds out there are not drawn."
    )


def _at(frame: Frame, relative: float) -> float:
    """The pixel of a relative change, at the axis's end for what lies beyond."""
    return frame.px(min(max(100 * relative, frame.x[0]), frame.x[1]))


def _outside(frame: Frame, relative: float) -> int:
    """1 beyond the right end, -1 beyond the left one."""
    return (100 * relative > frame.x[1]) - (100 * relative < frame.x[0])


def _known(row: Row) -> bool:
    return row.loss is not None and row.loss["mean"] is not None


def _mean(row: Row) -> float:
    return row.loss["mean"] if row.loss else 0.0


def _ends(loss: Mapping[str, Any] | None) -> list[float]:
    """The mean and, where they are known, the ends of its interval."""
    return [x for x in (loss or {}).values() if isinstance(x, float | int)]
