"""A study: which arms are compared, on which tasks and seeds. Read from a TOML file.

question = "Does growing the stack beat a full update?"
clock = "time"                  # or "cost": computed from parts that were measured once
seeds = [101, 102]
baseline = "full_update"        # the arm that the others are compared with
null = "again"                  # an arm that is the baseline once more
margin = 0.01                   # relative differences of the loss below this do not matter
confirms = ["search.toml"]      # the searches that chose these arms; none: this is a search

[flags]                         # of bench/run.py, in snake_case
preset = "small"

[tasks.text]                    # flags of this task; `task` is the table's name unless given
steps = 250

[arms.full_update]
schedule = "full_update"        # the arm's name unless given

[arms.top4]
schedule = "static_suffix"
static_active_layers = 4
against = ["grow"]              # judged against this arm too
tasks = ["text"]                # runs on these tasks alone
text = { lr = 1e-3 }            # flags on one task
"""

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.config import Config, UserError, resolve
from blocksched.schedules.flags import base_name

CLOCKS = ("time", "cost")
FEWEST = 10  # seeds of a confirmation
_OWN = {"seed", "schedules", "equal_time_budget", "interleave", "time_budget_ms", "out",
        "json_out", "html", "resume", "checkpoint_every", "allow_previous", "preflight",
        "random_like"}  # fmt: skip
_FLAGS = {field.name for field in dataclasses.fields(Config)} - _OWN


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


def load(path: Path, clock: str | None = None) -> Study:
    """The study in a file, on `clock` if that is given.

    Raises UserError if the file cannot be used, with the rule, the value and the remedy.
    """
    try:
        content = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a study file") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path} is not TOML ({error}): mend it") from None
    try:
        study = _study(path, _Table(content), clock)
    except _MistakeError as mistake:
        raise UserError(f"{path}: {mistake}") from None
    for cell in study.cells():
        study.config(cell)
    for search in study.confirms:
        _check_fresh(study, load(search))
    return study


class _MistakeError(Exception):
    """What is wrong in a study file."""


class _Table:
    """A TOML table, whose keys are taken out one by one; nothing may be left over."""

    def __init__(self, content: dict[str, Any], where: str = "") -> None:
        self._left, self._where = dict(content), where
        self._known: list[str] = []

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        self._known.append(key)
        value = self._left.pop(key, default)
        if value is not default and (not isinstance(value, kind) or isinstance(value, bool)):
            names = {str: "text", int: "a whole number", dict: "a table", list: "a list"}
            wanted = names.get(kind, "a number") if isinstance(kind, type) else "a number"
            raise _MistakeError(f"{self._where}{key} must be {wanted}, got {value!r}")
        return value

    def take_list(self, key: str, kind: type) -> tuple[Any, ...]:
        values = self.take(key, list, [])
        if not all(type(value) is kind for value in values):
            words = "whole numbers" if kind is int else "texts"
            raise _MistakeError(f"{self._where}{key} must be a list of {words}, got {values!r}")
        if len(set(values)) < len(values):
            raise _MistakeError(
                f"{self._where}{key} names one twice, got {values!r}: leave one out"
            )
        return tuple(values)

    def flags(self) -> dict[str, Any]:
        """What is left, which has to be flags of bench/run.py."""
        for key in self._left:
            if key not in _FLAGS:
                near = difflib.get_close_matches(key, _FLAGS, 1)
                hint = f"did you mean {near[0]}" if near else "see bench/run.py --help"
                ours = "is the study's to set" if key in _OWN else f"is no flag: {hint}"
                raise _MistakeError(f"{self._where}{key} {ours}")
        return self._left

    def done(self) -> None:
        for key in self._left:
            raise _MistakeError(f"{key} is not known here: there are {', '.join(self._known)}")


def _study(path: Path, table: _Table, clock: str | None) -> Study:
    shared = _Table(table.take("flags", dict, {}), "flags: ").flags()
    tasks = {}
    for name, content in table.take("tasks", dict, {}).items():
        tasks[name] = shared | _Table(content, f"tasks.{name}: ").flags()
        tasks[name].setdefault("task", name)
    arms = {
        name: _arm(name, _Table(content, f"arms.{name}: "), tasks)
        for name, content in table.take("arms", dict, {}).items()
    }
    said = table.take("clock", str, "time")
    study = Study(
        path=path,
        question=table.take("question", str, ""),
        clock=clock or said,
        seeds=table.take_list("seeds", int),
        baseline=table.take("baseline", str, "full_update"),
        null=table.take("null", str),
        margin=table.take("margin", (int, float), 0.01),
        confidence=table.take("confidence", (int, float), 0.95),
        tasks=tasks,
        arms=arms,
        confirms=tuple(path.parent / name for name in table.take_list("confirms", str)),
    )
    table.done()
    _check(study)
    return study


def _arm(name: str, table: _Table, tasks: Mapping[str, Any]) -> Arm:
    schedule = table.take("schedule", str, name)
    against, factor = table.take_list("against", str), table.take("time_factor", (int, float), 1.0)
    on = table.take_list("tasks", str) or tuple(tasks)
    unknown = [task for task in on if task not in tasks]
    if unknown:
        raise _MistakeError(
            f"arms.{name}: tasks names {unknown[0]}, which is not among {_list(tasks)}"
        )
    apart = {
        task: _Table(table.take(task, dict, {}), f"arms.{name}.{task}: ").flags() for task in tasks
    }
    flags = table.flags()
    if factor <= 0:
        raise _MistakeError(f"arms.{name}: time_factor must be above 0, got {factor}")
    return Arm(
        schedule=schedule,
        flags={task: flags | apart[task] for task in on},
        against=against,
        time_factor=factor,
    )


def _check(study: Study) -> None:
    if study.clock not in CLOCKS:
        raise _MistakeError(f"clock must be one of {_list(CLOCKS)}, got {study.clock!r}")
    for what in ("tasks", "arms", "seeds"):
        if not getattr(study, what):
            raise _MistakeError(f"there must be {what}, got none: add some")
    if not 0 < study.margin < 1 or not 0 < study.confidence < 1:
        raise _MistakeError(
            f"margin and confidence must be between 0 and 1, got {study.margin} and "
            f"{study.confidence}"
        )
    if any(not 0 <= seed < 2**31 for seed in study.seeds):
        raise _MistakeError(f"seeds must be 0 to 2**31 - 1, got {_list(study.seeds)}")
    judged = {study.baseline, *([study.null] if study.null else [])}
    for name, arm in study.arms.items():
        judged |= set(arm.against)
        if name in arm.against:
            raise _MistakeError(f"arms.{name}: against must name other arms, got its own name")
    for name in sorted(judged):
        if name not in study.arms:
            raise _MistakeError(f"{name} is not among the arms {_list(study.arms)}: add it")
    for name in (study.baseline, study.null):
        if name and set(study.arms[name].flags) != set(study.tasks):
            raise _MistakeError(
                f"arms.{name} has to run on all tasks, since the others are held to it"
            )
    for name, arm in study.arms.items():
        missing = [(r, t) for r in arm.against for t in arm.flags if t not in study.arms[r].flags]
        if missing:
            rival, task = missing[0]
            raise _MistakeError(
                f"arms.{name} is judged against {rival}, which does not run on {task}"
            )
    if study.null:
        _check_null(study)
    names = [base_name(arm.schedule) for arm in study.arms.values()]
    if study.clock == "cost" and "lora" in names:
        raise _MistakeError('lora has no computed cost: leave it out, or take clock = "time"')
    if not study.confirms:
        return
    if len(study.seeds) < FEWEST:
        raise _MistakeError(
            f"a confirmation needs {FEWEST} seeds or more, got {len(study.seeds)}: add some, or "
            "drop `confirms`"
        )
    if study.null is None:
        raise _MistakeError(
            "a confirmation needs `null`, the baseline once more, for the noise: add it"
        )


def _check_null(study: Study) -> None:
    null, base = study.arms[study.null or ""], study.arms[study.baseline]
    same = base_name(null.schedule) == base_name(base.schedule) and null.flags == base.flags
    if not same or null.time_factor != base.time_factor:
        raise _MistakeError(
            f"null must be the baseline {study.baseline} once more, got {study.null}, which differs"
        )


def _check_fresh(study: Study, search: Study) -> None:
    """A seed that arms were chosen by cannot confirm the choice."""
    used = sorted(set(study.seeds) & set(search.seeds))
    if used:
        raise UserError(
            f"{study.path}: the seeds {_list(used)} were already used by {search.path}, which it "
            "confirms: take others"
        )


def _list(values: Sequence[Any] | Mapping[str, Any]) -> str:
    return ", ".join(map(str, values))
