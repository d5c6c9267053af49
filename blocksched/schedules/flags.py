"""The benchmark's flags -> schedules: one flag a field, with the original experiment's clamping.

The library raises where a number does not fit the model; for the experiment's own schedules the
benchmark and the recordings clamp it and say so. Both forms of the rule meet here.
"""

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_origin, get_type_hints

from blocksched.schedules.autofreeze import AutoFreeze
from blocksched.schedules.base import Schedule
from blocksched.schedules.cyclic import Cyclic
from blocksched.schedules.dynamic_suffix import DynamicSuffix
from blocksched.schedules.freezeout import FreezeOut
from blocksched.schedules.full_update import FullUpdate
from blocksched.schedules.grades import GradES
from blocksched.schedules.grow import Grow
from blocksched.schedules.lisa import Lisa
from blocksched.schedules.numbers import choice
from blocksched.schedules.payoff import Payoff
from blocksched.schedules.random_suffix import RandomSuffix
from blocksched.schedules.row_suffix import RowSuffix
from blocksched.schedules.static_suffix import StaticSuffix

# Each schedule, and what its flags begin with.
SCHEDULES: dict[str, tuple[type, str]] = {
    "full_update": (FullUpdate, ""),
    "static_suffix": (StaticSuffix, "static"),
    "dynamic_suffix": (DynamicSuffix, "dyn"),
    "random_suffix": (RandomSuffix, "random"),
    "lisa": (Lisa, "lisa"),
    "cyclic": (Cyclic, "cyclic"),
    "freezeout": (FreezeOut, "freezeout"),
    "autofreeze": (AutoFreeze, "autofreeze"),
    "grades": (GradES, "grades"),
    "grow": (Grow, "grow"),
    "payoff": (Payoff, "payoff"),
    "row_suffix": (RowSuffix, "row"),
    "lora": (FullUpdate, "lora"),  # in the benchmark alone: of a model with adapters
}
NAMES = tuple(SCHEDULES)

_COUNTED_IN_LAYERS = (
    "static_active",
    "dyn_min_active",
    "dyn_max_active",
    "dyn_final_recovery_stage1",
    "dyn_final_recovery_stage2",
)
_CLAMPED = (
    "min_active",
    "max_active",
    "final_recovery_stage1_progress",
    "final_recovery_stage2_progress",
    "final_recovery_stage1",
    "final_recovery_stage2",
)
# What a recording made before a flag existed did.
_BEFORE_THE_FLAG: dict[str, Any] = {
    "dyn_freeze_start_frac": 0.0,
    "dyn_final_full_frac": 0.0,
    "dyn_loss_ema_decay": None,
}


class Flag(NamedTuple):
    """A field of a schedule on the command line.

    Attributes:
        key: the flag in snake_case, as in a result file's config.
        field: the schedule's field.
        kind: its type, str for words, and for numbers that are given as a list.
        declared: its default, help and range, see numbers.py.
    """

    key: str
    field: str
    kind: Any
    declared: Any


def flags_of(name: str, schedule: Any = None) -> list[Flag]:
    """The flags of the schedule `name`, or of the class `schedule` that runs in its place.

    Its seed is none of them: that of the run is.
    """
    schedule = schedule or SCHEDULES[name][0]
    hints = get_type_hints(schedule)
    fields = [field for field in dataclasses.fields(schedule) if field.name != "seed"]
    return [_flag(name, field, hints[field.name]) for field in fields]


def _flag(name: str, field: dataclasses.Field[Any], kind: Any) -> Flag:
    key = _key(name, field.name)
    default, metadata = field.default, dict(field.metadata)
    if field.name == "then":
        words = "grow: the schedule that goes on once all blocks run"
        return Flag(key, field.name, str, choice("full_update", words, NAMES[:3]))
    if isinstance(default, tuple):
        default, kind = ",".join(map(str, default)), str
    if get_origin(kind) is Literal:
        kind = str
    if key in CLAMPED:
        metadata = {k: v for k, v in metadata.items() if k not in ("ge", "gt", "le", "lt")}
    metadata.pop("optional", None)
    return Flag(key, field.name, kind, dataclasses.field(default=default, metadata=metadata))


def _key(name: str, field: str) -> str:
    key = f"{SCHEDULES[name][1]}_{field}"
    return f"{key}_layers" if key in _COUNTED_IN_LAYERS else key


CLAMPED = ("static_active_layers", *(_key("dynamic_suffix", field) for field in _CLAMPED))


def option(flag: str) -> str:
    """The flag as typed on a command line."""
    return "--" + flag.replace("_", "-")


def base_name(name: str) -> str:
    """The schedule of a run's name: `full_update#2` and `full_update+fused` are full_update."""
    return name.partition("#")[0].partition("+")[0]


def from_flags(name: str, config: Mapping[str, Any]) -> tuple[Schedule[Any], list[str]]:
    """The schedule `name` as the flags in `config` describe it, and a warning for each clamp.

    Flags that `config` lacks are read as recordings without them are. Raises ValueError for an
    unknown name or a number out of range.
    """
    base = base_name(name)
    if base not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: choose among {', '.join(NAMES)}")
    warnings: list[str] = []
    numbers: dict[str, Any] = {}
    for flag in flags_of(base):
        absent = _BEFORE_THE_FLAG.get(flag.key, flag.declared.default)
        numbers[flag.field] = config.get(flag.key, absent)
    schedule, _ = SCHEDULES[base]
    for field in dataclasses.fields(schedule):
        if field.name == "seed":
            numbers["seed"] = config.get("seed", field.default)
        elif isinstance(field.default, tuple):
            numbers[field.name] = _list(_key(base, field.name), numbers[field.name])
    if base == "static_suffix":
        limits = "static_active_layers", numbers["active"], 1, config["n_layers"]
        numbers["active"] = _clamp(*limits, warnings)
    elif base == "dynamic_suffix":
        _clamp_dynamic(numbers, config["n_layers"], warnings)
    elif "then" in numbers:
        numbers["then"], warnings = from_flags(_then(numbers["then"]), config)
    made: Schedule[Any] = schedule(**numbers)
    return made, warnings


def _then(name: Any) -> str:
    if name not in NAMES[:3]:
        raise ValueError(
            f"--grow-then must be one of {', '.join(NAMES[:3])}, got {reprlib.repr(name)}: choose "
            "one of these"
        )
    return str(name)


def _list(flag: str, value: Any) -> tuple[float, ...]:
    """Numbers separated by commas, "" for none."""
    words = value.split(",") if isinstance(value, str) and value else []
    try:
        if not isinstance(value, str):
            raise ValueError
        return tuple(float(word) if "." in word or "e" in word else int(word) for word in words)
    except ValueError:
        raise ValueError(
            f"{option(flag)} must be numbers separated by commas, got {reprlib.repr(value)}: give "
            "them as in 2,4"
        ) from None


def _clamp_dynamic(numbers: dict[str, Any], n: int, warnings: list[str]) -> None:
    """Bring the numbers of a DynamicSuffix into the range that `n` blocks allow."""
    window = _real(_key("dynamic_suffix", "final_full_frac"), numbers["final_full_frac"])
    staged = window > 0 and numbers["final_recovery_mode"] == "staged"

    def clamp(field: str, low: float, high: float, heard: bool = True) -> None:
        said = warnings if heard else []
        numbers[field] = _clamp(_key("dynamic_suffix", field), numbers[field], low, high, said)

    clamp("min_active", 1, n)
    least = numbers["min_active"]
    if numbers["max_active"] != 0:
        clamp("max_active", least, n)
    clamp("final_recovery_stage1_progress", 0.0, 1.0, staged)
    clamp("final_recovery_stage2_progress", numbers["final_recovery_stage1_progress"], 1.0, staged)
    clamp("final_recovery_stage1", least, n, staged)
    clamp("final_recovery_stage2", numbers["final_recovery_stage1"], n, staged)


def _clamp(flag: str, value: Any, low: float, high: float, warnings: list[str]) -> Any:
    used = min(max(_real(flag, value), low), high)
    if used != value:
        warnings.append(f"{option(flag)} {value} is outside {low}..{high}: {used} is used")
    return used


def _real(flag: str, value: Any) -> Any:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or value != value:  # a NaN
        raise ValueError(f"{option(flag)} must be a number, got {reprlib.repr(value)}: give one")
    return value
