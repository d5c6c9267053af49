"""One decision: readings over ranks, the same plan everywhere, errors on all ranks at once."""

import dataclasses
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from blocksched import BlockScheduler, DynamicSuffix, StaticSuffix
from blocksched.agreement import DisagreementError, Ranks
from tests.distributed.hand_loop import DYNAMIC, build, one_step, reduce


def walk(rank, steps):
    """Plans and states of a run whose ranks see batches that push them apart."""
    model, optimizer, scheduler = build(DYNAMIC)
    told = []
    for step in range(steps):
        with torch.no_grad():
            model.embed.weight.mul_(1 + 0.3 * rank)  # each rank's losses go another way
        told.append(scheduler.plan)
        # Ranks differ in their losses and, before they are reduced, in every gradient.
        one_step(model, optimizer, scheduler, 100 * rank + step)
        torch.manual_seed(step)
        for p in model.parameters():  # the same weights again
            distributed.broadcast(p.data, 0)
    state = scheduler.state
    gathered = scheduler.ranks.bytes
    scheduler.close()
    return told, state, gathered


def test_ranks_with_other_data_decide_the_same(ranks):
    (plans, state, sent), (others, other, _) = ranks(walk, 20)
    assert plans == others
    assert state == other
    assert {len(plan.active) for plan in plans} >= {4}
    assert min(len(plan.active) for plan in plans) < 4
    # 8 bytes a vote (21 plans and the run), readings on decision steps: 12 sums and the loss on a
    # probe, up to 4 losses while the gate is pending.
    assert 22 * 8 < sent < 22 * 8 + 20 * 8 * 5 + 7 * 8 * 13


def losses_of(rank, kind):
    """What the schedule saw, and this rank's losses."""
    model, optimizer, scheduler = build(DYNAMIC)
    seen = []
    observe = scheduler.schedule.observe

    class Seen(DynamicSuffix):
        def observe(self, state, plan, reading):
            seen.append((plan.probe, reading))
            return observe(state, plan, reading)

    scheduler.schedule = Seen(**{f: getattr(DYNAMIC, f) for f in DYNAMIC.__dataclass_fields__})
    run = model, optimizer, scheduler
    mine = [one_step(*run, 10 * rank + step, kind=kind) for step in range(3)]
    pending = [loss for _, loss in scheduler.state_dict()["pending"]]
    scheduler.close()
    return mine, [(probe, r.loss, r.relevance) for probe, r in seen], pending


@pytest.mark.parametrize("kind", [torch.Tensor, float])
def test_readings_are_of_all_ranks(kind, ranks):
    (mine, seen, pending), (other, seen_there, other_pending) = ranks(losses_of, kind)
    assert len(pending) == 2  # since the probe
    assert seen == seen_there
    means = [(a + b) / 2 for a, b in zip(mine, other, strict=True)]
    assert [loss for _, loss, _ in seen] == pytest.approx(means[: len(seen)], rel=1e-12)
    assert seen[0][0]
    assert min(seen[0][2]) > 0
    assert mine != other
    assert [float(x) for x in pending] == mine[len(seen) :]
    assert [float(x) for x in other_pending] == other[len(seen) :]


def relevance_of(rank, batches):
    """The relevance of the first probe, on these batches of this rank."""
    model, optimizer, scheduler = build(DYNAMIC)
    for batch in batches[rank]:
        (model.loss(batch) / len(batches[rank])).backward()
    if len(batches) > 1:
        reduce(model)
    optimizer.step()
    scheduler.step(1.0)
    found = scheduler.relevance
    scheduler.close()
    return found


def test_relevance_is_that_of_the_joined_batch(ranks):
    together = relevance_of(0, [[5, 6]])
    ours, theirs = ranks(relevance_of, [[5], [6]])
    assert ours == theirs
    assert ours == pytest.approx(together, rel=1e-5)


def unreduced(rank):
    model, optimizer, scheduler = build(DYNAMIC)
    try:
        one_step(model, optimizer, scheduler, rank, reduced=False)
    except RuntimeError as error:
        return str(error)
    finally:
        scheduler.close()


def test_gradients_nobody_reduced_are_an_error_on_the_first_probe(ranks):
    first, second = ranks(unreduced)
    assert first == second
    assert "block 0 (blocks.0) differ between the ranks" in first


def told_otherwise(rank, where):
    """The error of a rank, one of which was made to differ at `where`; what was trainable then."""
    model = None
    try:
        if where == "horizon":
            build(DYNAMIC, total_steps=40 + rank)
        elif where == "schedule":
            build(DYNAMIC if rank else StaticSuffix(active=4))
        model, optimizer, scheduler = build(DYNAMIC)
        if where.startswith("saved"):
            saved = scheduler.state_dict()
            if where == "saved steps":
                saved["steps"] += rank
            else:
                saved["state"]["not_finite"] += rank
            scheduler.load_state_dict(saved)
        if where == "plan":
            scheduler.schedule = dataclasses.replace(DYNAMIC, warmup_steps=5 * rank)
            one_step(model, optimizer, scheduler, 0)
    except DisagreementError as error:
        return str(error), model and [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("horizon", "rank 0: total_steps=40; rank 1: total_steps=41: give"),
        ("schedule", "rank 0: StaticSuffix.active=4.; rank 1: DynamicSuffix"),
        ("saved steps", "rank 0: step 0 does .*; rank 1: step 1 does"),
        ("saved state", "rank 0: not_finite=0.*; rank 1: not_finite=1"),
        ("plan", "rank 0: .*; rank 1: "),
    ],
)
def test_disagreement_is_raised_on_all_ranks(where, said, ranks):
    (first, before), (second, there) = ranks(told_otherwise, where)
    assert first == second
    assert first.startswith("the ranks disagree")
    assert re.search(said, first)
    assert before == there  # found before the plan was applied


def clocked(rank):
    """Plans, fractions and clocks of a run in time mode; rank 1 is three times slower."""

    class Slow:
        elapsed_ms = 0.0

        def tick(self):
            self.elapsed_ms += 10.0 * (1 + 2 * rank)

        pause = resume = tick

    schedule = StaticSuffix(active=2)
    model, optimizer, scheduler = build(schedule, time_budget_s=0.1, clock=Slow())
    seen = []
    while not scheduler.done:
        seen.append((scheduler.fraction, scheduler.plan))
        one_step(model, optimizer, scheduler, rank)
    saved = scheduler.state_dict()
    scheduler.close()
    _, _, again = build(schedule, time_budget_s=0.1, clock=Slow())
    again.load_state_dict(saved)
    assert again.done
    again.close()
    return seen, saved["elapsed_ms"]


def test_the_clock_is_the_slowest(ranks):
    first, second = ranks(clocked)
    assert first == second
    assert [fraction for fraction, _ in first[0]] == pytest.approx([0.0, 0.3, 0.6, 0.9])
    assert first[1] == pytest.approx(120.0)


def resumed(rank, at, steps):
    """Losses and plans of a run saved and loaded at step `at`, each rank its own state."""
    model, optimizer, scheduler = build(DYNAMIC)
    told = []
    for step in range(steps):
        if step == at:
            saved = scheduler.state_dict()
            scheduler.close()
            scheduler = BlockScheduler(model, optimizer, DYNAMIC, total_steps=40)
            scheduler.load_state_dict(saved)
        loss = one_step(model, optimizer, scheduler, 100 * rank + step)
        told.append((loss, scheduler.plan, scheduler.state.loss_ema))
    scheduler.close()
    return told


@pytest.mark.parametrize("at", [1, 2, 3, 6])
def test_resume_with_losses_pending(at, ranks):
    assert ranks(resumed, at, 10) == ranks(resumed, 99, 10)


def odd_one_out(rank):
    """Plans when rank 1 alone gives a loss that is NaN, and misses a probe's update."""
    free = dataclasses.replace(DYNAMIC, require_stable=False, adapt_budget=False)
    model, optimizer, scheduler = build(free)
    plans = []
    for step in range(8):
        plans.append(scheduler.plan)
        model.loss(step).backward()
        missed = step == 3 and rank == 1
        if not missed:
            optimizer.step()
        optimizer.zero_grad()
        scheduler.step(math.nan if rank == 1 and step == 1 else 1.0)
        for p in model.parameters():
            distributed.broadcast(p.data, 0)
    scheduler.close()
    return plans, scheduler.state


def test_one_rank_alone_changes_no_plan(ranks):
    (plans, state), others = ranks(odd_one_out)
    assert (plans, state) == others
    assert plans[3].probe
    assert plans[4].probe  # once more, since step 3 measured nothing
    assert state.not_finite == 1


def one_rank(rank):
    alone = distributed.new_group([rank], use_local_synchronization=True)
    _, _, scheduler = build(StaticSuffix(active=2), total_steps=5, group=alone)
    return scheduler.ranks is None


def test_a_group_of_one_asks_nobody(ranks):
    assert ranks(one_rank) == [True, True]
    assert Ranks.find() is None


LEAVES = """
import sys
import time
import torch
from torch import distributed
from blocksched.agreement import Ranks

rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
ranks = Ranks.find()
ranks.agree("both")
if rank == 1 and sys.argv[3] == "leaves":
    sys.exit("rank 1 has had enough")
start = time.monotonic()
try:
    ranks.agree(f"step 7 {rank if sys.argv[3] == 'differs' else ''}")
finally:
    print(f"ended after {time.monotonic() - start} s", file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("how", "said"), [("differs", "the ranks disagree"), ("leaves", "lost another rank")]
)
def test_processes_end_within_seconds(how, said, tmp_path):
    root = str(Path(__file__).resolve().parents[2])
    children = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVES, str(rank), str(tmp_path / "store"), how],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": root},
        )
        for rank in range(2)
    ]
    try:
        spoken = [child.communicate(timeout=40)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert all(child.returncode for child in children)
    assert said in spoken[0]
    assert float(re.search(r"ended after (.*) s", spoken[0])[1]) < 10
    assert ("has had enough" if how == "leaves" else said) in spoken[1]
