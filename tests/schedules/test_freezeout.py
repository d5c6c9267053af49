"""FreezeOut: every step of many runs against an oracle in fractions, and hand-worked traces."""

import itertools
import math
from fractions import Fraction

import pytest

from blocksched.schedules import Progress, Reading, to_plain
from blocksched.schedules.freezeout import FreezeOut

STEPS = 61  # a prime, so that no step falls on the end of a block but the last


def oracle(t0, cubic, scaled, n, t):
    """(active blocks, rates) at the share `t` of the run, all from the rules."""
    steps = [Fraction(i, n - 1) if n > 1 else Fraction(1) for i in range(n)]
    ends = [(t0 + (1 - t0) * step) ** (3 if cubic else 1) for step in steps] + [Fraction(1)]
    rates = [
        (1 + math.cos(math.pi * float(t / end))) / (2 * float(end if scaled else 1))
        if t < end
        else 0.0
        for end in ends
    ]
    return [b for b in range(n) if t < ends[b]] or [n - 1], rates


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("spacing", ["linear", "cubic"])
@pytest.mark.parametrize("scaled", [True, False])
def test_every_step(n, spacing, scaled):
    for t0 in (Fraction(1, 100), Fraction(4, 5), Fraction(1)):
        schedule = FreezeOut(t0=float(t0), spacing=spacing, scale_rates=scaled)
        state = schedule.init(n)
        before = n
        for step in range(STEPS + 3):
            progress = Progress(step, STEPS)
            plan = schedule.plan(state, progress)
            t = min(Fraction(1), Fraction(step, STEPS))
            active, rates = oracle(t0, spacing == "cubic", scaled, n, t)
            assert list(plan.active) == active
            assert plan.rates == pytest.approx(rates, rel=1e-9, abs=1e-9)
            assert plan.freezing == (len(active) < n)
            assert len(active) <= before
            before = len(active)
            assert schedule.observe(state, plan, Reading(math.nan)) == state
            assert schedule.wants(state, progress) == frozenset()
            timed = Progress(3, None, 10.0 * min(step, STEPS), 10.0 * STEPS)
            assert schedule.plan(state, timed) == plan
        assert schedule.restore(to_plain(state)) == state


def test_linear_by_hand():
    """t0 = 1/2 with 5 blocks: they end at 1/2, 5/8, 3/4, 7/8 and 1, head included."""
    schedule = FreezeOut(t0=0.5, spacing="linear", scale_rates=False)
    state = schedule.init(5)
    starts = [schedule.plan(state, Progress(step, 16)).active[0] for step in range(17)]
    assert starts == [0] * 8 + [1] * 2 + [2] * 2 + [3] * 2 + [4] * 3
    # Half way to its end a block has half its rate: cos(pi / 2) is 0.
    assert schedule.plan(state, Progress(0, 16)).rates == (1.0,) * 6
    assert schedule.plan(state, Progress(4, 16)).rates[0] == 0.5
    assert schedule.plan(state, Progress(6, 16)).rates[2] == 0.5
    assert schedule.plan(state, Progress(8, 16)).rates[4:] == (0.5, 0.5)
    # At a third of the run block 2 is at 4/9 of its way; (1 + cos(4 pi / 9)) / 2 = 0.586824.
    assert schedule.plan(state, Progress(1, 3)).rates[2] == pytest.approx(0.586824, abs=1e-6)


def test_cubic_and_scaled_by_hand():
    """The authors' numbers: 0.8, 0.9 and 1 cubed are 0.512, 0.729 and 1."""
    schedule = FreezeOut()
    state = schedule.init(3)

    def at(step):
        return schedule.plan(state, Progress(step, 1000))

    assert at(0).rates == pytest.approx((1 / 0.512, 1 / 0.729, 1.0, 1.0))
    assert at(256).rates[0] == pytest.approx(0.5 / 0.512)
    assert [at(step).active for step in (511, 513, 728, 730, 1000)] == [
        (0, 1, 2), (1, 2), (1, 2), (2,), (2,),
    ]  # fmt: skip
    assert at(513).rates[0] == 0.0
    assert at(1000).rates == (0.0,) * 4
    # Every block travels as far: its rates add up to half the run, whatever its share of it.
    for place in range(4):
        far = sum(at(step).rates[place] for step in range(1000))
        assert far == pytest.approx(500, abs=2)


def test_what_it_asks_for():
    schedule = FreezeOut()
    assert (schedule.history, schedule.needs_loss, schedule.metric) == (0, False, None)
    assert (schedule.anneals, schedule.timed) == (True, False)


def test_the_plan_of_a_step_is_the_same_on_machines_with_other_cosines(monkeypatch):
    schedule = FreezeOut()
    state = schedule.init(4)
    ours = [schedule.plan(state, Progress(step, 100)) for step in range(100)]
    exact = math.cos
    monkeypatch.setattr(math, "cos", lambda x: math.nextafter(exact(x), 2))
    assert [schedule.plan(state, Progress(step, 100)) for step in range(100)] == ours


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        *itertools.product(
            [{"t0": 0.0}, {"t0": 1.5}], [r"t0 must be >= 0.01 and <= 1, got .*: give a value"]
        ),
        ({"t0": math.nan}, "t0 must be a finite number, got nan"),
        ({"spacing": "squared"}, "spacing must be one of linear, cubic, got 'squared'"),
        ({"scale_rates": 1}, "scale_rates must be true or false, got 1"),
    ],
)
def test_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        FreezeOut(**numbers)


def test_a_run_without_a_horizon():
    schedule = FreezeOut()
    with pytest.raises(ValueError, match="pass total_steps or time_budget_s"):
        schedule.plan(schedule.init(3), Progress(0))
