"""A result for those without a browser: lines of text no longer than the terminal is wide."""

import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TextIO

from bench.pages.evidence import Evidence, Run
from bench.pages.spark import levels_of, spark
from bench.pages.words import headline
from bench.table import aligned, grid, number

_CURVE = 32  # characters of a curve at most
_LABEL = 14  # of what stands before it
_NAME = 24


def summary(evidence: Evidence, stream: TextIO | None = None) -> list[str]:
    """The file's name and the verdict's sentence, the table, and each schedule's curves.

    Args:
        evidence: the result file.
        stream: where it is to be printed, by default the standard output: where its encoding lacks
            block elements, curves are drawn in digits, 0 the lowest.
    """
    width = shutil.get_terminal_size().columns
    levels = levels_of(sys.stdout if stream is None else stream)
    lines = [printable(f"{evidence.name}: {headline(evidence)[0]}")]
    if evidence.runs:
        cells = grid(evidence.content["results"], evidence.on_cpu)
        lines += _tables([[_name(line[0]), *line[1:]] for line in cells], width)
        lines += [
            "",
            "Losses over the run (without its steep first tenth) and blocks that train:",
        ]
    for run in evidence.runs:
        lines += ["", _story(run), *_curves(run, evidence.n_blocks, width, levels)]
    return [part for line in lines for part in textwrap.wrap(line, width) or [""]]


def _tables(cells: Sequence[Sequence[str]], width: int) -> list[str]:
    """The columns one below the other where they do not fit side by side, each with the names."""
    names, *columns = zip(*cells, strict=True)
    lines = []
    while columns:
        count = len(columns)
        while count > 1 and len(_joined(names, columns[:count])[0]) > width:
            count -= 1
        lines += ["", *_joined(names, columns[:count])]
        columns = columns[count:]
    return lines


def _joined(names: Sequence[str], columns: Sequence[Sequence[str]]) -> list[str]:
    return aligned(list(zip(names, *columns, strict=True)))


def _story(run: Run) -> str:
    row = run.row
    loss = number(row["final_val_loss"], ".4f")
    end = "no final loss" if loss == "-" else f"final validation loss {loss}"
    if row["elapsed_ms"] is not None:
        end += f" after {row['elapsed_ms'] / 1e3:,.1f} s"
    if row["failure"] is not None:
        end += f"; stopped: {printable(row['failure'])}"
    return f"{_name(run.name)}: {end}"


def _curves(run: Run, n_blocks: int, width: int, levels: str) -> list[str]:
    validated = len(run.validations) > 1
    losses = [point.loss for point in run.validations] if validated else run.losses
    label = "val loss" if validated else "train loss"
    losses = losses[-(-len(losses) // 10) :] if len(losses) > 1 else losses
    known = [loss for loss in losses if loss is not None]
    lines = []
    if known:
        ends = f"{known[0]:.4f} to {known[-1]:.4f}"
        lines.append(_curve(label, losses, ends, width, levels, None))
    if run.active:
        least, most = min(run.active), max(run.active)
        count = f"{least} to {most}" if least < most else f"{most}"
        note = f"{count} of {n_blocks} blocks"
        lines.append(_curve("active", run.active, note, width, levels, (0, n_blocks)))
    return lines


def _curve(
    label: str,
    values: Sequence[float | None],
    note: str,
    width: int,
    levels: str,
    span: tuple[float, float] | None,
) -> str:
    room = min(_CURVE, width - _LABEL - 2 - len(note))
    return f"  {label:<{_LABEL - 2}}{spark(values, room, levels, span):<{max(room, 0)}}  {note}"


def _name(name: str) -> str:
    """At most so long that a table stays one."""
    shown = printable(name)
    return shown if len(shown) <= _NAME else f"{shown[: _NAME - 2]}.."


def printable(words: str) -> str:
    """Nothing that a terminal would obey, or show wider than a character."""
    return ascii(words)[1:-1]
