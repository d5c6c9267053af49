"""The numbers of a study's task as tables: of every arm, of every pair, of every cell."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.pages.chart import scrolling, text
from bench.pages.curves import loss_text
from bench.pages.study_numbers import (
    between,
    by_seed,
    change,
    failures,
    in_order,
    label,
    said_verdict,
    share,
)
from bench.pages.words import setting

_NUMBERS = ("arm", "verdict", "loss change", "its interval", "time to its loss", "its interval",
            "steps", "seeds", "step time", "its interval")  # fmt: skip
_PAIRS = ("arm", "against", "verdict", "loss change", "its interval")
_CELLS = ("arm", "seed", "final loss", "against the baseline", "steps", "probes", "ms a step",
          "time had", "failure")  # fmt: skip
_ARMS = ("arm", "schedule", "flags of its own")


def numbers(task: Mapping[str, Any], baseline: str) -> str:
    """Every number of every arm, the baseline first."""
    arms = task["arms"]
    shown = [baseline, *in_order(arms, baseline)]
    return _table(_NUMBERS, [_numbers(name, arms[name], name == baseline) for name in shown])


def pairs(arms: Mapping[str, Any]) -> str:
    """Arms against each other; "" if the study did not ask for that."""
    lines = [
        [name, rival, said_verdict(pair), _mean(pair), between(pair["low"], pair["high"])]
        for name, arm in arms.items()
        for rival, pair in arm["against"].items()
    ]
    return _table(_PAIRS, lines, kind="words") if lines else ""


def cells(task: Mapping[str, Any], baseline: str) -> str:
    """Every cell, the baseline's first."""
    arms = task["arms"]
    shown = [baseline, *in_order(arms, baseline)]
    lines = [line for name in shown for line in _cells(name, arms[name], arms[baseline])]
    return _table(_CELLS, lines, kind="cells")


def definitions(arms: Mapping[str, Any]) -> str:
    """What each arm is."""
    lines = []
    for name, arm in arms.items():
        flags = ", ".join(f"{flag} {setting(flag, value)}" for flag, value in arm["flags"].items())
        lines.append([label(name, arm), arm["notes"] or arm["schedule"], flags or "none"])
    return _table(_ARMS, lines, kind="words")


def _numbers(name: str, arm: Mapping[str, Any], is_baseline: bool) -> list[str]:
    steps = [cell["steps"] for cell in arm["cells"]]
    good = len(steps) - failures(arm)
    loss, time, step = arm["loss"], arm["time"], arm["step"]
    return [
        label(name, arm),
        "baseline" if is_baseline else said_verdict(arm),
        "-" if loss is None else _mean(loss),
        "-" if loss is None else between(loss["low"], loss["high"]),
        "-" if time is None else share(time["median"], "not reached"),
        "-" if time is None else _shares(time),
        _range(steps),
        str(good) if good == len(steps) else f"{good} of {len(steps)}",
        "-" if step is None else share(step["mean"], "-"),
        "-" if step is None else _shares(step),
    ]


def _shares(interval: Mapping[str, Any]) -> str:
    if interval["low"] is None and interval["high"] is None:
        return "no interval"
    low, high = (share(interval[end], "no bound") for end in ("low", "high"))
    return f"{low.removesuffix(' %') if interval['high'] is not None else low} to {high}"


def _mean(loss: Mapping[str, Any]) -> str:
    return "-" if loss["mean"] is None else change(loss["mean"])


def _range(steps: Sequence[int]) -> str:
    if not steps:
        return "-"
    low, high = min(steps), max(steps)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _cells(name: str, arm: Mapping[str, Any], base: Mapping[str, Any]) -> list[list[str]]:
    differs = dict(by_seed(arm, base)) if arm is not base else {}
    return [
        [
            name,
            str(cell["seed"]),
            "-" if cell["final_val_loss"] is None else loss_text(cell["final_val_loss"]),
            change(differs[cell["seed"]]) if cell["seed"] in differs else "-",
            f"{cell['steps']:,}" + _skipped(cell["skipped_steps"]),
            f"{cell['probes']:,}",
            "-" if cell["mean_step_ms"] is None else f"{cell['mean_step_ms']:,.1f}",
            f"{cell['elapsed_ms'] / 1e3:,.1f} of {cell['budget_ms'] / 1e3:,.1f} s",
            cell["failure"] or ("no final loss" if cell["final_val_loss"] is None else "-"),
        ]
        for cell in arm["cells"]
    ]


def _skipped(steps: int) -> str:
    return f" ({steps:,} left out)" if steps else ""


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], kind: str = "study") -> str:
    top = "".join(f"<th scope='col'>{text(name)}</th>" for name in head)
    body = "".join(
        f"<tr><th scope='row'>{text(name)}</th>"
        + "".join(f"<td>{text(value)}</td>" for value in values)
        + "</tr>"
        for name, *values in lines
    )
    return scrolling(
        f"<table class='{kind}'><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    )
