"""grow on two processes is one process that trains on everybody's batches."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import blocksched as bs
from blocksched.distributed import prepare_ddp
from blocksched.schedules.grow import Grow
from tests.distributed import ddp_loop, fsdp
from tests.distributed.ddp_loop import OPTIMIZERS, backward, plain
from tests.distributed.test_fsdp import distance

STEPS = 12
SCHEDULES = {
    "clock": Grow(blocks=(1, 2), until=(0.25, 0.5)),
    "loss": Grow(blocks=(1, 2), until=(0.7, 0.9), copy="none", when="loss", window=2, gain=0.9),
    "then": Grow(
        blocks=(1,),
        until=(0.25,),
        copy="interleave",
        then=bs.DynamicSuffix(min_active=1, max_active=2, probe_every=3, warmup_steps=0),
    ),
}


def build(rank, name, schedule):
    torch.manual_seed(0)
    module = wrapped = ddp_loop.Model(width=16)
    if rank is not None:
        wrapped = DistributedDataParallel(module, find_unused_parameters=True, bucket_cap_mb=0.002)
    optimizer = OPTIMIZERS[name](module.parameters())
    scheduler = bs.BlockScheduler(wrapped, optimizer, SCHEDULES[schedule], total_steps=STEPS)
    traffic = None if rank is None else prepare_ddp(wrapped, scheduler)
    return module, wrapped, optimizer, scheduler, traffic


def train(rank, name, schedule):
    """Plans, weights and bytes sent in each step; one process adds the halves up as DDP does."""
    module, wrapped, optimizer, scheduler, traffic = build(rank, name, schedule)
    seen = []
    for step in range(STEPS):
        shares, loss = [], torch.zeros(())
        halves = (0, 1) if rank is None else (rank,)
        for half in halves:
            loss += backward(wrapped, step, half, 1) / len(halves)
            shares.append([p.grad for p in module.parameters()])
            if rank is None:
                module.zero_grad()
        if rank is None:
            for p, *grads in zip(module.parameters(), *shares, strict=True):
                some = [grad / 2 for grad in grads if grad is not None]
                p.grad = sum(some[1:], some[0]) if some else None
        plan = scheduler.plan
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(loss)
        weights = plain(dict(module.named_parameters()))
        seen.append((plan.running, plan.active, weights, traffic and traffic.bytes))
    scheduler.close()
    return seen


@pytest.mark.parametrize(("name", "schedule"), [*zip(OPTIMIZERS, SCHEDULES, strict=True)])
def test_ddp_is_one_process_to_the_bit(name, schedule, ranks):
    first, second = ranks(train, name, schedule)
    one = train(None, name, schedule)
    assert first == second
    assert [step[:3] for step in first] == [step[:3] for step in one]
    assert len({step[0] for step in one}) == len(SCHEDULES[schedule].blocks) + 1
    if schedule == "clock":
        sent = [b[3] - a[3] for a, b in zip([(0, 0, 0, 0), *first], first, strict=False)]
        block = 4 * (16 * 16 + 16)
        assert [sent[step] - sent[0] for step in (3, 6)] == [block, 3 * block]


def sharded(rank, kind, schedule):
    model = fsdp.shard(fsdp.build())
    optimizer = OPTIMIZERS[kind](model.parameters())
    scheduler = bs.BlockScheduler(model, optimizer, SCHEDULES[schedule], total_steps=STEPS)
    plans = fsdp.train(model, optimizer, scheduler, range(STEPS), rank)
    scheduler.close()
    return plans, fsdp.trained(optimizer)


def single(kind, dtype, schedule):
    model = fsdp.build(dtype)
    optimizer = OPTIMIZERS[kind](model.parameters())
    scheduler = bs.BlockScheduler(model, optimizer, SCHEDULES[schedule], total_steps=STEPS)
    return fsdp.train(model, optimizer, scheduler, range(STEPS)), fsdp.trained(optimizer)


@pytest.mark.parametrize("kind", ["torch AdamW", "bs.AdamW"])
def test_fsdp_is_as_exact_as_one_process_on_the_joined_batch(kind, ranks):
    """The error of two processes is at most four times that of one: both are rounding."""
    plans, exact = single(kind, torch.float64, "clock")
    same_plans, rounded = single(kind, torch.float32, "clock")
    (plans_0, found), (_, found_1) = ranks(sharded, kind, "clock")
    assert plans == same_plans == plans_0
    assert found == found_1
    rounding = distance(rounded, exact)
    assert (rounding > 0).all()
    assert (distance(found, exact) <= 4 * rounding).all()
