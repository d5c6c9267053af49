"""What figures of a loss against time share: curves, their range, and what lies beyond it."""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bench.pages.chart import Frame, Series, stroke
from bench.pages.evidence import Evidence, Run
from bench.pages.looks import DASHES, Look, look
from bench.pages.thin import extremes

START = 0.1  # the share of a run after which its loss has to be seen
MOST = 360  # points of a training curve: one for each two or three pixels
_AVERAGED = 20  # the average is over this part of the steps
_DIVERGED = 4  # a loss so many times the best schedule's does not flatten the others


class Point(NamedTuple):
    """A loss at a time; None if it was not finite. `smooth` is an average up to here."""

    ms: float
    step: int
    loss: float | None
    smooth: float | None = None


class Curve(NamedTuple):
    """A schedule of a file; `label` is its name in the legend."""

    label: str
    look: Look
    points: Sequence[Point]


class Clock(NamedTuple):
    """A unit of time that suits a run."""

    name: str
    short: str
    ms: float
    digits: int

    def say(self, ms: float) -> str:
        return f"{ms / self.ms:,.{self.digits}f} {self.short}"


def clock(longest_ms: float) -> Clock:
    """The unit for times up to `longest_ms`."""
    if longest_ms < 10e3:
        return Clock("seconds", "s", 1e3, 3)
    if longest_ms < 600e3:
        return Clock("seconds", "s", 1e3, 1)
    if longest_ms < 5 * 3600e3:
        return Clock("minutes", "min", 60e3, 2)
    return Clock("hours", "h", 3600e3, 3)


def loss_text(loss: float | None) -> str:
    """A loss with four decimals, or four digits if that would not show it."""
    if loss is None:
        return "not finite"
    plain = loss == 0 or 0.01 <= abs(loss) < 1e5
    return f"{loss:.4f}" if plain else f"{loss:.3e}"


def curves_of(
    evidences: Sequence[Evidence], points: Callable[[Run], Sequence[Point]]
) -> list[Curve]:
    """The curves of all files; of several, the dashes tell the file."""
    several = len(evidences) > 1
    found = []
    for j, evidence in enumerate(evidences):
        for i, run in enumerate(evidence.runs):
            its = look(run.name, i)
            if several:
                its = its._replace(dash=DASHES[j % len(DASHES)])
            label = f"{run.name}, {evidence.name}" if several else run.name
            found.append(Curve(label, its, points(run)))
    return [curve for curve in found if curve.points]


def validated(run: Run) -> list[Point]:
    """The validations, or what is known of the one at the end."""
    if run.validations:
        return [Point(v.ms, v.step, v.loss) for v in run.validations]
    ms, loss = run.row["elapsed_ms"], run.row["final_val_loss"]
    return [] if ms is None or loss is None else [Point(ms, run.row["steps_executed"] or 0, loss)]


def trained(run: Run) -> list[Point]:
    """The training losses, thinned, each with the average of the steps up to it."""
    times, ms = [], 0.0
    for taken in run.step_ms:
        ms += taken or 0.0
        times.append(ms)
    window = averaged(run)
    points = []
    for i in extremes(run.losses, MOST):
        recent = [v for v in run.losses[max(0, i + 1 - window) : i + 1] if v is not None]
        smooth = statistics.fmean(recent) if recent else None
        points.append(Point(times[i], i, run.losses[i], smooth))
    return points


def averaged(run: Run) -> int:
    """Over how many steps the training loss is averaged."""
    return max(1, len(run.losses) // _AVERAGED)


def reach(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """From the lowest loss to the highest that the ends of the curves need; None without a loss.

    What a curve went through in the first tenth of its run, or where it diverged, lies above.
    """
    tops, bottoms = [], []
    for curve in curves:
        begun = START * curve.points[-1].ms
        late = [p for p in curve.points if p.ms >= begun and p.loss is not None]
        if late:
            tops.append(max(p.loss if p.smooth is None else p.smooth for p in late))
            bottoms.append(min(p.loss for p in late))
    if not tops:
        return None
    best = min(tops)
    low, high = min(bottoms), max(t for t in tops if t <= best + (_DIVERGED - 1) * abs(best))
    return low - 0.1 * (high - low), high + 0.04 * (high - low)  # a label fits below


def series(frame: Frame, clock: Clock, curve: Curve) -> Series:
    """What a curve says on hover; points beyond the axis lie at its end."""
    floor, top = frame.height - frame.bottom, frame.top
    return Series(
        curve.label,
        [
            (
                frame.px(p.ms / clock.ms),
                top if p.loss is None else min(max(frame.py(p.loss), top), floor),
                f"{clock.say(p.ms)}, step {p.step}: {loss_text(p.loss)}"
                + ("" if p.smooth is None else f" (average {loss_text(p.smooth)})"),
            )
            for p in curve.points
        ],
    )


def beyond(frame: Frame, clock: Clock, curve: Curve, above: Sequence[Point]) -> str:
    """Arrows where `above` lie higher than the axis reaches, crosses where no loss was finite."""
    solid = curve.look._replace(dash="")
    arrows = "".join(
        f"M{frame.px(p.ms / clock.ms):.1f} {frame.top + 11:g}v-10m-3.5 4l3.5-4l3.5 4" for p in above
    )
    crosses = "".join(
        f"M{frame.px(p.ms / clock.ms) - 4:.1f} {frame.top + 2:g}l8 8m0-8l-8 8"
        for p in curve.points
        if p.loss is None
    )
    return stroke(arrows + crosses, solid) if arrows or crosses else ""
