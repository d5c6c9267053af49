"""Replay: a recording gives no difference, and any tampering with it gives one."""

import copy
import json
import math
import pathlib

import pytest

from blocksched.schedules import Progress, Reading
from blocksched.schedules.flags import from_flags
from blocksched.schedules.replay import replay
from blocksched.schedules.trace import DynamicTrace

N = 6
REAL = pathlib.Path(__file__).parents[1] / "data" / "recording_4090_staged_saliency.json"
PROBES = {
    "dyn_warmup_steps": 3, "dyn_probe_every": 4, "dyn_refresh_every": 10,
    "dyn_relevance_threshold": 0.7, "dyn_min_active_layers": 2, "dyn_ema_decay": 0.5,
}  # fmt: skip
STEP_MODE = {
    "n_layers": N, "steps": 30, "static_active_layers": 3, **PROBES, "dyn_loss_ema_decay": 0.9,
    "dyn_freeze_start_step": 5, "dyn_freeze_start_frac": 0.5, "dyn_final_full_frac": 0.1,
}  # fmt: skip
EQUAL_TIME = {
    "n_layers": N, "steps": 30, "equal_time_budget": True, "max_steps_multiplier": 3.0, **PROBES,
    "dyn_relevance_metric": "saliency_abs_gp", "dyn_max_active_layers": 5,
    "dyn_adapt_budget": True, "dyn_loss_upper": 1.03, "dyn_loss_lower": 0.97,
    "dyn_loss_ema_decay": 0.9, "dyn_budget_step_up": 2, "dyn_freeze_start_frac": 0.3,
    "dyn_require_stable": True, "dyn_stability_window": 3, "dyn_stability_rel_change": 0.05,
    "dyn_stability_cv": 0.2, "dyn_final_full_frac": 0.3, "dyn_final_recovery_mode": "staged",
    "dyn_final_recovery_stage1_layers": 4, "dyn_final_recovery_stage2_layers": 5,
}  # fmt: skip


def drive(name, config, steps, ms, budget_ms=None, bad=()):
    """The trace of a made-up run; the losses of the steps in `bad` are not finite."""
    schedule, _ = from_flags(name, config)
    state = schedule.init(N)
    dynamic = DynamicTrace(schedule) if name.startswith("dynamic") else None
    trace = {"step_times_ms": [], "train_losses": [], "active_layers_hist": []}
    limit = steps if budget_ms is None else 3 * config["steps"]
    for step in range(steps):
        elapsed = sum(trace["step_times_ms"])
        if budget_ms is not None and elapsed >= budget_ms:
            break
        progress = Progress(step, limit, elapsed, budget_ms)
        plan = schedule.plan(state, progress)
        loss = math.nan if step in bad else 2.0 * 0.97**step + 0.2 * math.sin(1.7 * step)
        relevance = (
            [(1.1 + math.sin(step * 0.4 + b)) ** 4 for b in range(N)] if plan.probe else None
        )
        reading = Reading(loss, relevance)
        new = schedule.observe(state, plan, reading)
        if dynamic is not None:
            dynamic.planned(progress, plan)
            dynamic.observed(step, plan, reading, state, new)
        trace["step_times_ms"].append(ms + 0.25 * (step % 3))
        trace["train_losses"].append(None if step in bad else loss)
        trace["active_layers_hist"].append(len(plan.active))
        state = new
    trace["dynamic_trace"] = dynamic.entries if dynamic else []
    for entry in trace["dynamic_trace"]:
        if "probe" in entry and entry["step"] in bad:
            entry["probe_loss"] = None
    return trace


def record(config, steps=30, bad=(), names=("full_update", "static_suffix", "dynamic_suffix")):
    full = drive("full_update", config, config["steps"], 10.0)
    fixed = config.get("time_budget_ms", sum(full["step_times_ms"]))
    budget = fixed if config.get("equal_time_budget") else None
    traces = {name: drive(name, config, steps, 6.0, budget, bad) for name in names}
    if "full_update" in traces and "time_budget_ms" not in config:
        traces["full_update"] = full
    # What a file on disk holds.
    return json.loads(json.dumps({"config": config, "traces": traces}, allow_nan=False))


RECORDINGS = {
    "step mode": record(STEP_MODE),
    "equal time": record(EQUAL_TIME, steps=90),
    "not finite": record(STEP_MODE, bad=(4, 14, 17)),
}


def entries(recording):
    return recording["traces"]["dynamic_suffix"]["dynamic_trace"]


def the_steps(recording):
    return [difference.step for difference in replay(recording)[1]]


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_recording_replays(name):
    recording = RECORDINGS[name]
    steps = sum(len(trace["train_losses"]) for trace in recording["traces"].values())
    assert replay(recording) == (steps, [], [])
    # The run must have had something to decide.
    hist = recording["traces"]["dynamic_suffix"]["active_layers_hist"]
    assert len(set(hist)) >= 3
    found = entries(recording)
    assert len({e["active_layers_next"] for e in found if "probe" in e}) >= 3
    assert sum("freeze_trigger" in e for e in found) == 1
    stages = [e["final_recovery_stage"] for e in found if "final_recovery_stage" in e]
    assert stages == (["stage1", "stage2", "stage3_full"] if name == "equal time" else ["full"])
    if name == "equal time":
        assert len({e["active_budget"] for e in found if "probe" in e}) >= 3


@pytest.mark.parametrize("name", RECORDINGS)
@pytest.mark.parametrize("run", ["full_update", "static_suffix", "dynamic_suffix"])
def test_a_changed_active_count_shows_at_its_step(name, run):
    for step in range(len(RECORDINGS[name]["traces"][run]["active_layers_hist"])):
        recording = copy.deepcopy(RECORDINGS[name])
        recording["traces"][run]["active_layers_hist"][step] += 1
        (difference,) = replay(recording)[1]
        assert (difference.schedule, difference.step) == (run, step)
        assert str(difference).startswith(f"{run} step {step}: ")


@pytest.mark.parametrize("name", RECORDINGS)
@pytest.mark.parametrize(
    ("mark", "key", "change"),
    [
        ("probe", "active_layers_next", lambda v: v - 1),
        ("probe", "active_start_next", lambda v: v + 1),
        ("probe", "active_budget", lambda v: v - 1),
        ("probe", "freeze_enabled", lambda v: not v),
        ("final_recovery_stage", "final_recovery_stage", lambda v: v + "x"),
        ("final_recovery_stage", "final_recovery_active_layers", lambda v: v - 1),
    ],
)
def test_a_changed_entry_shows_at_its_step(name, mark, key, change):
    tampered = 0
    for i, entry in enumerate(entries(RECORDINGS[name])):
        if mark in entry:
            recording = copy.deepcopy(RECORDINGS[name])
            entries(recording)[i][key] = change(entry[key])
            (difference,) = replay(recording)[1]
            assert difference.step == entry["step"]
            assert key in difference.what
            tampered += 1
    assert tampered >= 1


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_missing_entry_shows_at_its_step(name):
    for i, entry in enumerate(entries(RECORDINGS[name])):
        recording = copy.deepcopy(RECORDINGS[name])
        del entries(recording)[i]
        assert entry["step"] in the_steps(recording)


@pytest.mark.parametrize("name", RECORDINGS)
@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("mark", ["freeze_trigger", "final_recovery_stage"])
def test_a_moved_entry_shows_at_both_steps(name, mark, by):
    for i, entry in enumerate(entries(RECORDINGS[name])):
        if mark in entry:
            recording = copy.deepcopy(RECORDINGS[name])
            entries(recording)[i]["step"] += by
            assert the_steps(recording) == sorted([entry["step"], entry["step"] + by])


def test_an_added_probe_shows_at_its_step():
    recording = copy.deepcopy(RECORDINGS["step mode"])
    probe = next(e for e in entries(recording) if e["step"] == 8 and "probe" in e)
    entries(recording).append({**probe, "step": 7})
    assert 7 in the_steps(recording)


def test_the_original_recording_replays():
    assert replay(json.loads(REAL.read_text())) == (4228, [], [])
