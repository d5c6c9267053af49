"""The schedule at 1B to 70B parameters on 8 to 1,024 GPUs, on paper: `python bench/scale.py`.

Prints the tables of docs/scale.md.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench.cost_model import (
    CONSTANTS,
    CPU,
    GATHERED,
    GRADIENT,
    SEQUENCE,
    SHAPES,
    ddp,
    fsdp,
    memory,
    mixed,
    operations,
    ring_vote,
    root_vote,
    trained,
)

_RESULTS = Path(__file__).parent / "results"


def measured() -> dict[str, dict[int, float]]:
    """Suffix step over full step in this project's own results, by number of active blocks of 8."""
    found = {}
    for name in ("cpu-small-text", "cpu-small-finetune"):
        step = json.loads((_RESULTS / f"{name}.json").read_text())["expected"]["parts_ms"]["step"]
        found[name] = {k: step[str(k)] / step["8"] for k in (2, 4, 6)}
    return found


def predicted(k: int) -> float:
    """The same from the operations counted here."""
    return operations(CPU, k, 128) / operations(CPU, 8, 128)


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in lines)


def _constants() -> str:
    rows = [(c.what, f"{c.value:.3g}", c.source) for c in CONSTANTS]
    return markdown(("constant", "value", "source"), rows)


def _own() -> str:
    found = measured()
    rows = [
        (k, f"{predicted(k):.3f}", *(f"{found[name][k]:.3f}" for name in found)) for k in (2, 4, 6)
    ]
    return markdown(("active of 8", "counted", *found), rows)


def _ceiling() -> str:
    rows = []
    for shape in SHAPES:
        for quarter in (3, 2, 1):
            k = shape.blocks * quarter // 4
            plain, kept = (
                operations(shape, shape.blocks, SEQUENCE, c) / operations(shape, k, SEQUENCE, c)
                for c in (False, True)
            )
            f = 1 - quarter / 4
            row = (f"{3 / (3 - 2 * f):.2f}", f"{plain:.2f}", f"{kept:.2f}")
            rows.append((shape.name, f"{k} of {shape.blocks}", *row))
    head = ("model", "active", "3 / (3 - 2f)", "counted", "with checkpointing")
    return markdown(head, rows)


# Model, how it is parallel, GPUs, tokens of a batch for each.
RUNS = (
    (SHAPES[0], "DDP", 8, 8192),
    (SHAPES[0], "DDP", 1024, 8192),
    (SHAPES[0], "DDP", 1024, 1024),
    (SHAPES[1], "FSDP2", 64, 8192),
    (SHAPES[1], "FSDP2", 1024, 8192),
    (SHAPES[1], "FSDP2", 1024, 1024),
    (SHAPES[2], "FSDP2", 64, 8192),
    (SHAPES[2], "FSDP2", 1024, 8192),
    (SHAPES[2], "FSDP2", 1024, 1024),
)


def _steps() -> str:
    rows = []
    for shape, how, gpus, tokens in RUNS:
        n, k = shape.blocks, shape.blocks // 4
        model = ddp if how == "DDP" else fsdp
        full, few = (model(shape, active, gpus, tokens) for active in (n, k))
        alone = operations(shape, n, SEQUENCE) / operations(shape, k, SEQUENCE)
        where = (f"{shape.name} {how}", f"{gpus:,}", f"{tokens:,}")
        steps = (f"{t.step * 1e3:,.0f} ({t.waits / t.step:.0%})" for t in (full, few))
        run = full.step / mixed(full.step, few.step)
        gains = (full.step / few.step, alone, run)
        rows.append((*where, *steps, *(f"{gain:.2f}" for gain in gains)))
    head = (
        "model",
        "GPUs",
        "tokens a GPU",
        "full, ms",
        "n/4, ms",
        "gain",
        "on one GPU",
        "of a run",
    )
    return markdown(head, rows)


def _agreement() -> str:
    rows = []
    for gpus in (8, 64, 1024):
        for shape in SHAPES:
            model = ddp if shape is SHAPES[0] else fsdp
            full, few = (
                model(shape, k, gpus, SEQUENCE).step for k in (shape.blocks, shape.blocks // 4)
            )
            sent = (3 * 8 * shape.blocks + 8, 8)
            shares = (f"{vote(gpus) / few:.2%}" for vote in (ring_vote, root_vote))
            probes = f"{(full - few) / 20 / few:.0%}"
            rows.append((f"{gpus:,}", shape.name, *sent, *shares, probes))
    head = ("GPUs", "model", "bytes a probe", "bytes a vote", "vote, ring", "vote, root", "probes")
    return markdown(head, rows)


def _memory() -> str:
    rows = []
    for shape, how, gpus, _ in (RUNS[0], RUNS[3], RUNS[6], RUNS[7]):
        full, few = (memory(shape, k, gpus, how) for k in (shape.blocks, shape.blocks // 4))
        cells = [f"{full[0] / 1e9:.1f}"]
        cells += [f"{a / 1e9:.1f} -> {b / 1e9:.1f}" for a, b in zip(full[1:], few[1:], strict=True)]
        rows.append((f"{shape.name} {how}", f"{gpus:,}", *cells, f"{sum(full) / 1e9:.0f}"))
    head = ("model", "GPUs", "weights, moments", "gradients", "kept for backward", "peak")
    return markdown(head, rows)


def _traffic() -> str:
    rows = []
    for shape, how, _, _ in (RUNS[0], RUNS[3], RUNS[6]):
        cells = []
        for k in (shape.blocks, shape.blocks // 2, shape.blocks // 4):
            size = 2 * GRADIENT * trained(shape, k)
            if how == "FSDP2":
                weights = shape.parameters + k * shape.block + shape.embedding
                size = GATHERED * weights + GRADIENT * trained(shape, k)
            cells.append(size)
        shown = [f"{cells[0] / 1e9:.1f}"]
        shown += [f"{cell / 1e9:.1f} ({cell / cells[0]:.0%})" for cell in cells[1:]]
        rows.append((f"{shape.name} {how}", *shown))
    return markdown(("model", "full, GB", "n/2", "n/4"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "Constants": _constants,
    "Against this project's own measurements": _own,
    "Computing": _ceiling,
    "Gradients and weights sent, a GPU and step": _traffic,
    "Steps": _steps,
    "Deciding together, of a step with n/4 active": _agreement,
    "Memory of a GPU, GB": _memory,
}


def main() -> None:
    """Print every table under its title."""
    print("\n\n".join(f"## {title}\n\n{make()}" for title, make in TABLES.items()))


if __name__ == "__main__":
    main()
