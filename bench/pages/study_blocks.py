"""How many blocks a study's arms trained: a bar an arm, the share of its steps by how many."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.pages.bars import Bar, Part, bars, bars_legend
from bench.pages.chart import figure
from bench.pages.columns import percent
from bench.pages.study_numbers import cut, label

_NAME = 26  # letters, beside which the average has room on a phone
_QUARTERS = (
    ("up to a quarter of the blocks", "light"),
    ("up to half", "dots"),
    ("up to three quarters", "lines"),
    ("more, or all", "full"),
)


def blocks(name: str, arms: Mapping[str, Any], order: Sequence[str]) -> str:
    """The figure, of all seeds together; "" if no step was taken."""
    named = [(label(arm, arms[arm]), _counts(arms[arm]["cells"])) for arm in order]
    found = [_bar(cut(words, _NAME), counts) for words, counts in named if sum(counts)]
    if not found:
        return ""
    used = {part.pattern for bar in found for part in bar.parts}
    return figure(
        name,
        "How many blocks trained",
        lambda width: bars(width, found, "share of the steps (%)", name),
        note="Of all seeds together. The fewer blocks train, the cheaper is a step.",
        legend=bars_legend([entry for entry in _QUARTERS if entry[1] in used], name),
    )


def _counts(cells: Sequence[Mapping[str, Any]]) -> list[int]:
    """Steps with 1, 2, ... active blocks, over all cells."""
    longest = max((len(cell["active_counts"]) for cell in cells), default=0)
    padded = [[*cell["active_counts"], *[0] * longest][:longest] for cell in cells]
    return [sum(steps) for steps in zip(*padded, strict=True)]


def _bar(name: str, counts: Sequence[int]) -> Bar:
    n, total = len(counts), sum(counts)
    mean = sum(k * steps for k, steps in enumerate(counts, 1)) / total
    parts = []
    for quarter, (_, pattern) in enumerate(_QUARTERS, 1):
        here = {
            k: steps for k, steps in enumerate(counts, 1) if -(-4 * k // n) == quarter and steps
        }
        if here:
            said = ", ".join(f"{k} in {percent(steps / total)}" for k, steps in here.items())
            amount = 100 * sum(here.values()) / total
            parts.append(Part(amount, pattern, f"blocks that trained: {said} of the steps"))
    return Bar(name, f"{mean:.1f} of {n} on average", parts)
