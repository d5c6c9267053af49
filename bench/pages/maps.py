"""Which blocks trained, step by step, and which did not run at all: a map with the probes,
freezing's start and the recovery."""

from collections.abc import Sequence

from bench.pages.cells import LINE, axes, map_frame, paint, rules, slug, swatch, swatches
from bench.pages.chart import Drawing, Frame, Series, figure, ticks
from bench.pages.columns import Column, columns, in_words, marks
from bench.pages.evidence import Evidence, Run

SHARES = (0.5, 0.75, 1.0)  # how opaque: trained in some, in half or more, in all of the steps
_ABSENT = len(SHARES) + 1  # the level of a block that did not run
_ROOM, _LITTLE = 320.0, 56.0  # pixels of the map, and of one on which nothing ever changes
_STRIP = 16.0  # pixels for the probes' triangles


def block_map(evidence: Evidence, run: Run) -> str:
    """The figure; "" if the file does not tell which blocks trained."""
    n = evidence.n_blocks
    found = columns(run, n)
    if not found:
        return ""
    return figure(
        slug("map", evidence.name, run.name),
        f"Blocks that trained at each step: {run.name}",
        lambda width: _draw(width, found, marks(run), n),
        note=_note(found, n),
        legend=_legend(found),
    )


def _draw(
    width: float, found: Sequence[Column], marked: Sequence[tuple[int, str]], n: int
) -> Drawing:
    total, size = found[-1].first + found[-1].steps, found[0].steps
    still = len({(c.fewest, c.most, *_levels(c)) for c in found}) == 1
    probed = any(c.probes for c in found)
    frame = map_frame(
        width,
        total,
        n,
        room=_LITTLE if still else _ROOM,
        above=LINE * len(marked),
        below=_STRIP * probed,
    )
    whole = [x for x in ticks(0, total, (width - frame.left) / 80) if x == int(x)]
    rows = list(zip(*map(_levels, found), strict=True))
    svg = axes(frame, n, "step", whole)
    svg += paint(frame, rows, SHARES, columns=total / size, ground="frozen")
    svg += _probes(frame, found)
    svg += rules(frame, [(step, f"{what}, step {step}") for step, what in marked])
    told = {column.first: in_words(column, n) for column in found}
    for step, what in marked:
        told[step // size * size] += f"; {what} at step {step}"
    points = [(_middle(frame, c), frame.top, told[c.first]) for c in found]
    return Drawing(frame.height, svg, [Series("", points)])


def _levels(column: Column) -> list[int]:
    """By block, _ABSENT if it did not run in more than half of the steps, else 0 if it was frozen
    in all, else 1 to 3, as in SHARES."""
    return [
        _ABSENT if 2 * absent > column.steps else _level(trained, column.steps)
        for trained, absent in zip(column.trained, column.absent, strict=True)
    ]


def _level(trained: int, steps: int) -> int:
    return 3 if trained == steps else 2 if 2 * trained >= steps else int(trained > 0)


def _middle(frame: Frame, column: Column) -> float:
    return frame.px(column.first + column.steps / 2)


def _probes(frame: Frame, found: Sequence[Column]) -> str:
    """A triangle under each column with a probe."""
    tip = frame.py(-0.5) + 4
    path = "".join(f"M{_middle(frame, c):.1f} {tip:.1f}l-3 8h6z" for c in found if c.probes)
    if not path:
        return ""
    return (
        f'<text class="tick" x="{frame.left - 8:g}" y="{tip + 8:.1f}" text-anchor="end">probes'
        f'</text><path class="probes" style="fill:var(--warm)" d="{path}"/>'
    )


def _legend(found: Sequence[Column]) -> str:
    """What there is on the map."""
    words = ("frozen", "trained in some of a column's steps", "in half of them or more", "in all")
    levels = sorted({level for column in found for level in _levels(column)} - {_ABSENT})
    if not {1, 2}.intersection(levels):
        words = ("frozen", "", "", "trained")
    entries = [(words[level], swatch("frozen", (0.0, *SHARES)[level])) for level in levels]
    if any(_ABSENT in _levels(column) for column in found):
        entries.append(("did not run: passed on what it was given", swatch("absent")))
    if any(column.probes for column in found):
        triangle = '<path style="fill:var(--warm)" d="M11 3l-3 8h6z"/>'
        entries.append(("probe: a step that measures how much each block matters", triangle))
    return swatches(entries)


def _note(found: Sequence[Column], n: int) -> str:
    size = found[0].steps
    note = "A column stands for one step." if size == 1 else f"A column stands for {size} steps."
    return f"No block was ever frozen. {note}" if all(c.fewest == n for c in found) else note
