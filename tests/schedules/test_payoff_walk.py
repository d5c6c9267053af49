"""Every short story of payoff, against an oracle that tries all sets, in fractions."""

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


def first(s, n):
    """Before a reading all blocks are worth the same; of sets that pay alike the largest."""
    payoffs = all_payoffs(s, n, Story(relevance=((1.0,) * n,)))
    return max(payoffs, key=lambda a: (payoffs[a], len(a)))


def oracle_after(s, n, t, story, freezing, relevance, times):
    if NAN in relevance:
        return story._replace(due=t + 1, bad=story.bad + 1)
    story = story._replace(relevance=(*story.relevance, relevance), times=(*story.times, times))
    payoffs = all_payoffs(s, n, story)
    best, second = sorted(payoffs.values(), reverse=True)[:2] if n > 1 else (*payoffs.values(), 0)
    assert best > second, "the case must not hang on a tie"
    active = max(payoffs, key=payoffs.__getitem__)
    before = story.active or first(s, n)
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
    freezing = Fraction(t, steps) >= Fraction(s.freeze_start_frac)
    probe = not freezing or t >= story.due
    chosen = story.active or first(s, n)
    active = tuple(range(n)) if probe else chosen
    plan = s.plan(state, progress)
    assert (plan.active, plan.probe) == (active, probe), (t, story)
    rates = tuple(1.0 if i in (*chosen, n) else 0.0 for i in range(n + 1))
    assert plan.rates == (rates if probe and freezing else ())
    assert (plan.freezing, plan.phase) == (freezing, "payoff" if freezing else "full")
    assert s.wants(state, progress) == ({"relevance"} if probe else set())
    assert (state.not_finite, state.active) == (story.bad, chosen)
    count, met = 1, {active, chosen}
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
