"""Dataclass fields that carry their own documentation and range.

A schedule's numbers, and the benchmark's flags, are declared once: `number(40, "...", ge=0)`. The
help text, the range check and its error message all come from that line.
"""

import dataclasses
import reprlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

_LARGEST = 2**53  # beyond it not every whole number is a float
_BOUNDS: tuple[tuple[str, str, Callable[[float, float], bool]], ...] = (
    ("ge", ">= {}", lambda value, bound: value >= bound),
    ("gt", "> {}", lambda value, bound: value > bound),
    ("le", "<= {}", lambda value, bound: value <= bound),
    ("lt", "< {}", lambda value, bound: value < bound),
)


def number(default: float, doc: str, *, optional: bool = False, **bounds: float) -> Any:
    """A field holding a finite number, or None if `optional`; `bounds`: any of ge, gt, le, lt."""
    return dataclasses.field(
        default=default, metadata={"help": doc, "optional": optional, **bounds}
    )


def choice(default: str, doc: str, options: Sequence[str]) -> Any:
    """A field holding one of `options`."""
    return dataclasses.field(default=default, metadata={"help": doc, "options": tuple(options)})


def text(default: Any, doc: str) -> Any:
    """A field of any other type, with its documentation."""
    return dataclasses.field(default=default, metadata={"help": doc})


def check_numbers(owner: Any, label: Callable[[str], str] = str) -> None:
    """Raise ValueError naming the first field of the dataclass `owner` outside its range.

    `label` turns a field's name into what the reader knows it by, such as a flag.
    """
    for field in dataclasses.fields(owner):
        value = getattr(owner, field.name)
        options = field.metadata.get("options")
        if options is not None and value not in options:
            raise ValueError(
                f"{label(field.name)} must be one of {', '.join(options)}, got "
                f"{reprlib.repr(value)}: choose one of these"
            )
        if value is None and (field.default is None or field.metadata.get("optional")):
            continue
        if isinstance(field.default, bool):
            _require(isinstance(value, bool), label(field.name), "true or false", value)
        elif isinstance(field.default, int):
            whole = isinstance(value, int) and not isinstance(value, bool)
            _require(whole, label(field.name), "a whole number", value)
            _require(abs(value) <= _LARGEST, label(field.name), "at most 2**53 in size", value)
        elif isinstance(field.default, float) or (field.default is None and value is not None):
            real = isinstance(value, (int, float)) and not isinstance(value, bool)
            finite = real and abs(value) <= sys.float_info.max  # also of whole numbers
            _require(finite, label(field.name), "a finite number", value)
        _check_bounds(value, field.metadata, label(field.name))


def _check_bounds(value: Any, metadata: Any, name: str) -> None:
    rules = [(text, holds, metadata[key]) for key, text, holds in _BOUNDS if key in metadata]
    wording = " and ".join(text.format(bound) for text, _, bound in rules)
    for _, holds, bound in rules:
        _require(holds(value, bound), name, wording, value)


def _require(holds: bool, name: str, rule: str, value: Any) -> None:
    if not holds:
        raise ValueError(
            f"{name} must be {rule}, got {reprlib.repr(value)}: give a value in that range"
        )
