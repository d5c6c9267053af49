"""AutoFreeze: every short story against an oracle, a hand-worked trace, a model, and refusals."""

import itertools
import json
import math
from fractions import Fraction

import pytest
import torch

from blocksched import BlockScheduler
from blocksched.schedules import Progress, Reading, to_plain
from blocksched.schedules.autofreeze import AutoFreeze

NAN = math.nan
NORMS = (8.0, 5.0, 8.0, 4.0), (8.0, 10.0, 4.0, 8.0), (4.0, 9.0, 6.0, 0.0), (0.0, 9.0, 9.0, 4.0)
CASES = {  # schedule and steps of the run
    "a probe an interval": (AutoFreeze(intervals=6, probes=1), 6),
    "two probes": (AutoFreeze(intervals=3, probes=2, percentile=75.0), 6),
    "more steps": (AutoFreeze(intervals=4, probes=1, percentile=100.0), 9),
    "nothing": (AutoFreeze(intervals=6, probes=1, percentile=0.0), 5),
}


def oracle_boundary(schedule, n, probes):
    """From the norms of all probes, oldest first."""
    size = schedule.probes
    intervals = [probes[i : i + size] for i in range(0, len(probes) - size + 1, size)]
    sums = [[sum(map(Fraction, column)) for column in zip(*i, strict=True)] for i in intervals]
    boundary = 0
    for before, now in itertools.pairwise(sums):
        changes = []
        for b in range(boundary, n):
            if before[b]:
                changes.append(abs(before[b] - now[b]) / before[b])
            else:
                changes.append(Fraction(10**150) if now[b] else Fraction(0))
        place = Fraction(schedule.percentile) / 100 * (len(changes) - 1)
        ordered = sorted(changes)
        low = ordered[math.floor(place)]
        least = low + (ordered[math.ceil(place)] - low) * (place - math.floor(place))
        boundary += [change >= least for change in changes].index(True)
    return boundary


def walk(schedule, n, steps, t, state, probes, bad):
    """Check every story from step `t` on; how many steps were checked, and all boundaries met."""
    if t == steps:
        return 0, set()
    progress = Progress(t, steps)
    boundary = oracle_boundary(schedule, n, probes)
    due = Fraction(t, steps) >= Fraction(len(probes) + 1, schedule.intervals * schedule.probes)
    plan = schedule.plan(state, progress)
    assert plan.active == tuple(range(boundary, n)), (t, probes)
    assert plan.probe == (due and boundary < n - 1), (t, probes)
    assert (plan.freezing, plan.phase) == (boundary > 0, "suffix" if boundary else "full")
    assert schedule.wants(state, progress) == ({"relevance"} if plan.probe else set())
    count, met = 1, {boundary}
    readings = [*NORMS, (NAN,) * 4] if plan.probe else [None]
    for norms in readings:
        # Losses are not looked at, whatever they are.
        reading = Reading(NAN, None if norms is None else norms[:n])
        new = schedule.observe(state, plan, reading)
        if norms is None:
            assert new == state
        usable = norms is not None and norms[0] == norms[0]
        after = [*probes, norms[:n]] if usable else probes
        wrong = bad + (norms is not None and not usable)
        assert (new.taken, new.not_finite) == (len(after), wrong)
        assert schedule.restore(json.loads(json.dumps(to_plain(new), allow_nan=False))) == new
        more = walk(schedule, n, steps, t + 1, new, after, wrong)
        count, met = count + more[0], met | more[1]
    return count, met


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_every_story(name, n):
    schedule, steps = CASES[name]
    count, met = walk(schedule, n, steps, 0, schedule.init(n), [], 0)
    assert count == steps if n == 1 else count > 5**3
    assert met == {0} if name == "nothing" else {0, n - 1} <= met


def test_by_hand():
    """Four blocks, two probes an interval, the median. Means of the intervals and their changes:

    1: 10 10 10 10
    2:  9  8  5 10   .1 .2 .5  0   median of all .15: block 1 is the first that reaches it
    3:  7  8  4  5       0 .2 .5   median of those active .2: block 2
    4:  1  1  4  5          0  0   median 0: block 2 again
    5:  0  0  4  6          0 .2   median .1: block 3, the last; no more probes
    """
    schedule = AutoFreeze(intervals=10, probes=2)
    state = schedule.init(4)
    means = [(10, 10, 10, 10), (9, 8, 5, 10), (7, 8, 4, 5), (1, 1, 4, 5), (0, 0, 4, 6)]
    trace = []
    for step in range(200):
        plan = schedule.plan(state, Progress(step, 200))
        reading = Reading()
        if plan.probe:
            interval, second = divmod(state.taken, 2)
            share = 1.5 if second else 0.5  # of the interval's mean
            reading = Reading(None, [share * mean for mean in means[interval]])
            trace.append((step, plan.active[0]))
        state = schedule.observe(state, plan, reading)
    assert trace == [
        (10, 0), (20, 0), (30, 0), (40, 0), (50, 1), (60, 1), (70, 2), (80, 2), (90, 2), (100, 2),
    ]  # fmt: skip
    assert schedule.plan(state, Progress(199, 200)).active == (3,)


def test_a_probe_that_was_not_finite_is_made_up_for():
    schedule = AutoFreeze(intervals=4, probes=1)
    state = schedule.init(2)
    probed = []
    for step in range(16):
        plan = schedule.plan(state, Progress(step, 16))
        bad = step in (4, 5, 12)
        if plan.probe:
            probed.append(step)
        values = (math.inf if bad else 1.0, 1.0)
        state = schedule.observe(state, plan, Reading(None, values if plan.probe else None))
    assert probed == [4, 5, 6, 8, 12, 13]
    assert state.not_finite == 3


@pytest.mark.parametrize("relevance", [None, (NAN, 1.0), (1.0, math.inf), (1.0, 1e200)])
def test_what_cannot_be_used_changes_nothing(relevance):
    schedule = AutoFreeze(intervals=2, probes=1)
    state = schedule.init(2)
    plan = schedule.plan(state, Progress(1, 2))
    assert plan.probe
    new = schedule.observe(state, plan, Reading(1.0, relevance))
    assert to_plain(new) == to_plain(state) | {"not_finite": 1}


def test_on_a_model(tiny):
    """Probes measure what still trains, and nothing thaws."""
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = AutoFreeze(intervals=10, probes=1)
    scheduler = BlockScheduler(model, optimizer, schedule, total_steps=20)
    boundaries = []
    for step in range(20):
        boundary = scheduler.plan.active[0]
        boundaries.append(boundary)
        frozen = [p.clone() for block in model.blocks[:boundary] for p in block.parameters()]
        model.loss(step).backward()
        norms = [
            math.sqrt(sum(0.0 if p.grad is None else float(p.grad.square().sum()) for p in part))
            for part in (list(block.parameters()) for block in model.blocks)
        ]
        probe = scheduler.plan.probe
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if probe:
            assert scheduler.relevance == pytest.approx(norms, rel=1e-5)
            assert norms[:boundary] == [0.0] * boundary
        left = [p for block in model.blocks[:boundary] for p in block.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(frozen, left, strict=True))
    assert boundaries == sorted(boundaries)
    assert boundaries[-1] > 0


def test_what_it_asks_for():
    schedule = AutoFreeze()
    assert (schedule.history, schedule.needs_loss) == (0, False)
    assert schedule.metric == ("grad_norm", 0.0)
    assert (schedule.anneals, schedule.timed) == (False, False)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"intervals": 0}, "intervals must be >= 1, got 0"),
        ({"probes": 0}, "probes must be >= 1, got 0"),
        ({"probes": 1.5}, "probes must be a whole number, got 1.5"),
        ({"percentile": -1.0}, "percentile must be >= 0 and <= 100, got -1.0"),
        ({"percentile": 101.0}, "percentile must be >= 0 and <= 100, got 101.0"),
        ({"percentile": NAN}, "percentile must be a finite number, got nan"),
    ],
)
def test_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        AutoFreeze(**numbers)


@pytest.mark.parametrize("relevance", [(1.0,), (1.0, 2.0, 3.0), (1.0, -1.0)])
def test_relevance_of_another_model(relevance):
    schedule = AutoFreeze(intervals=2, probes=1)
    state = schedule.init(2)
    plan = schedule.plan(state, Progress(1, 2))
    with pytest.raises(ValueError, match="relevance must be 2 numbers >= 0, one per block"):
        schedule.observe(state, plan, Reading(None, relevance))


def test_the_wrong_state():
    with pytest.raises(ValueError, match="load it with the schedule that saved it"):
        AutoFreeze().restore({"n_blocks": 3})
