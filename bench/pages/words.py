"""What a report says in words: the verdict, what differs, and what the evidence cannot say."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from bench import provenance
from bench.config import Config
from bench.pages.evidence import ORIGINAL, Evidence, Run
from bench.verdict import faults, verdict

_DEFAULTS = dataclasses.asdict(Config())
UNTOLD = "not recorded"
_STATUS = {
    "complete": [],
    "interrupted": ["No result: the run was interrupted before its end."],
    "running": ["No result: the run had not ended when this file was written."],
}


def headline(evidence: Evidence) -> list[str]:
    """The verdict, its one sentence first."""
    rows = evidence.content["results"]
    lines = list(_STATUS[evidence.status])
    if not rows:
        return [*lines, "Nothing to compare: the file has no schedule's result."]
    content = {**evidence.content, "config": {**_DEFAULTS, **evidence.config}}
    return lines + verdict(content) + faults(rows)


def subject(evidence: Evidence) -> str:
    """What was run, in a line."""
    config, system = evidence.config, evidence.content["system"]
    task = config.get("task", "the original experiment's teacher")
    device = system.get("cuda_device_name") or system.get("cpu_name") or "CPU"
    when = evidence.content.get("timestamp_utc", "at a time that was not recorded")
    return (
        f"{evidence.name}: {task}, {evidence.n_blocks} blocks of width "
        f"{config.get('dmodel', 'unknown')}, {device}, {when}"
    )


def setting(name: str, value: Any) -> str:
    """A setting's value as a person writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:g}"
    if value is None or value == "":
        return "-"
    return f"{value:,}" if isinstance(value, int) and name != "seed" else str(value)


def settings(evidence: Evidence) -> list[tuple[str, str]]:
    """Every flag of the run but where its files lie."""
    return [
        (name, setting(name, value))
        for name, value in evidence.config.items()
        if name not in provenance.NO_PART_OF_A_RUN
    ]


def environment(evidence: Evidence) -> list[tuple[str, str]]:
    """The machine, the versions, the data: what else the numbers depend on."""
    content = evidence.content
    found = {"written": content.get("timestamp_utc"), "script": content["script"]}
    found |= {name.replace("_", " "): value for name, value in content["system"].items()}
    found |= {name.replace("_", " "): value for name, value in content["task"].items()}
    return [(name, setting(name, value)) for name, value in found.items()]


def command(evidence: Evidence) -> str:
    """The shell line that repeats the run; from its flags where the file does not tell."""
    recorded = evidence.content.get("command")
    if isinstance(recorded, str):
        return recorded
    flags = {name: value for name, value in evidence.config.items() if name in _DEFAULTS}
    if evidence.content["script"] == ORIGINAL:
        flags["task"] = "teacher"
    return provenance.command(Config(**flags))


def differences(evidences: Sequence[Evidence]) -> list[tuple[str, list[str]]]:
    """What differs between files in settings, machine and data, a value a file."""
    tables = [
        dict([*settings(each), *environment(each), ("status", each.status)]) for each in evidences
    ]
    names = list(dict.fromkeys(name for table in tables for name in table))
    rows = [(name, [table.get(name, UNTOLD) for table in tables]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1 and name != "written"]


def limits(evidence: Evidence) -> list[str]:
    """What this evidence cannot say, as far as the file itself tells."""
    config = evidence.config
    found = [
        f"One seed ({config.get('seed', 'not recorded')}): another seed gives other losses, and "
        "nothing here says by how much."
    ]
    found += _noise(evidence) + _comparison(evidence)
    device = evidence.content["system"].get("cuda_device_name") or "a CPU"
    found.append(
        f"Step times are those of {device}: on another device forward, backward and update cost in "
        "other proportions, so another schedule may win."
    )
    found.append(
        f"{evidence.n_blocks} blocks of width {config.get('dmodel', '?')}, at most "
        f"{max((len(run.active) for run in evidence.runs), default=0):,} steps: whether it holds "
        "for deeper models or longer training is not shown."
    )
    found.append(
        f"All schedules share one learning rate ({config.get('lr', '?')}), tuned for none of them."
    )
    return found + _not_recorded(evidence.runs)


def not_compared(evidences: Sequence[Evidence]) -> list[str]:
    """What cannot be read from files side by side."""
    found = []
    systems = {tuple(sorted(map(str, each.content["system"].items()))) for each in evidences}
    if len(systems) > 1:
        found.append(
            "The files are of different machines or versions: compare each schedule with the "
            "full_update of its own file, not seconds of one with seconds of another."
        )
    tasks = {(each.config.get("task"), str(each.content["task"])) for each in evidences}
    if len(tasks) > 1:
        found.append("The files are of different tasks or data: their losses have no common scale.")
    if len({each.config.get("seed") for each in evidences}) > 1:
        found.append("Seeds differ: runs start from other weights and see other batches.")
    return found


def _noise(evidence: Evidence) -> list[str]:
    rows = {run.name: run.row for run in evidence.runs}
    again = rows.get("full_update#2", {}).get("final_val_loss")
    first = rows.get("full_update", {}).get("final_val_loss")
    if not (again and first):
        return ["No schedule ran twice (full_update#2), so this machine's noise is unknown."]
    return [
        f"The same schedule run twice differed by {abs(again / first - 1):.2%} in its final loss; "
        "a smaller difference between two schedules is no difference."
    ]


def _comparison(evidence: Evidence) -> list[str]:
    config = evidence.config
    found = []
    if not config.get("equal_time_budget"):
        found.append(
            "Every schedule took equally many steps, so a faster step gains nothing here: "
            "--equal-time-budget gives all the same time."
        )
    if not config.get("interleave"):
        found.append(
            "The schedules ran one after the other: what else the machine did meanwhile counts as "
            "a difference between them."
        )
    if evidence.status != "complete":
        found.append("The run did not end: schedules that were not done have no final loss.")
    off = [
        f"{run.name} {over:.2f}"
        for run in evidence.runs
        if (over := run.row["measured_over_expected"]) is not None and abs(over - 1) > 0.1
    ]
    if off:
        found.append(
            "Steps did not cost what their parts cost when timed alone (measured over expected: "
            f"{', '.join(off)}): the machine was busy, or something is slow that should not be."
        )
    return found


def _not_recorded(runs: Sequence[Run]) -> list[str]:
    lacking = {
        "validation losses on the way, so nobody knows when a loss was reached": any(
            run.validations for run in runs
        ),
        "where the time of a step went": any(run.parts_ms for run in runs),
        "memory by number of active blocks": any(run.memory for run in runs),
        "step times": any(run.step_ms for run in runs),
    }
    return [f"Not recorded in this file: {what}." for what, there in lacking.items() if not there]
