"""Replay of older files, of other names and budgets, and of files that are broken."""

import copy
import math
import re

import pytest

from blocksched.schedules.replay import replay

# A run of four blocks written out by hand. Each probe's raw relevance, from the ema with e = 0.5:
# step 0 (2, 2, 2, 2), step 2 (0, 0, 0, 8), step 4 (8, 0, 0, 0).
EMAS = {0: [1.0, 1.0, 1.0, 1.0], 2: [0.5, 0.5, 0.5, 4.5], 4: [4.25, 0.25, 0.25, 2.25]}
ACTIVE = {0: 3, 2: 1, 4: 4}  # the fewest that hold 0.75: 3 of 4, 4.5 of 6, 7 of 7


def probe(step):
    active = ACTIVE[step]
    return {
        "step": step,
        "probe": True,
        "freeze_enabled": True,
        "active_budget": 4,
        "active_start_next": 4 - active,
        "active_layers_next": active,
        "ema_scores": EMAS[step],
    }


def trace(active, entries=(), ms=10.0):
    count = len(active)
    return {
        "step_times_ms": [ms] * count,
        "train_losses": [1.0] * count,
        "active_layers_hist": list(active),
        "dynamic_trace": list(entries),
    }


OLD = {
    "n_layers": 4,
    "steps": 6,
    "static_active_layers": 2,
    "dyn_warmup_steps": 0,
    "dyn_probe_every": 2,
    "dyn_refresh_every": 0,
    "dyn_relevance_threshold": 0.75,
    "dyn_min_active_layers": 1,
    "dyn_ema_decay": 0.5,
}
DYNAMIC = trace([4, 3, 4, 1, 4, 4], map(probe, EMAS))


def old():
    traces = {"full_update": trace([4] * 6), "static_suffix": trace([2] * 6)}
    return copy.deepcopy({"config": OLD, "traces": {**traces, "dynamic_suffix": DYNAMIC}})


def test_a_file_without_the_later_flags():
    assert replay(old()) == (18, [], [])


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ({"dyn_freeze_start_frac": 0.0}, [0]),  # with the flag, the start has to be there
        ({"dyn_freeze_start_step": 2}, [0, 1]),  # nothing may be left out at step 1 yet
        ({"dyn_final_full_frac": 0.3}, [4]),  # steps 4 and 5 recover: an entry, no probe
        ({"dyn_max_active_layers": 3}, [0, 2, 4, 5]),
    ],
)
def test_later_flags_count_where_they_are(flags, steps):
    recording = old()
    recording["config"] |= flags
    assert [difference.step for difference in replay(recording)[1]] == steps


def test_entries_that_the_flags_of_an_older_file_do_not_know_are_ignored():
    recording = old()
    recording["traces"]["dynamic_suffix"]["dynamic_trace"] += [
        {"step": 1, "note": "a field of another time"},
    ]
    assert replay(recording) == (18, [], [])


def test_the_budget_of_an_older_file_follows_the_best_loss():
    recording = old()
    recording["config"] |= {"dyn_adapt_budget": True, "dyn_loss_upper": 1.03}
    recording["config"] |= {"dyn_loss_lower": 0.995, "dyn_budget_step_up": 1}
    run = recording["traces"]["dynamic_suffix"]
    # A fall to 0.5 is the best itself: the budget stays at 4. Against an average it would fall.
    run["train_losses"] = [1.0, 1.0, 0.5, 0.5, 0.514, 0.5]
    assert replay(recording) == (18, [], [])
    recording["config"]["dyn_loss_ema_decay"] = 0.5
    assert [difference.step for difference in replay(recording)[1]] == [2, 4, 5]


def test_variants_of_a_run_have_names_of_their_own():
    recording = old()
    full = recording["traces"]["full_update"]
    recording["traces"] |= {"full_update#2": full, "full_update+fused": full}
    recording["traces"]["dynamic_suffix+fused#2"] = recording["traces"]["dynamic_suffix"]
    assert replay(recording) == (36, [], [])
    recording["traces"]["full_update+fused"] = trace([4, 4, 3, 4, 4, 4])
    recording["traces"]["dynamic_suffix+fused#2"] = trace([4, 3, 4, 1, 4, 4], [probe(0), probe(2)])
    found = [(difference.schedule, difference.step) for difference in replay(recording)[1]]
    assert found[:2] == [("full_update+fused", 2), ("dynamic_suffix+fused#2", 4)]


@pytest.mark.parametrize(
    ("fixed", "wrong"),
    [
        (None, []),  # 60 ms, what full_update took: freezing at 30 ms
        (60.0, []),
        (40.0, [2, 3]),  # freezing at 20 ms
        (80.0, [3, 4]),  # freezing at 40 ms
    ],
)
def test_the_time_budget(fixed, wrong):
    recording = old()
    recording["config"] |= {"equal_time_budget": True, "dyn_freeze_start_frac": 0.5}
    if fixed is not None:
        recording["config"]["time_budget_ms"] = fixed
    start = {"step": 3, "freeze_enabled": True, "freeze_trigger": {"reached_start": True}}
    early = [probe(0) | {"freeze_enabled": False}, probe(2) | {"freeze_enabled": False}]
    run = trace([4, 4, 4, 1, 4, 4], [*early, start, probe(4)])
    recording["traces"]["dynamic_suffix"] = run
    assert [difference.step for difference in replay(recording)[1]] == wrong


def changed(path, value):
    """The recording with `value` at `path`, or without what is there if `value` is ..."""
    recording = old()
    *inner, last = path
    where = recording
    for key in inner:
        where = where[key]
    if value is ...:
        del where[last]
    else:
        where[last] = value
    return recording


RUN = ("traces", "dynamic_suffix")


@pytest.mark.parametrize(
    ("recording", "message"),
    [
        (None, "lacks `config`"),
        ([], "lacks `config`"),
        ("{}", "lacks `config`"),
        ({}, "lacks `config`"),
        ({"config": []}, "lacks `config`"),
        ({"config": {}}, "lacks `traces`"),
        (changed(("traces",), ...), "lacks `traces`"),
        (changed(("traces",), {}), "lacks `traces`"),
        (changed(("traces",), []), "lacks `traces`"),
        (changed(("config", "n_layers"), ...), "n_layers must be a whole number >= 1"),
        (changed(("config", "n_layers"), 0), "n_layers must be a whole number >= 1"),
        (changed(("config", "steps"), 6.0), "steps must be a whole number >= 1"),
        (changed(("config", "steps"), True), "steps must be a whole number >= 1"),
        (changed(("config", "dyn_ema_decay"), 1.0), "ema_decay must be >= 0 and < 1"),
        (changed(("config", "dyn_min_active_layers"), "4"), "must be a number"),
        (changed(RUN, None), "lacks a list of numbers `step_times_ms`"),
        (changed((*RUN, "train_losses"), ...), "lacks a list of numbers `train_losses`"),
        (changed((*RUN, "train_losses", 3), "1"), "lacks a list of numbers `train_losses`"),
        (changed((*RUN, "train_losses", 3), True), "lacks a list of numbers `train_losses`"),
        (changed((*RUN, "active_layers_hist", 5), ...), "cut off: 6 times, 6 losses, 5 active"),
        (changed((*RUN, "train_losses", 5), ...), "cut off: 6 times, 5 losses, 6 active"),
        (changed((*RUN, "step_times_ms", 0), ...), "cut off: 5 times, 6 losses, 6 active"),
        (changed((*RUN, "dynamic_trace"), {}), "dynamic_trace must be a list of entries"),
        (changed((*RUN, "dynamic_trace", 1), 7), "dynamic_trace must be a list of entries"),
        (changed((*RUN, "dynamic_trace", 1, "step"), ...), "must be a list of entries with a step"),
        (changed((*RUN, "dynamic_trace", 1, "ema_scores"), ...), "`ema_scores`"),
        (
            changed((*RUN, "dynamic_trace", 1, "ema_scores", 0), ...),
            "step 2: 3 ema_scores for 4 blocks",
        ),
        (changed(("config", "n_layers"), 10**9), "n_layers must be a whole number >= 1 and <= 1"),
        (changed(("config", "steps"), 10**400), "steps must be a whole number >= 1 and <= 90"),
        (changed(("config", "max_steps_multiplier"), "33"), "multiplier must be a number >= 1"),
        (changed(("config", "max_steps_multiplier"), 1e300), "must be a number >= 1 and <= 1e+06"),
        (changed(("config", "time_budget_ms"), "5"), "time_budget_ms must be a number >= 0"),
        (changed(("config", "dyn_final_full_frac"), "0.1"), "--dyn-final-full-frac must be a numb"),
        (changed(("config", "dyn_min_active_layers"), math.nan), "--dyn-min-active-layers must be"),
        (changed((*RUN, "train_losses", 3), 10**400), "lacks a list of numbers `train_losses`"),
        (changed(("traces", "other_suffix"), trace([4])), "unknown schedule 'other_suffix'"),
        ({"config": OLD | {"equal_time_budget": True}, "traces": {"static_suffix": trace([2])}},
         "budget is unknown"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_whole_raises(recording, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replay(recording)


def test_the_untouched_file_is_whole():
    assert replay(changed(("config", "steps"), 6)) == (18, [], [])


def test_a_loss_too_large_for_the_stability_test():
    recording = old()
    recording["config"] |= {"dyn_require_stable": True, "dyn_stability_window": 1}
    recording["traces"]["dynamic_suffix"]["train_losses"] = [1e308, 1e308, -1e308, 1e200, 1.0, 1.0]
    assert len(replay(recording)[1]) > 0
