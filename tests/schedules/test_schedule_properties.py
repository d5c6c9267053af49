"""What holds for every schedule, whatever its numbers and whatever the run brings."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksched.schedules import (
    AutoFreeze,
    Cyclic,
    DynamicSuffix,
    FreezeOut,
    FullUpdate,
    GradES,
    Grow,
    Lisa,
    Payoff,
    Progress,
    RandomSuffix,
    Reading,
    RowSuffix,
    StaticSuffix,
    to_plain,
)
from blocksched.schedules.base import plan_from_plain
from blocksched.schedules.flags import SCHEDULES

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
def growing(draw, n):
    count = draw(st.integers(0, min(2, n - 1)))
    depths = sorted(draw(st.sets(st.integers(1, max(1, n - 1)), min_size=count, max_size=count)))
    ends = sorted(draw(st.sets(st.floats(0.01, 1), min_size=count, max_size=count)))
    return Grow(
        blocks=tuple(depths),
        until=tuple(ends),
        when=draw(st.sampled_from(["clock", "loss"])),
        window=draw(st.integers(1, 4)),
        gain=draw(st.floats(0, 0.99)),
        then=draw(st.one_of(st.just(FullUpdate()), dynamic(n))),
    )


def every_kind(n):
    """Each schedule with any numbers that fit n blocks."""
    active, seed = st.integers(1, n), st.integers(0, 5)
    counts = st.lists(st.integers(0, 3), min_size=n, max_size=n).filter(any).map(tuple)
    order = st.sampled_from(["random", "ascending", "descending"])
    return {
        FullUpdate: st.builds(FullUpdate),
        StaticSuffix: st.builds(StaticSuffix, active=active),
        DynamicSuffix: dynamic(n),
        RandomSuffix: st.builds(RandomSuffix, counts=counts, seed=seed),
        Lisa: st.builds(Lisa, active=active, interval=st.integers(1, 4), seed=seed),
        Cyclic: st.builds(
            Cyclic, interval=COUNT, cycles=st.integers(1, 4), order=order,
            train_stem=st.booleans(), seed=seed,
        ),
        FreezeOut: st.builds(
            FreezeOut, t0=st.floats(0.01, 1), spacing=st.sampled_from(["linear", "cubic"])
        ),
        AutoFreeze: st.builds(
            AutoFreeze, intervals=st.integers(1, 6), probes=st.integers(1, 3),
            percentile=st.floats(0, 100),
        ),
        GradES: st.builds(GradES, alpha=st.floats(0, 0.99), tau=st.floats(0.01, 3)),
        Grow: growing(n),
        Payoff: st.builds(
            Payoff, returns=st.floats(0.1, 1), outside=st.floats(0, 5), overhead=st.floats(0.01, 1),
            freeze_start_frac=FRACTION, ema_decay=st.floats(0, 0.99),
        ),
        RowSuffix: st.builds(RowSuffix, active=active, rows=st.floats(0.01, 1)),
    }  # fmt: skip


def test_no_schedule_is_left_out():
    assert set(every_kind(3)) == {kind for kind, _ in SCHEDULES.values()}


@st.composite
def runs(draw, kind):
    """(schedule, blocks, budget or None, losses, relevance of each step)."""
    n = draw(st.integers(1, 5))
    losses = draw(st.lists(LOSS, min_size=1, max_size=12))
    relevance = st.lists(st.lists(RELEVANCE, min_size=n, max_size=n), min_size=12, max_size=12)
    budget = draw(st.one_of(st.none(), st.floats(0, 100)))
    return draw(every_kind(n)[kind]), n, budget, losses, draw(relevance)


@pytest.mark.parametrize("kind", every_kind(2), ids=lambda kind: kind.__name__)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_plans_and_states(kind, data):
    schedule, n, budget_ms, losses, relevance = data.draw(runs(kind))
    state, ran, sizes = schedule.init(n), set(), []
    for step, loss in enumerate(losses):
        progress = Progress(step, len(losses), 10.0 * step, budget_ms)
        plan = schedule.plan(state, progress)
        check_plan(plan, n, ran)
        ran = set(plan.running or range(n))
        assert ("relevance" in schedule.wants(state, progress)) == plan.probe
        assert schedule.plan(state, progress) == plan
        values = relevance[step] if plan.probe else None
        reading = Reading(loss, values, values, values)
        new = schedule.observe(state, plan, reading)
        assert schedule.observe(state, plan, reading) == new
        text = json.dumps(to_plain(new), allow_nan=False)
        assert schedule.restore(json.loads(text)) == new
        sizes.append(len(text))
        plain = json.loads(json.dumps(to_plain(plan), allow_nan=False))
        assert plan_from_plain(plain) == plan
        state = new
    assert max(sizes) < 700 + 60 * n + 25 * schedule.history


def check_plan(plan, n, ran):
    """What every plan keeps to, `ran` being the blocks that ran before."""
    everything = tuple(range(n))
    assert plan.active
    assert list(plan.active) == sorted(set(plan.active) & set(everything))
    running = everything if plan.running is None else plan.running
    assert list(running) == sorted(set(running) & set(everything))
    assert set(plan.active) <= set(running)
    assert ran <= set(running)  # no stage ever goes back
    assert plan.sources == () or len(plan.sources) == len(running)
    assert all(s == b or s in ran for b, s in zip(running, plan.sources, strict=False) if ran)
    assert set(plan.fresh) <= set(plan.active)
    assert plan.rates == () or len(plan.rates) == n + 1
    assert all(0 <= rate < math.inf for rate in plan.rates)
    assert 0 <= plan.lower < n
    assert 0 < plan.rows <= 1
    assert 0 <= plan.boundary <= plan.active[0]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(runs(DynamicSuffix))
def test_dynamic_suffix(run):
    schedule, n, budget_ms, losses, relevance = run
    state, froze = schedule.init(n), False
    for step, loss in enumerate(losses):
        plan = schedule.plan(state, Progress(step, len(losses), 10.0 * step, budget_ms))
        assert plan.active == tuple(range(n))[-len(plan.active) :]
        assert not plan.probe or len(plan.active) == n
        assert plan.freezing or len(plan.active) == n
        assert plan.freezing >= froze
        state = schedule.observe(state, plan, Reading(loss, relevance[step]))
        assert schedule.min_active <= state.active <= state.budget
        assert state.budget <= (schedule.max_active or n)
        assert len(state.losses) <= schedule.history
        froze = plan.freezing


ALL = (
    *(FullUpdate(), StaticSuffix(active=2), DynamicSuffix(min_active=1), Lisa(), Cyclic()),
    *(RandomSuffix(counts=(1, 0, 2)), FreezeOut(), AutoFreeze(), GradES(), Grow()),
    *(Payoff(), RowSuffix(active=1)),
)


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
