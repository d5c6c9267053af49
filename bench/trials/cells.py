"""Runs the cells of a study and keeps what they gave.

On the measured clock the arms of a task and seed run side by side, a few steps at a time, and each
gets the time of as many steps of the baseline as --steps says, measured anew. They are kept
together, in one file. On the computed clock every cell runs by itself and has a file of its own.
"""

import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.config import Config, UserError, resolve_device
from bench.expected import Expected
from bench.live import Live
from bench.provenance import code_sha256, commit, system
from bench.results import read
from bench.run import TASKS
from bench.runner import GROUP, measured_budget_ms, schedule_of
from bench.tasks.parts import Task
from bench.train import Arm
from bench.trials.arms import Cell, Study
from bench.trials.files import keep, make
from bench.trials.prices import Priced, PriceList, Prices, size_of
from blocksched.ops import backend_of
from blocksched.schedules import Plan
from blocksched.schedules.flags import option

SCRIPT = "bench/study.py"


class Cells:
    """The cells of a study in a folder.

    Attributes:
        done: what each cell gave that has ended.

    Raises UserError if the folder cannot be used, or holds cells of other flags.
    """

    def __init__(self, study: Study, folder: Path) -> None:
        self._study, self._folder = study, folder
        make(folder)
        self.prices = PriceList(folder / "prices.json", study.prices)
        self.done: dict[Cell, dict[str, Any]] = {}
        for cells in self.rounds():
            path = self._path(cells)
            if study.name in (path.stem, "prices"):
                raise UserError(
                    f"{study.path} must not be named {study.name}, as a file of its cells is: "
                    "rename it, since the result gets its name"
                )
            if path.exists():
                self._take(path, cells)

    def rounds(self) -> Iterator[list[Cell]]:
        """What runs side by side, in turn: by seed, so that an early end leaves whole pairs."""
        study = self._study
        for seed in study.seeds:
            for task in study.tasks:
                cells = [Cell(task, arm, seed) for arm in study.arms_of(task)]
                yield from [cells] if study.clock == "time" else ([cell] for cell in cells)

    def run(self) -> None:
        """Run what is missing. What has ended stays, however this ends."""
        missing = [cells for cells in self.rounds() if cells[0] not in self.done]
        commit()  # the cells are to name the code that runs now
        code_sha256()
        start = time.perf_counter()
        for i, cells in enumerate(missing, start=1):
            print(f"{_words(cells)} ({i} of {len(missing)})", flush=True)
            self._run(cells)
            losses = [self.done[cell]["final_val_loss"] for cell in cells]
            ended = ", ".join("failed" if loss is None else f"{loss:.4f}" for loss in losses)
            spent = (time.perf_counter() - start) / 60
            left = spent / i * (len(missing) - i)
            print(f"  ended at {ended}; {spent:.1f} min so far, about {left:.0f} to go", flush=True)

    def _run(self, cells: Sequence[Cell]) -> None:
        models = {cell: _Model(self._study.config(cell)) for cell in cells}
        base = cells[0]._replace(arm=self._study.baseline)
        baseline = models.get(base) or _Model(self._study.config(base))
        prices: dict[Cell, Prices] = {}
        if self._study.clock == "cost":
            prices = {cell: self.prices.of(model.task, model.config, model.fused)
                      for cell, model in models.items()}  # fmt: skip
            full = self.prices.of(baseline.task, baseline.config, baseline.fused)
            everything = Plan(tuple(range(baseline.config.n_layers)))
            # Less a rounding, so that the sum of as many steps does not fall short of it.
            budget = (1 - 1e-9) * baseline.config.steps * full.step_ms(everything)
            self._check_prices(base.task, budget)
        else:
            sizes = {size_of(model.config, model.fused): model for model in models.values()}
            for model in sizes.values():  # compiles what steps run, before any clock starts
                Expected(model.task, model.config, model.fused)
            budget = measured_budget_ms(baseline.task, baseline.config, baseline.fused)
        arms = {cell: self._arm(cell, models[cell], prices.get(cell), budget) for cell in cells}
        live = Live() if sys.stdout.isatty() else None
        while running := [arm for arm in arms.values() if not arm.finished]:
            arm = min(running, key=lambda arm: arm.elapsed_ms)
            validated = arm.advance(GROUP)
            if live is not None:
                live.update(list(arms.values()), arm, validated, baseline.config.n_layers)
        found = [self._found(cell, models[cell], arm, budget) for cell, arm in arms.items()]
        keep(self._path(cells), {"script": SCRIPT, "cells": found})
        self._take(self._path(cells), cells)  # as whoever goes on will

    def _check_prices(self, task: str, budget_ms: float) -> None:
        """A study is of one price list: the baseline's budget is what it was for other cells."""
        others = {cell: found["budget_ms"] for cell, found in self.done.items()}
        for cell, other_ms in others.items():
            if cell.task == task and not math.isclose(other_ms, budget_ms, rel_tol=1e-6):
                raise UserError(
                    f"{self._folder / 'prices.json'} is not what {_words([cell])} was run with "
                    f"(budget {other_ms:.1f} ms there, {budget_ms:.1f} ms here): put the old one "
                    "back, or start anew with another --out"
                )

    def _arm(self, cell: Cell, model: "_Model", prices: Prices | None, budget_ms: float) -> Arm:
        schedule, _ = schedule_of(self._study.arms[cell.arm].schedule, model.config)
        factor = self._study.arms[cell.arm].time_factor

        def counted(plan: Plan, ms: float) -> float:
            return factor * (ms if prices is None else prices.step_ms(plan))

        arm = Arm(cell.arm, schedule, model.task, model.config, budget_ms, model.fused,
                  counted=counted)  # fmt: skip
        if prices is not None and arm.scheduler.times is not None:
            arm.scheduler.times.close()
            arm.scheduler.times = Priced(model.config.n_layers, prices)
            arm.scheduler.times.expect(arm.scheduler.plan.probe)
        return arm

    def _found(self, cell: Cell, model: "_Model", arm: Arm, budget_ms: float) -> dict[str, Any]:
        failure, loss = arm.failure, arm.val_trace[-1]["val_loss"]
        if failure is None and not math.isfinite(loss):
            failure = f"the validation loss at the end is not finite ({loss})"
        active = [step.active for step in arm.steps]
        return {
            **self._identity(cell),
            "code": code_sha256(),
            "system": system(model.task.device),
            "info": model.task.info,
            "notes": str(arm.schedule),
            "budget_ms": budget_ms,
            "elapsed_ms": arm.elapsed_ms,
            "steps": len(arm.steps),
            "skipped_steps": arm.scheduler.skipped,
            "probes": sum(step.probe for step in arm.steps),
            "active_counts": [active.count(k) for k in range(1, model.config.n_layers + 1)],
            "mean_step_ms": statistics.fmean(step.ms for step in arm.steps),
            "failure": failure,
            "final_val_loss": loss if failure is None else None,
            "val_trace": arm.val_trace,
        }

    def _identity(self, cell: Cell) -> dict[str, Any]:
        """What makes a cell the one that the study asks for."""
        return {
            **cell._asdict(),
            "clock": self._study.clock,
            "time_factor": self._study.arms[cell.arm].time_factor,
            "flags": dataclasses.asdict(self._study.config(cell)),
        }

    def _take(self, path: Path, cells: Sequence[Cell]) -> None:
        try:
            found = {Cell(each["task"], each["arm"], each["seed"]): each
                     for each in read(path)["cells"]}  # fmt: skip
        except (KeyError, TypeError):
            raise UserError(f"{path} holds no cells of a study: delete it") from None
        if set(found) != set(cells):
            raise UserError(
                f"{path} compares {_words(list(found))}, the study {_words(cells)}: on the "
                "measured clock what is compared ran side by side; give it another --out"
            )
        for cell in cells:
            self._check_same(path, cell, found[cell])
            self.done[cell] = found[cell]

    def _check_same(self, path: Path, cell: Cell, found: dict[str, Any]) -> None:
        ours = self._identity(cell)
        flags, theirs = ours.pop("flags"), found["flags"]
        differ = [f"{option(key)} {theirs.get(key)} there, {value} here"
                  for key, value in flags.items() if theirs.get(key) != value]  # fmt: skip
        differ += [f"{key} {found.get(key)} there, {value} here"
                   for key, value in ours.items() if found.get(key) != value]  # fmt: skip
        if differ:
            raise UserError(
                f"{path}, arm {cell.arm}, was run otherwise: {'; '.join(differ)}. Give the arm "
                "another name, or the study another --out"
            )
        if self._study.confirms and found["code"] != code_sha256():
            raise UserError(
                f"{path} was run by other code (commit {found['system']['commit']}): a "
                "confirmation is one code's; go back to it, or start anew with another --out"
            )

    def _path(self, cells: Sequence[Cell]) -> Path:
        task, arm, seed = cells[0]
        name = f"{task}-{seed}" if self._study.clock == "time" else f"{task}-{arm}-{seed}"
        return self._folder / f"{name}.json"


class _Model:
    """What an arm trains: its task at its batch size and seed."""

    def __init__(self, config: Config) -> None:
        self.config = config
        device = resolve_device(config.device)
        can_fuse = backend_of("mlp", device.type) != "eager"
        config.arms(can_fuse)  # which refuses kernels that are not there
        self.fused = config.backend != "eager" and can_fuse
        self.task: Task = TASKS[config.task](config, device)
        self.task.model(self.fused)  # which may have to be pretrained


def _words(cells: Sequence[Cell]) -> str:
    arms = ", ".join(cell.arm for cell in cells)
    return f"{cells[0].task}, seed {cells[0].seed}: {arms}"
