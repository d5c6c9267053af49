"""What a study has to be, so that its arms can be compared."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.config import Config, UserError
from bench.runner import schedule_of
from bench.trials.arms import CLOCKS, FEWEST, Cell, Study
from bench.trials.tables import MistakeError
from blocksched.schedules.flags import base_name


def check(study: Study) -> None:
    """Raise MistakeError, with the rule, the value and the remedy, if it cannot be run."""
    _check_values(study)
    _check_names(study)
    if study.null:
        _check_null(study)
    if study.confirms:
        _check_confirmation(study)
    for task in study.tasks:
        _check_arms(study, task)


def check_fresh(study: Study, search: Study) -> None:
    """A seed that arms were chosen by cannot confirm the choice. Raises UserError."""
    used = sorted(set(study.seeds) & set(search.seeds))
    if used:
        raise UserError(
            f"{study.path}: the seeds {_list(used)} were already used by {search.path}, which it "
            "confirms: take others"
        )


def _check_values(study: Study) -> None:
    if study.clock not in CLOCKS:
        raise MistakeError(
            f"clock must be one of {_list(CLOCKS)}, got {study.clock!r}: choose one of these"
        )
    for what in ("tasks", "arms", "seeds"):
        if not getattr(study, what):
            raise MistakeError(f"there must be {what}, got none: add some")
    if not 0 < study.margin < 1 or not 0 < study.confidence < 1:
        raise MistakeError(
            f"margin and confidence must be between 0 and 1, got {study.margin} and "
            f"{study.confidence}: mend them"
        )
    if any(not 0 <= seed < 2**31 for seed in study.seeds):
        raise MistakeError(f"seeds must be 0 to 2**31 - 1, got {_list(study.seeds)}: take others")
    for task in study.tasks:
        if "-" in task:  # files are named TASK-ARM-SEED
            raise MistakeError(f"tasks must be named without -, got {task}: take another name")
    names = [base_name(arm.schedule) for arm in study.arms.values()]
    if study.clock == "cost" and "lora" in names:
        raise MistakeError('lora has no computed cost: leave it out, or take clock = "time"')


def _check_names(study: Study) -> None:
    judged = {study.baseline, *([study.null] if study.null else [])}
    for name, arm in study.arms.items():
        judged |= set(arm.against)
        if name in arm.against:
            raise MistakeError(
                f"arms.{name}: against must name other arms, got its own name: leave it out"
            )
    for name in sorted(judged):
        if name not in study.arms:
            raise MistakeError(f"{name!r} is not among the arms {_list(study.arms)}: add it")
    for name in (study.baseline, study.null):
        if name and set(study.arms[name].flags) != set(study.tasks):
            raise MistakeError(
                f"arms.{name} has to run on all tasks, since the others are held to it: drop its "
                "`tasks`"
            )
    for name, arm in study.arms.items():
        missing = [(r, t) for r in arm.against for t in arm.flags if t not in study.arms[r].flags]
        if missing:
            rival, task = missing[0]
            raise MistakeError(
                f"arms.{name} is judged against {rival}, which does not run on {task}: add it to "
                f"the `tasks` of {rival}"
            )


def _check_null(study: Study) -> None:
    null, base = study.arms[study.null or ""], study.arms[study.baseline]
    same = base_name(null.schedule) == base_name(base.schedule) and null.flags == base.flags
    if study.null == study.baseline or not same or null.time_factor != base.time_factor:
        raise MistakeError(
            f"null must be another arm that does what the baseline {study.baseline} does, got "
            f"{study.null}: take away what differs, or give it an arm of its own"
        )


def _check_confirmation(study: Study) -> None:
    if len(study.seeds) < FEWEST:
        raise MistakeError(
            f"a confirmation needs {FEWEST} seeds or more, got {len(study.seeds)}: add some, or "
            "drop `confirms`"
        )
    if not study.null:
        raise MistakeError(
            "a confirmation needs `null`, the baseline once more, for the noise: add it"
        )


def _check_arms(study: Study, task: str) -> None:
    """Schedules are there and fit the model, and all arms are validated on the same."""
    wanted = _validated(study.config(Cell(task, study.baseline, study.seeds[0])))
    for name in study.arms_of(task):
        config = study.config(Cell(task, name, study.seeds[0]))
        try:
            _, clamped = schedule_of(study.arms[name].schedule, config)
        except UserError as error:
            raise MistakeError(f"arm {name}, task {task}: {error}") from None
        if clamped:
            raise MistakeError(f"arm {name}, task {task}: {clamped[0]}; say what is meant")
        found = _validated(config)
        differ = [what for what in found if found[what] != wanted[what]]
        if differ:
            what = differ[0]
            raise MistakeError(
                f"arm {name}, task {task}: arms must be validated on the same, got {what} "
                f"{found[what]} and of {study.baseline} {wanted[what]}: make them alike"
            )


def _validated(config: Config) -> dict[str, Any]:
    """What the validation loss depends on, beside the model."""
    return {
        "task": config.task,
        "data": config.data,
        "seq_len": config.seq_len,
        "batch_size x val_batches": config.batch_size * config.val_batches,
    }


def _list(values: Sequence[Any] | Mapping[str, Any]) -> str:
    return ", ".join(map(str, values))
