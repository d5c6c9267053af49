"""`bench/run.py --replay`: were the decisions of recorded runs these, and what would others be?"""

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from bench.config import UserError
from bench.results import read
from blocksched.schedules.flags import NAMES, flags_of, option
from blocksched.schedules.replay import replay
from blocksched.schedules.what_if import Outcome, spread, what_if

_SHOWN = 5  # differences that are printed
_Result = TypeVar("_Result")


def replay_files(given: Mapping[str, Any]) -> int:
    """Replay the files of --replay, or with --schedules say what these would have done on them.

    Returns 1 if a decision differs. Raises UserError for an unreadable file, an unknown schedule or
    a flag that is not one of a schedule.
    """
    if "schedules" not in given:
        return max([_verify(name) for name in given["replay"]])
    flags = {key: value for key, value in given.items() if key not in ("replay", "schedules")}
    known = {flag.key for name in NAMES for flag in flags_of(name)}
    for key in flags:
        if key not in known:
            raise UserError(
                f"--replay with --schedules takes flags of schedules only, got {option(key)}: drop "
                "it, the rest is as recorded"
            )
    schedules = [name.strip() for name in given["schedules"].split(",") if name.strip()]
    if not schedules:
        raise UserError("--schedules must name at least one schedule, got none: see --help")
    for name in given["replay"]:
        run, outcomes = _use(name, lambda content: what_if(content, schedules, flags))
        steps = len(outcomes[0].active)
        print(f"{name}: what would have been done in the {steps} steps of its {run}")
        for outcome in outcomes:
            print("\n".join(_lines(outcome)))
    return 0


def _verify(name: str) -> int:
    steps, differences, left_out = _use(name, replay)
    print(f"{name}: {steps} steps, {len(differences)} differences")
    for difference in differences[:_SHOWN]:
        print(f"  {difference}")
    for run in left_out:
        print(f"  {run} left out: the file lacks the readings that it decided by")
    return int(bool(differences))


def _use(name: str, function: Callable[[Any], _Result]) -> _Result:
    """What `function` makes of a file's content. Raises UserError if it cannot be used."""
    try:
        return function(read(Path(name)))
    except RecursionError:
        raise UserError(f"{name} is nested too deeply: give a result file") from None
    except ValueError as error:
        raise UserError(f"{name} cannot be replayed: {error}") from None


def _lines(outcome: Outcome) -> list[str]:
    active = outcome.active
    percent = [f"{100 * share:.0f}" for share in spread(outcome.shares)]
    grouped = " (means of neighbours)" if len(percent) < len(outcome.shares) else ""
    return [
        f"  {outcome.schedule}: {statistics.fmean(active):.1f} active blocks (least {min(active)}, "
        f"most {max(active)}), {outcome.probes} probes, {outcome.cost:.0%} of a full update's cost",
        f"    % of steps in which each block trained, block 0 first{grouped}: {' '.join(percent)}",
        *(f"    {note}" for note in outcome.notes),
    ]
