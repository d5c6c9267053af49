"""Figures of the loss against time: on validation data and in training."""

from collections.abc import Sequence

from bench.config import FUSED
from bench.pages.chart import Drawing, Frame, figure, legend_of, text
from bench.pages.curves import (
    Clock,
    Curve,
    beyond,
    clock,
    curves_of,
    loss_text,
    reach,
    series,
    trained,
    validated,
)
from bench.pages.evidence import Evidence
from bench.pages.looks import look

_CROSS_ENTROPY = ("text", "finetune")  # tasks on bytes; the third is a regression


def validation(evidences: Sequence[Evidence]) -> str:
    """Figures of the validation loss against time, one for each unit of loss; "" without any."""
    return "".join(
        _validation(f"validation-loss{suffix}", unit, group)
        for suffix, unit, group in by_unit(evidences)
    )


def training(evidences: Sequence[Evidence]) -> str:
    """Figures of the training loss against time, one for each unit of loss; "" without any."""
    return "".join(
        _training(f"training-loss{suffix}", unit, group)
        for suffix, unit, group in by_unit(evidences)
    )


def unit_of(task: str | None) -> str:
    """What a task's losses are."""
    return "nats per byte" if task in _CROSS_ENTROPY else "mean squared error"


def by_unit(evidences: Sequence[Evidence]) -> list[tuple[str, str, list[Evidence]]]:
    """Files whose losses can share an axis: an id's suffix, the unit, the files."""
    groups: dict[str, list[Evidence]] = {}
    for evidence in evidences:
        groups.setdefault(unit_of(evidence.config.get("task")), []).append(evidence)
    return [
        (f"-{i + 1}" if i else "", unit, group) for i, (unit, group) in enumerate(groups.items())
    ]


def _validation(name: str, unit: str, evidences: Sequence[Evidence]) -> str:
    curves = curves_of(evidences, validated)
    if not curves:
        return ""
    budgets = [(e.name, e.budget_ms) for e in evidences if e.budget_ms is not None]
    last = max([c.points[-1].ms for c in curves] + [ms for _, ms in budgets])
    time = clock(last)
    ends = [f"of {name} after {time.say(ms)}" for name, ms in budgets]
    found = reach(curves)

    def draw(width: float) -> Drawing:
        frame = Frame(width, _height(width), x=(0.0, last / time.ms), y=found or (0.0, 1.0))
        svg = _axes(frame, time, f"validation loss, {unit}", found is not None)
        for curve in curves:
            points = [(p.ms / time.ms, p.loss) for p in curve.points]
            above = [p for p in curve.points if p.loss is not None and p.loss > frame.y[1]]
            svg += frame.inside(frame.line(points, curve.look))
            svg += frame.markers(points, curve.look) + beyond(frame, time, curve, above)
        svg += _ends(frame, time, budgets)
        if len(evidences) == 1:
            svg += _finals(frame, evidences[0])
        return Drawing(frame.height, svg, [series(frame, time, curve) for curve in curves])

    return figure(
        name,
        "Validation loss against time",
        draw,
        note=_validation_note(evidences, curves, found, ends),
        legend=legend_of([(c.label, c.look) for c in curves]),
        table=_table(time, curves),
    )


def _training(name: str, unit: str, evidences: Sequence[Evidence]) -> str:
    curves = curves_of(evidences, trained)
    if not curves:
        return ""
    last = max(c.points[-1].ms for c in curves)
    time = clock(last)
    found = reach(curves)

    def draw(width: float) -> Drawing:
        frame = Frame(width, _height(width), x=(0.0, last / time.ms), y=found or (0.0, 1.0))
        svg = _axes(frame, time, f"training loss, {unit}", found is not None)
        for curve in curves:
            path = frame.path([(p.ms / time.ms, p.loss) for p in curve.points])
            svg += frame.inside(
                f'<path class="line raw" style="stroke:var(--c{curve.look.color})" d="{path}"/>'
            )
        for curve in curves:
            smooth = [(p.ms / time.ms, p.smooth) for p in curve.points]
            svg += frame.inside(frame.line(smooth, curve.look))
            some = smooth[:: max(1, len(smooth) // 8)]
            svg += frame.markers(some, curve.look) + beyond(frame, time, curve, [])
        return Drawing(frame.height, svg, [series(frame, time, curve) for curve in curves])

    return figure(
        name,
        "Training loss against time",
        draw,
        note=_training_note(curves, found),
        legend=legend_of([(c.label, c.look) for c in curves]),
        table=_table(time, [_tenths(curve) for curve in curves]),
    )


def _height(width: float) -> float:
    return min(380.0, 200.0 + 0.35 * width)


def _axes(frame: Frame, time: Clock, y_label: str, known: bool) -> str:
    return frame.axes(f"time in steps, {time.name}", y_label, y_ticks=None if known else ())


def _ends(frame: Frame, time: Clock, budgets: Sequence[tuple[str, float]]) -> str:
    """Where the time that every schedule had ends; of several files, the note says whose."""
    svg = ""
    for i, ms in enumerate(sorted({ms for _, ms in budgets}, reverse=True)):
        x = frame.px(ms / time.ms)
        aside = 'end" dx="-6' if x > frame.width / 2 else 'start" dx="6'
        what = "" if len(budgets) > 1 else "equal time ends: "
        svg += (
            f'<path class="rule" d="M{x:.1f} {frame.top:g}V{frame.height - frame.bottom:g}"/>'
            f'<text class="on" x="{x:.1f}" y="{frame.top + 12 + 15 * i:g}" text-anchor="{aside}">'
            f"{what}{time.say(ms)}</text>"
        )
    return svg


def _finals(frame: Frame, evidence: Evidence) -> str:
    """What the others have to beat: the final loss of full_update, on either kind of kernels."""
    finals = {run.name: run.row["final_val_loss"] for run in evidence.runs}
    known = [
        (loss, name)
        for name in ("full_update", FUSED)
        if (loss := finals.get(name)) is not None and frame.y[0] <= loss <= frame.y[1]
    ]
    svg = ""
    for loss, name in known:
        y = frame.py(loss)
        beside = y - 5 if loss == max(known)[0] else y + 14  # two labels never meet
        svg += (
            f'<path class="rule" style="stroke:var(--c{look(name, 0).color})" '
            f'd="M{frame.left:g} {y:.1f}H{frame.width - frame.right:g}"/>'
            f'<text class="on" x="{frame.left + 6:g}" y="{beside:.1f}">'
            f"{text(name)} ends at {loss_text(loss)}</text>"
        )
    return svg


def _validation_note(
    evidences: Sequence[Evidence],
    curves: Sequence[Curve],
    found: tuple[float, float] | None,
    ends: Sequence[str],
) -> str:
    said = ["Time is the sum of the steps' times; validations are not in it."]
    if len(ends) > 1:
        said.append(f"Dotted upright lines: there equal time ends, {', '.join(ends)}.")
    said += _range_note(curves, found)
    if any(not run.validations for evidence in evidences for run in evidence.runs):
        said.append("A marker without a line: only the loss at the end was recorded.")
    return " ".join(said)


def _training_note(curves: Sequence[Curve], found: tuple[float, float] | None) -> str:
    return " ".join(
        [
            "Pale: the loss of single steps, counted from 0 (of a long run the lowest and the "
            "highest of each stretch). Strong: the average of the last steps, a twentieth of the "
            "run.",
            *_range_note(curves, found),
        ]
    )


def _range_note(curves: Sequence[Curve], found: tuple[float, float] | None) -> list[str]:
    said = []
    losses = [p.loss for curve in curves for p in curve.points]
    highest = max((loss for loss in losses if loss is not None), default=0.0)
    if found is not None and highest > found[1]:
        said.append(
            f"The axis leaves out the highest losses, up to {loss_text(highest)}, so that the ends "
            "can be told apart."
        )
    if None in losses:
        said.append("Crosses: the loss was not finite there.")
    return said


def _tenths(curve: Curve) -> Curve:
    """The curve with about ten of its points and the last."""
    points = curve.points
    places = sorted({i * (len(points) - 1) // 10 for i in range(11)})
    return curve._replace(points=[points[i] for i in places])


def _table(time: Clock, curves: Sequence[Curve]) -> str:
    smooth = any(p.smooth is not None for curve in curves for p in curve.points)
    head = ["schedule", f"time, {time.short}", "step", "loss"] + (["average"] if smooth else [])
    rows = [
        f"<td>{text(curve.label)}</td>"
        + "".join(
            f'<td class="number">{cell}</td>'
            for cell in [
                f"{p.ms / time.ms:,.{time.digits}f}",
                f"{p.step:,}",
                loss_text(p.loss),
                *([loss_text(p.smooth)] if smooth else []),
            ]
        )
        for curve in curves
        for p in curve.points
    ]
    names = f"<th>{head[0]}</th>" + "".join(f'<th class="number">{name}</th>' for name in head[1:])
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in [names, *rows]) + "</table>"
