"""Result files spoilt at random: a replay goes through, or raises ValueError with the remedy."""

import json
import math
import pathlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blocksched.schedules.flags import NAMES
from blocksched.schedules.replay import replay
from blocksched.schedules.what_if import what_if
from tests.schedules.recordings import on_disk, record

ROOT = pathlib.Path(__file__).parents[2]
FILES = [
    ROOT / "tests" / "data" / "recording_4090_staged_saliency.json",
    ROOT / "bench" / "results" / "cpu-small-text.json",
]
STEPS = 30  # of each run, to be quick


def beginning(recording):
    """The recording without what the schedules are not replayed from, and only its first steps."""
    traces = {
        name: {
            key: [e for e in trace[key] if e["step"] < STEPS]
            if key == "dynamic_trace"
            else trace[key][:STEPS]
            for key in ("step_times_ms", "train_losses", "active_layers_hist", "dynamic_trace")
        }
        for name, trace in recording["traces"].items()
    }
    return {"config": recording["config"], "traces": traces}


RECORDINGS = [beginning(json.loads(path.read_bytes())) for path in FILES]
RECORDINGS.append(on_disk({name: record(name) for name in ("autofreeze", "grow", "lisa")}))
GONE = object()
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([2**31, 10**13, -(10**40), 10**400, 1e308, -1e308, 5e-324, -0.0]),
    st.sampled_from([math.nan, math.inf, -math.inf, 0.5, 1.0, "3", "", "\ud800\n", "staged"]),
    st.recursive(
        st.integers(0, 2),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
        max_leaves=5,
    ),
)
# What a file may lack and a hand may add.
KEYS = [
    "time_budget_ms",
    "max_steps_multiplier",
    "dyn_final_full_frac",
    "steps",
    "dyn_loss_ema_decay",
    "full_update#\ud800",
    "x\n",
]


@st.composite
def spoilt(draw):
    """A real recording with one to three of its values, at any depth, changed or gone."""
    recording = draw(st.sampled_from(RECORDINGS))
    for _ in range(draw(st.integers(1, 2))):
        top = draw(st.sampled_from(["config", "config", "traces", "traces", None]))
        recording = changed(draw, recording, top)
    return recording


def changed(draw, value, key=None):
    """A copy of `value` with something in it, under `key` if given, replaced by junk or gone."""
    if not isinstance(value, dict | list) or not value:
        return draw(JUNK)
    places = list(value) if isinstance(value, dict) else list(range(len(value)))
    if key not in places:
        if isinstance(value, dict) and draw(st.integers(0, 2)) == 0:
            return {**value, draw(st.sampled_from(KEYS)): draw(JUNK)}
        key = draw(st.sampled_from(places))
    made = value.copy()
    what = draw(st.sampled_from(["deeper", "deeper", "junk", "gone"]))
    if what == "gone":
        del made[key]
    else:
        made[key] = changed(draw, value[key]) if what == "deeper" else draw(JUNK)
    return made


def check(recording, name):
    try:
        steps, differences, _ = replay(recording)
    except ValueError as error:
        if ": " not in str(error) and "; " not in str(error):  # the rule, then the remedy
            raise
    else:
        assert steps >= 0
        assert all(str(difference) for difference in differences)
    try:
        _, (outcome,) = what_if(recording, [name], {})
    except ValueError as error:
        if ": " not in str(error) and "; " not in str(error):
            raise
    else:
        assert 0 < outcome.cost < 1 + 1e-9


@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(st.data())
def test_a_spoilt_recording(data):
    check(data.draw(spoilt()), data.draw(st.sampled_from(NAMES)))


@pytest.mark.soak
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_many_spoilt_recordings(data):
    check(data.draw(spoilt()), data.draw(st.sampled_from(NAMES)))
