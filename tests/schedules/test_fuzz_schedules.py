"""Any numbers, runs of any length, hostile readings: a schedule plans, or refuses in a line."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksched.schedules import DynamicSuffix, Progress, Reading, StaticSuffix
from blocksched.schedules.base import to_plain
from blocksched.schedules.trace import DynamicTrace

HUGE = (10**400, 10**13, -(10**400))
ODD = st.one_of(
    st.integers(-2, 20),
    st.floats(0, 1),
    st.floats(),
    st.sampled_from(HUGE),
    st.sampled_from([10**400, True, None, "3", (), "staged", b"", 3j]),
)
LOSS = st.one_of(
    st.floats(),
    st.floats(1.9, 2.1),
    st.sampled_from([1e308, -1e308, 1e200, 5e-324, 0.0]),
)
RELEVANCE = st.one_of(
    st.floats(0, 1),
    st.sampled_from([0.0, 5e-324, 1e308, math.inf, math.nan]),
    st.floats(min_value=0),
)
FIELDS = [field.name for field in dataclasses.fields(DynamicSuffix)]
FEW = {"min_active": 1, "warmup_steps": 1, "probe_every": 3, "require_stable": True,
       "adapt_budget": True, "stability_window": 2, "stability_cv": 1e300,
       "freeze_start_frac": 0.1, "stability_rel_change": 1e300}  # fmt: skip
HORIZON = st.one_of(st.integers(1, 300), st.sampled_from([10**9, 2**53]))
BUDGET = st.one_of(st.none(), st.floats(0, 1e4), st.sampled_from([5e-324, 1e308]))


def refused(error):
    """Whether an error is for people: one line with a rule and, after a colon, a remedy."""
    said = str(error)
    return ": " in said and len(said.splitlines()) == 1


@st.composite
def schedules(draw):
    """Arguments of a schedule, most of them sound, and the blocks of its model."""
    blocks = draw(st.integers(1, 9))
    if draw(st.integers(0, 9)) == 0:
        return StaticSuffix, {"active": draw(ODD)}, blocks
    odd = draw(st.dictionaries(st.sampled_from(FIELDS), ODD, max_size=2))
    return DynamicSuffix, {**FEW, **odd}, blocks


def walk(draw, schedule, blocks, steps):
    """Let a schedule plan and observe, whatever is read."""
    state, limit, budget_ms = schedule.init(blocks), draw(HORIZON), draw(BUDGET)
    losses = st.lists(LOSS if schedule.needs_loss else LOSS | st.none(), min_size=1, max_size=12)
    losses = draw(losses)
    relevance = draw(st.lists(RELEVANCE, min_size=1, max_size=12))
    late = draw(st.integers(0, limit))
    trace = DynamicTrace(schedule)
    for step in range(steps):
        progress = Progress(late + step, limit, 10.0 * step, budget_ms)
        schedule.wants(state, progress)
        plan = schedule.plan(state, progress)
        trace.planned(progress, plan)
        assert plan.active == tuple(range(blocks))[-len(plan.active) :]
        assert plan.active
        found = [relevance[(step + b) % len(relevance)] for b in range(blocks)]
        reading = Reading(losses[step % len(losses)], found if plan.probe else None)
        new = schedule.observe(state, plan, reading)
        trace.observed(step, plan, reading, state, new)
        assert schedule.restore(json.loads(json.dumps(to_plain(new)))) == new
        state = new


def made(kind, numbers, blocks):
    """The schedule, None if it is refused as it should be."""
    try:
        schedule = kind(**numbers)
        schedule.init(blocks)
    except ValueError as error:
        if not refused(error):
            raise
        return None
    return schedule


def check(data, steps):
    kind, numbers, blocks = data.draw(schedules())
    schedule = made(kind, numbers, blocks)
    if isinstance(schedule, DynamicSuffix):
        walk(data.draw, schedule, blocks, steps)


@pytest.mark.parametrize("field", FIELDS)
def test_each_number_by_itself(field):
    for value in (*HUGE, 2**53, -1, 0, 1, 1e308, 5e-324, math.nan, math.inf, True, None, "3", ()):
        schedule = made(DynamicSuffix, {**FEW, "loss_lower": 0, field: value}, 3)
        if schedule is None:
            continue
        state, trace = schedule.init(3), DynamicTrace(schedule)
        for step in range(12):
            progress = Progress(step, 20)
            plan = schedule.plan(state, progress)
            reading = Reading(2.0, (1.0, 2.0, 3.0) if plan.probe else None)
            trace.planned(progress, plan)
            new = schedule.observe(state, plan, reading)
            trace.observed(step, plan, reading, state, new)
            state = new


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.data())
def test_any_schedule_walks_or_is_refused(data):
    check(data, 40)


@pytest.mark.soak
@settings(max_examples=20_000, deadline=None)
@given(st.data())
def test_many_schedules(data):
    check(data, 400)
