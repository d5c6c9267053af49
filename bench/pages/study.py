"""The page of a study: one file that needs no other."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.config import UserError
from bench.pages import study_tables, study_words
from bench.pages.chart import text
from bench.pages.looks import Look
from bench.pages.sections import limits_section, pairs, paragraphs, section, whole
from bench.pages.study_blocks import blocks
from bench.pages.study_checks import SCRIPT, check
from bench.pages.study_curves import leads, losses
from bench.pages.study_intervals import arm_rows, intervals, pair_rows
from bench.pages.study_numbers import in_order, looks_of
from bench.pages.words import setting
from bench.results import read


def is_study(content: Any) -> bool:
    """Whether the content of a file is meant to be a study's result."""
    return isinstance(content, Mapping) and content.get("script") == SCRIPT


def load_study(path: Path) -> Mapping[str, Any]:
    """The content of a study's result file.

    Raises UserError, in a line, for a file that cannot be read or is no study's result.
    """
    content = read(path)
    try:
        return check(content)
    except ValueError as error:
        raise UserError(f"{path} is not a result of bench/study.py: {error}") from None


def study_page(result: Mapping[str, Any]) -> str:
    """The page of a study's result, as `load_study` gives it."""
    verdicts = "<br>".join(map(text, study_words.verdicts(result)))
    looks = looks_of(result)
    return whole(
        f"blocksched: {result['name']}",
        f"<header><p class='note'>{text(_subject(result))}</p><h1>{verdicts}</h1>"
        f"{paragraphs(study_words.setup(result))}</header>",
        *(_task(i, name, result, looks) for i, name in enumerate(result["tasks"])),
        section("method", "How it was judged", paragraphs([result["method"]])),
        limits_section(study_words.limits(result)),
        _settings(result),
    )


def _subject(result: Mapping[str, Any]) -> str:
    system = result["system"]
    device = system.get("cuda_device_name") or system.get("cpu_name") or "CPU"
    status = "" if result["status"] == "complete" else ", incomplete"
    return f"Study {result['name']}{status}: {device}, {result['timestamp_utc']}"


def _task(i: int, name: str, result: Mapping[str, Any], looks: Mapping[str, Look]) -> str:
    task, base = result["tasks"][name], result["baseline"]
    arms, margin = task["arms"], result["margin"]
    null = arms[result["null"]]["loss"] if result["null"] in arms else None
    if null is not None and null["low"] is None:
        null = None
    return section(
        f"task-{i}",
        f"Task {name}",
        paragraphs(study_words.task_lines(result, task)),
        intervals(f"intervals-{i}", f"Final loss against {base}, {name}",
                  arm_rows(arms, base, looks), margin, null, _READ),
        intervals(f"against-{i}", f"Final loss against each other, {name}",
                  pair_rows(arms, looks), margin, null, _PAIRS),
        _folded("why, arm by arm", paragraphs(study_words.reasons(task, base)),
                shown=len(arms) <= _FEW),
        "<h3>Numbers</h3>" + study_tables.numbers(task, base) + study_tables.pairs(arms),
        f"<p class='note'>{text(_NUMBERS)}</p>",
        losses(f"losses-{i}", task, base, looks),
        leads(f"leads-{i}", task, base, looks, margin),
        blocks(f"blocks-{i}", arms, [base, *in_order(arms, base)]),
        _folded("what each arm is", study_tables.definitions(arms)),
        _folded("every cell", study_tables.cells(task, base)),
    )  # fmt: skip


_FEW = 10  # arms whose reasons are shown at once
_READ = "An arm is better where its whole interval is left of 0 and of the noise floor."
_PAIRS = "The first of each pair is better where its whole interval is left of 0."
_NUMBERS = (
    "Loss change: of the final loss, over the seeds that both have. Time to its loss: when the arm "
    "reached the baseline's final loss, as a share of the baseline's time (median of the seeds). "
    "Step time: as a share of the baseline's."
)


def _settings(result: Mapping[str, Any]) -> str:
    found = {"written": result["timestamp_utc"], "commits": ", ".join(result["commits"])}
    found |= {name.replace("_", " "): value for name, value in result["system"].items()}
    for task, content in result["tasks"].items():
        found |= {f"{task}: {name.replace('_', ' ')}": value
                  for name, value in content["info"].items()}  # fmt: skip
    folded = [_folded("the study file", f"<pre>{text(result['study'])}</pre>")]
    for task, content in result["tasks"].items():
        flags = [(name, setting(name, value)) for name, value in content["flags"].items()]
        folded.append(_folded(f"settings of {result['baseline']} on {task}", pairs(flags)))
    if result["prices"] is not None:
        prices = text(json.dumps(result["prices"], indent=1))
        folded.append(_folded("the prices of its clock, in milliseconds", f"<pre>{prices}</pre>"))
    return section(
        "settings",
        "Settings and environment",
        f"<p>To run it again:</p><pre>{text(result['command'])}</pre>",
        f"<h3>Machine, versions and data</h3>"
        f"{pairs([(name, setting(name, value)) for name, value in found.items()])}",
        *folded,
    )


def _folded(summary: str, content: str, shown: bool = False) -> str:
    begin = "<details open>" if shown else "<details>"
    return f"{begin}<summary>{text(summary)}</summary>{content}</details>"
