"""Replay of every schedule: from the readings of its probes, and the sets that it trained."""

import copy
import json
import re

import pytest

from blocksched.schedules.flags import NAMES, from_flags
from blocksched.schedules.replay import replay
from tests.schedules.recordings import CONFIG, STEPS, N, on_disk, record

OTHERS = [name for name in NAMES if name != "dynamic_suffix"]  # which test_replay.py is about
READERS = [name for name in OTHERS if from_flags(name, CONFIG)[0].metric is not None]
MADE = {name: on_disk({name: record(name, bad=(8, 12, 13))}) for name in OTHERS}


@pytest.mark.parametrize("name", OTHERS)
def test_a_recording_replays(name):
    assert replay(MADE[name]) == (STEPS, [], [])
    assert bool(MADE[name]["traces"][name]["readings"]) == (name in READERS)


@pytest.mark.parametrize("name", OTHERS)
def test_another_set_of_as_many_blocks_shows_at_its_step(name):
    """The last change is moved to the end, with the highest active block but one instead."""
    recording = copy.deepcopy(MADE[name])
    changes = recording["traces"][name]["active_blocks"]
    blocks = changes[-1][1]
    free = [b for b in range(N) if b not in blocks]
    if not free:
        pytest.skip("trains all blocks in the end, of which there is one set")
    if changes[-1][0] == STEPS - 1:
        del changes[-1]
    changes.append([STEPS - 1, sorted([*blocks[1:], free[0]])])
    (difference,) = replay(recording)[1]
    assert difference.step == STEPS - 1
    ours = " ".join(map(str, blocks))
    assert difference.what.startswith(f"blocks {ours} train, recorded {changes[-1][1][0]}")


def test_the_order_of_recorded_blocks_says_nothing():
    recording = copy.deepcopy(MADE["lisa"])
    for _, blocks in recording["traces"]["lisa"]["active_blocks"]:
        blocks.reverse()
    assert replay(recording) == (STEPS, [], [])


def test_blocks_that_ran_are_compared():
    recording = copy.deepcopy(MADE["grow"])
    assert recording["traces"]["grow"]["running_blocks"][0] == [0, [0, 1]]
    recording["traces"]["grow"]["running_blocks"][0][1] = [0, 1, 2]
    found = replay(recording)[1]
    assert [d.step for d in found] == list(range(8))
    assert found[0].what == "blocks 0 1 run, recorded 0 1 2"
    recording["traces"]["grow"]["running_blocks"] = []
    assert [d.step for d in replay(recording)[1]] == list(range(16))
    del recording["traces"]["grow"]["running_blocks"], recording["traces"]["grow"]["active_blocks"]
    assert replay(recording)[1] == []


@pytest.mark.parametrize("name", READERS)
def test_readings_decide(name):
    """Relevance moved from the last block to the first is decided on, or the test tests nothing."""
    recording = copy.deepcopy(MADE[name])
    for reading in recording["traces"][name]["readings"]:
        reading["relevance"] = [(reading["step"] + 1.0) ** b for b in range(N)]
    assert replay(recording)[1] != []


@pytest.mark.parametrize("name", READERS)
def test_without_readings_a_run_is_left_out(name):
    recording = copy.deepcopy(MADE[name])
    recording["traces"]["lisa"] = copy.deepcopy(MADE["lisa"]["traces"]["lisa"])
    for trace in recording["traces"].values():
        del trace["readings"]
    assert replay(recording) == (STEPS, [], [name])


def test_a_probe_that_measured_nothing():
    recording = copy.deepcopy(MADE["autofreeze"])
    for reading in recording["traces"]["autofreeze"]["readings"]:
        reading["relevance"] = None
    hist = recording["traces"]["autofreeze"]["active_layers_hist"]
    # Without a reading nothing is ever frozen.
    assert len(replay(recording)[1]) == sum(k < N for k in hist) > 0


def changed(key, value):
    recording = copy.deepcopy(MADE["autofreeze"])
    recording["traces"]["autofreeze"][key] = value
    return recording


READING = {"step": 3, "relevance": [1.0] * N, "forward_ms": None, "backward_ms": None}
SETS = "must be a list of steps, ascending, each with the blocks from it on"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("readings", {}, "autofreeze.readings must be a list of entries with a step"),
        ("readings", [3], "autofreeze.readings must be a list of entries with a step"),
        ("readings", [READING | {"step": "3"}], "must be a list of entries with a step"),
        ("readings", [READING | {"step": 40}], "speaks of step 40, of which there are 40"),
        ("readings", [READING | {"step": -1}], "speaks of step -1"),
        ("readings", [READING | {"relevance": [1.0] * 5}], "relevance must be 6 numbers >= 0"),
        ("readings", [READING | {"relevance": [-1.0] * 6}], "relevance must be 6 numbers >= 0"),
        ("readings", [READING | {"relevance": 1.0}], "lacks a list of numbers `relevance`"),
        ("readings", [READING | {"relevance": ["1"] * 6}], "lacks a list of numbers `relevance`"),
        ("readings", [READING | {"forward_ms": [1.0]}], "forward_ms must be 6 numbers >= 0"),
        ("active_blocks", 7, SETS),
        ("active_blocks", [7], SETS),
        ("active_blocks", [[0]], SETS),
        ("active_blocks", [[0, [6]]], SETS),
        ("active_blocks", [[0, [-1]]], SETS),
        ("active_blocks", [[0, [True]]], SETS),
        ("active_blocks", [[5, [0]], [4, [1]]], SETS),
        ("active_blocks", [[40, [0]]], SETS),
        ("active_blocks", [["0", [0]]], SETS),
        ("running_blocks", {}, SETS),
        ("step_times_ms", [None] * STEPS, "step_times_ms must be numbers >= 0 and <= 1e+15"),
        ("step_times_ms", [-1.0] * STEPS, "step_times_ms must be numbers >= 0 and <= 1e+15"),
        ("step_times_ms", [1e16] * STEPS, "step_times_ms must be numbers >= 0 and <= 1e+15"),
    ],
)
def test_a_file_that_is_not_whole_raises(key, value, message):
    recording = json.loads(json.dumps(changed(key, value)))
    with pytest.raises(ValueError, match=re.escape(message)):
        replay(recording)
