"""Every short story of dynamic_suffix, against an oracle written from the rules alone.

The oracle keeps whole lists and works everything out anew at each step. Decays of 1/2 and small
whole numbers make both sides exact, so they are compared with ==.
"""

import itertools
import json
import math
from typing import NamedTuple

import pytest

from blocksched.schedules import DynamicSuffix, Progress, Reading, to_plain

NAN = math.nan
SHAPES = ((4.0, 2.0, 1.0, 1.0), (1.0, 1.0, 2.0, 4.0), (0.0, 0.0, 0.0, 0.0))


class Case(NamedTuple):
    flags: dict
    steps: int = 5
    equal_time: bool = False


CASES = {
    "few probes": Case(
        {"warmup_steps": 1, "probe_every": 2, "relevance_threshold": 0.5, "freeze_start_frac": 0.3}
    ),
    "budget": Case(
        {"warmup_steps": 9, "adapt_budget": True, "freeze_start_step": 1, "loss_upper": 1.25},
        steps=4,
    ),
    "legacy budget": Case(
        {"warmup_steps": 9, "adapt_budget": True, "freeze_start_step": 0, "loss_ema_decay": None}
        | {"loss_upper": 2.0, "loss_lower": 1.5, "max_active": 3, "budget_step_up": 1},
        steps=4,
    ),
    "stable, full recovery": Case(
        {"probe_every": 3, "refresh_every": 2, "freeze_start_frac": 0.0, "require_stable": True}
        | {"stability_window": 1, "stability_rel_change": 0.5, "final_full_frac": 0.4},
    ),
    "staged, equal time": Case(
        {"warmup_steps": 2, "freeze_start_frac": 0.2, "freeze_start_step": 3, "max_active": 2}
        | {"final_full_frac": 0.6, "final_recovery_mode": "staged", "final_recovery_stage1": 2}
        | {"final_recovery_stage2": 3, "final_recovery_stage1_progress": 0.3}
        | {"final_recovery_stage2_progress": 0.6},
        equal_time=True,
    ),
    "least 2, no period": Case(
        {"warmup_steps": 1, "min_active": 2, "freeze_start_step": 1, "relevance_threshold": 0.75}
    ),
}
BASE = {
    "warmup_steps": 0, "probe_every": 0, "refresh_every": 0, "min_active": 1, "ema_decay": 0.5,
    "loss_ema_decay": 0.5, "loss_upper": 1.5, "loss_lower": 0.75, "budget_step_up": 2,
}  # fmt: skip
LAYERS = ("min_active", "max_active", "final_recovery_stage1", "final_recovery_stage2")


class Story(NamedTuple):
    """All that happened so far."""

    probes: tuple = ()
    losses: tuple = ()
    froze: bool = False
    owed: bool = False
    bad: int = 0


def weights(count, first):
    """What each of `count` values weighs in an average with decay 1/2, oldest first."""
    tail = [0.5 ** (count - i) for i in range(1 if first else 0, count)]
    return [0.5 ** (count - 1), *tail] if first else tail


def average(losses):
    return sum(w * v for w, v in zip(weights(len(losses), True), losses, strict=True))


def oracle_state(s, n, story):
    top = s.max_active or n
    budget, losses = top, [loss for loss, _ in story.probes]
    for i in range(1, len(losses)):
        if s.adapt_budget:
            ref = min(losses[: i + 1]) if s.loss_ema_decay is None else average(losses[:i])
            if losses[i] > ref * s.loss_upper:
                budget = min(top, budget + s.budget_step_up)
            elif losses[i] < ref * s.loss_lower:
                budget = max(s.min_active, budget - s.budget_step_down)
    each = weights(len(story.probes), False)
    smooth = [sum(w * r[b] for w, (_, r) in zip(each, story.probes, strict=True)) for b in range(n)]
    fits = [
        k
        for k in range(s.min_active, budget + 1)
        if sum(smooth) > 0 and sum(smooth[n - k :]) >= s.relevance_threshold * sum(smooth)
    ]
    average_loss = None
    if losses:
        average_loss = min(losses) if s.loss_ema_decay is None else average(losses)
    active = top if not story.probes else min(fits, default=budget)
    kept = story.losses[-2 * s.stability_window :] if s.require_stable else ()
    return {
        "n_blocks": n,
        "active": active,
        "budget": budget,
        "relevance_ema": smooth,
        "loss_ema": average_loss,
        "best_loss": min(losses, default=None),
        "freezing": story.froze,
        "losses": list(kept),
        "reprobe": story.owed,
        "not_finite": story.bad,
    }


def oracle_plan(s, n, case, t, story):
    """(active count, probe, freezing, phase) of step `t`; a step takes 10 ms."""
    now, end = (10 * t, 10 * case.steps) if case.equal_time else (t, case.steps)
    start = s.freeze_start_frac * end
    if not case.equal_time:
        start = s.freeze_start_step if s.freeze_start_step >= 0 else round(start)
    # Windows of one loss have no spread, so only the means matter.
    a, b = story.losses[-2:] if len(story.losses) >= 2 else (0.0, 1.0)
    settled = abs(b - a) <= s.stability_rel_change * (abs(a) + 1e-12)
    freezing = story.froze or (now >= start and (settled or not s.require_stable))
    begin = (1 - s.final_full_frac) * end
    begin = begin if case.equal_time else int(begin)
    active = oracle_state(s, n, story)["active"]
    if s.final_full_frac > 0 and now >= begin:
        r = (now - begin) / (end - begin)
        if s.final_recovery_mode == "full":
            k, stage = n, "full"
        elif r >= s.final_recovery_stage2_progress:
            k, stage = n, "stage3_full"
        elif r >= s.final_recovery_stage1_progress:
            k, stage = max(active, s.final_recovery_stage2), "stage2"
        else:
            k, stage = max(active, s.final_recovery_stage1), "stage1"
        return (k if freezing else n), False, freezing, f"recovery:{stage}"
    probe = story.owed or t < s.warmup_steps
    for period in (s.probe_every, s.refresh_every):
        probe = probe or (period > 0 and t % period == 0)
    return n if probe or not freezing else active, probe, freezing, "suffix" if freezing else "full"


def oracle_after(story, probe, freezing, loss, relevance):
    story = story._replace(froze=freezing)
    if math.isnan(loss):
        return story._replace(owed=True, bad=story.bad + 1)
    story = story._replace(losses=(*story.losses, loss))
    if probe:
        return story._replace(probes=(*story.probes, (loss, relevance)), owed=False)
    return story


def walk(s, n, case, t, state, story):
    """Check every story from step `t` on; the number of steps checked."""
    if t == case.steps:
        return 0
    budget_ms = 10.0 * case.steps if case.equal_time else None
    progress = Progress(t, case.steps, 10.0 * t, budget_ms)
    plan = s.plan(state, progress)
    k, probe, freezing, phase = oracle_plan(s, n, case, t, story)
    assert (plan.active, plan.probe) == (tuple(range(n))[n - k :], probe), (t, story)
    assert (plan.freezing, plan.phase) == (freezing, phase), (t, story)
    assert s.plan(state, progress) == plan
    count = 1
    shapes = [shape[:n] for shape in SHAPES] if probe else [None]
    # A loss that is not a number discards the relevance, so one shape stands for all.
    readings = [*itertools.product((1.0, 4.0), shapes), (NAN, shapes[0])]
    for loss, relevance in readings:
        new = s.observe(state, plan, Reading(loss, relevance))
        after = oracle_after(story, probe, freezing, loss, relevance)
        plain = to_plain(new)
        expected = oracle_state(s, n, after)
        if freezing:
            # No later step looks at them any more.
            assert len(plain["losses"]) <= s.history
            expected["losses"] = plain["losses"]
        assert plain == expected, (t, after)
        if t < 2:
            assert s.restore(json.loads(json.dumps(plain, allow_nan=False))) == new
        count += walk(s, n, case, t + 1, new, after)
    return count


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_every_story(name, n):
    case = CASES[name]
    flags = BASE | case.flags
    fitted = {key: min(flags[key], n) for key in LAYERS if key in flags}
    schedule = DynamicSuffix(**(flags | fitted))
    assert walk(schedule, n, case, 0, schedule.init(n), Story()) > 3**case.steps / 2
