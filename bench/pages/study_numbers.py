"""How the page of a study writes its numbers, and what it reckons from its cells."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.pages.looks import DASHES, SHAPES, Look, look

_COLOURS = 7  # beside the baseline's


def change(relative: float) -> str:
    """A relative change in percent, with its sign."""
    percent = 100 * relative
    if abs(percent) >= 1000:
        return f"{percent:+.3g} %"
    if percent and abs(percent) < 0.005:
        return f"{percent:+.1e} %"
    return f"{percent:+.2f} %" if percent else "0 %"


def share(value: float | None, otherwise: str) -> str:
    """A ratio in percent, without a sign."""
    if value is None:
        return otherwise
    return f"{100 * value:.1f} %" if value < 10 else f"{100 * value:.3g} %"


def between(low: float | None, high: float | None) -> str:
    """An interval of relative changes."""
    if low is None and high is None:
        return "no interval"
    if low is None or high is None:
        return f"above {change(low)}" if low is not None else f"below {change(high or 0.0)}"
    return f"{change(low).removesuffix(' %')} to {change(high)}"


def window(values: Sequence[float], best: float, margin: float) -> tuple[float, float]:
    """The part of an axis of relative changes that shows the best arms well, and 0 and the margin.

    The worst of the losers may lie beyond it. `best` is the lowest mean.
    """
    wide = max(4 * margin, -2.5 * best)
    low = max(min([*values, -1.5 * margin]), -wide)
    high = min(max([*values, 1.5 * margin]), 3 * wide)
    aside = 0.04 * (high - low)
    return low - aside, high + aside


def said_loss(loss: Mapping[str, Any] | None) -> str:
    """The change of the loss and its interval."""
    if loss is None or loss["mean"] is None:
        return "no final loss to compare"
    return f"{change(loss['mean'])} ({between(loss['low'], loss['high'])})"


def said_verdict(judged: Mapping[str, Any]) -> str:
    """The verdict as words."""
    return str(judged["verdict"]).replace("_", " ")


def looks_of(result: Mapping[str, Any]) -> dict[str, Look]:
    """One look an arm: any few that ran differ in colour, in the order of the file."""
    arms = [arm for task in result["tasks"].values() for arm in task["arms"].items()]
    ran = [name for name, arm in arms if len(arm["cells"]) > failures(arm)]
    names = dict.fromkeys([*ran, *(name for name, _ in arms)])
    names.pop(result["baseline"], None)
    found = {result["baseline"]: look("full_update", 0)}
    for i, name in enumerate(names):
        dash, marker = 1 + i % 7, 1 + (i + i // 7) % 7
        found[name] = Look(1 + i % _COLOURS, DASHES[dash], tuple(SHAPES)[marker])
    return found


def in_order(arms: Mapping[str, Any], baseline: str) -> list[str]:
    """All arms but the baseline, the lowest loss first, those without one last."""

    def place(name: str) -> float:
        loss = arms[name]["loss"]
        return float("inf") if loss is None or loss["mean"] is None else loss["mean"]

    return sorted((name for name in arms if name != baseline), key=place)


def by_seed(arm: Mapping[str, Any], rival: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Seeds of which both have a final loss, each with the relative change against the rival."""
    losses = {cell["seed"]: cell["final_val_loss"] for cell in rival["cells"]}
    found = []
    for cell in arm["cells"]:
        ours, theirs = cell["final_val_loss"], losses.get(cell["seed"])
        if ours is not None and theirs:
            found.append((cell["seed"], ours / theirs - 1))
    return found


def failures(arm: Mapping[str, Any]) -> int:
    """How many of its cells failed."""
    return sum(failed(cell) for cell in arm["cells"])


def failed(cell: Mapping[str, Any]) -> bool:
    """Whether a cell has no final loss."""
    return cell["final_val_loss"] is None


def label(name: str, arm: Mapping[str, Any]) -> str:
    """An arm's name and what a reader must not miss about it."""
    said = []
    if arm["planted"] is not None:
        said.append(f"planted: time x{arm['planted']:g}")
    if not arm["cells"]:
        said.append("not run")
    if failures(arm):
        said.append(f"{failures(arm)} of {len(arm['cells'])} failed")
    return f"{name} ({', '.join(said)})" if said else name


def listed_names(names: Sequence[str], most: int = 3) -> str:
    """Names in a sentence, the first few of many."""
    shown = list(names[:most])
    if len(names) > most:
        shown.append(f"{len(names) - most} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def cut(name: str, most: int) -> str:
    """A name at most so many letters long."""
    return name if len(name) <= most else f"{name[: most - 2]}.."
