"""The clock of a run: the time of the steps so far, with what is off the clock left out."""

import collections
import time
from typing import Protocol

import torch


class Clock(Protocol):
    """What BlockScheduler asks of a clock."""

    elapsed_ms: float

    def tick(self) -> None:
        """A step has ended."""

    def pause(self) -> None:
        """What follows is off the clock."""

    def resume(self) -> None:
        """The clock runs on."""


class WallClock:
    """Elapsed time of the work on `device`, without waiting for it.

    On a CUDA device time is read from events as they complete, so that `elapsed_ms` counts what
    the device has done, not what the host has queued; elsewhere it is the host's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._done_ms = 0.0
        self._queued: collections.deque[tuple[torch.cuda.Event, torch.cuda.Event]] = (
            collections.deque()
        )
        self._start: torch.cuda.Event | float | None = None
        self.resume()

    @property
    def elapsed_ms(self) -> float:
        while self._queued and self._queued[0][1].query():
            start, end = self._queued.popleft()
            self._done_ms += start.elapsed_time(end)
        if isinstance(self._start, float):
            return self._done_ms + (time.perf_counter() - self._start) * 1e3
        return self._done_ms

    @elapsed_ms.setter
    def elapsed_ms(self, value: float) -> None:
        self._queued.clear()
        self._done_ms = value
        if self._start is not None:
            self._start = self._now()

    def tick(self) -> None:
        if self._cuda and self._start is not None:
            self.pause()
            self.resume()

    def pause(self) -> None:
        end = self._now()
        if isinstance(self._start, float) and isinstance(end, float):
            self._done_ms += (end - self._start) * 1e3
        elif isinstance(self._start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            self._queued.append((self._start, end))
        self._start = None

    def resume(self) -> None:
        if self._start is None:
            self._start = self._now()

    def _now(self) -> torch.cuda.Event | float:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
