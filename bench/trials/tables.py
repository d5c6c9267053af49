"""Reading a study file: TOML whose keys are all known, and values of the right kind."""

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

from bench.config import Config, UserError

_OWN = {"seed", "schedules", "equal_time_budget", "interleave", "time_budget_ms", "out",
        "json_out", "html", "resume", "checkpoint_every", "allow_previous", "preflight",
        "random_like"}  # fmt: skip
_FLAGS = {field.name for field in dataclasses.fields(Config)} - _OWN
_TEXTS = {name for name, kind in get_type_hints(Config).items() if kind is str} & _FLAGS
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+#-]{0,79}")  # they make names of files


class MistakeError(Exception):
    """What is wrong in a study file."""


def parse(path: Path) -> "Table":
    """The content of a TOML file. Raises UserError if it is none."""
    try:
        content = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a study file") from None
    except ValueError as error:  # tomllib's own, UTF-8's, that of a number of many digits
        raise UserError(f"{path} is not TOML ({error}): mend it") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply: give a study file") from None
    if any(type(value) is int and abs(value) >= 2**63 for value in _values(content)):
        raise UserError(f"{path} holds a whole number of more than 64 bits: mend it")
    return Table(content)


class Table:
    """A TOML table, whose keys are taken out one by one; nothing may be left over."""

    def __init__(self, content: dict[str, Any], where: str = "") -> None:
        self._left, self._where = dict(content), where
        self._known: list[str] = []

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The value of `key`, which must be of that kind."""
        self._known.append(key)
        value = self._left.pop(key, default)
        if value is not default and (not isinstance(value, kind) or isinstance(value, bool)):
            names = {str: "text", int: "a whole number", dict: "a table", list: "a list"}
            wanted = names.get(kind, "a number") if isinstance(kind, type) else "a number"
            raise MistakeError(f"{self._where}{key} must be {wanted}, got {value!r}: mend it")
        return value

    def take_list(self, key: str, kind: type) -> tuple[Any, ...]:
        """The values of `key`, all of that kind and different."""
        values = self.take(key, list, [])
        if not all(type(value) is kind for value in values):
            words = "whole numbers" if kind is int else "texts"
            raise MistakeError(
                f"{self._where}{key} must be a list of {words}, got {values!r}: mend it"
            )
        if len(set(values)) < len(values):
            raise MistakeError(f"{self._where}{key} names one twice, got {values!r}: leave one out")
        return tuple(values)

    def take_tables(self, key: str) -> Iterator[tuple[str, "Table"]]:
        """The tables below `key`, by name."""
        for name, content in self.take(key, dict, {}).items():
            if not _NAME.fullmatch(name):
                raise MistakeError(
                    f"{key} must be named with up to 80 letters, digits and any of _.+#-, got "
                    f"{name!r}: take another name"
                )
            if not isinstance(content, dict):
                raise MistakeError(f"{key}.{name} must be a table, got {content!r}: mend it")
            yield name, Table(content, f"{key}.{name}: ")

    def flags(self) -> dict[str, Any]:
        """What is left, which has to be flags of bench/run.py."""
        for key, value in self._left.items():
            if key not in _FLAGS:
                near = difflib.get_close_matches(key, _FLAGS, 1)
                hint = f"did you mean {near[0]}?" if near else "see bench/run.py --help"
                ours = "is the study's to set: drop it" if key in _OWN else f"is no flag: {hint}"
                raise MistakeError(f"{self._where}{key} {ours}")
            if key in _TEXTS and not isinstance(value, str):
                raise MistakeError(f"{self._where}{key} must be text, got {value!r}: mend it")
        return self._left

    def done(self) -> None:
        """Nothing may be left."""
        for key in self._left:
            raise MistakeError(f"{key} is not known here: there are {', '.join(self._known)}")


def _values(content: Any) -> Iterator[Any]:
    """The values at the ends of tables and lists."""
    if isinstance(content, (dict, list)):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _values(value)
    else:
        yield content
