"""What one sees while the benchmark runs: on a terminal two lines a schedule, redrawn in place."""

import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from bench.pages.spark import BLOCKS, levels_of, spark
from bench.train import Arm

_PAUSE_S = 0.2  # between two drawings
_RECENT = 5  # steps, the fewest between two drawings: a probe among them is marked
_SAMPLES = 512  # losses that a curve is drawn from, however long the run is
_CURVE = 10  # columns kept for the curve
_WIDEST = 40  # characters of a curve, and of a map
_ROOMY = 60  # columns from which on a change is shown beside its loss
# Trained, frozen, some of several blocks, those that do not run.
_SIGNS = {True: "\u2588\u2591\u2592\u00b7", False: "#.+-"}


class Live:
    """Redraws its lines on a terminal; elsewhere prints one at each validation."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._redraws = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._levels = levels_of(self._stream)
        self._drawn: list[str] = []
        self._drawn_at = -_PAUSE_S
        self._begun: tuple[float, float] | None = None

    def update(
        self, arms: Sequence[Arm], moved: Arm, validated: bool, n_blocks: int, waiting: int = 0
    ) -> None:
        """`moved`, one of `arms`, has just advanced; after them come `waiting` more schedules."""
        if not self._redraws:
            if validated or moved.finished:
                self._stream.write(_plain(moved, n_blocks) + "\n")
                self._stream.flush()
            return
        now, stepped_s = time.monotonic(), sum(arm.elapsed_ms for arm in arms) / 1e3
        self._begun = self._begun or (now, stepped_s)
        if now - self._drawn_at < _PAUSE_S and not moved.finished:
            return
        self._drawn_at = now
        shown = [arm for arm in arms if arm.steps]
        whole_s = max(arm.elapsed_ms / 1e3 + _left_s(arm) for arm in shown)
        left_s = sum(map(_left_s, shown)) + (len(arms) - len(shown) + waiting) * whole_s
        if stepped_s > self._begun[1]:  # validations take time too, off the clock
            left_s *= max(1.0, (now - self._begun[0]) / (stepped_s - self._begun[1]))
        size = shutil.get_terminal_size()
        width = size.columns - 1  # a character in the last column would break the line
        lines = _lines(shown, n_blocks, width, size.lines - 2, self._levels)
        lines.append(_footer(shown, left_s, n_blocks, width, self._levels))
        self._draw(lines[-max(size.lines - 1, 1) :], size.columns)

    def _draw(self, lines: list[str], columns: int) -> None:
        """All in one write, over the last drawing; the cursor then stands below it.

        A terminal that became narrower since has broken the lines that no longer fit.
        """
        rows = sum(max(1, -(-len(line) // columns)) for line in self._drawn)
        up = f"\x1b[{rows}A" if rows else ""
        self._stream.write(f"\r{up}" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
        self._stream.flush()
        self._drawn = lines


def _lines(arms: Sequence[Arm], n_blocks: int, width: int, rows: int, levels: str) -> list[str]:
    """Two lines an arm or, where there are too few rows, one."""
    column = max(len(arm.name) for arm in arms)
    lines = []
    for arm in arms:
        lines.append(_head(arm, column, width))
        if 2 * len(arms) <= rows:
            lines.append(_detail(arm, n_blocks, width, levels))
    return lines


def _head(arm: Arm, column: int, width: int) -> str:
    steps, ms = f"step {len(arm.steps):>5}", f"{_recent_ms(arm):7.1f} ms/step"
    return _fit([arm.name.ljust(column), f"{_state(arm):>9}", steps, ms], width)


def _detail(arm: Arm, n_blocks: int, width: int, levels: str) -> str:
    """What fits of: validation loss, what trains, training loss; and that one's curve."""
    if arm.failure is not None:
        return _fit([f"  {arm.failure}"], width)
    before, val = ([None] + [point["val_loss"] for point in arm.val_trace])[-2:]
    change = "" if before is None else f"({val - before:+.4f})"
    parts = [
        f"  val {val:.4f}" + (f" {change:9}" if width >= _ROOMY else ""),
        _map(arm, n_blocks, _fold(n_blocks, width), levels),
        f"loss {arm.steps[-1].loss:.4f}",
    ]
    fixed = _fit(parts, max(width - _CURVE, len(parts[0])))
    count = len(arm.steps)  # without the first tenth, whose fall would flatten the rest
    losses = [step.loss for step in arm.steps[count // 10 :: -(-count // _SAMPLES)]]
    curve = spark(losses, min(_WIDEST, width - len(fixed) - 2), levels)
    return f"{fixed}  {curve}"[:width]


def _map(arm: Arm, n_blocks: int, fold: int, levels: str) -> str:
    """A character for every `fold` blocks, and whether there has just been a probe."""
    every, none, some, absent = _SIGNS[levels == BLOCKS]
    active, running = set(arm.scheduler.plan.active), set(_running(arm, n_blocks))
    groups = [range(i, min(i + fold, n_blocks)) for i in range(0, n_blocks, fold)]
    if arm.finished:  # the plan is of a step that does not come
        return " " * (len(groups) + 1)

    def sign(group: range) -> str:
        if running.isdisjoint(group):
            return absent
        return every if active.issuperset(group) else none if active.isdisjoint(group) else some

    return "".join(map(sign, groups)) + (
        "p" if any(step.probe for step in arm.steps[-_RECENT:]) else " "
    )


def _running(arm: Arm, n_blocks: int) -> Sequence[int]:
    running = arm.scheduler.plan.running
    return range(n_blocks) if running is None else running


def _fold(n_blocks: int, width: int) -> int:
    """How many blocks a character of the map stands for."""
    return -(-n_blocks // max(1, min(_WIDEST, width // 3)))


def _footer(arms: Sequence[Arm], left_s: float, n_blocks: int, width: int, levels: str) -> str:
    every, none, some, absent = _SIGNS[levels == BLOCKS]
    fold = _fold(n_blocks, width)
    each = "blocks" if fold == 1 else f"each {fold} blocks"
    others = [f"{some} in part"] if fold > 1 else []
    if any(len(_running(arm, n_blocks)) < n_blocks for arm in arms):
        others.append(f"{absent} not running")
    legend = [f"{each}, first to last: {every} train", f"{none} frozen", *others, "p just measured"]
    return _fit([f"about {_time(left_s)} left in all", *legend], width)


def _fit(parts: Sequence[str], width: int) -> str:
    """As many of the parts as there is room for; the first one is cut."""
    line = parts[0][:width]
    for part in parts[1:]:
        if len(line) + 2 + len(part) > width:
            break
        line += f"  {part}"
    return line


def _state(arm: Arm) -> str:
    if arm.failure is not None:
        return "stopped"
    return "done" if arm.finished else f"{_time(_left_s(arm))} left"


def _left_s(arm: Arm) -> float:
    """Of step time."""
    if arm.finished:
        return 0.0
    if arm.budget_ms is None:
        return (1.0 - arm.fraction) * arm.elapsed_ms / max(arm.fraction, 1e-9) / 1e3
    return max(0.0, arm.budget_ms - arm.elapsed_ms) / 1e3


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _recent_ms(arm: Arm) -> float:
    return statistics.median(step.ms for step in arm.steps[-20:])


def _plain(arm: Arm, n_blocks: int) -> str:
    last = arm.steps[-1]
    line = (
        f"{arm.name:<17} step {len(arm.steps):>5}  loss {last.loss:.4f}  "
        f"val {arm.val_trace[-1]['val_loss']:.4f}  active {last.active:>2}/{n_blocks}  "
        f"{_recent_ms(arm):7.1f} ms/step  {_state(arm)}"
    )
    return line if arm.failure is None else f"{line}: {arm.failure}"
