"""A study: which arms are compared, on which tasks and seeds. Read from a TOML file.

question = "Does growing the stack beat a full update?"
clock = "time"                  # or "cost": computed from parts that were measured once
seeds = [101, 102]
baseline = "full_update"        # the arm that the others are compared with
null = "again"                  # an arm that is the baseline once more
margin = 0.01                   # relative differences of the loss below this do not matter
confirms = ["search.toml"]      # the searches that chose these arms; none: this is a search
prices = "prices.json"          # of the computed clock; what it lacks is measured

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

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.config import UserError
from bench.trials.arms import CLOCKS, FEWEST, Arm, Cell, Study
from bench.trials.checks import check, check_fresh
from bench.trials.tables import MistakeError, Table, parse

__all__ = ["CLOCKS", "FEWEST", "Arm", "Cell", "Study", "load"]


def load(path: Path, clock: str | None = None) -> Study:
    """The study in a file, on `clock` if that is given.

    Raises UserError if the file cannot be used, with the rule, the value and the remedy.
    """
    study = _load(path, clock)
    for file in study.confirms:
        search = _load(file)
        if search.confirms:
            raise UserError(
                f"{study.path}: confirms must name searches, got {file}, which confirms others "
                "itself: name those"
            )
        check_fresh(study, search)
    return study


def _load(path: Path, clock: str | None = None) -> Study:
    try:
        study = _study(path, parse(path), clock)
        check(study)
    except MistakeError as mistake:
        raise UserError(f"{path}: {mistake}") from None
    return study


def _study(path: Path, table: Table, clock: str | None) -> Study:
    shared = Table(table.take("flags", dict, {}), "flags: ").flags()
    tasks = {}
    for name, content in table.take_tables("tasks"):
        tasks[name] = shared | content.flags()
        tasks[name].setdefault("task", name)
    arms = {name: _arm(name, content, tasks) for name, content in table.take_tables("arms")}
    said = table.take("clock", str, "time")
    prices = table.take("prices", str)
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
        prices=None if prices is None else path.parent / prices,
    )
    table.done()
    return study


def _arm(name: str, table: Table, tasks: Mapping[str, Any]) -> Arm:
    schedule = table.take("schedule", str, name)
    against, factor = table.take_list("against", str), table.take("time_factor", (int, float), 1.0)
    on = table.take_list("tasks", str) or tuple(tasks)
    unknown = [task for task in on if task not in tasks]
    if unknown:
        raise MistakeError(
            f"arms.{name}: tasks names {unknown[0]}, which is not among {', '.join(tasks)}: "
            "leave it out"
        )
    apart = {
        task: Table(table.take(task, dict, {}), f"arms.{name}.{task}: ").flags() for task in on
    }
    flags = table.flags()
    if not 0.001 <= factor <= 1000:
        raise MistakeError(
            f"arms.{name}: time_factor must be between 0.001 and 1000, got {factor}: mend it"
        )
    return Arm(
        schedule=schedule,
        flags={task: flags | apart[task] for task in on},
        against=against,
        time_factor=factor,
    )
