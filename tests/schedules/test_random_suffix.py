"""random_suffix: the histogram of a recording, exactly, in random order."""

import itertools
import json
import math
from collections import Counter

import pytest

from blocksched.schedules.base import Plan, Progress, Reading, to_plain
from blocksched.schedules.random_suffix import RandomSuffix, Remaining


def run(schedule, n, steps):
    """The sizes of the suffix step by step, and the states before each and after the last."""
    state, sizes, states = schedule.init(n), [], []
    for step in range(steps):
        progress = Progress(step, steps, 10.0 * step)
        plan = schedule.plan(state, progress)
        k = len(plan.active)
        assert plan == Plan(tuple(range(n))[n - k :], phase="suffix", freezing=True)
        assert schedule.wants(state, progress) == frozenset()
        sizes.append(k)
        states.append(state)
        state = schedule.observe(state, plan, Reading(math.nan if step % 2 else 1.0))
    return sizes, [*states, state]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_step_of_every_small_recording(n):
    for counts in itertools.product(range(4 if n < 4 else 3), repeat=n):
        total = sum(counts)
        if total == 0:
            continue
        sizes, states = run(RandomSuffix(counts=counts, seed=n), n, 2 * total + 1)
        for step, state in enumerate(states):
            seen = Counter(sizes[total * (step // total) : step])
            assert state == Remaining(n, tuple(counts[k] - seen[k + 1] for k in range(n)))
        for part in (sizes[:total], sizes[total : 2 * total]):
            assert Counter(part) == {k + 1: c for k, c in enumerate(counts) if c}


def test_draws_by_hand():
    """Two steps with 1 block, one with 3, three with 4; `printf "2 random_suffix 0" | sha256sum`
    begins with a9, so that 0xa9 / 256 = 0.66 of 6 steps is place 3, which has 4 blocks. Then ba:
    place 3 of (1, 1, 3, 4, 4); 0e: 0 of (1, 1, 3, 4); cc: 2 of (1, 3, 4); f1: 1 of (1, 3); the
    last is 1; ff: place 5 of all six again."""
    assert run(RandomSuffix(counts=(2, 0, 1, 3), seed=2), 4, 7)[0] == [4, 4, 1, 4, 3, 1, 4]


def test_every_order_of_the_recorded_steps_is_as_likely():
    """6 orders of (1, 1, 2, 2) in 3000 runs: chi2 of five degrees of freedom > 20.5 once in 1000
    tests."""
    drawn = Counter(
        tuple(run(RandomSuffix(counts=(2, 2), seed=seed), 2, 4)[0]) for seed in range(3000)
    )
    assert len(drawn) == 6
    assert sum((count - 500) ** 2 / 500 for count in drawn.values()) < 20.5


def test_what_is_left_outlives_a_resume():
    schedule = RandomSuffix(counts=(3, 4))
    sizes, states = run(schedule, 2, 7)
    again = schedule.restore(json.loads(json.dumps(to_plain(states[3]))))
    assert again == states[3]
    assert [len(schedule.plan(again, Progress(3)).active)] == sizes[3:4]


@pytest.mark.parametrize(
    ("counts", "n", "rule"),
    [
        (
            (),
            3,
            r"counts must be 3 numbers, not all 0, got \(\): give how many steps of a recorded",
        ),
        ((1, 2), 3, r"counts must be 3 numbers, not all 0, got \(1, 2\)"),
        ((0, 0, 0), 3, "counts must be 3 numbers, not all 0"),
        ((1,), 0, "at least 1 block, got 0"),
    ],
)
def test_what_does_not_fit_the_model(counts, n, rule):
    with pytest.raises(ValueError, match=rule):
        RandomSuffix(counts=counts).init(n)


@pytest.mark.parametrize("counts", [(1, -1), (1.0, 2), (True, 2), (1, 2**53 + 1), [1, 2], None])
def test_counts_that_are_none(counts):
    with pytest.raises(ValueError, match=r"counts must be a tuple of whole numbers, 0 to 2\*\*53"):
        RandomSuffix(counts=counts)


def test_a_seed_that_is_none():
    with pytest.raises(ValueError, match="seed must be a whole number"):
        RandomSuffix(counts=(1,), seed="0")
