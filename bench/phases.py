"""Where the time of a step went: in its forward, backward, the scheduler's work, the update.

A mark names what ended at it. On a CPU it is the host's clock (some 0.3 us a mark), on CUDA an
event that the device stamps when it gets there, read where the loop waits anyway.
"""

import itertools
import time
from typing import Any

import torch

PARTS = ("prefix forward", "suffix forward", "backward", "measure", "update")


class Phases:
    """The sums of each part of a step, by number of active blocks.

    prefix forward: stem and frozen blocks; suffix forward: from the first active block through
    head and loss; measure: the scheduler's (its step, the search for numbers that are not finite,
    and the sums of a probe, except those that blocksched's AdamW takes inside its update); update:
    the optimizer's; other: the rest of the step, and on several processes the wait for the slowest.

    Args:
        device: where the steps run.
        warming: the first steps, left out if there are others.

    Attributes:
        sums: by number of active blocks, the steps counted and the ms of each part, which with
            "other" add up to the ms of these steps.
    """

    def __init__(self, device: torch.device, warming: int) -> None:
        self.sums: dict[int, dict[str, float]] = {}
        self._device, self._on_gpu = device, device.type == "cuda"
        self._warming = warming
        self._ended: list[str] = []
        self._times: list[int] = []
        self._events: list[torch.cuda.Event] = []  # made once, since each mark has its place

    def begin(self) -> None:
        """A step begins."""
        self._ended.clear()
        self._times.clear()
        self.mark("")

    def mark(self, ended: str) -> None:
        """What took the time since the mark before; names that are not in PARTS count as other."""
        if self._on_gpu:
            if len(self._ended) == len(self._events):
                self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[len(self._ended)].record(torch.cuda.current_stream(self._device))
        else:
            self._times.append(time.perf_counter_ns())
        self._ended.append(ended)

    def read(self) -> dict[str, float]:
        """The ms of each part in the step that has ended, once the device has."""
        parts = dict.fromkeys(PARTS, 0.0)
        if self._on_gpu:
            events = itertools.pairwise(self._events[: len(self._ended)])
            spans = [before.elapsed_time(after) for before, after in events]
        else:
            spans = [(after - before) / 1e6 for before, after in itertools.pairwise(self._times)]
        for ended, ms in zip(self._ended[1:], spans, strict=True):
            if ended in parts:
                parts[ended] += ms
        return parts

    def add(self, step: int, active: int, ms: float, parts: dict[str, float]) -> None:
        """Count a step of so many ms, whose parts `read` gave."""
        if step == self._warming:
            self.sums.clear()
        sums = self.sums.setdefault(active, dict.fromkeys(("steps", *PARTS, "other"), 0))
        others = ms - sum(parts.values())
        for part, more in {"steps": 1, **parts, "other": others}.items():
            sums[part] += more

    def state(self) -> list[Any]:
        """The sums as plain values."""
        return [[active, sums] for active, sums in self.sums.items()]

    def load_state(self, saved: list[Any]) -> None:
        """Go on where `saved` was."""
        self.sums = {active: dict(sums) for active, sums in saved}
