"""What holds for every schedule, whatever its numbers and whatever the run brings."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksched.schedules import (
    DynamicSuffix,
    FullUpdate,
    Progress,
    Reading,
    StaticSuffix,
    to_plain,
)

FRACTION = st.floats(0, 1)
COUNT = st.integers(0, 12)
LOSS = st.one_of(st.floats(0, 1e6), st.sampled_from([math.nan, math.inf]))
RELEVANCE = st.one_of(st.floats(0, 1e6), st.floats(0, 1e-300), st.just(math.nan))


@st.composite
def dynamic(draw, n):
    least = draw(st.integers(1, n))
    stages = sorted(draw(st.tuples(st.integers(least, n), st.integers(least, n))))
    shares = sorted(draw(st.tuples(FRACTION, FRACTION)))
    bounds = sorted(draw(st.tuples(st.floats(0, 2), st.floats(0, 2))))
    return DynamicSuffix(
        warmup_steps=draw(COUNT),
        probe_every=draw(COUNT),
        refresh_every=draw(COUNT),
        relevance_threshold=draw(st.floats(0, 1, exclude_min=True)),
        min_active=least,
        max_active=draw(st.one_of(st.just(0), st.integers(least, n))),
        adapt_budget=draw(st.booleans()),
        freeze_start_step=draw(st.integers(-1, 12)),
        freeze_start_frac=draw(FRACTION),
        require_stable=draw(st.booleans()),
        stability_window=draw(st.integers(1, 3)),
        stability_rel_change=draw(st.floats(0, 10)),
        stability_cv=draw(st.floats(0, 10)),
        final_full_frac=draw(FRACTION),
        final_recovery_mode=draw(st.sampled_from(["full", "staged"])),
        final_recovery_stage1_progress=shares[0],
        final_recovery_stage2_progress=shares[1],
        final_recovery_stage1=stages[0],
        final_recovery_stage2=stages[1],
        loss_lower=bounds[0],
        loss_upper=bounds[1],
        budget_step_up=draw(st.integers(1, 3)),
        budget_step_down=draw(st.integers(1, 3)),
        loss_ema_decay=draw(st.one_of(st.none(), st.floats(0, 0.999))),
        ema_decay=draw(st.floats(0, 0.999)),
    )


@st.composite
def runs(draw):
    """(schedule, blocks, budget or None, losses, relevance of each step)."""
    n = draw(st.integers(1, 5))
    kinds = (st.builds(FullUpdate), st.builds(StaticSuffix, active=st.integers(1, n)), dynamic(n))
    losses = draw(st.lists(LOSS, min_size=1, max_size=12))
    relevance = st.lists(st.lists(RELEVANCE, min_size=n, max_size=n), min_size=12, max_size=12)
    budget = draw(st.one_of(st.none(), st.floats(0, 100)))
    return draw(st.one_of(*kinds)), n, budget, losses, draw(relevance)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(runs())
def test_plans_and_states(run):
    schedule, n, budget_ms, losses, relevance = run
    state, froze = schedule.init(n), False
    for step, loss in enumerate(losses):
        progress = Progress(step, len(losses), 10.0 * step, budget_ms)
        plan = schedule.plan(state, progress)
        assert 1 <= len(plan.active) <= n
        assert plan.active == tuple(range(n))[-len(plan.active) :]
        assert not plan.probe or len(plan.active) == n
        assert plan.freezing or len(plan.active) == n
        assert plan.freezing >= froze
        assert ("relevance" in schedule.wants(state, progress)) == plan.probe
        assert schedule.plan(state, progress) == plan
        reading = Reading(loss, relevance[step] if plan.probe else None)
        new = schedule.observe(state, plan, reading)
        assert schedule.observe(state, plan, reading) == new
        text = json.dumps(to_plain(new), allow_nan=False)
        assert schedule.restore(json.loads(text)) == new
        assert len(text) < 200 + 25 * (2 * n + 6 + 3)
        if isinstance(schedule, DynamicSuffix):
            assert schedule.min_active <= new.active <= new.budget
            assert new.budget <= (schedule.max_active or n)
            assert len(new.losses) <= schedule.history
        state, froze = new, plan.freezing


ALL = (FullUpdate(), StaticSuffix(active=2), DynamicSuffix(min_active=1))


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: type(s).__name__)
def test_state_and_schedule_cannot_be_changed(schedule):
    state = schedule.init(3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.n_blocks = 4
    if dataclasses.fields(schedule):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(schedule, dataclasses.fields(schedule)[0].name, 1)
    for field in dataclasses.fields(state):
        assert not isinstance(getattr(state, field.name), list | dict | set)
    before = to_plain(state)
    plan = schedule.plan(state, Progress(0, 10))
    schedule.observe(state, plan, Reading(1.0, (1.0, 2.0, 3.0)))
    assert to_plain(state) == before


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: type(s).__name__)
def test_restore_refuses_a_state_of_another_kind(schedule):
    with pytest.raises(ValueError, match="load it with the schedule that saved it"):
        schedule.restore({"n_blocks": 3, "momentum": 0.9})


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("n", [0, -1])
def test_no_blocks(schedule, n):
    with pytest.raises(ValueError, match=f"at least 1 block, got {n}"):
        schedule.init(n)


@pytest.mark.parametrize(
    ("schedule", "active", "phase"),
    [(FullUpdate(), (0, 1, 2, 3), "full"), (StaticSuffix(active=3), (1, 2, 3), "suffix")],
)
def test_the_plain_schedules_never_vary(schedule, active, phase):
    state = schedule.init(4)
    for step in (0, 7, 10**6):
        plan = schedule.plan(state, Progress(step, 10, 1e9, 5.0))
        assert (plan.active, plan.probe, plan.phase) == (active, False, phase)
        assert schedule.wants(state, Progress(step, 10)) == frozenset()
        assert schedule.observe(state, plan, Reading(math.nan)) == state
    assert (schedule.history, schedule.needs_loss, schedule.metric) == (0, False, None)


@pytest.mark.parametrize(
    ("flags", "frozen", "wanted", "history", "needs_loss"),
    [
        ({}, False, set(), 0, False),
        ({"adapt_budget": True}, False, set(), 0, True),
        ({"require_stable": True, "stability_window": 5}, False, {"losses"}, 10, True),
        ({"require_stable": True, "stability_window": 5}, True, set(), 10, True),
        ({"require_stable": True, "freeze_start_step": 2}, False, set(), 24, True),
    ],
)
def test_what_dynamic_suffix_asks_for(flags, frozen, wanted, history, needs_loss):
    quiet = {"min_active": 1, "warmup_steps": 0, "freeze_start_step": 1}
    schedule = DynamicSuffix(**(quiet | flags))
    state = dataclasses.replace(schedule.init(3), freezing=frozen)
    assert schedule.wants(state, Progress(1, 10)) == wanted
    assert (schedule.history, schedule.needs_loss) == (history, needs_loss)
    assert DynamicSuffix(relevance_metric="saliency_abs_gp", eps=0.5).metric == (
        "saliency_abs_gp",
        0.5,
    )


def test_step_mode_needs_a_limit():
    schedule = DynamicSuffix(min_active=1)
    with pytest.raises(ValueError, match="pass total_steps or time_budget_s"):
        schedule.plan(schedule.init(3), Progress(0))
    assert schedule.plan(schedule.init(3), Progress(0, None, 0.0, 10.0)).probe
