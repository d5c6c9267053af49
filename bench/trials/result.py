"""What a study gave, as its result file has it, and as lines for the end of a run."""

from collections.abc import Mapping
from typing import Any

from bench.trials.design import Cell, Study


def document(
    study: Study, done: Mapping[Cell, Mapping[str, Any]], prices: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The result file's content, of the cells that are done; `prices` on the computed clock."""
    raise NotImplementedError


def lines(document: Mapping[str, Any]) -> list[str]:
    """Tables, verdicts and what cannot be said, from the result file's content."""
    raise NotImplementedError
