"""dynamic_suffix, rules 5 to 7, the stability test, and readings that are not finite."""

import dataclasses
import math

import pytest

from blocksched.schedules import DynamicSuffix, Plan, Progress, Reading
from blocksched.schedules.dynamic_suffix import stability

NAN, INF = math.nan, math.inf
PROBE = Plan(tuple(range(8)), probe=True)
ONES = (1.0,) * 8


def budgets(schedule, losses, start=None):
    """(budget, loss_ema, best_loss) after each probe with these losses, of 8 blocks."""
    state = schedule.init(8)
    if start is not None:
        state = dataclasses.replace(state, budget=start)
    out = []
    for loss in losses:
        state = schedule.observe(state, PROBE, Reading(loss, ONES))
        out.append((state.budget, state.loss_ema, state.best_loss))
    return out


ADAPT = DynamicSuffix(
    adapt_budget=True,
    min_active=3,
    max_active=6,
    loss_upper=1.25,
    loss_lower=0.75,
    budget_step_up=2,
    budget_step_down=1,
    loss_ema_decay=0.5,
)


def test_budget_follows_the_loss_of_the_probes():
    story = [
        (4.0, 6, 4.0),  # the first only sets the average
        (8.0, 6, 6.0),  # > 5: up, but 6 is the most
        (4.0, 5, 5.0),  # < 4.5
        (2.0, 4, 3.5),  # < 3.75
        (1.0, 3, 2.25),  # < 2.625
        (0.5, 3, 1.375),  # < 1.6875: down, but 3 is the least
        (4.0, 5, 2.6875),  # > 1.71875: 3 + 2
        (2.6875, 5, 2.6875),
        (9.0, 6, 5.84375),  # 5 + 2 is above the most
    ]
    found = budgets(ADAPT, [loss for loss, _, _ in story])
    assert [(b, ema) for b, ema, _ in found] == [(b, ema) for _, b, ema in story]
    assert [best for _, _, best in found] == [4, 4, 4, 2, 1, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("loss", "budget"),
    [(5.0, 4), (5.001, 6), (5.5, 6), (3.0, 4), (2.999, 3)],
)
def test_budget_limits_are_strict_and_compare_with_the_average_before(loss, budget):
    assert budgets(ADAPT, [4.0, loss], start=4)[-1][0] == budget


def test_budget_only_rises_where_both_conditions_hold():
    # Below zero a loss can exceed -8 and be less than -4.
    both = dataclasses.replace(ADAPT, loss_upper=2.0, loss_lower=1.0)
    assert budgets(both, [-4.0, -5.0], start=4)[-1][0] == 6


def test_budget_may_rise_to_every_block_where_max_active_is_0():
    schedule = dataclasses.replace(ADAPT, max_active=0)
    assert [b for b, _, _ in budgets(schedule, [4.0, 9.0, 90.0], start=5)] == [5, 7, 8]


def test_budget_stays_with_adapt_budget_off():
    schedule = dataclasses.replace(ADAPT, adapt_budget=False)
    assert budgets(schedule, [4.0, 8.0, 1.0]) == [(6, 4.0, 4.0), (6, 6.0, 4.0), (6, 3.5, 1.0)]


@pytest.mark.parametrize(
    ("upper", "lower", "story"),
    [
        # 2.0 is its own best, so it does not lower the cap.
        (1.03, 0.995, [(4.0, 3), (5.0, 5), (2.0, 5), (2.05, 5), (2.1, 6)]),
        (2.0, 1.5, [(4.0, 3), (4.0, 3), (9.0, 5), (2.0, 4), (3.0, 4)]),
    ],
)
def test_without_decay_a_loss_is_compared_with_the_lowest(upper, lower, story):
    schedule = dataclasses.replace(ADAPT, loss_ema_decay=None, loss_upper=upper, loss_lower=lower)
    found = budgets(schedule, [loss for loss, _ in story], start=3)
    assert [b for b, _, _ in found] == [b for _, b in story]


def test_adapt_budget_needs_the_loss_of_a_probe():
    state = ADAPT.init(8)
    with pytest.raises(ValueError, match=r"adapt_budget .* scheduler\.step\(loss\), or switch"):
        ADAPT.observe(state, PROBE, Reading(None, ONES))
    assert ADAPT.observe(state, Plan((7,)), Reading()) == state


def test_relevance_is_smoothed_from_zero_without_bias_correction():
    schedule = DynamicSuffix(min_active=1, ema_decay=0.75)
    state, seen = schedule.init(2), []
    for relevance in [(4.0, 8.0), (0.0, 0.0), (8.0, 0.0)]:
        state = schedule.observe(state, PROBE, Reading(1.0, relevance))
        seen.append(state.relevance_ema)
    assert seen == [(1.0, 2.0), (0.75, 1.5), (2.5625, 1.125)]


@pytest.mark.parametrize(
    ("relevance", "threshold", "least", "most", "active"),
    [
        ((1, 1, 1, 1), 0.75, 1, 0, 3),
        ((1, 1, 1, 1), 0.5, 1, 0, 2),
        ((1, 1, 1, 1), 1.0, 1, 0, 4),
        ((1, 1, 1, 1), 0.76, 1, 0, 4),
        ((4, 3, 2, 1), 0.1, 1, 0, 1),
        ((4, 3, 2, 1), 0.3, 1, 0, 2),
        ((4, 3, 2, 1), 0.6, 1, 0, 3),
        ((4, 3, 2, 1), 0.61, 1, 0, 4),
        ((1, 2, 3, 4), 0.4, 1, 0, 1),
        ((0, 0, 0, 1), 1.0, 1, 0, 1),
        ((0, 0, 0, 1), 0.9, 2, 0, 2),  # min_active is a floor
        ((0, 0, 0, 1), 0.9, 3, 3, 3),
        ((1, 0, 0, 0), 0.5, 1, 2, 2),  # out of reach: the budget
        ((1, 0, 0, 0), 0.5, 1, 0, 4),
        ((0, 0, 0, 0), 0.5, 1, 0, 4),  # no relevance at all: the budget
        ((0, 0, 0, 0), 0.5, 1, 3, 3),
    ],
)
def test_selection(relevance, threshold, least, most, active):
    schedule = DynamicSuffix(
        relevance_threshold=threshold, min_active=least, max_active=most, ema_decay=0.0
    )
    state = schedule.observe(schedule.init(4), PROBE, Reading(1.0, relevance))
    assert state.active == active


@pytest.mark.parametrize(
    ("losses", "window", "figures"),
    [
        ([3, 5, 4, 6], 2, (4.0, 5.0, 0.25, 0.2)),  # population std 1
        ([99, 3, 5, 4, 6], 2, (4.0, 5.0, 0.25, 0.2)),
        ([5, 5, 4, 4], 2, (5.0, 4.0, 0.2, 0.0)),
        ([-4, -5], 1, (-4.0, -5.0, 0.25, 0.0)),
        ([0, 0, 1e-12, 1e-12], 2, (0.0, 1e-12, 1.0, 0.0)),  # 1e-12 in the denominator
        ([0, 0, -2e-12, 4e-12], 2, (0.0, 1e-12, 1.0, 1.5)),  # 3e-12 / (1e-12 + 1e-12)
        ([0, 0], 1, (0.0, 0.0, 0.0, 0.0)),
        ([3, 5, 4], 2, None),
        ([1, 1], 0, None),
        ([1, 1], -1, None),
    ],
)
def test_stability_figures(losses, window, figures):
    found = stability(losses, window)
    assert (found is None) == (figures is None)
    if figures is not None:
        assert tuple(found) == pytest.approx(figures, rel=1e-9, abs=1e-20)


@pytest.mark.parametrize(
    ("rel_change", "cv", "stable"),
    [(0.25, 0.2, True), (0.2499, 0.2, False), (0.25, 0.1999, False)],
)
def test_stability_limits(rel_change, cv, stable):
    schedule = DynamicSuffix(stability_window=2, stability_rel_change=rel_change, stability_cv=cv)
    assert schedule.stable([3, 5, 4, 6]) is stable
    assert not schedule.stable([5, 4, 6])
    exact = DynamicSuffix(stability_window=2, stability_rel_change=0.0, stability_cv=0.0)
    assert exact.stable([7, 7, 7, 7])


@pytest.mark.parametrize(
    ("probe", "reading"),
    [
        (True, Reading(NAN, (1.0, 1.0))),
        (True, Reading(INF, (1.0, 1.0))),
        (True, Reading(1.0, (1.0, NAN))),
        (True, Reading(None, (INF, 1.0))),
        (True, Reading(1.0, None)),
        (True, Reading(None, None)),
        (False, Reading(NAN)),
        (False, Reading(-INF)),
        (False, Reading(1.0, (NAN, 1.0))),
        (False, Reading(-1e150)),  # its square, added to another, would overflow
        (True, Reading(1.0, (1e200, 1.0))),
    ],
)
def test_a_reading_that_is_not_finite_only_calls_for_another(probe, reading):
    schedule = DynamicSuffix(
        min_active=1, freeze_start_step=0, final_full_frac=0.5, probe_every=0, refresh_every=0,
        warmup_steps=1, require_stable=True, stability_window=2, ema_decay=0.0, adapt_budget=True,
    )  # fmt: skip
    every = Plan((0, 1), probe=True)
    before = schedule.observe(schedule.init(2), every, Reading(2.0, (0.0, 3.0)))
    assert (before.active, before.losses) == (1, (2.0,))
    after = schedule.observe(before, Plan((0, 1), probe=probe), reading)
    assert after == dataclasses.replace(before, reprobe=True, not_finite=1)
    assert schedule.plan(after, Progress(3, 10)).probe
    assert not schedule.plan(after, Progress(5, 10)).probe
    again = schedule.observe(after, every, Reading(NAN, (1.0, 1.0)))
    assert (again.reprobe, again.not_finite) == (True, 2)
    # A good step that measured nothing does not end the wait; a good probe does.
    assert schedule.observe(again, Plan((1,)), Reading(1.0)).reprobe
    good = schedule.observe(again, every, Reading(2.0, (1.0, 3.0)))
    assert (good.reprobe, good.not_finite, good.relevance_ema) == (False, 2, (1.0, 3.0))
    assert not schedule.plan(good, Progress(4, 10)).probe


@pytest.mark.parametrize("relevance", [(1.0,), (1.0,) * 3, (1.0, -1.0), ()])
def test_relevance_that_does_not_fit_raises(relevance):
    schedule = DynamicSuffix(min_active=1)
    with pytest.raises(ValueError, match=r"relevance must be 2 numbers >= 0.*measure every block"):
        schedule.observe(schedule.init(2), PROBE, Reading(1.0, relevance))
