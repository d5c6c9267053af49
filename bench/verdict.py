"""The verdict: keep dynamic_suffix, or not, and what to move; of others, which beat full_update.

The experiment's own guide:

keep it only if it is clearly faster than full_update and the loss given up is acceptable; if the
quality falls short, raise the minimum or the maximum of active blocks, probe more often, or make
the threshold less aggressive.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from bench.config import FUSED
from blocksched.schedules.flags import base_name

CLEARLY_FASTER = 1.05  # a mean step at least 5 % shorter than full_update's


def verdict(result: Mapping[str, Any]) -> list[str]:
    """Lines that say what the run's evidence is worth, from the result file's content."""
    rows = {row["schedule"]: row for row in result["results"]}
    # On the same kernels, so that their gain is not booked as the schedule's.
    full, dynamic = rows.get(FUSED) or rows.get("full_update"), rows.get("dynamic_suffix")
    if full is None or len(rows) == len(_full_updates(rows)):
        return ["No verdict: it compares schedules with full_update; run it and another."]
    if dynamic is None:
        return _others(rows, full, result["config"])
    if not (_known(full["final_val_loss"]) and _known(dynamic["final_val_loss"])):
        return ["No verdict: a run without a finite final loss (unfinished, or diverged)."]
    config = result["config"]
    name = full["schedule"]
    speed = dynamic["speedup_schedule"] if name == FUSED else dynamic["speedup_vs_full"]
    if speed is None:
        return ["No verdict: how long the steps took was not recorded."]
    given_up = _relative(dynamic["final_val_loss"], full["final_val_loss"])
    fast, good = speed >= CLEARLY_FASTER, given_up <= config["accept_loss"]
    decision = "Keep dynamic_suffix" if fast and good else "Do not keep dynamic_suffix"
    if fast and good and given_up > 0 and config["equal_time_budget"]:
        decision += f" if the loss it costs is accepted: in equal time {name} ends lower"
    lines = [f"{decision} (an indication: one seed)."]
    lines.append(
        f"A step is {speed:.2f}x as fast as {name}'s"
        + ("" if fast else f", not clearly faster (that is {CLEARLY_FASTER}x or more)")
        + f"; the loss after {'equal time' if config['equal_time_budget'] else 'equal steps'} is "
        + f"{abs(given_up):.2%} {'higher' if given_up > 0 else 'lower'}"
        + f" ({config['accept_loss']:.2%} higher is accepted)."
    )
    lines += _noise(rows, given_up) + _control(rows, dynamic)
    if config["equal_time_budget"]:
        lines += _time_to_quality(full, dynamic)
        best, own = _lowest(rows), ("full_update", "static_suffix", "dynamic_suffix")
        # The guide is about the experiment's schedules: where another is lowest, that comes first.
        place = len(lines) if base_name(best["schedule"]) in own else 0
        lines[place:place] = _best(best, full)
    if name == FUSED:
        lines += _with_kernels(rows, dynamic)
    trace = result["traces"].get("dynamic_suffix", {})
    if not good:
        lines += _advice("The quality falls short. To move:", _for_quality(config, trace))
    elif not fast:
        lines += _advice("The speed falls short. To move:", _for_speed(config, trace))
    return lines


def _full_updates(rows: Mapping[str, Any]) -> list[str]:
    return [name for name in rows if base_name(name) == "full_update"]


def _others(
    rows: Mapping[str, Any], full: Mapping[str, Any], config: Mapping[str, Any]
) -> list[str]:
    """Each schedule against full_update where dynamic_suffix, which can be tuned, did not run."""
    known = [row for row in rows.values() if _known(row["final_val_loss"])]
    others = [row for row in known if row["schedule"] not in _full_updates(rows)]
    if not others or full not in known:
        return ["No verdict: a run without a finite final loss (unfinished, or diverged)."]
    name, horizon = full["schedule"], "time" if config["equal_time_budget"] else "steps"
    changes = {
        row["schedule"]: _relative(row["final_val_loss"], full["final_val_loss"]) for row in others
    }
    best = min(changes, key=lambda each: changes[each])
    if changes[best] < 0:
        first = f"{best} ends {-changes[best]:.2%} below {name} after equal {horizon}"
    else:
        first = f"Nothing beat {name} after equal {horizon}"
    lines = [f"{first} (an indication: one seed)."]
    for row in others:
        change = changes[row["schedule"]]
        speed = row["speedup_schedule"] if name == FUSED else row["speedup_vs_full"]
        step = "" if speed is None else f"a step {speed:.2f}x as fast as {name}'s, "
        way = "higher" if change > 0 else "lower"
        lines.append(f"{row['schedule']}: {step}loss {abs(change):.2%} {way}.")
    return lines + _noise(rows, changes[best])


def faults(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each schedule that left updates out or stopped over numbers not finite."""
    lines = []
    for row in rows:
        if row["failure"] is not None:
            lines.append(f"{row['schedule']} was stopped and has no result: {row['failure']}.")
        elif row["skipped_steps"]:
            lines.append(
                f"{row['schedule']} left out the updates of {row['skipped_steps']} of "
                f"{row['steps_executed']} steps: loss or gradients were not finite."
            )
    return lines


def _with_kernels(rows: Mapping[str, Any], dynamic: Mapping[str, Any]) -> list[str]:
    """What kernels and schedule do together, against the eager baseline."""
    eager = rows.get("full_update")
    if eager is None or not _known(eager["final_val_loss"]) or not dynamic["speedup_vs_full"]:
        return []
    change = _relative(dynamic["final_val_loss"], eager["final_val_loss"])
    return [
        f"With its kernels it is {dynamic['speedup_vs_full']:.2f}x as fast as eager full_update "
        f"({dynamic['speedup_kernels']:.2f} kernels x {dynamic['speedup_schedule']:.2f} schedule), "
        f"its loss {abs(change):.2%} {'higher' if change > 0 else 'lower'}."
    ]


def _noise(rows: Mapping[str, Any], given_up: float) -> list[str]:
    full, again = rows.get("full_update"), rows.get("full_update#2")
    if full is None or again is None:
        return []
    if not (_known(full["final_val_loss"]) and _known(again["final_val_loss"])):
        return []
    noise = abs(_relative(again["final_val_loss"], full["final_val_loss"]))
    if again["speedup_vs_full"] is None:
        return []
    within = "; the difference is within it" if abs(given_up) <= noise else ""
    return [
        f"The same full_update run twice differs by {noise:.2%} in loss and "
        f"{abs(again['speedup_vs_full'] - 1.0):.1%} in step time{within}."
    ]


def _control(rows: Mapping[str, Any], dynamic: Mapping[str, Any]) -> list[str]:
    """Whether relevance bought anything, or the sizes alone did."""
    random = rows.get("random_suffix")
    if random is None or not _known(random["final_val_loss"]):
        return []
    change = _relative(random["final_val_loss"], dynamic["final_val_loss"])
    if change > 0:
        return [f"Suffixes of such sizes in random order end {change:.2%} higher."]
    return [
        f"Suffixes of such sizes in random order end {-change:.2%} lower: what was measured "
        "bought nothing here."
    ]


def _time_to_quality(full: Mapping[str, Any], dynamic: Mapping[str, Any]) -> list[str]:
    name, reached = full["schedule"], dynamic["time_to_full_loss_ms"]
    if reached is None and dynamic["final_val_loss"] <= full["final_val_loss"]:
        return [f"It ended at {name}'s final loss or below; when it got there was not recorded."]
    if reached is None:
        return [f"It did not beat {name}: it never reached {name}'s final loss."]
    if not full["elapsed_ms"]:
        return []
    share = reached / full["elapsed_ms"]
    return [f"It reached {name}'s final loss after {share:.0%} of {name}'s time."]


def _known(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)


def _lowest(rows: Mapping[str, Any]) -> Mapping[str, Any]:
    known = [row for row in rows.values() if _known(row["final_val_loss"])]
    return min(known, key=lambda row: row["final_val_loss"])


def _best(best: Mapping[str, Any], full: Mapping[str, Any]) -> list[str]:
    """The schedule with the lowest loss, if it is none of the two that the verdict is about."""
    if base_name(best["schedule"]) in ("full_update", "dynamic_suffix"):
        return []
    lower = -_relative(best["final_val_loss"], full["final_val_loss"])
    return [
        f"The lowest loss is {best['schedule']}'s: {lower:.2%} below {full['schedule']}'s (an "
        "indication: one seed)."
    ]


def _relative(loss: float, reference: float) -> float:
    """How much higher `loss` is than `reference`, as a fraction of it."""
    if loss == reference:
        return 0.0
    return loss / reference - 1.0 if reference else math.inf


def _advice(title: str, moves: Sequence[str]) -> list[str]:
    return [title, *(f"  {move}" for move in moves)]


def _for_quality(config: Mapping[str, Any], trace: Mapping[str, Any]) -> list[str]:
    n = config["n_layers"]
    frozen = _frozen_sizes(trace, n)
    if not frozen:
        return ["nothing: no block was ever frozen, so what differs is noise, or steps cost more"]
    least = min(max(config["dyn_min_active_layers"], 1), n)
    most = min(config["dyn_max_active_layers"] or n, n)
    probes = [e for e in trace["dynamic_trace"] if e.get("probe")]
    at_least = sum(k <= least for k in frozen) / len(frozen)
    capped = [e["active_layers_next"] >= e["active_budget"] for e in probes] or [True]
    at_cap = sum(capped) / len(capped)
    moves = []
    if at_least > 0.5 and least < n:
        moves.append(
            f"--dyn-min-active-layers {least} -> {min(n, least + max(1, n // 8))}: the suffix sat "
            f"at the minimum in {at_least:.0%} of the frozen steps"
        )
    if at_cap > 0.5 and most < n:
        moves.append(
            f"--dyn-max-active-layers {most} -> {min(n, most + max(1, n // 8))}: the cap, not the "
            f"relevance, decided after {at_cap:.0%} of the probes"
        )
    threshold = config["dyn_relevance_threshold"]
    if at_cap <= 0.5 and threshold < 1:
        moves.append(
            f"--dyn-relevance-threshold {threshold} -> {round((1 + threshold) / 2, 3)} (less "
            f"aggressive): the threshold, not the cap, decided after {1 - at_cap:.0%} of the probes"
        )
    moved, every = _relevance_moved(probes), config["dyn_probe_every"]
    if moved > 0.05 and every > 1:
        moves.append(
            f"--dyn-probe-every {every} -> {max(1, every // 2)}: {moved:.0%} of the relevance "
            "moved to other blocks between two probes"
        )
    begin = config["dyn_freeze_start_frac"]
    if not moves:
        moves.append(
            f"--dyn-freeze-start-frac {begin} -> {round((1 + begin) / 2, 2)}: freeze later"
        )
    return moves


def _for_speed(config: Mapping[str, Any], trace: Mapping[str, Any]) -> list[str]:
    n = config["n_layers"]
    if not _frozen_sizes(trace, n):
        return [
            "--dyn-freeze-start-frac, --dyn-require-stable: no block was frozen; lower the first "
            "or drop the second (or lower --dyn-max-active-layers and --dyn-relevance-threshold)"
        ]
    most = min(config["dyn_max_active_layers"] or n, n)
    return [
        f"--dyn-max-active-layers {most} -> {max(1, most - max(1, n // 8))}, "
        "--dyn-freeze-start-frac lower, or --dyn-probe-every higher: fewer blocks on average"
    ]


def _frozen_sizes(trace: Mapping[str, Any], n: int) -> list[int]:
    return [k for k in trace.get("active_layers_hist", []) if k < n]


def _relevance_moved(probes: Sequence[Mapping[str, Any]]) -> float:
    """Mean share of the relevance that changes block between two probes once freezing is on."""
    shares = [
        [score / sum(e["ema_scores"]) for score in e["ema_scores"]]
        for e in probes
        if e["freeze_enabled"] and None not in e["ema_scores"] and sum(e["ema_scores"]) > 0
    ]
    changes = [
        sum(abs(b - a) for a, b in zip(one, two, strict=True)) / 2
        for one, two in itertools.pairwise(shares)
    ]
    return sum(changes) / len(changes) if changes else 0.0
