"""Studies of tiny models, with prices made up so that nothing has to be measured."""

import json
from pathlib import Path
from typing import Any

from bench.costs import Shape, anchors
from bench.results import write
from bench.trials.cells import Cells
from bench.trials.design import load
from blocksched.schedules import Plan

N = 4  # blocks
FLAGS = {
    "device": "cpu", "backend": "eager", "preset": "seed", "dtype": "float32", "dmodel": 16,
    "n_layers": N, "seq_len": 16, "batch_size": 2, "steps": 12, "val_batches": 2, "lr": 0.01,
    "max_steps_multiplier": 20.0, "static_active_layers": 2, "cyclic_train_stem": True,
}  # fmt: skip
TWO = {"full_update": {}, "top2": {"schedule": "static_suffix"}}
MEASURING = 0.7
# Of a block's forward, of the gradient that it passes on, of that of its weights, of their update.
FORWARD, PASS, WEIGHTS, UPDATE = 1.1, 0.9, 1.3, 0.2
STEM, HEAD = 0.3, 2.1


def study_file(
    folder: Path, data: Path, arms: dict[str, dict[str, Any]] = TWO, top: str = "", **flags: Any
) -> Path:
    """Writes NAME.toml: two seeds on the computed clock, if `top` does not say otherwise."""
    folder.mkdir(exist_ok=True)
    said = {"seeds": "[1, 2]", "clock": '"cost"'}
    said |= dict(line.split(" = ", 1) for line in top.splitlines())
    tables = {"flags": FLAGS | {"data": str(data)} | flags, "tasks.text": {}}
    tables |= {f"arms.{name}": content for name, content in arms.items()}
    lines = [f"{key} = {value}" for key, value in said.items()]
    for name, content in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in content.items())]
    path = folder / "study.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def run(path: Path, out: Path | None = None) -> Cells:
    """The cells of a study, run as bench/study.py does."""
    cells = Cells(load(path), out or path.parent / "out")
    cells.run()
    return cells


def price_ms(plan: Plan) -> float:
    """What a step costs that does `plan`, block by block."""
    total, lowest = HEAD, plan.boundary
    for block in range(N) if plan.running is None else plan.running:
        total += FORWARD + (PASS if block >= lowest else 0.0)
        total += WEIGHTS + UPDATE if block in plan.active else 0.0
    return total + STEM * (2 if plan.stem_trains else 1) + (MEASURING if plan.probe else 0.0)


def parts_of(shape: Shape) -> dict[str, float]:
    """The same by part, for a shape."""
    below = STEM + shape.prefix * FORWARD
    above = shape.reached * (FORWARD + PASS) + shape.active * WEIGHTS
    return {
        "stem and prefix": 0.0 if shape.stem else below,
        "suffix": above + (2 * STEM if shape.stem else 0.0),
        "head": HEAD,
        "update": shape.active * UPDATE,
    }


def made_up(*_: object) -> dict[str, Any]:
    """What measuring would have given."""
    parts = [[name, list(shape), ms] for shape in anchors(N)
             for name, ms in parts_of(shape).items()]  # fmt: skip
    return {"parts": parts, "measuring": MEASURING}


def write_prices(folder: Path, *, batch_sizes: tuple[int, ...] = (2,), factor: float = 1.0) -> Path:
    """prices.json in a study's folder, as a study has it after measuring."""
    folder.mkdir(parents=True, exist_ok=True)
    size = ("dmodel", "n_layers", "n_heads", "hidden_mult", "batch_size", "seq_len", "dtype",
            "device")  # fmt: skip
    known = {}
    for batch_size in batch_sizes:
        flags = {"n_heads": 0, "hidden_mult": 4} | FLAGS | {"batch_size": batch_size}
        named = {name: flags[name] for name in size}
        plain = made_up()
        plain["parts"] = [[name, shape, factor * ms] for name, shape, ms in plain["parts"]]
        known[json.dumps(named | {"teacher": False, "fused": False})] = plain
    path = folder / "prices.json"
    write(path, known)
    return path
