"""A study's result as text: tables, the reasons of the verdicts, and what cannot be said."""

import itertools
import math
import statistics
from collections.abc import Mapping
from typing import Any

from bench.table import aligned, number


def lines(document: Mapping[str, Any]) -> list[str]:
    """What the end of a run prints, from the result file's content."""
    printed = [_task(document, name, task) for name, task in document["tasks"].items()]
    return [*itertools.chain(*printed), *_limits(document)]


def _task(document: Mapping[str, Any], name: str, task: Mapping[str, Any]) -> list[str]:
    arms = dict(sorted(task["arms"].items(), key=lambda item: _order(item[1])))
    baseline = document["baseline"]
    cells = task["arms"][baseline]["cells"]
    losses = [cell["final_val_loss"] for cell in cells if cell["final_val_loss"] is not None]
    mean = number(statistics.fmean(losses) if losses else None, ".4f")
    head = [
        f"{name}: against {baseline}, which ends at {mean}, the mean of {len(losses)}; "
        f"{task['comparisons']} comparisons, each interval at {task['level']:.2%}"
    ]
    columns = ["arm", "loss", "interval", "time to its loss", "step", "verdict"]
    rows = [_row(_named(arm, about), about) for arm, about in arms.items()]
    reasons = [
        f"{_named(arm, about)}: {about['verdict']}. {about['why']}"
        for arm, about in arms.items()
        if about["verdict"]
    ]
    rivals = [
        f"{_named(arm, about)} against {rival}: {found['verdict']}. {found['why']}"
        for arm, about in arms.items()
        for rival, found in about["against"].items()
    ]
    return [*head, *aligned([columns, *rows]), "", *reasons, *rivals, ""]


def _order(arm: Mapping[str, Any]) -> float:
    """The lowest loss first, the baseline at no change, what has no loss last."""
    if arm["verdict"] is None:
        return 0.0
    return arm["loss"]["mean"] if arm["loss"] else math.inf


def _named(name: str, arm: Mapping[str, Any]) -> str:
    return name if arm["planted"] is None else f"{name} (planted: time x {arm['planted']:g})"


def _row(name: str, arm: Mapping[str, Any]) -> list[str]:
    if arm["verdict"] is None:
        return [name, "", "", "", "", "baseline"]
    nothing = dict.fromkeys(("mean", "median", "low", "high"))
    loss, time, step = (arm[key] or nothing for key in ("loss", "time", "step"))
    low, high = (number(loss[bound], "+.2%") for bound in ("low", "high"))
    return [
        name,
        number(loss["mean"], "+.2%"),
        "-" if loss["low"] is None else f"{low} to {high}",
        "never" if arm["time"] and time["median"] is None else number(time["median"], ".0%"),
        number(step["mean"], ".2f"),
        arm["verdict"],
    ]


def _limits(document: Mapping[str, Any]) -> list[str]:
    """What the study cannot say."""
    found = []
    if document["status"] == "incomplete":
        found.append("Incomplete: cells are missing, and what is said may change.")
    if not document["confirms"]:
        found.append("A search: it chooses what is worth a confirmation on fresh seeds.")
    if document["clock"] == "cost":
        found.append("The clock is computed, not measured: nothing here can be a WIN.")
    commits = document["commits"]
    if len(commits) > 1:
        found.append(f"Its cells were run by {len(commits)} commits: {', '.join(commits)}.")
    if any(commit.endswith("-dirty") for commit in commits):
        found.append("Some of its code was not committed: nobody else has what ran.")
    for name, task in document["tasks"].items():
        null = task["arms"].get(document["null"])
        if null is not None and null["verdict"] != "NO_DIFFERENCE":
            found.append(
                f"On {name} the null arm, {document['baseline']} once more, is {null['verdict']}: "
                "the noise is too large for the margin, or the comparison is not fair."
            )
    return found
