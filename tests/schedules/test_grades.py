"""GradES: every short story against an oracle, a hand-worked trace, a model, and refusals."""

import json
import math
from decimal import Decimal

import pytest
import torch

from blocksched import BlockScheduler
from blocksched.schedules import Progress, Reading, to_plain
from blocksched.schedules.grades import GradES

NAN = math.nan
NORMS = (8.0, 2.0, 5.0, 1.0), (1.0, 3.0, 0.0, 6.0), (2.0, 0.0, 2.0, 0.5)
CASES = {  # schedule, steps of the run, and whether a story leaves a hole
    "some": (GradES(tau=0.7, alpha=0.45, probes=6), 6, True),
    "no grace": (GradES(tau=0.9, alpha=0.0, probes=5), 6, True),
    "few probes": (GradES(tau=1.1, alpha=0.5, probes=4), 9, True),
    "all at once": (GradES(tau=100.0, alpha=0.3, probes=5), 5, False),
}


def oracle_active(schedule, n, probes):
    """From (norms of a probe, whether the grace period was over), oldest first."""
    active, grace = list(range(n)), []
    for i in range(1, len(probes)):
        (before, _), (now, over) = probes[i - 1 : i + 1]
        changes = [
            (Decimal(a) ** 2 + Decimal(b) ** 2).sqrt() for a, b in zip(before, now, strict=True)
        ]
        if not over or not grace:
            grace.append(sum(changes) / n)
            continue
        least = Decimal(schedule.tau) * sum(grace) / len(grace)
        moving = [b for b in active if changes[b] >= least]
        active = moving or [max(active, key=lambda b: changes[b])]
    return active


def walk(schedule, n, steps, t, state, probes, bad):
    """Check every story from step `t` on; how many steps were checked, and all sets met."""
    if t == steps:
        return 0, set()
    progress = Progress(t, steps)
    active = oracle_active(schedule, n, probes)
    due = t * schedule.probes >= (len(probes) + 1) * steps
    over = t >= schedule.alpha * steps
    plan = schedule.plan(state, progress)
    assert list(plan.active) == active, (t, probes)
    assert plan.probe == (due and len(active) > 1), (t, probes)
    assert (plan.freezing, plan.phase) == (over, "full" if len(active) == n else "stopping")
    assert schedule.wants(state, progress) == ({"relevance"} if plan.probe else set())
    count, met = 1, {plan.active}
    for norms in [*NORMS, (NAN,) * 4] if plan.probe else [None]:
        # Losses are not looked at, whatever they are.
        reading = Reading(NAN, None if norms is None else norms[:n])
        new = schedule.observe(state, plan, reading)
        if norms is None:
            assert new == state
        usable = norms is not None and norms[0] == norms[0]
        after = [*probes, (norms[:n], over)] if usable else probes
        wrong = bad + (norms is not None and not usable)
        assert (new.taken, new.not_finite) == (len(after), wrong)
        assert schedule.restore(json.loads(json.dumps(to_plain(new), allow_nan=False))) == new
        more = walk(schedule, n, steps, t + 1, new, after, wrong)
        count, met = count + more[0], met | more[1]
    return count, met


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_every_story(name, n):
    schedule, steps, hole = CASES[name]
    count, met = walk(schedule, n, steps, 0, schedule.init(n), [], 0)
    assert count == steps if n == 1 else count > 4**3
    assert n == 1 or {len(active) for active in met} >= {1, n}
    holes = [a for a in met if len(a) > 1 and a[-1] - a[0] >= len(a)]
    assert bool(holes) is (hole and n >= 3)


def test_by_hand():
    """Three blocks, a probe every tenth of 100 steps, grace to 40, tau 1/2. Norms, and the changes
    sqrt(a^2 + b^2) from the probe before:

    10: 3 4 5
    20: 4 3 12    5 5 13     grace, mean 23/3
    30: 3 4 5     5 5 13     grace, mean 23/3
    40: 4 3 0     5 5 5      least is 23/6 = 3.83: none is below
    50: 3 1 2     5 3.16 2   blocks 1 and 2 stop; only block 0 is left, so no more probes
    """
    schedule = GradES(tau=0.5, alpha=0.4, probes=10)
    norms = {10: (3, 4, 5), 20: (4, 3, 12), 30: (3, 4, 5), 40: (4, 3, 0), 50: (3, 1, 2)}
    state = schedule.init(3)
    trace = []
    for step in range(100):
        plan = schedule.plan(state, Progress(step, 100))
        if plan.probe:
            trace.append((step, plan.active, plan.freezing))
        state = schedule.observe(state, plan, Reading(None, norms[step] if plan.probe else None))
    assert trace == [
        (10, (0, 1, 2), False),
        (20, (0, 1, 2), False),
        (30, (0, 1, 2), False),
        (40, (0, 1, 2), True),
        (50, (0, 1, 2), True),
    ]
    assert schedule.plan(state, Progress(60, 100)).active == (0,)


def test_blocks_stop_anywhere_and_for_good():
    """Grace, on a clock, is the first half: two probes, whose change is 5 on average."""
    schedule = GradES(tau=0.9, alpha=0.5, probes=5)
    state = schedule.init(4)
    norms = [(3, 3, 3, 3), (4, 4, 4, 4), (4, 0, 4, 4), (0, 9, 3, 9), (9, 9, 3, 9)]
    trace = []
    for ms in range(0, 100, 10):
        plan = schedule.plan(state, Progress(ms, None, float(ms), 100.0))
        trace.append(plan.active)
        reading = Reading(None, norms[state.taken] if plan.probe else None)
        state = schedule.observe(state, plan, reading)
    # At 60 ms block 1 has sqrt(16 + 0) < 4.5, the others sqrt(32); at 80 ms block 0 too.
    assert trace == [*[(0, 1, 2, 3)] * 7, *[(0, 2, 3)] * 2, (2, 3)]


@pytest.mark.parametrize("relevance", [None, (NAN, 1.0), (1.0, math.inf), (1.0, 1e200)])
def test_what_cannot_be_used_changes_nothing_and_the_next_step_probes(relevance):
    schedule = GradES(probes=2)
    state = schedule.init(2)
    plan = schedule.plan(state, Progress(5, 10))
    assert plan.probe
    new = schedule.observe(state, plan, Reading(1.0, relevance))
    assert to_plain(new) == to_plain(state) | {"not_finite": 1}
    assert schedule.plan(new, Progress(6, 10)).probe
    after = schedule.observe(new, plan, Reading(1.0, (1.0, 1.0)))
    assert not schedule.plan(after, Progress(7, 10)).probe


def test_on_a_model(tiny):
    """A block that stopped below active ones keeps its weights, and those below it train on."""
    model = tiny()
    with torch.no_grad():
        model.blocks[2].inner.bias.fill_(9.0)  # its tanh is flat: hardly a gradient
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = GradES(tau=0.2, alpha=0.5, probes=10)
    scheduler = BlockScheduler(model, optimizer, schedule, total_steps=20)
    sets = []
    for step in range(20):
        active = scheduler.plan.active
        sets.append(active)
        before = [[p.clone() for p in block.parameters()] for block in model.blocks]
        model.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        for b, block in enumerate(model.blocks):
            same = [
                torch.equal(p, old) for p, old in zip(block.parameters(), before[b], strict=True)
            ]
            if b not in active:
                assert all(same)
            elif b != 2:
                assert not any(same)
    assert sets == [(0, 1, 2, 3)] * 11 + [(0, 1, 3)] * 9


def test_what_it_asks_for():
    schedule = GradES()
    assert (schedule.history, schedule.needs_loss) == (0, False)
    assert schedule.metric == ("grad_norm", 0.0)
    assert (schedule.anneals, schedule.timed) == (False, False)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"tau": 0.0}, "tau must be > 0, got 0.0"),
        ({"tau": math.inf}, "tau must be a finite number, got inf"),
        ({"alpha": -0.1}, "alpha must be >= 0 and < 1, got -0.1"),
        ({"alpha": 1.0}, "alpha must be >= 0 and < 1, got 1.0"),
        ({"probes": 1}, "probes must be >= 2, got 1"),
        ({"probes": 2.5}, "probes must be a whole number, got 2.5"),
    ],
)
def test_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        GradES(**numbers)


def test_relevance_of_another_model():
    schedule = GradES(probes=2)
    plan = schedule.plan(schedule.init(2), Progress(5, 10))
    with pytest.raises(ValueError, match="relevance must be 2 numbers >= 0, one per block"):
        schedule.observe(schedule.init(2), plan, Reading(None, (1.0,)))
