"""The main plots as PNG files for a paper, drawn with matplotlib."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.config import UserError
from bench.pages import plots
from bench.pages.curves import reach
from bench.pages.evidence import Evidence
from bench.pages.looks import LIGHT
from bench.pages.losses import by_unit
from bench.pages.shares import shares
from bench.results import write_whole

_COLUMN, _PAGE = 3.4, 7.0  # inches: the widths of a column and of a page of two columns
_LONGEST = 60  # characters of a file's name that come from a name in the result file
_STYLE = {
    "font.family": "DejaVu Sans",  # matplotlib brings it: the same letters on every machine
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.edgecolor": LIGHT["soft"],
    "axes.labelcolor": LIGHT["ink"],
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["soft"],
    "ytick.color": LIGHT["soft"],
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.6,
    "figure.dpi": 300,
    "savefig.dpi": 300,
}

# A name, the size in inches, and what draws on a figure of that size.
Named = tuple[str, tuple[float, float], Callable[[Any], None]]


def draw(evidences: Sequence[Evidence], folder: Path) -> list[Path]:
    """Write the plots that the files have data for, and return where they lie.

    Of all files together the loss over time; of each one its step times and, of each schedule that
    moved, what trained and how relevance was spread. The same files give the same bytes.

    Raises:
        UserError: matplotlib is missing, or `folder` cannot be made or written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--png needs matplotlib: pip install matplotlib") from None
    written = []
    with matplotlib.rc_context():  # whatever a matplotlibrc says
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, size, plot in plots_of(evidences):
                figure = Figure(figsize=size, layout="constrained")
                plot(figure)
                image = io.BytesIO()
                figure.savefig(image, format="png", metadata={"Software": None})
                written.append(folder / f"{name}.png")
                write_whole(written[-1], image.getvalue())
        except OSError as error:
            raise UserError(
                f"--png {folder} must be a folder that can be written ({error.strerror}): "
                "choose another"
            ) from None
    return written


def plots_of(evidences: Sequence[Evidence]) -> Iterator[Named]:
    """Each with a name of its own that is no path, however names in the files may look."""
    taken: set[str] = set()
    for name, size, plot in _plots(evidences):
        slug = re.sub(r"[^A-Za-z0-9]+", "-", name)[-_LONGEST:].strip("-")
        again, unique = 2, slug
        while unique.lower() in taken:
            unique, again = f"{slug}-{again}", again + 1
        taken.add(unique.lower())
        yield unique, size, plot


def _plots(evidences: Sequence[Evidence]) -> Iterator[Named]:
    alone = len(evidences) == 1
    name = evidences[0].name if alone else "all"
    for suffix, unit, group in by_unit(evidences):
        lines, ends = plots.loss_curves(group)
        if reach([*lines, *ends]) is not None:
            n = len(lines)  # the legend is above the plot, a line for two, or to its right
            size = (_COLUMN, 2.0 + 0.1 * n) if alone else (_PAGE, max(2.4, 0.3 + 0.14 * n))
            plot = partial(plots.losses, evidences=group, lines=lines, ends=ends, unit=unit)
            yield f"{name}-loss{suffix}", size, plot
    for evidence in evidences:
        yield from _of_one(evidence)


def _of_one(evidence: Evidence) -> Iterator[Named]:
    if any(ms is not None for run in evidence.runs for ms in run.step_ms):
        size = _COLUMN, 2.0 + 0.1 * len(evidence.runs)
        yield f"{evidence.name}-steps", size, partial(plots.steps, evidence=evidence)
    for run in evidence.runs:
        if run.active and (run.probes or len(run.changes) > 1):
            name = f"{evidence.name}-{run.name}"
            size = _PAGE, 1.1 + min(1.6, 0.12 * evidence.n_blocks)
            yield f"{name}-trained", size, partial(plots.block_map, evidence=evidence, run=run)
            if any(map(shares, run.probes)):
                plot = partial(plots.relevance, evidence=evidence, run=run)
                yield f"{name}-relevance", size, plot
