"""Results made by hand, for pages: ordinary ones and the corners."""

import json
import math
import random
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECORDING = ROOT / "tests" / "data" / "recording_4090_staged_saliency.json"
PARTS = ("prefix forward", "suffix forward", "backward", "measure", "update", "other")


def result(
    steps: int = 40,
    n: int = 6,
    names: tuple[str, ...] = ("full_update", "static_suffix", "dynamic_suffix"),
    probe_every: int = 5,
    seed: int = 0,
    freeze_at: int | None = None,
    **top: Any,
) -> dict[str, Any]:
    """The content of a result file, with every field that the benchmark writes."""
    draw = random.Random(seed)
    traces = {
        name: trace(
            name, steps, n, probe_every, draw, steps // 4 if freeze_at is None else freeze_at
        )
        for name in names
    }
    budget = max(sum(t["step_times_ms"]) for t in traces.values())
    return {
        "script": "bench/run.py",
        "timestamp_utc": "2026-01-02T03:04:05Z",
        "status": "complete",
        "config": {
            "task": "text", "n_layers": n, "dmodel": 32, "seed": 7, "lr": 1e-3, "steps": steps,
            "equal_time_budget": True, "interleave": True, "time_budget_ms": budget,
            "accept_loss": 0.01, "warmup_ignore_steps": 0, "resolved_device": "cpu",
        },
        "command": "python bench/run.py --dmodel 32",
        "system": {"cuda_available": False, "cuda_device_name": None, "torch_version": "2.13.0"},
        "task": {"corpus": "a text", "corpus_sha256": "0" * 64},
        "results": [row(name, t, n) for name, t in traces.items()],
        "traces": traces,
        "expected": {"step_ms": {str(k): 2.0 + k for k in range(1, n + 1)}, "parts_ms": {}},
    } | top  # fmt: skip


def trace(
    name: str, steps: int, n: int, probe_every: int, draw: random.Random, freeze_at: int
) -> dict[str, Any]:
    dynamic = name.startswith("dynamic")
    probes = list(range(0, steps, probe_every)) if dynamic else []
    begun = min(freeze_at, steps) if dynamic else steps
    k = max(1, n // 2)
    active = [n if t < begun or t in set(probes) else k for t in range(steps)]
    if name.startswith("static"):
        active = [k] * steps
    ms = [2.0 + count + draw.random() for count in active]
    losses = [
        1.5 + 4.0 * math.exp(-4.0 * t / max(1, steps)) + 0.1 * draw.random() for t in range(steps)
    ]
    events: list[dict[str, Any]] = [
        {
            "step": t, "probe": True, "freeze_enabled": t >= begun, "probe_loss": losses[t],
            "active_budget": k, "active_layers_next": k, "active_start_next": n - k,
            "ema_scores": [draw.uniform(1.0, 2.0) * (b + 1) for b in range(n)],
        }
        for t in probes
    ]  # fmt: skip
    if begun < steps:
        events.append({"step": begun, "freeze_enabled": True, "freeze_trigger": {}})
    events.sort(key=lambda event: event["step"])
    at = sorted({0, *(steps * i // 8 for i in range(1, 9))})
    return {
        "step_times_ms": ms,
        "train_losses": losses,
        "active_layers_hist": active,
        "gradient_bytes": [0] * steps,
        "active_blocks": [
            [t, list(range(n - count, n))]
            for t, count in enumerate(active)
            if t == 0 or active[t - 1] != count
        ],
        "probe_steps": probes,
        "parts_ms": {
            str(k): {"steps": len(some), **{part: sum(some) / len(PARTS) for part in PARTS}}
            for k in sorted(set(active))
            if (some := [t for t, count in zip(ms, active, strict=True) if count == k])
        },
        "memory": {str(k): 1_000_000 * (k + 1) for k in sorted(set(active))},
        "dynamic_trace": events,
        "val_trace": [
            {
                "step": t,
                "elapsed_ms": sum(ms[:t]),
                "val_loss": 1.5 + 4.0 * math.exp(-4.0 * t / max(1, steps)) + draw.random() / 50,
            }
            for t in at
        ],
    }


def row(name: str, made: dict[str, Any], n: int) -> dict[str, Any]:
    ms, active = made["step_times_ms"], made["active_layers_hist"]
    return {
        "schedule": name, "fused": False, "steps_executed": len(ms), "skipped_steps": 0,
        "failure": None, "elapsed_ms": sum(ms), "final_val_loss": made["val_trace"][-1]["val_loss"],
        "train_loss_start": made["train_losses"][0], "train_loss_end": made["train_losses"][-1],
        "mean_step_ms": sum(ms) / len(ms), "p50_step_ms": sorted(ms)[len(ms) // 2],
        "p90_step_ms": max(ms), "speedup_vs_full": (2.5 + n) * len(ms) / sum(ms),
        "speedup_kernels": None, "speedup_schedule": None,
        "active_layers_mean": sum(active) / len(active), "active_layers_min": min(active),
        "active_layers_max": max(active), "probe_step_count": len(made["probe_steps"]),
        "notes": "by hand", "peak_bytes": max(made["memory"].values()),
        "expected_step_ms": 2.0 + sum(active) / len(active), "measured_over_expected": 1.05,
        "time_to_full_loss_ms": None, "gradient_bytes_per_step": None,
        "agreement_bytes_per_step": None, "weights_sha256": None,
    }  # fmt: skip


def interrupted() -> dict[str, Any]:
    """Stopped: no final losses, one schedule shorter than the others."""
    made = result(status="interrupted")
    for each in made["results"]:
        each["final_val_loss"] = None
    short = made["traces"]["static_suffix"]
    for field in ("step_times_ms", "train_losses", "active_layers_hist", "gradient_bytes"):
        short[field] = short[field][:3]
    short["val_trace"] = short["val_trace"][:1]
    return made


def with_nulls() -> dict[str, Any]:
    """Losses that were not finite, a schedule that failed over them."""
    made = result()
    broken = made["traces"]["dynamic_suffix"]
    for t in range(20, 40):
        broken["train_losses"][t] = None
    for point in broken["val_trace"][4:]:
        point["val_loss"] = None
    for event in broken["dynamic_trace"]:
        if event.get("probe") and event["step"] >= 20:
            event["probe_loss"] = None
            event["ema_scores"] = [None] * 6
    failed = made["results"][2]
    failed |= dict.fromkeys(("final_val_loss", "train_loss_end", "mean_step_ms", "p50_step_ms"))
    failed |= dict.fromkeys(("p90_step_ms", "speedup_vs_full", "expected_step_ms"))
    failed |= {"measured_over_expected": None, "failure": "21 steps in a row were not finite"}
    return made


def all_null() -> dict[str, Any]:
    """Not one finite loss."""
    made = result()
    for each in made["traces"].values():
        each["train_losses"] = [None] * len(each["train_losses"])
        for point in each["val_trace"]:
            point["val_loss"] = None
    for each in made["results"]:
        each["final_val_loss"] = each["train_loss_start"] = each["train_loss_end"] = None
    return made


def with_holes() -> dict[str, Any]:
    """Active sets that are no suffixes."""
    made = result(names=("full_update", "lisa"))
    draw = random.Random(3)
    holes = made["traces"]["lisa"]
    sets = [sorted(draw.sample(range(6), 2)) for _ in range(40)]
    holes["active_layers_hist"] = [2] * 40
    holes["active_blocks"] = [
        [t, blocks] for t, blocks in enumerate(sets) if t == 0 or sets[t - 1] != blocks
    ]
    return made


def growing() -> dict[str, Any]:
    """Blocks that do not run at first."""
    made = result(names=("full_update", "grow"))
    grow = made["traces"]["grow"]
    grow["active_layers_hist"] = [2] * 10 + [4] * 10 + [6] * 20
    grow["active_blocks"] = [[0, [0, 1]], [10, [0, 1, 2, 3]], [20, list(range(6))]]
    grow["running_blocks"] = grow["active_blocks"]
    return made


def with_markup() -> dict[str, Any]:
    """Names that would be HTML, or end a script, if they were not escaped."""
    evil = "<script>alert(1)</script>"
    made = result(names=("full_update", f"dynamic_suffix{evil}", "a\"b'c & </script> <!-- d"))
    made["config"]["data"] = evil
    made["system"]["cuda_device_name"] = f"<img src=x onerror=alert(2)>{evil}"
    made["task"]["corpus"] = evil
    made["command"] = f"python bench/run.py --data '{evil}'"
    return made


def many(steps: int = 100_000, n: int = 18) -> dict[str, Any]:
    """A long run of five schedules."""
    names = ("full_update", "full_update#2", "static_suffix", "dynamic_suffix", "dynamic_suffix#2")
    return result(steps, n, names, probe_every=23)


def nothing() -> dict[str, Any]:
    """Interrupted before the first step."""
    return result() | {"results": [], "traces": {}, "status": "interrupted", "expected": None}


CORNERS = {
    "ordinary": result,
    "one step": lambda: result(1, 3),
    "one block": lambda: result(12, 1),
    "one step of one block": lambda: result(1, 1, ("full_update",)),
    "two schedules": lambda: result(names=("full_update", "dynamic_suffix")),
    "interrupted": interrupted,
    "no schedule yet": nothing,
    "nulls": with_nulls,
    "all null": all_null,
    "never froze": lambda: result(freeze_at=10_000),
    "holes": with_holes,
    "growing": growing,
    "markup": with_markup,
    "the original's": lambda: json.loads(RECORDING.read_bytes()),
}
