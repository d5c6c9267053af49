"""What a study is made of: cells, each an arm on a task from a seed."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.config import Config, UserError, resolve

CLOCKS = ("time", "cost")
FEWEST = 10  # seeds of a confirmation


class Cell(NamedTuple):
    """One run: an arm on a task from a seed."""

    task: str
    arm: str
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the things compared.

    Attributes:
        schedule: its schedule, by the name of bench/run.py.
        flags: its own flags, for each task.
        against: the arms it is judged against beside the baseline.
        time_factor: its steps count so many times their time. Not 1: planted, to see whether the
            verdict can tell.
    """

    schedule: str
    flags: Mapping[str, Mapping[str, Any]]
    against: tuple[str, ...] = ()
    time_factor: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What a study file says.

    Attributes:
        path: the file.
        tasks: flags of each task, those of all tasks included.
        arms: by name.
        confirms: the files of the searches that this confirms; () for a search.
        prices: a file of prices for the computed clock; what it lacks is measured.
    """

    path: Path
    question: str
    clock: str
    seeds: tuple[int, ...]
    baseline: str
    null: str | None
    margin: float
    confidence: float
    tasks: Mapping[str, Mapping[str, Any]]
    arms: Mapping[str, Arm]
    confirms: tuple[Path, ...]
    prices: Path | None

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem

    def arms_of(self, task: str) -> list[str]:
        """The arms that run on a task."""
        return [name for name, arm in self.arms.items() if task in arm.flags]

    def cells(self) -> list[Cell]:
        """All of them, seed by seed, so that one that is stopped early has whole pairs."""
        return [
            Cell(task, arm, seed)
            for seed in self.seeds
            for task in self.tasks
            for arm in self.arms_of(task)
        ]

    def config(self, cell: Cell) -> Config:
        """The flags of a cell. Raises UserError for one out of range."""
        arm = self.arms[cell.arm]
        given = {"task": cell.task, **self.tasks[cell.task], **arm.flags[cell.task]}
        fixed = {"equal_time_budget": False, "interleave": False, "seed": cell.seed}
        try:
            return resolve({**given, "schedules": arm.schedule, **fixed})
        except UserError as error:
            raise UserError(f"{self.path}, arm {cell.arm}, task {cell.task}: {error}") from None
