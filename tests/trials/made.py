"""Cells and studies made by hand, as bench/trials/cells.py and design.py give them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.trials.design import Cell, Study, load

ARMS = ("full_update", "again", "top4", "grow", "slow")
STUDY = """
question = "Does it pay?"
seeds = {seeds}
null = "again"
{confirms}

[flags]
preset = "small"

[tasks.text]

[arms.full_update]
[arms.again]
schedule = "full_update"
[arms.top4]
schedule = "static_suffix"
static_active_layers = 4
against = ["grow"]
[arms.grow]
[arms.slow]
schedule = "full_update"
time_factor = 2.0
"""
SEARCH = 'seeds = [1, 2]\n[flags]\npreset = "small"\n[tasks.text]\n[arms.full_update]\n'


def study(folder: Path, seeds: Sequence[int], confirms: bool = True) -> Study:
    """A study of ARMS on text; 5 comparisons, so that each interval is at 0.99."""
    (folder / "search.toml").write_text(SEARCH)
    words = 'confirms = ["search.toml"]' if confirms else ""
    path = folder / "mine.toml"
    path.write_text(STUDY.format(seeds=list(seeds), confirms=words))
    return load(path)


def cell(seed: int, loss: float | None, half: float = 4.0, step_ms: float = 10.0) -> dict[str, Any]:
    """A cell that is at `half` after half of its 1,000 ms and at `loss` in the end."""
    trace = [(0, 0.0, 5.0), (50, 500.0, half), (100, 1000.0, 4.5 if loss is None else loss)]
    return {
        "seed": seed, "final_val_loss": loss, "mean_step_ms": step_ms, "elapsed_ms": 1000.0,
        "val_trace": [dict(zip(("step", "elapsed_ms", "val_loss"), p, strict=True)) for p in trace],
    }  # fmt: skip


def by_seed(losses: Sequence[float | None], **more: float) -> dict[int, dict[str, Any]]:
    """Cells of the seeds 11, 12, ... that end at `losses`."""
    return {seed: cell(seed, loss, **more) for seed, loss in enumerate(losses, start=11)}


def done(arms: Mapping[str, Mapping[int, dict[str, Any]]]) -> dict[Cell, dict[str, Any]]:
    """The cells of arms as a study keeps them."""
    about = {
        "failure": None, "steps": 100, "probes": 0, "skipped_steps": 0, "active_counts": [0, 100],
        "budget_ms": 1000.0, "info": {"corpus": "made"}, "notes": "Made()",
        "system": {"commit": "abc", "torch_version": "2"},
    }  # fmt: skip
    return {
        Cell("text", arm, seed): {**about, "arm": arm, **each}
        for arm, cells in arms.items()
        for seed, each in cells.items()
    }
