"""The table at the end of a run."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Mapping[str, Any]], on_cpu: bool) -> list[str]:
    """The experiment's table, a line a schedule."""
    memory = "kept for bwd" if on_cpu else "peak memory"
    header = [
        "schedule", "val loss", "mean ms", "speed-up", "steps", "active mean (min-max)", "probes",
        memory, "ms / expected",
    ]  # fmt: skip
    body = [[cell for _, cell in _cells(row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in [header, *body]
    ]


def _cells(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    active = f"{row['active_layers_mean']:.1f}"
    return [
        ("schedule", row["schedule"]),
        ("val loss", number(row["final_val_loss"], ".4f")),
        ("mean ms", f"{row['mean_step_ms']:.1f}"),
        ("speed-up", number(row["speedup_vs_full"], ".2f", "x")),
        ("steps", str(row["steps_executed"])),
        ("active", f"{active} ({row['active_layers_min']}-{row['active_layers_max']})"),
        ("probes", str(row["probe_step_count"])),
        ("memory", f"{row['peak_bytes'] / 2**20:.0f} MiB"),
        ("over", number(row["measured_over_expected"], ".2f")),
    ]


def number(value: float | None, form: str, unit: str = "") -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:{form}}{unit}"
