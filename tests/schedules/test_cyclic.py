"""cyclic: each block once a cycle, from the start of its turn with a fresh optimizer state."""

import itertools
import json

import pytest

from blocksched.schedules.base import Plan, Progress, Reading, to_plain
from blocksched.schedules.cyclic import Cyclic, Turns


def run(schedule, n, times):
    """(block, whether its turn begins) of each step, at the given (step, limit, ms, budget)."""
    state, seen = schedule.init(n), []
    stem = None if schedule.train_stem else False
    for time in times:
        plan = schedule.plan(state, Progress(*time))
        (block,) = plan.active
        assert plan == Plan((block,), phase="turn", freezing=True, stem=stem, fresh=plan.fresh)
        assert plan.fresh in ((), (block,))
        assert schedule.wants(state, Progress(*time)) == frozenset()
        seen.append((block, plan.fresh == (block,)))
        state = schedule.observe(state, plan, Reading(1.0))
        assert schedule.restore(json.loads(json.dumps(to_plain(state)))) == state
    assert state == Turns(n, sum(fresh for _, fresh in seen))
    return seen


def steps(count):
    return [(step, count) for step in range(count)]


def check(seen, turns, n, order):
    """`seen` against the number of the turn that each step belongs to."""
    cycles = [set() for _ in range(turns[-1] // n + 1)]
    for step, turn in enumerate(turns):
        block, begins = seen[step]
        assert begins == (step == 0 or turns[step - 1] != turn)
        if not begins:
            assert block == seen[step - 1][0]
            continue
        assert block not in cycles[turn // n]
        cycles[turn // n].add(block)
        if order != "random":
            assert block == (turn % n if order == "ascending" else n - 1 - turn % n)


@pytest.mark.parametrize("order", ["random", "ascending", "descending"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_every_step_of_many_runs(n, order):
    for interval, train_stem in itertools.product((1, 2, 5), (False, True)):
        schedule = Cyclic(interval=interval, order=order, train_stem=train_stem)
        check(run(schedule, n, steps(36)), [t // interval for t in range(36)], n, order)
    for cycles, limit in itertools.product((1, 2, 3, 7), (1, 5, 12, 49, 240, 250)):
        turns = [min(t, t * cycles * n // limit) for t in range(limit)]  # one begins a step at most
        check(run(Cyclic(cycles=cycles, order=order), n, steps(limit)), turns, n, order)


def test_under_a_clock_no_turn_is_left_out():
    """4 turns in 40 ms, of steps of 1, 1, 9, 25, 1, 1 and 1 ms: two turns are due at 36 ms."""
    ms = (0, 1, 2, 11, 36, 37, 38, 39)
    times = [(step, None, at, 40.0) for step, at in enumerate(ms)]
    seen = run(Cyclic(cycles=2, order="ascending"), 2, times)
    assert seen == [
        (0, True), (0, False), (0, False), (1, True), (0, True), (1, True), (1, False), (1, False),
    ]  # fmt: skip


def test_no_turn_begins_as_the_run_ends():
    schedule = Cyclic(cycles=1)
    assert not schedule.plan(Turns(2, 2), Progress(10, 10)).fresh


def test_random_reshuffling_by_hand():
    """D = 4 blocks, K = 2. `printf "5 cyclic 0 I" | sha256sum` begins for I = 0..3 with 24, 08, b1,
    a6: the order is 1, 0, 3, 2. The second cycle has df, f4, 2b, d7; the third da, 2c, c6, 3d."""
    seen = run(Cyclic(interval=2, seed=5), 4, steps(24))
    assert [block for block, _ in seen[::2]] == [1, 0, 3, 2, 2, 3, 0, 1, 1, 3, 2, 0]
    assert seen[::2] == [(block, True) for block, _ in seen[::2]]
    assert seen[1::2] == [(block, False) for block, _ in seen[::2]]


def test_the_defaults_suit_short_and_long_runs():
    """3 cycles of 8 turns in 250 steps, of 18 turns in 3000."""
    for n, limit, least, most in ((8, 250, 10, 11), (18, 3000, 55, 56)):
        seen = run(Cyclic(), n, steps(limit))
        starts = [step for step, (_, begins) in enumerate(seen) if begins] + [limit]
        lengths = {b - a for a, b in itertools.pairwise(starts)}
        assert (min(lengths), max(lengths)) == (least, most)
        assert len(starts) == 3 * n + 1


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        ({"interval": -1}, "interval must be >= 0, got -1"),
        ({"cycles": 0}, "cycles must be >= 1, got 0"),
        ({"order": "fixed"}, "order must be one of random, ascending, descending, got 'fixed'"),
        ({"train_stem": 1}, "train_stem must be true or false, got 1"),
        ({"seed": None}, "seed must be a whole number"),
    ],
)
def test_numbers_out_of_range(flags, rule):
    with pytest.raises(ValueError, match=rule):
        Cyclic(**flags)


def test_no_blocks_and_no_horizon():
    with pytest.raises(ValueError, match="at least 1 block, got 0"):
        Cyclic().init(0)
    with pytest.raises(ValueError, match="pass total_steps or time_budget_s"):
        Cyclic().plan(Turns(2), Progress(0))
