"""The table at the end of a run."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Mapping[str, Any]], on_cpu: bool) -> list[str]:
    """The experiment's table, a line a schedule."""
    memory = "kept for bwd" if on_cpu else "peak memory"
    split = any(row["speedup_schedule"] is not None for row in rows)
    cells = [_cells(row, split, memory) for row in rows]
    header = [name for name, _ in cells[0]]
    body = [[cell for _, cell in line] for line in cells]
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in [header, *body]
    ]


def _cells(row: Mapping[str, Any], split: bool, memory: str) -> list[tuple[str, str]]:
    kernels, schedule = (number(row[f"speedup_{part}"], ".2f") for part in ("kernels", "schedule"))
    both = [("kernels x schedule", "-" if schedule == "-" else f"{kernels} x {schedule}")]
    active = f"{row['active_layers_mean']:.1f} "
    active += f"({row['active_layers_min']}-{row['active_layers_max']})"
    sent = [("gradients sent", f"{(row['gradient_bytes_per_step'] or 0) / 2**20:.2f} MiB/step")]
    return [
        ("schedule", row["schedule"]),
        ("val loss", number(row["final_val_loss"], ".4f")),
        ("mean ms", number(row["mean_step_ms"], ".1f")),
        ("speed-up", number(row["speedup_vs_full"], ".2f", "x")),
        *(both if split else []),
        ("steps", str(row["steps_executed"])),
        ("active mean (min-max)", active),
        ("probes", str(row["probe_step_count"])),
        (memory, f"{row['peak_bytes'] / 2**20:.0f} MiB"),
        *(sent if row["gradient_bytes_per_step"] is not None else []),
        ("ms / expected", number(row["measured_over_expected"], ".2f")),
    ]


def number(value: float | None, form: str, unit: str = "") -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:{form}}{unit}"
