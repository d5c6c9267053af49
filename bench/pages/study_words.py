"""What the page of a study says in sentences: verdicts, how it was asked, what it cannot say."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.pages.study_numbers import (
    change,
    failures,
    in_order,
    listed_names,
    said_loss,
    said_verdict,
)

_CLOCKS = {
    "time": "the time that steps took, arms side by side",
    "cost": "a computed cost of the steps, from parts timed once",
}
_FEW = 10  # seeds that a verdict needs


def verdicts(result: Mapping[str, Any]) -> list[str]:
    """A sentence a task."""
    if not result["tasks"]:
        return ["No cell has run yet: nothing to compare."]
    return [_verdict(result, name, task) for name, task in result["tasks"].items()]


def setup(result: Mapping[str, Any]) -> list[str]:
    """What was asked, and how."""
    seeds = result["seeds"]
    shown = ", ".join(map(str, seeds[:12])) + (", ..." if len(seeds) > 12 else "")
    confirms = result["confirms"]
    kind = (
        f"It confirms {listed_names(confirms)}, on other seeds." if confirms else "It is a search."
    )
    lines = [
        f"Asked: {result['question']}" if result["question"] else "",
        f"{kind} Every arm is compared with {result['baseline']}, seed by seed, at equal time; "
        f"the clock is {_CLOCKS[result['clock']]}. {_counted(len(seeds), 'seed')}: {shown}.",
        f"A difference within +-{100 * result['margin']:g} % counts as none; intervals hold with "
        f"{100 * result['confidence']:g} % for all comparisons of a task together.",
    ]
    return [line for line in lines if line]


def task_lines(result: Mapping[str, Any], task: Mapping[str, Any]) -> list[str]:
    """How the comparisons of a task are to be taken: its correction, its null, what is planted."""
    lines = [
        f"{_counted(task['comparisons'], 'comparison')}, so each interval is at "
        f"{100 * task['level']:.4g} %."
    ]
    arms, null = task["arms"], result["null"]
    if null in arms:
        lines.append(
            f"The null arm {null}, which is {result['baseline']} once more, shows the noise: "
            f"{said_loss(arms[null]['loss'])}, {said_verdict(arms[null])}."
        )
    planted = [name for name, arm in arms.items() if arm["planted"] is not None]
    if planted:
        said = (f"{name} (time x{arms[name]['planted']:g}) {said_verdict(arms[name])}"
                for name in planted)  # fmt: skip
        lines.append(f"Planted, to see whether the verdict can tell: {', '.join(said)}.")
    return lines


def reasons(task: Mapping[str, Any], baseline: str) -> list[str]:
    """Each arm with its verdict and why, the pairs below."""
    arms = task["arms"]
    lines = []
    for name in in_order(arms, baseline):
        arm = arms[name]
        lines.append(f"{name}: {said_verdict(arm)}. {arm['why']}")
        lines += [f"  against {rival}: {said_verdict(pair)}. {pair['why']}"
                  for rival, pair in arm["against"].items()]  # fmt: skip
    return lines


def limits(result: Mapping[str, Any]) -> list[str]:
    """What this evidence cannot say, as far as the file itself tells."""
    lines = []
    if not result["confirms"]:
        lines.append(
            "A search judges nothing: of many arms the best looks better than it is. Confirm it "
            "on fresh seeds."
        )
    lines += _missing(result)
    if result["clock"] == "cost":
        lines.append(
            "Its clock is computed, not measured: what a step really takes may differ, so nothing "
            "here is a WIN."
        )
    if len(result["seeds"]) < _FEW:
        lines.append(f"{_counted(len(result['seeds']), 'seed')}: a verdict needs {_FEW}.")
    if result["null"] is None:
        lines.append("No null arm, so the noise of this machine is unknown.")
    lines += _machine(result) + _sizes(result)
    if len(result["commits"]) > 1:
        lines.append(f"Its cells were run by {len(result['commits'])} versions of the code.")
    if any(commit.endswith("-dirty") for commit in result["commits"]):
        lines.append("Some cells were run by code that was changed after its commit (-dirty).")
    if any(arm["planted"] is not None for _, arm in _all_arms(result)):
        lines.append("Planted arms have a false clock: they test the verdict and are no results.")
    return lines


def _verdict(result: Mapping[str, Any], name: str, task: Mapping[str, Any]) -> str:
    base, arms = result["baseline"], task["arms"]
    real = [arm for arm in in_order(arms, base)
            if arm != result["null"] and arms[arm]["planted"] is None]  # fmt: skip
    begin = f"{name}: " if result["status"] == "complete" else f"{name}, so far: "
    if not real:
        return f"{begin}nothing to compare with {base}."
    if not result["confirms"]:
        return f"{begin}a search, which judges nothing; {_lowest(real[0], arms, base)}."
    wins = [arm for arm in real if arms[arm]["verdict"] == "WIN"]
    if len(wins) == 1:
        return f"{begin}{wins[0]} wins against {base}, loss {said_loss(arms[wins[0]]['loss'])}."
    if wins:
        return f"{begin}{listed_names(wins)} win against {base}."
    return f"{begin}no arm wins against {base}."


def _lowest(name: str, arms: Mapping[str, Any], base: str) -> str:
    loss = arms[name]["loss"]
    if loss is None or loss["mean"] is None:
        return "no arm has a final loss to compare"
    if loss["mean"] >= 0:
        return f"no arm ended below {base}"
    return f"{name} ended lowest, {change(loss['mean'])} against {base}"


def _missing(result: Mapping[str, Any]) -> list[str]:
    lines = []
    lacking = [
        f"{arm} on {task} {len(result['seeds']) - len(result['tasks'][task]['arms'][arm]['cells'])}"
        for task, each in result["tasks"].items()
        for arm in each["arms"]
        if len(each["arms"][arm]["cells"]) < len(result["seeds"])
    ]
    if result["status"] != "complete":
        which = f" Seeds missing: {listed_names(lacking, 6)}." if lacking else ""
        lines.append(f"The study is incomplete: every number here may still change.{which}")
    failing = [f"{arm} on {task} {failures(each)}" for (task, arm), each in _all_arms(result)
               if failures(each)]  # fmt: skip
    if failing:
        lines.append(
            f"Cells failed ({listed_names(failing, 6)}): the means of those arms are over the "
            "other seeds, and so look better than the arm is."
        )
    return lines


def _machine(result: Mapping[str, Any]) -> list[str]:
    system = result["system"]
    device = system.get("cuda_device_name") or system.get("cpu_name") or "one machine"
    return [
        f"One machine ({device}): on another, forward, backward and update cost in other "
        "proportions, so another arm may win."
    ]


def _sizes(result: Mapping[str, Any]) -> list[str]:
    sizes = {
        f"{flags.get('n_layers', '?')} blocks of width {flags.get('dmodel', '?')}, "
        f"{steps:,} steps of {result['baseline']}"
        for task in result["tasks"].values()
        for flags in [task["flags"]]
        for cells in [task["arms"][result["baseline"]]["cells"]]
        for steps in [max((cell["steps"] for cell in cells), default=0)]
    }
    return [f"Model and length: {size}; larger or longer is not shown." for size in sorted(sizes)]


def _all_arms(result: Mapping[str, Any]) -> Sequence[tuple[tuple[str, str], Mapping[str, Any]]]:
    return [((name, arm), each) for name, task in result["tasks"].items()
            for arm, each in task["arms"].items()]  # fmt: skip


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"
