"""payoff: sets worked out by hand, how often it probes, blocks that differ, and refusals."""

import dataclasses
import itertools
import math

import pytest

from blocksched.schedules import Progress, Reading
from blocksched.schedules.payoff import Costs, Payoff, PayoffState


def observed(schedule, n, relevance, *times, freezing=True):
    """The state after a probe at the start of freezing that gave this."""
    state = schedule.init(n)
    plan = schedule.plan(state, Progress(0, 10))
    return schedule.observe(
        state, dataclasses.replace(plan, freezing=freezing), Reading(None, relevance, *times)
    )


def test_a_traded_boundary_by_hand():
    """Four blocks worth 1 each, forward 1, backward 2, nothing outside: the top k cost 4 + 2k - 1,
    all of them 12. The sum pays 1/5, 2/7, 3/9, 4/12: a third twice, so all train. Its root pays
    1/5 = .2, 1.414/7 = .202, 1.732/9 = .192, 2/12 = .167: two train, and the other two cost their
    forward alone. A probe is 12/7 - 1 = 71 % dearer: at 10 % overhead one in 8 steps."""
    ones = (1.0,) * 4
    free = {"outside": 0.0, "overhead": 0.1, "freeze_start_frac": 0.0}
    assert observed(Payoff(returns=1.0, **free), 4, ones).active == (0, 1, 2, 3)
    state = observed(Payoff(returns=0.5, **free), 4, ones)
    assert (state.active, state.interval, state.wait) == ((2, 3), 8, 7)


def test_a_hole_by_hand():
    """Worth 8, 0.5, 4, 4: without block 1 a step takes 11 instead of 12 and pays 16/11 = 1.45, with
    it 16.5/12 = 1.38; the top two pay 8/7 = 1.14. Were its backward 0.2, these were 16/10.1 = 1.58
    and 16.5/10.2 = 1.62: it trains."""
    schedule = Payoff(returns=1.0, outside=0.0, freeze_start_frac=0.0)
    relevance = (64.0, 0.25, 16.0, 16.0)
    assert observed(schedule, 4, relevance).active == (0, 2, 3)
    short = (1.0,) * 4, (2.0, 0.2, 2.0, 2.0)
    assert observed(schedule, 4, relevance, *short).active == (0, 1, 2, 3)


def test_what_is_outside_of_the_blocks_makes_more_of_them_pay():
    sizes = [
        len(observed(Payoff(outside=outside), 12, (1.0,) * 12).active)
        for outside in (0.0, 1.0, 5.0, 20.0)
    ]
    assert sizes == sorted(set(sizes))


def test_it_settles_and_a_dropped_block_returns():
    """Half of 8 blocks: a probe is 25.5/16.5 - 1 = 55 % dearer than a step, so it comes every 11 at
    5 %, or twice, four and at most eight times that while nothing changes. Then the first block's
    relevance rises: it trains after the next probe, and the one after that is near."""
    schedule = Payoff(returns=0.5, freeze_start_frac=0.01, ema_decay=0.0)
    state, probes, active = schedule.init(8), [], []
    for step in range(1000):
        plan = schedule.plan(state, Progress(step, 1000))
        relevance = (1.0,) * 8 if step < 600 else (400.0, *(1.0,) * 7)
        reading = Reading(None, relevance) if plan.probe else Reading()
        state = schedule.observe(state, plan, reading)
        probes += [step] if plan.probe else []
        active.append(plan.active)
    assert probes[:10] == list(range(10))  # all train, so that it costs nothing
    later = [step for step in probes if step >= 10]
    gaps = [b - a for a, b in itertools.pairwise(later)]
    assert gaps[:4] == [22, 44, 88, 88]
    assert active[599] == (4, 5, 6, 7)
    returned = next(step for step in probes if step >= 600)
    assert returned - 600 < 8 * 11
    assert 0 in active[returned + 1]
    assert min(b - a for a, b in itertools.pairwise(probes) if a >= returned) < 11


@pytest.mark.parametrize("returns", [0.2, 0.4, 0.8])
def test_unlike_blocks_miss_the_best_by_little(returns):
    """Taking blocks by worth per time is exact for like ones; here times differ eightfold."""
    schedule, shares = Payoff(returns=returns), []
    for seed in range(200):
        number = [1 + (seed * k * k + 7 * k) % 8 for k in range(1, 13)]
        state = PayoffState(4, (0,), tuple(number[:4]), tuple(number[4:8]), tuple(number[8:]))
        costs = Costs.of(state, schedule.outside)
        best = max(
            schedule.payoff(active, state.worth, costs)
            for k in range(1, 5)
            for active in itertools.combinations(range(4), k)
        )
        found = schedule.payoff(schedule.best(state.worth, costs), state.worth, costs)
        assert found <= best * (1 + 1e-12)
        shares.append(found / best)
    assert min(shares) > 0.95
    assert sum(share > 1 - 1e-12 for share in shares) > 180


def test_no_relevance_at_all_changes_nothing():
    state = observed(Payoff(), 5, (0.0,) * 5)
    assert state.active == Payoff().init(5).active == (3, 4)


def test_times_that_a_clock_did_not_tell_are_left_out():
    schedule = Payoff(freeze_start_frac=0.0)
    whole = observed(schedule, 2, (1.0, 1.0), (3.0, 3.0), (5.0, 5.0))
    assert (whole.forward_ms, whole.backward_ms) == ((3.0, 3.0), (5.0, 5.0))
    for odd in ((0.0, 3.0), None):
        state = observed(schedule, 2, (1.0, 1.0), odd, (5.0, 5.0))
        assert (state.forward_ms, state.backward_ms, state.not_finite) == ((), (), 0)
    state = observed(schedule, 2, (1.0, 1.0), (math.nan, 3.0), (5.0, 5.0))
    assert (state.worth, state.not_finite, state.wait) == ((), 1, 0)
    plan = schedule.plan(whole, Progress(1, 10))
    later = schedule.observe(
        whole,
        dataclasses.replace(plan, probe=True),
        Reading(1.0, (1.0, 1.0), (2.0, 4.0), (9.0, 4.0)),
    )
    assert (later.forward_ms, later.backward_ms) == ((2.0, 3.0), (5.0, 4.0))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"returns": 0.0}, "returns must be > 0 and <= 1, got 0.0"),
        ({"overhead": 0.0}, "overhead must be > 0, got 0.0"),
        ({"outside": -1.0}, "outside must be >= 0, got -1.0"),
        ({"ema_decay": 1.0}, "ema_decay must be >= 0 and < 1, got 1.0"),
        ({"freeze_start_frac": 2.0}, "freeze_start_frac must be >= 0 and <= 1, got 2.0"),
        ({"relevance_metric": "noise"}, "relevance_metric must be one of"),
    ],
)
def test_refusals(flags, words):
    with pytest.raises(ValueError, match=words):
        Payoff(**flags)


def test_relevance_of_another_number_of_blocks():
    with pytest.raises(ValueError, match="relevance must be 3 numbers >= 0"):
        observed(Payoff(), 3, (1.0, 1.0))
