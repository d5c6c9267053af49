"""Whether a file is the sound result of a study: every field that its page reads."""

import sys
from collections.abc import Mapping
from typing import Any

from bench.pages.checks import count, listed, mapping, number, number_or_none, short

SCRIPT = "bench/study.py"
_VERDICTS = ("WIN", "FASTER_BUT_WORSE", "NO_DIFFERENCE", "LOSS", "INCONCLUSIVE")
_INTERVALS = {"loss": "mean", "time": "median", "step": "mean"}
_COUNTS = ("seed", "steps", "probes", "skipped_steps")


def check(content: Any) -> Mapping[str, Any]:
    """The content of a study's result file. Raises ValueError if it is none."""
    top = mapping(content, "the file")
    if top.get("script") != SCRIPT:
        raise ValueError(f"its script is {top.get('script')!r}, not {SCRIPT!r}")
    for field in ("timestamp_utc", "name", "question", "command", "study", "method", "baseline"):
        _text(top.get(field), field)
    _one_of(top.get("status"), ("complete", "incomplete"), "status")
    _one_of(top.get("clock"), ("time", "cost"), "clock")
    if top.get("null") is not None:
        _text(top["null"], "null")
    for seed in listed(top.get("seeds"), "seeds"):
        count(seed, "a seed")
    for field in ("confirms", "commits"):
        for name in listed(top.get(field), field):
            _text(name, f"a name of {field}")
    for field in ("margin", "confidence"):
        _share(top.get(field), field)
    mapping(top.get("system"), "system")
    if top.get("prices") is not None:
        mapping(top["prices"], "prices")
    for name, task in mapping(top.get("tasks"), "tasks").items():
        _check_task(mapping(task, f"task {name!r}"), top["baseline"], f"task {name!r}")
    return top


def _check_task(task: Mapping[str, Any], baseline: str, where: str) -> None:
    for field in ("info", "flags"):
        mapping(task.get(field), f"{field} of {where}")
    count(task.get("comparisons"), f"comparisons of {where}")
    _share(task.get("level"), f"level of {where}")
    arms = mapping(task.get("arms"), f"arms of {where}")
    if baseline not in arms:
        raise ValueError(f"the arms of {where} lack the baseline {baseline!r}")
    for name, arm in arms.items():
        _check_arm(mapping(arm, f"arm {name!r}"), arms, f"{name!r}, {where}")
        if name != baseline:
            _check_verdict(arm, f"{name!r}, {where}")


def _check_arm(arm: Mapping[str, Any], arms: Mapping[str, Any], where: str) -> None:
    _text(arm.get("schedule"), f"schedule of {where}")
    _text(arm.get("notes") or "", f"notes of {where}")
    mapping(arm.get("flags"), f"flags of {where}")
    _number_or_none(arm.get("planted"), f"planted of {where}")
    for field, middle in _INTERVALS.items():
        if arm.get(field) is not None:
            _check_interval(arm[field], middle, f"{field} of {where}")
    for rival, pair in mapping(arm.get("against"), f"against of {where}").items():
        both = f"{where}, against {rival!r}"
        if rival not in arms:
            raise ValueError(f"{both}: there is no such arm")
        _check_interval(pair, "mean", both)
        _check_verdict(pair, both)
    for cell in listed(arm.get("cells"), f"cells of {where}"):
        _check_cell(mapping(cell, f"a cell of {where}"), where)


def _check_cell(cell: Mapping[str, Any], where: str) -> None:
    for field in _COUNTS:
        count(cell.get(field), f"{field} in a cell of {where}")
    for field in ("budget_ms", "elapsed_ms"):
        if number(cell.get(field), f"{field} in a cell of {where}") <= 0:
            raise ValueError(f"{field} in a cell of {where} must be above 0, got {cell[field]}")
    for field in ("final_val_loss", "mean_step_ms"):
        number_or_none(cell.get(field), f"{field} in a cell of {where}")
    if cell.get("failure") is not None:
        _text(cell["failure"], f"failure in a cell of {where}")
    for steps in listed(cell.get("active_counts"), f"active_counts of {where}"):
        count(steps, f"active_counts of {where}")
    for value in listed(cell.get("val_trace"), f"val_trace of {where}"):
        point = mapping(value, f"val_trace of {where}")
        count(point.get("step"), f"a step in val_trace of {where}")
        number(point.get("elapsed_ms"), f"elapsed_ms in val_trace of {where}")
        number_or_none(point.get("val_loss"), f"val_loss of {where}")


def _check_interval(value: Any, middle: str, what: str) -> None:
    interval = mapping(value, what)
    for field in (middle, "low", "high"):
        _number_or_none(interval.get(field), f"{field} of {what}")


def _check_verdict(judged: Mapping[str, Any], where: str) -> None:
    _one_of(judged.get("verdict"), _VERDICTS, f"the verdict of {where}")
    _text(judged.get("why"), f"why of {where}")


def _number_or_none(value: Any, what: str) -> None:
    """Of any size: with two seeds an interval may reach very far."""
    sound = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (sound and abs(value) <= sys.float_info.max):
        raise ValueError(f"{what} must be a finite number or null, got {short(value)}")


def _share(value: Any, what: str) -> None:
    if not 0 < number(value, what) < 1:
        raise ValueError(f"{what} must be between 0 and 1, got {value}")


def _text(value: Any, what: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text, got {short(value)}")


def _one_of(value: Any, known: tuple[str, ...], what: str) -> None:
    if value not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, got {short(value)}")
