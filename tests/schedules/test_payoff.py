"""payoff: every short story against an oracle that tries all sets, hand-worked steps, refusals."""

import dataclasses
import itertools
import json
import math
from fractions import Fraction
from typing import NamedTuple

import pytest

from blocksched.schedules import Progress, Reading, to_plain
from blocksched.schedules.payoff import Payoff

NAN = math.nan
# Squares, since a root is taken; the times of blocks differ only where returns is 1.
READINGS = (
    ((9.0, 1.0, 4.0, 25.0), ((1.0, 1.0, 1.0, 2.0), (5.0, 5.0, 5.0, 5.0))),
    ((256.0, 49.0, 1.0, 4.0), (None, None)),
)
UNLIKE = (
    ((9.0, 1.0, 4.0, 25.0), ((1.0, 2.0, 1.0, 1.0), (2.0, 2.0, 5.0, 7.0))),
    ((256.0, 49.0, 1.0, 4.0), ((2.0, 1.0, 1.0, 1.0), (3.0, 8.0, 3.0, 8.0))),
)
CASES = {  # schedule and steps of the run
    "returns 1/2": (Payoff(returns=0.5, outside=0.5, ema_decay=0.5, overhead=0.25), 5),
    "returns 1": (Payoff(returns=1.0, outside=2.0, ema_decay=0.0, overhead=1.0), 5),
    "from the middle on": (
        Payoff(returns=0.5, freeze_start_frac=0.5, ema_decay=0.5, overhead=0.5),
        5,
    ),
    "dear probes": (Payoff(returns=0.5, freeze_start_frac=0.0, ema_decay=0.75, overhead=0.01), 5),
}


class Story(NamedTuple):
    """All that the schedule saw, oldest first."""

    relevance: tuple = ()
    times: tuple = ()
    active: tuple = ()
    interval: int = 1
    due: int = 0  # the step of the next probe
    bad: int = 0


def worth(s, readings):
    keep = Fraction(s.ema_decay)
    average, *rest = [[Fraction(math.sqrt(value)) for value in reading] for reading in readings]
    for roots in rest:
        average = [keep * a + (1 - keep) * root for a, root in zip(average, roots, strict=True)]
    return average


def times_of(n, story):
    """Forward and backward: of each block the least that was measured, else 1 and 2."""
    whole = [pair for pair in story.times if pair[0] is not None]
    if not whole:
        return [Fraction(1)] * n, [Fraction(2)] * n
    return tuple(
        [Fraction(min(c)) for c in zip(*part, strict=True)] for part in zip(*whole, strict=True)
    )


def ms(s, active, forward, backward):
    """Written block by block: what is frozen below runs forward, what is frozen above passes on."""
    n = len(forward)
    total = Fraction(s.outside) * (sum(forward) + sum(backward)) / n
    for i in range(n):
        total += forward[i]
        if i > active[0] or active[0] == 0:
            total += backward[i] / 2
        if i in active:
            total += backward[i] / 2
    return total


def all_payoffs(s, n, story):
    """Of every set, to the power of 1 / returns, so that they are fractions."""
    gains, parts = worth(s, story.relevance), times_of(n, story)
    sets = [a for k in range(1, n + 1) for a in itertools.combinations(range(n), k)]
    power = int(1 / s.returns)
    return {a: sum(gains[i] for i in a) / ms(s, a, *parts) ** power for a in sets}


def oracle_after(s, n, t, story, freezing, relevance, times):
    if NAN in relevance:
        return story._replace(due=t + 1, bad=story.bad + 1)
    story = story._replace(relevance=(*story.relevance, relevance), times=(*story.times, times))
    payoffs = all_payoffs(s, n, story)
    best, second = sorted(payoffs.values(), reverse=True)[:2] if n > 1 else (*payoffs.values(), 0)
    assert best > second, "the case must not hang on a tie"
    active = max(payoffs, key=payoffs.__getitem__)
    before = story.active or tuple(range(n))
    if payoffs[before] * Fraction(1.02) ** int(1 / s.returns) >= best:
        active = before
    parts = times_of(n, story)
    extra = ms(s, range(n), *parts) / ms(s, active, *parts) - 1
    shortest = max(1, math.ceil(extra / Fraction(s.overhead)))
    interval = shortest
    if freezing and active == before:
        interval = min(8 * shortest, max(shortest, 2 * story.interval))
    return story._replace(active=active, interval=interval, due=t + interval)


def walk(s, n, steps, t, state, story):
    """Check every story from step `t` on; how many steps, and the sets that trained."""
    if t == steps:
        return 0, set()
    progress = Progress(t, steps)
    freezing = bool(story.relevance) and Fraction(t, steps) >= Fraction(s.freeze_start_frac)
    probe = not freezing or t >= story.due
    active = tuple(range(n)) if probe else story.active
    plan = s.plan(state, progress)
    assert (plan.active, plan.probe) == (active, probe), (t, story)
    assert (plan.freezing, plan.phase) == (freezing, "payoff" if freezing else "full")
    assert s.wants(state, progress) == ({"relevance"} if probe else set())
    assert (state.not_finite, state.active) == (story.bad, story.active or tuple(range(n)))
    count, met = 1, {active}
    readings = [(None, (None, None))]
    if probe:
        both = UNLIKE if s.returns == 1 else READINGS
        readings = [(r[:n], tuple(part and part[:n] for part in pair)) for r, pair in both]
        readings.append(((NAN,) * n, (None, None)))
    for relevance, times in readings:
        new = s.observe(state, plan, Reading(1.0, relevance, *times))
        after = story
        if probe:
            after = oracle_after(s, n, t, story, freezing, relevance, times)
        if t < 2:
            assert s.restore(json.loads(json.dumps(to_plain(new), allow_nan=False))) == new
        below, sets = walk(s, n, steps, t + 1, new, after)
        count, met = count + below, met | sets
    return count, met


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_every_story(name, n):
    schedule, steps = CASES[name]
    count, met = walk(schedule, n, steps, 0, schedule.init(n), Story())
    assert count > 20
    assert len(met) > 1 or n < 3


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
    """Worth 4, 0.5, 4, 4: training block 1 as well takes 1 of 12 ms and adds 0.5 to 12, which pays
    12.5/12 = 1.04 against 12/11 = 1.09. Where its backward is 2 of 20 times shorter, it stays."""
    schedule = Payoff(returns=1.0, outside=0.0, freeze_start_frac=0.0)
    relevance = (16.0, 0.25, 16.0, 16.0)
    assert observed(schedule, 4, relevance).active == (0, 2, 3)
    short = (1.0,) * 4, (2.0, 0.2, 2.0, 2.0)  # 12.5 / 10.2 = 1.225 against 12 / 10.1 = 1.188
    assert observed(schedule, 4, relevance, *short).active == (0, 1, 2, 3)


def test_what_is_outside_of_the_blocks_makes_more_of_them_pay():
    sizes = [
        len(observed(Payoff(outside=outside), 12, (1.0,) * 12).active)
        for outside in (0.0, 1.0, 5.0, 20.0)
    ]
    assert sizes == sorted(set(sizes))


def test_it_settles_and_a_dropped_block_returns():
    """Half of 8 blocks; probes 13 steps apart, then 26, 52, 104, and again 104. Then the first
    block's relevance rises: it trains after the next probe, which is followed by a nearer one."""
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
    assert gaps[:4] == [2 * gaps[0] // 2, 2 * gaps[0], 4 * gaps[0], 4 * gaps[0]]
    assert active[599] == (4, 5, 6, 7)
    returned = next(step for step in probes if step >= 600)
    assert returned - 600 < 8 * 13
    assert 0 in active[returned + 1]
    assert min(b - a for a, b in itertools.pairwise(probes) if a >= returned) < 13
