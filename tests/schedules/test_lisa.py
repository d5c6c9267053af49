"""lisa: draws that hold for an interval, from all sets equally often."""

import itertools
import math
from collections import Counter

import pytest

from blocksched.schedules.base import Depth, Plan, Progress, Reading
from blocksched.schedules.lisa import Lisa


def run(schedule, n, steps):
    """The active blocks of each step; whatever else the plans hold is checked."""
    state, active = schedule.init(n), []
    for step in range(steps):
        plan = schedule.plan(state, Progress(step, steps, 10.0 * step))
        assert plan == Plan(plan.active, phase="drawn", freezing=True, stem=True)
        assert schedule.wants(state, Progress(step, steps)) == frozenset()
        active.append(plan.active)
    return active


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_every_step_of_many_runs(n):
    for k, interval, seed in itertools.product(range(1, n + 1), (1, 2, 3, 5), range(3)):
        active = run(Lisa(active=k, interval=interval, seed=seed), n, 13)
        for step, blocks in enumerate(active):
            assert len(set(blocks)) == k
            assert list(blocks) == sorted(blocks)
            assert 0 <= blocks[0] <= blocks[-1] < n
            assert blocks == active[step - step % interval]


def test_algorithm_1_by_hand():
    """gamma = 2 of N_L = 5, K = 3. `printf "3 lisa 0 I" | sha256sum` begins for I = 0..4 with b6,
    da, 10, ee, 45: 2 and 4 are least. The second draw has d2, 2b, 09, 28, 37; the third e4, ab,
    fb, 5ac5, 0d."""
    assert run(Lisa(active=2, interval=3, seed=3), 5, 9) == 3 * [(2, 4)] + 3 * [(2, 3)] + 3 * [
        (3, 4)
    ]


def test_all_sets_are_drawn_equally_often():
    """6 sets in 3000 draws: five degrees of freedom, chi2 > 20.5 once in 1000 tests."""
    drawn = Counter(run(Lisa(active=2, interval=1), 4, 3000))
    assert set(drawn) == set(itertools.combinations(range(4), 2))
    assert sum((count - 500) ** 2 / 500 for count in drawn.values()) < 20.5


def test_a_draw_depends_on_nothing_but_the_step():
    schedule = Lisa()
    state = schedule.init(8)
    plan = schedule.plan(state, Progress(41, 250))
    assert schedule.plan(state, Progress(41, None, 7.0, 9.0)) == plan
    assert schedule.observe(state, plan, Reading(math.nan)) == state
    assert schedule.restore({"n_blocks": 8}) == state == Depth(8)


@pytest.mark.parametrize(("n", "steps"), [(8, 250), (18, 2000)])
def test_the_defaults_train_every_block(n, steps):
    """A block is left out once in 160 of the shorter runs."""
    assert set().union(*run(Lisa(), n, steps)) == set(range(n))


@pytest.mark.parametrize(
    ("flags", "n", "rule"),
    [
        ({"active": 5}, 4, r"active must be 1..4, got 5: lower it"),
        ({}, 0, "at least 1 block, got 0"),
    ],
)
def test_what_does_not_fit_the_model(flags, n, rule):
    with pytest.raises(ValueError, match=rule):
        Lisa(**flags).init(n)


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        ({"active": 0}, "active must be >= 1, got 0"),
        ({"interval": 0}, "interval must be >= 1, got 0"),
        ({"interval": 2.5}, "interval must be a whole number, got 2.5"),
        ({"seed": 0.5}, "seed must be a whole number, got 0.5"),
    ],
)
def test_numbers_out_of_range(flags, rule):
    with pytest.raises(ValueError, match=rule):
        Lisa(**flags)
