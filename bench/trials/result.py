"""What a study gave, as its result file has it."""

import dataclasses
import datetime
import math
import shlex
from collections.abc import Mapping
from typing import Any

from bench.trials import judge
from bench.trials.design import Cell, Study
from bench.trials.inference import Comparison, Interval, compare, corrected

_KEPT = ("seed", "final_val_loss", "failure", "steps", "probes", "skipped_steps", "mean_step_ms",
         "active_counts", "budget_ms", "elapsed_ms", "val_trace")  # fmt: skip
_METHOD = """
Arms are paired by seed: both of a pair start from the same weights and train on the same batches,
for the same time. `loss` is the geometric mean of the ratios of their final losses, minus 1, with
Student's t interval of the logarithms; `step` is the same of their mean step times. `time` is the
time at which an arm first has the baseline's final loss, as a share of the time that the baseline
took; a seed that never gets there counts as infinite, and its interval is the distribution-free one
of the median, between two order statistics. The level of every interval is raised by the Bonferroni
correction for all the comparisons of its task. In this order: LOSS, if the arm failed on a seed and
the baseline did not; INCONCLUSIVE without two pairs; NO_DIFFERENCE, if the loss interval is inside
the margin; WIN, if it lies below 0 and below the interval of the null arm (the baseline once more)
and the time interval below 1, on the measured clock, in a confirmation, over all of its seeds and
at least 10 pairs; LOSS, if it lies above 0 and above the null's, or FASTER_BUT_WORSE, if at the
same time the step interval lies below 1; else INCONCLUSIVE. Against other arms than the baseline
the loss interval is held to 0 and the margin alone.
"""


def document(
    study: Study, done: Mapping[Cell, Mapping[str, Any]], prices: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The result file's content.

    Args:
        study: what was asked for.
        done: what the cells gave that have ended; others may be missing.
        prices: of the computed clock, None on the measured one.

    Raises UserError if scipy is missing, or a loss is not above 0.
    """
    done = {cell: done[cell] for cell in study.cells() if cell in done}  # in whatever order it ran
    first = next(iter(done.values()), {})
    commits = dict.fromkeys(found["system"]["commit"] for found in done.values())
    words = ["python", "bench/study.py", str(study.path), "--clock", study.clock]
    return {
        "script": "bench/study.py",
        "timestamp_utc": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "status": "complete" if len(done) == len(study.cells()) else "incomplete",
        "name": study.name,
        "question": study.question,
        "clock": study.clock,
        "seeds": list(study.seeds),
        "baseline": study.baseline,
        "null": study.null,
        "margin": study.margin,
        "confidence": study.confidence,
        "confirms": [path.stem for path in study.confirms],
        "command": shlex.join(words),
        "study": study.path.read_text(),
        "prices": prices,
        "system": first.get("system", {}),
        "commits": [commit for commit in commits if commit is not None],
        "method": " ".join(_METHOD.split()),
        "tasks": {task: _task(study, task, done) for task in study.tasks},
    }


def _task(study: Study, task: str, done: Mapping[Cell, Mapping[str, Any]]) -> dict[str, Any]:
    names = study.arms_of(task)
    comparisons = len(names) - 1 + sum(len(study.arms[name].against) for name in names)
    level = corrected(study.confidence, comparisons)
    cells = {
        arm: {
            seed: _kept(done[Cell(task, arm, seed)])
            for seed in study.seeds
            if Cell(task, arm, seed) in done
        }
        for arm in names
    }
    found = {arm: compare(study.baseline, cells[arm], cells[study.baseline], level)
             for arm in names if arm != study.baseline}  # fmt: skip
    floor = found[study.null].loss if study.null else None
    infos = [each["info"] for cell, each in done.items() if cell.task == task]
    arms = {}
    for arm in names:
        arms[arm] = {
            **_about(study, task, arm, done),
            "cells": list(cells[arm].values()),
            **_judged(study, found.get(arm), None if arm == study.null else floor),
            "against": {
                rival: _against(study, compare(rival, cells[arm], cells[rival], level))
                for rival in study.arms[arm].against
            },
        }
    return {
        "info": infos[0] if infos else {},
        "flags": _flags(study, task, study.baseline),
        "comparisons": comparisons,
        "level": level,
        "arms": arms,
    }


def _about(
    study: Study, task: str, arm: str, done: Mapping[Cell, Mapping[str, Any]]
) -> dict[str, Any]:
    """What an arm is, whatever it gave."""
    base, factor = _flags(study, task, study.baseline), study.arms[arm].time_factor
    flags = _flags(study, task, arm)
    notes = [each["notes"] for cell, each in done.items() if cell[:2] == (task, arm)]
    return {
        "schedule": study.arms[arm].schedule,
        "notes": notes[0] if notes else None,
        "flags": {name: value for name, value in flags.items() if value != base[name]},
        "planted": None if factor == 1 else factor,
    }


def _flags(study: Study, task: str, arm: str) -> dict[str, Any]:
    """An arm's flags, those left out that say which arm and which seed."""
    flags = dataclasses.asdict(study.config(Cell(task, arm, study.seeds[0])))
    return {name: value for name, value in flags.items() if name not in ("schedules", "seed")}


def _kept(found: Mapping[str, Any]) -> dict[str, Any]:
    """A cell as the result has it: without the validations whose loss was not finite."""
    reached = [point for point in found["val_trace"] if point["val_loss"] is not None]
    return {**{name: found[name] for name in _KEPT}, "val_trace": reached}


def _judged(study: Study, found: Comparison | None, floor: Interval | None) -> dict[str, Any]:
    """An arm against the baseline; `found` is None of the baseline itself."""
    if found is None:
        return dict.fromkeys(("loss", "time", "step", "verdict", "why"))
    reservation = judge.reservation(study, found)
    word, why = judge.against_baseline(found, study.margin, floor, reservation)
    if study.null is None and found.pairs > 1:
        why += " No null arm shows how large the noise is."
    return {
        "loss": _plain("mean", found.loss),
        "time": _plain("median", found.time),
        "step": _plain("mean", found.step),
        "verdict": word,
        "why": why,
    }


def _against(study: Study, found: Comparison) -> dict[str, Any]:
    reservation = judge.reservation(study, found)
    word, why = judge.against_rival(found, study.margin, reservation)
    loss = _plain("mean", found.loss) or dict.fromkeys(("mean", "low", "high"))
    return {**loss, "verdict": word, "why": why}


def _plain(center: str, value: Interval | None) -> dict[str, float | None] | None:
    """An interval for JSON, which has no infinity."""
    if value is None:
        return None
    named = zip((center, "low", "high"), value, strict=True)
    return {name: None if x is None or math.isinf(x) else x for name, x in named}
