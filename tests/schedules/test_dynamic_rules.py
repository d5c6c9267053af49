"""dynamic_suffix, rules 1 to 4: when it freezes, recovers and probes, and the plan that follows."""

import dataclasses

import pytest

from blocksched.schedules import DynamicSuffix, Progress, Reading

N = 6
QUIET = {"min_active": 1, "warmup_steps": 0, "probe_every": 0, "refresh_every": 0}


def freezes_at(schedule, limit, losses=None):
    """The first step whose plan freezes, None if none does; losses[t] is the loss of step t."""
    state = schedule.init(N)
    for step in range(limit):
        plan = schedule.plan(state, Progress(step, limit))
        if plan.freezing:
            return step
        loss = losses[step] if losses else 1.0
        relevance = (1.0,) * N if plan.probe else None
        state = schedule.observe(state, plan, Reading(loss, relevance))
    return None


@pytest.mark.parametrize(
    ("start_step", "frac", "limit", "first"),
    [
        (-1, 0.5, 5, 2),  # round(2.5), half to even
        (-1, 0.5, 7, 4),  # round(3.5)
        (-1, 0.5, 1, 0),  # round(0.5)
        (-1, 0.5, 3, 2),  # round(1.5)
        (-1, 0.25, 10, 2),
        (-1, 0.35, 10, 4),  # 0.35 x 10 is 3.5 in floating point
        (-1, 0.0, 10, 0),
        (-1, 1.0, 10, None),
        (-7, 0.5, 10, 5),
        (3, 0.0, 10, 3),
        (0, 1.0, 10, 0),
        (9, 0.5, 10, 9),
        (10, 0.0, 10, None),
    ],
)
def test_freezing_starts_in_step_mode(start_step, frac, limit, first):
    schedule = DynamicSuffix(freeze_start_step=start_step, freeze_start_frac=frac, **QUIET)
    assert freezes_at(schedule, limit) == first


@pytest.mark.parametrize(
    ("start_step", "step", "elapsed", "freezing"),
    [
        (-1, 0, 49.999, False),
        (-1, 0, 50.0, True),
        (-1, 0, 50.001, True),
        (0, 0, 49.0, False),
        (0, 99, 0.0, False),
        (1000, 1, 50.0, True),
    ],
)
def test_equal_time_goes_by_the_clock_alone(start_step, step, elapsed, freezing):
    schedule = DynamicSuffix(freeze_start_step=start_step, freeze_start_frac=0.5, **QUIET)
    plan = schedule.plan(schedule.init(N), Progress(step, 100, elapsed, 100.0))
    assert plan.freezing is freezing
    assert plan.phase == ("suffix" if freezing else "full")


@pytest.mark.parametrize(
    ("window", "start", "losses", "first"),
    [
        (1, 0, [5.0, 4.0, 4.0, 9.0], 3),
        (1, 0, [5.0, 5.0, 9.0, 9.0], 2),
        (1, 3, [5.0, 5.0, 9.0, 8.0, 8.0, 8.0], 5),  # stable before step 3 does not count
        (1, 0, [4.0, 3.0, 2.0, 1.0], None),
        (2, 0, [3.0, 3.0, 3.0, 3.0, 9.0], 4),  # 4 losses, not 3
        (2, 0, [9.0, 3.0, 3.0, 3.0, 3.0, 9.0], 5),
        (2, 0, [3.0, 3.0, 2.0, 4.0, 9.0], None),  # same means, but the last two spread
    ],
)
def test_require_stable_waits_for_the_losses(window, start, losses, first):
    schedule = DynamicSuffix(
        freeze_start_step=start,
        require_stable=True,
        stability_window=window,
        stability_rel_change=0.0,
        stability_cv=0.0,
        **QUIET,
    )
    assert freezes_at(schedule, len(losses), losses) == first


def test_freezing_latches():
    schedule = DynamicSuffix(freeze_start_step=0, require_stable=True, stability_window=1, **QUIET)
    state = schedule.init(N)
    frozen = []
    for step, loss in enumerate([1.0, 1.0, 50.0, 0.1, 70.0]):
        plan = schedule.plan(state, Progress(step, 100))
        frozen.append(plan.freezing)
        state = schedule.observe(state, plan, Reading(loss))
    assert frozen == [False, False, True, True, True]
    late = DynamicSuffix(freeze_start_step=90, **QUIET)
    assert late.plan(dataclasses.replace(state, freezing=True), Progress(0, 100)).freezing


@pytest.mark.parametrize(
    ("frac", "limit", "first"),
    [
        (0.25, 10, 7),  # int(7.5)
        (0.3, 10, 7),
        (0.01, 10, 9),  # int(9.9)
        (0.5, 3, 1),
        (1.0, 10, 0),
        (0.9, 10, 0),  # (1 - 0.9) x 10 is just below 1 in floating point
        (0.0, 10, None),
    ],
)
def test_recovery_begins_in_step_mode(frac, limit, first):
    schedule = DynamicSuffix(final_full_frac=frac, **QUIET)
    inside = [t for t in range(limit) if schedule.recovery(Progress(t, limit)) is not None]
    assert inside == ([] if first is None else list(range(first, limit)))


@pytest.mark.parametrize(
    ("elapsed", "expected"),
    [
        (7.0, None),  # int(7.5) would let this in
        (7.49, None),
        (7.5, ("full", 0.0)),
        (8.75, ("full", 0.5)),
        (10.0, ("full", 1.0)),
        (11.0, ("full", 1.0)),
    ],
)
def test_recovery_begins_in_time_mode(elapsed, expected):
    schedule = DynamicSuffix(final_full_frac=0.25, **QUIET)
    assert schedule.recovery(Progress(99, 100, elapsed, 10.0)) == expected


STAGED = DynamicSuffix(
    freeze_start_step=0,
    final_full_frac=0.5,
    final_recovery_mode="staged",
    final_recovery_stage1_progress=0.25,
    final_recovery_stage2_progress=0.75,
    final_recovery_stage1=3,
    final_recovery_stage2=4,
    **QUIET,
)


@pytest.mark.parametrize(
    ("active", "counts"),
    [
        (2, [2, 3, 4, 4, 6]),
        (4, [4, 4, 4, 4, 6]),
        (5, [5, 5, 5, 5, 6]),
        (6, [6, 6, 6, 6, 6]),
    ],
)
def test_stages_never_take_blocks_from_the_suffix_in_use(active, counts):
    state = dataclasses.replace(STAGED.init(N), active=active)
    plans = [STAGED.plan(state, Progress(step, 8)) for step in range(3, 8)]
    assert [len(plan.active) for plan in plans] == counts
    assert [plan.phase for plan in plans] == [
        "suffix",
        "recovery:stage1",
        "recovery:stage2",
        "recovery:stage2",
        "recovery:stage3_full",
    ]
    assert plans[0].active == tuple(range(N - active, N))


def test_mode_full_trains_every_block():
    schedule = dataclasses.replace(STAGED, final_recovery_mode="full")
    state = dataclasses.replace(schedule.init(N), active=2)
    plans = [schedule.plan(state, Progress(step, 8)) for step in range(3, 8)]
    assert [len(plan.active) for plan in plans] == [2, 6, 6, 6, 6]
    assert {plan.phase for plan in plans[1:]} == {"recovery:full"}


def test_recovery_before_freezing_keeps_every_block():
    schedule = dataclasses.replace(STAGED, freeze_start_step=6)
    state = dataclasses.replace(schedule.init(N), active=2)
    plans = [schedule.plan(state, Progress(step, 8)) for step in range(4, 8)]
    # Freezing may start inside the window: rule 1 comes before rule 2.
    assert [len(plan.active) for plan in plans] == [6, 6, 4, 6]
    assert [plan.freezing for plan in plans] == [False, False, True, True]
    assert plans[0].phase == "recovery:stage1"


@pytest.mark.parametrize(
    ("warmup", "probe_every", "refresh_every", "probes"),
    [
        (0, 0, 0, []),
        (2, 0, 0, [0, 1]),
        (0, 5, 0, [0, 5, 10]),
        (0, 0, 4, [0, 4, 8, 12]),
        (3, 5, 4, [0, 1, 2, 4, 5, 8, 10, 12]),
    ],
)
@pytest.mark.parametrize("freeze", [0, 1000])
def test_probes(warmup, probe_every, refresh_every, probes, freeze):
    schedule = DynamicSuffix(
        min_active=1,
        max_active=2,
        warmup_steps=warmup,
        probe_every=probe_every,
        refresh_every=refresh_every,
        freeze_start_step=freeze,
    )
    plans = [schedule.plan(schedule.init(N), Progress(step, 100)) for step in range(13)]
    assert [step for step, plan in enumerate(plans) if plan.probe] == probes
    rest = N if freeze else 2
    assert [len(p.active) for p in plans] == [N if t in probes else rest for t in range(13)]


def test_no_probe_in_recovery():
    schedule = dataclasses.replace(STAGED, warmup_steps=8, probe_every=1, refresh_every=1)
    state = dataclasses.replace(schedule.init(N), reprobe=True)
    plans = [schedule.plan(state, Progress(step, 8)) for step in range(8)]
    assert [plan.probe for plan in plans] == [True] * 4 + [False] * 4
    assert schedule.wants(state, Progress(3, 8)) == {"relevance"}
    assert schedule.wants(state, Progress(4, 8)) == frozenset()
