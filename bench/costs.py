"""What a step of any shape should cost, from what its parts cost at a few shapes, the anchors.

A part's time is a sum over the blocks of what each does, so that it lies on a line from anchor to
anchor: there is one price for a block that trains, one for a frozen one that passes the gradient
on, one in the prefix; a block that does not run costs nothing.
"""

from collections.abc import Mapping
from typing import NamedTuple

from blocksched.schedules import Plan
from blocksched.schedules.base import suffix

PARTS = ("stem and prefix", "suffix", "head", "update")


class Shape(NamedTuple):
    """What a step runs and trains, as far as its time depends on it.

    Attributes:
        prefix: how many blocks run below the boundary, without a graph.
        active: how many train.
        frozen: how many run above the boundary and only pass the gradient on.
        stem: whether the stem trains.
        lower, rows: as in blocksched.schedules.Plan.
    """

    prefix: int
    active: int
    frozen: int = 0
    stem: bool = False
    lower: int = 0
    rows: float = 1.0

    @classmethod
    def of(cls, plan: Plan, n_blocks: int) -> "Shape":
        """The shape of a step that does `plan`."""
        running = range(n_blocks) if plan.running is None else plan.running
        prefix = sum(block < plan.boundary for block in running)
        active = len(plan.active)
        frozen = len(running) - prefix - active
        return cls(prefix, active, frozen, plan.stem_trains, plan.lower, plan.rows)

    @classmethod
    def suffix(cls, active: int, n_blocks: int) -> "Shape":
        """The shape of a step in which the top `active` blocks train."""
        return cls(n_blocks - active, active, stem=active == n_blocks)

    @property
    def reached(self) -> int:
        """How many blocks backward goes through."""
        return self.active + self.frozen


def anchors(n_blocks: int) -> dict[Shape, Plan]:
    """The shapes to measure: suffixes up to the whole model; of a model with more than one block
    also, with the stem, few active blocks in the whole stack, and a stack of few blocks."""
    few = _few(n_blocks)
    sizes = sorted({max(1, round(n_blocks * share)) for share in (0.25, 0.5, 0.75, 1.0)})
    plans = [Plan(suffix(n_blocks, k)) for k in sizes]
    if few < n_blocks:
        spread = tuple((i + 1) * n_blocks // few - 1 for i in range(few))
        plans += [Plan(spread, stem=True), Plan(tuple(range(few)), running=tuple(range(few)))]
    return {Shape.of(plan, n_blocks): plan for plan in plans}


def _few(n_blocks: int) -> int:
    return max(1, n_blocks // 4)


class Costs:
    """Milliseconds of each part of a step at each anchor of a model of `n_blocks`, and so, on lines
    through them, of any step."""

    def __init__(self, n_blocks: int, parts: Mapping[tuple[str, Shape], float]) -> None:
        self._n, self._parts = n_blocks, parts
        self._full = Shape(0, n_blocks, stem=True)
        few = _few(n_blocks)
        self._holes = Shape(0, few, n_blocks - few, stem=True)
        self._short = Shape(0, few, stem=True)
        # The full step differs in kind (the stem trains), so it anchors no line of suffixes.
        self._suffixes = {shape.active: shape for shape in anchors(n_blocks) if not shape.stem}

    def step_ms(self, shape: Shape) -> float:
        """The expected time of a step of this shape."""
        return sum(self.part_ms(name, shape) for name in PARTS)

    def part_ms(self, name: str, shape: Shape) -> float:
        """The expected time of one of PARTS."""
        if shape.lower and name in ("stem and prefix", "suffix"):
            # For the rows that their backward leaves out the lower blocks are a prefix.
            with_them = shape.rows * self.part_ms(name, shape._replace(lower=0))
            cut = Shape.suffix(self._n - shape.lower, self._n)
            return with_them + (1 - shape.rows) * self.part_ms(name, cut)
        if shape.stem:
            return self._with_stem(name, shape)
        k = self._n - shape.prefix if name == "stem and prefix" else shape.reached
        return self._of_suffix(name, k) + shape.frozen * self._hole(name)

    def _with_stem(self, name: str, shape: Shape) -> float:
        """On the plane through the full step, the one with holes and the short stack."""
        full = self._parts[name, self._full]
        skipped = self._n - shape.reached
        return full + skipped * self._skip(name) + shape.frozen * self._hole(name)

    def _hole(self, name: str) -> float:
        """What a block that is frozen above the boundary adds over one that trains."""
        return self._difference(name, self._holes)

    def _skip(self, name: str) -> float:
        """What a block that does not run adds over one that trains."""
        return self._difference(name, self._short)

    def _difference(self, name: str, anchor: Shape) -> float:
        """Of a part between an anchor and the full step, for each block that trains in only one."""
        if anchor == self._full:
            return 0.0
        parts = self._parts
        return (parts[name, anchor] - parts[name, self._full]) / (self._n - anchor.active)

    def _of_suffix(self, name: str, k: int) -> float:
        """At `k` blocks from the boundary on: on the line through the two nearest anchors."""
        known = self._suffixes
        if not known:
            return self._parts[name, self._full]
        nearest = sorted(known, key=lambda each: abs(each - k))[:2]
        if k in known or len(nearest) < 2:
            return self._parts[name, known[nearest[0]]]
        low, high = sorted(nearest)
        at_low, at_high = self._parts[name, known[low]], self._parts[name, known[high]]
        return at_low + (at_high - at_low) / (high - low) * (k - low)
