"""Results of studies made by hand, for pages: ordinary ones and the corners."""

import math
import random
import statistics
from typing import Any

EFFECTS = {"again": 0.0, "grow": -0.03, "top4": 0.002, "lisa": 0.04, "slow": 0.06}


def study(
    effects: dict[str, float] | None = None,
    seeds: int = 10,
    tasks: tuple[str, ...] = ("text",),
    against: tuple[tuple[str, str], ...] = (("grow", "top4"),),
    noise: float = 0.004,
    **top: Any,
) -> dict[str, Any]:
    """The content of a study's result file.

    Args:
        effects: arms beside full_update, each with its relative change of the final loss.
        against: arms that are also compared with each other.
        noise: standard deviation of that change over the seeds.
    """
    effects = EFFECTS if effects is None else effects
    numbers = list(range(101, 101 + seeds))
    return {
        "script": "bench/study.py", "timestamp_utc": "2026-01-02T03:04:05Z", "status": "complete",
        "name": "a-study", "question": "Does growing the stack pay?", "clock": "time",
        "seeds": numbers, "baseline": "full_update",
        "null": "again" if "again" in effects else None,
        "margin": 0.01, "confidence": 0.95, "confirms": ["search-text"],
        "command": "python bench/study.py studies/a-study.toml",
        "study": 'question = "Does growing the stack pay?"\nseeds = [101, 102]\n', "prices": None,
        "system": {"cuda_available": False, "cuda_device_name": None, "cpu_name": "a CPU",
                   "torch_version": "2.13.0", "cpu_threads": 2},
        "commits": ["0123abc"], "method": "Student's t intervals of paired log ratios.",
        "tasks": {name: task(effects, numbers, against, noise, i)
                  for i, name in enumerate(tasks)},
    } | top  # fmt: skip


def task(
    effects: dict[str, float],
    seeds: list[int],
    against: tuple[tuple[str, str], ...] = (),
    noise: float = 0.004,
    number: int = 0,
) -> dict[str, Any]:
    draw = random.Random(number)
    arms = {"full_update": arm("full_update", 0.0, seeds, draw, 0.0)}
    arms |= {name: arm(name, effect, seeds, draw, noise) for name, effect in effects.items()}
    for name in effects:
        judge(arms[name], arms["full_update"])
    for name, rival in against:
        if name in arms and rival in arms:
            pair = interval(changes(arms[name], arms[rival]))
            arms[name]["against"][rival] = {**pair, **verdict(pair)}
    return {
        "info": {"corpus": "a text", "corpus_sha256": "0" * 64},
        "flags": {"task": "text", "n_layers": 8, "dmodel": 128, "lr": 2e-3, "batch_size": 8},
        "comparisons": len(effects) + len(against), "level": 0.99, "arms": arms,
    }  # fmt: skip


def arm(
    name: str, effect: float, seeds: list[int], draw: random.Random, noise: float
) -> dict[str, Any]:
    return {
        "schedule": name, "notes": f"{name}(by hand)",
        "flags": {} if name in ("full_update", "again") else {"static_active_layers": 4},
        "planted": 1.5 if name == "slow" else None,
        "cells": [cell(seed, effect + draw.gauss(0, noise), effect) for seed in seeds],
        "loss": None, "time": None, "step": None, "verdict": None, "why": "", "against": {},
    }  # fmt: skip


def cell(seed: int, change: float, effect: float) -> dict[str, Any]:
    final = 1.8 * (1 + change) * (1 + (seed % 7) / 100)
    steps = 250 if abs(effect) < 1e-9 else 310
    return {
        "seed": seed, "final_val_loss": final, "failure": None, "steps": steps, "probes": 12,
        "skipped_steps": 0, "mean_step_ms": 40_000 / steps,
        "active_counts": [0] * 7 + [steps] if steps == 250 else [40, 0, 0, 200, 0, 30, 0, 40],
        "budget_ms": 40_000.0, "elapsed_ms": 40_010.0,
        "val_trace": [
            {"step": steps * i // 8, "elapsed_ms": 40_000.0 * i / 8 + 10 * (i > 0),
             "val_loss": final * (1 + 2 * (math.exp(-5 * i / 8) - math.exp(-5)))}
            for i in range(9)
        ],
    }  # fmt: skip


def changes(made: dict[str, Any], rival: dict[str, Any]) -> list[float]:
    both = zip(made["cells"], rival["cells"], strict=True)
    losses = [(a["final_val_loss"], b["final_val_loss"]) for a, b in both]
    return [ours / theirs - 1 for ours, theirs in losses if ours is not None and theirs]


def interval(values: list[float]) -> dict[str, float | None]:
    if len(values) < 2:
        return {"mean": values[0] if values else None, "low": None, "high": None}
    mean, wide = statistics.fmean(values), 3 * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": mean, "low": mean - wide, "high": mean + wide}


def verdict(loss: dict[str, float | None]) -> dict[str, str]:
    low, high = loss["low"], loss["high"]
    if low is None or high is None:
        word = "INCONCLUSIVE"
    elif low > -0.01 and high < 0.01:
        word = "NO_DIFFERENCE"
    else:
        word = "WIN" if high < 0 else "LOSS" if low > 0 else "INCONCLUSIVE"
    return {"verdict": word, "why": f"The interval says {word.lower()}."}


def judge(made: dict[str, Any], base: dict[str, Any]) -> None:
    made["loss"] = interval(changes(made, base))
    mean = made["loss"]["mean"]
    reached = mean is not None and mean < 0
    made["time"] = {
        "median": 0.8 if reached else None,
        "low": 0.7,
        "high": 0.9 if reached else None,
    }
    made["step"] = {"mean": 0.81, "low": 0.80, "high": 0.82}
    made |= verdict(made["loss"])


def failing() -> dict[str, Any]:
    """A seed that failed, an arm that failed always, a baseline that did once."""
    made = study()
    arms = made["tasks"]["text"]["arms"]
    for name, which in (("top4", [0]), ("lisa", range(10)), ("full_update", [3])):
        for i in which:
            broken = arms[name]["cells"][i]
            broken |= {"final_val_loss": None, "failure": "21 steps in a row were not finite"}
            broken["val_trace"] = [*broken["val_trace"][:3], {**broken["val_trace"][3],
                                                             "val_loss": None}]  # fmt: skip
    for name in EFFECTS:
        judge(arms[name], arms["full_update"])
    return made


def without_bounds() -> dict[str, Any]:
    """Every bound null, and whole figures too."""
    made = study()
    for each in made["tasks"]["text"]["arms"].values():
        for field in ("loss", "time", "step"):
            if each[field] is not None:
                each[field] |= {"low": None, "high": None}
    made["tasks"]["text"]["arms"]["lisa"] |= {"loss": None, "time": None, "step": None}
    return made


def incomplete() -> dict[str, Any]:
    """One arm has no cell yet, another few."""
    made = study(status="incomplete", commits=["0123abc", "4567def-dirty"])
    arms = made["tasks"]["text"]["arms"]
    arms["lisa"] |= {"cells": [], "loss": None, "time": None, "step": None}
    arms["top4"]["cells"] = arms["top4"]["cells"][:2]
    arms["top4"]["against"] = {}
    return made


def with_markup() -> dict[str, Any]:
    """Names that would be HTML, or end a script, if they were not escaped."""
    evil = "<script>alert(1)</script>"
    made = study({"again": 0.0, f"grow{evil}": -0.03, "a\"b'c & </script> <!-- d": 0.02},
                 tasks=(f"text{evil}",), against=())  # fmt: skip
    made |= dict.fromkeys(("name", "question", "command", "study", "method"), f"<b>x</b>{evil}")
    made["commits"], made["confirms"] = [evil], [evil]
    made["system"]["cpu_name"] = f"<img src=x onerror=alert(2)>{evil}"
    task = made["tasks"][f"text{evil}"]
    task["info"]["corpus"] = task["flags"]["data"] = evil
    for each in task["arms"].values():
        each |= {"notes": evil, "schedule": evil, "flags": {evil: evil}}
        each["why"] += evil
        each["cells"][0]["failure"] = evil
    return made


def computed() -> dict[str, Any]:
    """A search on the computed clock: no noise at all."""
    made = study(seeds=2, clock="cost", confirms=[], noise=0.0)
    return made | {"prices": {"a size": {"parts": [["head", [1, 2], 0.5]], "measuring": 1.5}}}


def many() -> dict[str, Any]:
    return study({f"arm_{i}": 0.002 * (i - 5) * abs(i - 5) for i in range(20)}, 2, confirms=[],
                 against=())  # fmt: skip


def long_names() -> dict[str, Any]:
    names = ("dynamic_suffix_with_every_number_of_it_spelled_out_" * 2, "x" * 120)
    return study({name: 0.01 * i for i, name in enumerate(names)}, against=((names),))


CORNERS = {
    "ordinary": study,
    "one arm": lambda: study({"grow": -0.03}, against=()),
    "twenty arms": many,
    "three tasks": lambda: study(tasks=("teacher", "text", "finetune")),
    "two seeds": lambda: study(seeds=2, confirms=[]),
    "one seed": lambda: study(seeds=1, confirms=[]),
    "one cell": lambda: study({}, seeds=1, against=(), confirms=[], status="incomplete"),
    "no cell": lambda: study(status="incomplete") | {"tasks": {}, "commits": [], "system": {}},
    "failed": failing,
    "null bounds": without_bounds,
    "incomplete": incomplete,
    "computed": computed,
    "no null": lambda: study({"grow": -0.03, "top4": 0.001}),
    "long names": long_names,
    "huge": lambda: study({"again": 0.0, "wild": 1e6, "grow": -0.9, "top4": 40.0}, noise=0.2),
    "two wild seeds": lambda: study({"again": 0.0, "grow": -0.03}, 2, against=(), noise=0.5),
    "tiny": lambda: study({"again": 0.0, "grow": -1e-7, "top4": 1e-6}, noise=1e-9),
    "markup": with_markup,
}
