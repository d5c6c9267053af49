"""grow: every short story against an oracle, growth as its paper draws it, and what it refuses."""

import itertools
import json
import math

import pytest

from blocksched.schedules import (
    DynamicSuffix,
    FullUpdate,
    Progress,
    Reading,
    StaticSuffix,
    to_plain,
)
from blocksched.schedules.grow import Grow

NAN = math.nan
CASES = {
    "clock": {"until": (0.3, 0.6)},
    "loss": {"until": (0.5, 0.9), "when": "loss", "window": 1, "gain": 0.5},
    "loss, windows of 2": {"until": (0.7, 0.8), "when": "loss", "window": 2, "gain": 0.25},
    "loss, in the middle of one": {"until": (0.1, 0.9), "when": "loss", "window": 2},
    "interleaved": {"copy": "interleave", "until": (0.4, 1.0), "when": "loss", "window": 1},
    "new blocks": {"copy": "none", "until": (0.3, 0.6), "when": "loss", "window": 1},
    "frozen after": {"until": (0.1, 0.4), "then": StaticSuffix(active=1)},
}  # fmt: skip
STEPS = 6


def oracle_depths(n):
    """A quarter and a half of the blocks, each once, at least one; for n up to 5."""
    return {1: (), 2: (1,), 3: (1,), 4: (1, 2), 5: (1, 2)}[n]


def oracle_depth(s, depths, n, step, story):
    """How many blocks run in `step`, after `story`: depth and loss of each step so far."""
    depth = story[-1][0] if story else (*depths, n)[0]
    if depth == n:
        return n
    stage = depths.index(depth)
    if s.when == "loss" and story and step % s.window == 0:
        windows = [story[i : i + s.window] for i in range(0, step, s.window)]
        own = [[x for d, x in w if d == depth and not math.isnan(x)] for w in windows]
        means = [sum(w) / len(w) for w in own if w]
        falls = [a - b for a, b in itertools.pairwise(means)]
        stage += bool(own[-1] and falls and falls[-1] <= s.gain * max(0, *falls))
    return (*depths, n)[max(stage, sum(step / STEPS >= end for end in s.until))]


def oracle_running(s, n, depth):
    apart = n // depth
    return [i for i in range(n) if (i % apart == 0 if s.copy == "interleave" else i < depth)]


def oracle_source(s, n, depth, block):
    """The block that `block` is a copy of, where `depth` ran before."""
    if s.copy == "stack":
        return block % depth
    return max(i for i in oracle_running(s, n, depth) if i <= block)


def walk(s, depths, n, state, lazy, pending, story):
    """Check every story from here on; `lazy` gets its readings only when it wants them."""
    step = len(story)
    if step == STEPS:
        return 0
    progress = Progress(step, STEPS)
    plan = s.plan(state, progress)
    depth = oracle_depth(s, depths, n, step, story)
    before = story[-1][0] if story else depth
    expected = s.then.plan(s.then.init(n), progress)
    if depth == n:
        assert (plan.running, plan.active, plan.phase) == (None, expected.active, expected.phase)
    else:
        assert plan.running == plan.active == tuple(oracle_running(s, n, depth)), story
        assert (plan.phase, plan.freezing, plan.stem_trains) == ("grow", False, True)
    if depth != before and s.copy != "none":
        all_now = range(n) if plan.running is None else plan.running
        assert plan.sources == tuple(oracle_source(s, n, before, b) for b in all_now), story
    else:
        assert plan.sources == ()
    if "losses" in s.wants(lazy, progress):
        for old, reading in pending[-s.history :]:
            lazy = s.observe(lazy, old, reading)
        pending = []
    assert s.plan(lazy, progress) == plan, story
    count = 1
    for loss in (8.0, 4.0, NAN if step % 2 else 3.0) if s.when == "loss" else (1.0,):
        new = s.observe(state, plan, Reading(loss))
        text = json.dumps(to_plain(new), allow_nan=False)
        assert len(text) < 250
        assert s.restore(json.loads(text)) == new
        waiting = [*pending, (plan, Reading(loss))]
        count += walk(s, depths, n, new, lazy, waiting, [*story, (depth, loss)])
    return count


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", CASES)
def test_every_story(name, n):
    depths = oracle_depths(n)
    numbers = dict(CASES[name])
    numbers["until"] = numbers["until"][2 - len(depths) :]
    if name == "interleaved" and n == 5:
        depths, numbers["until"] = (1,), numbers["until"][1:]
    s = Grow(**numbers)
    state = s.init(n)
    assert walk(s, depths, n, state, state, [], []) >= (
        3 ** (STEPS - 1) if s.when == "loss" else STEPS
    )


def trace(s, n, losses, steps=100):
    """Depth and sources of each step of a run, one more than there are losses."""
    state, seen = s.init(n), []
    for step, loss in enumerate([*losses, 0.0]):
        plan = s.plan(state, Progress(step, steps))
        seen.append((len(plan.running or range(n)), plan.sources))
        state = s.observe(state, plan, Reading(loss))
    return seen


def test_stacking_is_the_small_stack_again_on_top_of_itself():
    # G_stack, arXiv 2405.15319: with growth factor g the new model is the small one, g times, one
    # on top of the other. 3 blocks and g = 4: 012 012 012 012.
    seen = trace(Grow(blocks=(3,), until=(0.02,)), 12, [1.0] * 4)
    assert seen == [(3, ())] * 2 + [(12, (0, 1, 2) * 4)] + [(12, ())] * 2


def test_two_stages_copy_from_what_ran_before():
    seen = trace(Grow(until=(0.01, 0.03)), 8, [1.0] * 3)
    assert seen == [(2, ()), (4, (0, 1, 0, 1)), (4, ()), (8, (0, 1, 2, 3, 0, 1, 2, 3))]


def test_interleaving_moves_no_trained_block():
    s = Grow(until=(0.01, 0.02), copy="interleave")
    # Two of eight blocks run in slots 0 and 4, four in 0, 2, 4, 6: each copy right above its block.
    assert trace(s, 8, [1.0, 1.0]) == [(2, ()), (4, (0, 0, 4, 4)), (8, (0, 0, 2, 2, 4, 4, 6, 6))]
    assert [s.slots(8, k) for k in (2, 4)] == [(0, 4), (0, 2, 4, 6)]


def test_a_slow_step_may_pass_a_stage():
    s = Grow(until=(0.1, 0.2))
    state = s.init(8)
    plan = s.plan(state, Progress(1, None, 500.0, 1000.0))
    assert (plan.running, plan.sources) == (None, (0, 1) * 4)


def test_a_stage_ends_when_the_loss_has_stopped_falling():
    # Windows of 2 and gain 1/4. Means: 8, 6 (falls 2), 5 (falls 1 > 2/4), 4.75 (falls 1/4: too
    # little). In the next stage: 9 (new: nothing to compare with), 5 (4), 4.5 (1/2: too little).
    losses = [9, 7, 6, 6, 5, 5, 4.5, 5.0, 9, 9, 5, 5, 4, 5]
    s = Grow(when="loss", window=2, gain=0.25)
    depths = [depth for depth, _ in trace(s, 8, map(float, losses))]
    assert depths == [2] * 8 + [4] * 6 + [8]


def test_a_loss_that_only_rises_ends_the_stage():
    s = Grow(when="loss", window=1)
    assert [depth for depth, _ in trace(s, 8, [1.0, 2.0, 3.0])] == [2, 2, 4, 4]


def test_a_loss_that_is_not_finite_is_counted_and_left_out():
    s = Grow(when="loss", window=2)
    state = s.init(8)
    for step, loss in enumerate((4.0, NAN, math.inf, 1e200)):
        state = s.observe(state, s.plan(state, Progress(step, 100)), Reading(loss))
    assert (state.steps, state.mean, state.not_finite, state.stage) == (4, 4.0, 3, 0)


@pytest.mark.parametrize(
    ("n", "copy", "depths", "until"),
    [
        (1, "stack", (), ()),
        (2, "stack", (1,), (0.5,)),
        (3, "interleave", (1,), (0.5,)),
        (8, "stack", (2, 4), (0.2, 0.5)),
        (18, "stack", (4, 9), (0.2, 0.5)),
        (18, "interleave", (3, 9), (0.2, 0.5)),
        (7, "interleave", (1,), (0.5,)),
    ],
)
def test_defaults(n, copy, depths, until):
    s = Grow(copy=copy)
    s.init(n)
    assert (s.depths(n), s.ends(n)) == (depths, until)


def test_a_third_stage_is_longer_than_the_second():
    assert Grow(blocks=(1, 2, 4)).ends(8) == (2 / 18, 5 / 18, 0.5)


def test_the_schedule_after_it_keeps_its_state_inside():
    then = DynamicSuffix(min_active=1, warmup_steps=0, probe_every=2, freeze_start_frac=0.0)
    s = Grow(blocks=(2,), until=(0.2,), then=then)
    state = s.init(4)
    for step in range(8):
        progress = Progress(step, 10)
        plan = s.plan(state, progress)
        assert ("relevance" in s.wants(state, progress)) == plan.probe == (step in (2, 4, 6))
        reading = Reading(1.0, (0.0, 0.0, 0.0, 9.0) if plan.probe else None)
        state = s.observe(state, plan, reading)
    assert plan.active == (3,)
    plain = json.loads(json.dumps(to_plain(state)))
    assert plain["then"]["active"] == 1
    assert s.restore(plain) == state


def test_what_it_asks_for_is_also_what_the_schedule_after_it_asks_for():
    stable = DynamicSuffix(min_active=1, require_stable=True, stability_window=30)
    assert (Grow().history, Grow().needs_loss, Grow().metric) == (0, False, None)
    assert (Grow(when="loss").history, Grow(when="loss").needs_loss) == (50, True)
    both = Grow(when="loss", then=stable)
    assert (both.history, both.needs_loss, both.metric) == (60, True, ("grad_ratio", 1e-8))
    assert (both.timed, both.anneals) == (False, False)


@pytest.mark.parametrize(
    ("numbers", "n", "message"),
    [
        ({"blocks": (4, 2)}, 8, "blocks must be a tuple of whole numbers >= 1, ascending"),
        ({"blocks": (0, 2)}, 8, r"ascending, got \(0, 2\): list one for each stage"),
        ({"blocks": [2, 4]}, 8, r"got \[2, 4\]"),
        ({"blocks": (2.0,)}, 8, "whole numbers"),
        ({"until": (0.5, 0.2)}, 8, "until must be a tuple of fractions, above 0 to 1, ascending"),
        ({"until": (NAN, 0.2)}, 8, "until must be a tuple of fractions"),
        ({"until": (0.2, 1.5)}, 8, r"above 0 to 1, got \(0.2, 1.5\): give shares of the run"),
        ({"until": (0.5,)}, 8, "an end for each of the 2 stages, of 2, 4 blocks, got 0.5"),
        ({"blocks": (2, 8)}, 8, r"below 8, the depth of the model, got \(2, 8\)"),
        ({"blocks": (2, 3), "copy": "interleave"}, 6, "got 2 before 3: take one of 1, or copy"),
        ({"blocks": (4,), "copy": "interleave"}, 6, "got 4 before 6: take one of 1, 2, 3, or"),
        ({"copy": "mirror"}, 8, "copy must be one of stack, interleave, none, got 'mirror'"),
        ({"when": "later"}, 8, "when must be one of clock, loss"),
        ({"window": 0}, 8, "window must be >= 1"),
        ({"gain": 1.0}, 8, "gain must be >= 0 and < 1"),
        ({"then": Grow()}, 8, "then must not grow again: list all stages in blocks"),
        ({"then": StaticSuffix(active=9)}, 8, r"active must be 1\.\.8, got 9"),
        ({}, 0, "at least 1 block, got 0"),
    ],
)
def test_refused(numbers, n, message):
    with pytest.raises(ValueError, match=message):
        Grow(**numbers).init(n)


def test_a_state_of_another_schedule_is_refused():
    with pytest.raises(ValueError, match="load it with the schedule that saved it"):
        Grow().restore(to_plain(FullUpdate().init(4)))
