"""Runs made of what trained, for the maps, and what is painted of them."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from bench.pages.evidence import Evidence, evidence


def run_of(
    n: int,
    sets: Sequence[Iterable[int]],
    probes: Sequence[int] = (),
    scores: Sequence[Sequence[float]] = (),
    events: Sequence[dict[str, Any]] = (),
    name: str = "lisa",
    running: Sequence[tuple[int, Iterable[int]]] = (),
) -> Evidence:
    """A result with one run.

    Args:
        n: blocks of the model.
        sets: the blocks that trained, a set a step.
        probes: steps.
        scores: of each probe, the relevance of the blocks; all alike by default.
        events: of its dynamic_trace besides the probes.
        running: which blocks run, from which step on; none where all do.
    """
    blocks = [sorted(one) for one in sets]
    told = [
        {
            "step": step,
            "probe": True,
            "freeze_enabled": False,
            "active_layers_next": n,
            "active_budget": n,
            "ema_scores": list(scores[i]) if scores else [1.0] * n,
        }
        for i, step in enumerate(probes)
    ]
    trace = {
        "step_times_ms": [10.0] * len(sets),
        "train_losses": [1.0] * len(sets),
        "active_layers_hist": [len(one) for one in blocks],
        "active_blocks": [
            [step, one] for step, one in enumerate(blocks) if step == 0 or one != blocks[step - 1]
        ],
        "dynamic_trace": [*told, *events],
    }
    if running:
        trace["running_blocks"] = [[step, sorted(one)] for step, one in running]
    return evidence(
        {
            "script": "bench/run.py",
            "config": {"n_layers": n},
            "results": [{"schedule": name}],
            "traces": {name: trace},
        },
        "made",
    )


def painted(svg: str, rows: int, columns: float) -> list[list[float]]:
    """The opacity of each cell of a map, 0 where only its ground is seen; block 0 first.

    The last column is narrower than the others where `columns` is no whole number.
    """
    cells = [[0.0] * math.ceil(columns) for _ in range(rows)]
    for opacity, path in re.findall(r'<path style="stroke-opacity:([\d.]+)" d="([^"]*)"', svg):
        x, row = 0.0, cells[0]
        for kind, values in re.findall(r"([Mmh])([^Mmh]*)", path):
            first, *y = map(float, values.split())
            if kind == "M":
                x, row = first, cells[rows - 1 - int(y[0])]
            elif kind == "m":
                x += first
            else:
                for column in range(round(x), math.ceil(x + first - 1e-3)):
                    assert row[column] == 0, "painted twice"
                    row[column] = float(opacity)
                x += first
                assert x <= columns
    return cells
