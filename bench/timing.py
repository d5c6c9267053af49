"""Interleaved timing: each case has a turn in every round, so a slow moment hits all alike."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Row = dict[str, Any]
Call = Callable[[], Any]
Case = tuple[Row, Call, Call]  # a row of the table, what prepares the case, what is timed


def timed(call: Call, repeats: int, on_gpu: bool) -> tuple[float, float | None]:
    """Milliseconds a call among calls back to back, and on a GPU milliseconds until one returns."""
    call()  # whatever has changed since the last time, such as the set of gradients, is paid here
    if not on_gpu:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) * 1e3 / repeats, None
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    host_ms = (time.perf_counter() - start) * 1e3
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()  # behind the call above: the time of a launch on an idle GPU is not in it
    for _ in range(repeats):
        call()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / repeats, host_ms


def sample(cases: list[Case], rounds: int, sample_ms: float, on_gpu: bool) -> list[Row]:
    """Time every case once a round, some `sample_ms` each; the rows, with samples and medians."""
    for row, prepare, call in cases:  # compiles, makes optimizers' states, and sizes the samples
        prepare()
        repeats = min(200, max(1, round(sample_ms / timed(call, 1, on_gpu)[0])))
        row.update(repeats=repeats, samples_ms=[], host_samples_ms=[])
    for turn in range(rounds):
        shift = turn * len(cases) // rounds
        for row, prepare, call in cases[shift:] + cases[:shift]:
            prepare()
            ms, host_ms = timed(call, row["repeats"], on_gpu)
            row["samples_ms"].append(ms)
            row["host_samples_ms"].append(host_ms)
    rows = [row for row, _, _ in cases]
    for row in rows:
        row["ms"] = statistics.median(row["samples_ms"])
        row["host_ms"] = statistics.median(row["host_samples_ms"]) if on_gpu else None
    return rows


def ratio(over: Row, under: Row) -> float:
    """How many times as long one row takes as another, in the median round."""
    pairs = zip(over["samples_ms"], under["samples_ms"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def mark(text: str, value: float, low: float = 0.0, high: float = float("inf")) -> Row:
    """Something that is to be reached, and whether it was."""
    return {"mark": text, "found": value, "low": low, "high": high, "passed": low <= value <= high}
