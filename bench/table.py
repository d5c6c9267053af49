"""The table at the end of a run."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Mapping[str, Any]], on_cpu: bool) -> list[str]:
    """The experiment's table, a line a schedule."""
    return aligned(grid(rows, on_cpu))


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells as text, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def grid(rows: Sequence[Mapping[str, Any]], on_cpu: bool) -> list[list[str]]:
    """The table's cells, its header first."""
    memory = "kept for bwd" if on_cpu else "peak memory"
    split = any(row["speedup_schedule"] is not None for row in rows)
    sent = any(row["gradient_bytes_per_step"] is not None for row in rows)
    cells = [_cells(row, split, sent, memory) for row in rows]
    return [[name for name, _ in cells[0]], *([cell for _, cell in line] for line in cells)]


def _cells(row: Mapping[str, Any], split: bool, sent: bool, memory: str) -> list[tuple[str, str]]:
    kernels, schedule = (number(row[f"speedup_{part}"], ".2f") for part in ("kernels", "schedule"))
    both = [("kernels x schedule", "-" if schedule == "-" else f"{kernels} x {schedule}")]
    least, most = row["active_layers_min"], row["active_layers_max"]
    active = f"{number(row['active_layers_mean'], '.1f')} "
    active += f"({number(least, '.0f')}-{number(most, '.0f')})"
    given = [("gradients sent", _mib(row["gradient_bytes_per_step"], ".2f", "/step"))]
    return [
        ("schedule", row["schedule"]),
        ("val loss", number(row["final_val_loss"], ".4f")),
        ("mean ms", number(row["mean_step_ms"], ".1f")),
        ("speed-up", number(row["speedup_vs_full"], ".2f", "x")),
        *(both if split else []),
        ("steps", number(row["steps_executed"], "d")),
        ("active mean (min-max)", active),
        ("probes", number(row["probe_step_count"], "d")),
        (memory, _mib(row["peak_bytes"], ".0f")),
        *(given if sent else []),
        ("ms / expected", number(row["measured_over_expected"], ".2f")),
    ]


def _mib(size: float | None, form: str, unit: str = "") -> str:
    return number(None if size is None else size / 2**20, form, f" MiB{unit}")


def number(value: float | None, form: str, unit: str = "") -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:{form}}{unit}"
