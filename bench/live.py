"""What one sees while the benchmark runs: a line per schedule."""

import statistics
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from bench.train import Arm


class Live:
    """Redraws a line per schedule on a terminal; elsewhere prints one at each validation."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._redraws = self._stream.isatty()
        self._drawn = 0
        self._last = 0.0

    def update(self, arms: Sequence[Arm], moved: Arm, validated: bool, n_blocks: int) -> None:
        """`moved` has just advanced."""
        if not self._redraws:
            if validated:
                self._stream.write(_line(moved, n_blocks) + "\n")
                self._stream.flush()
            return
        now = time.monotonic()
        if now - self._last < 0.2 and not moved.finished:
            return
        self._last = now
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        lines = [_line(arm, n_blocks) for arm in arms if arm.steps]
        self._stream.write(up + "".join(f"\r\x1b[K{line}\n" for line in lines))
        self._stream.flush()
        self._drawn = len(lines)


def _line(arm: Arm, n_blocks: int) -> str:
    recent = arm.steps[-20:]
    ms = statistics.median(step.ms for step in recent)
    if arm.budget_ms is None:
        left_s = (1.0 - arm.fraction) * arm.elapsed_ms / max(arm.fraction, 1e-9) / 1e3
    else:
        left_s = max(0.0, arm.budget_ms - arm.elapsed_ms) / 1e3
    minutes, seconds = divmod(round(0.0 if arm.finished else left_s), 60)
    return (
        f"{arm.name:<17} step {len(arm.steps):>5}  loss {recent[-1].loss:.4f}  "
        f"val {arm.val_trace[-1]['val_loss']:.4f}  active {recent[-1].active:>2}/{n_blocks}  "
        f"{ms:7.1f} ms/step  {minutes}:{seconds:02d} left"
    )
