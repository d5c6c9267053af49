"""Loops around an FSDP2 model: what does not train is noticed, and what people do in loops."""

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.tensor import DTensor

import blocksched as bs
from blocksched import BlockScheduler, PrefixCache, StaticSuffix, find_blocks
from blocksched.mechanism import Mechanism
from tests.distributed.fsdp import MOVING, STEPS, batch_loss, build, shard, trained, whole


class Cut(torch.nn.Module):
    """A block that lets no gradient through to those below."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x.detach())


def scheduled(model, schedule=MOVING, make=torch.optim.AdamW):
    optimizer = make(model.parameters(), lr=0.01)
    return optimizer, BlockScheduler(model, optimizer, schedule, total_steps=STEPS)


def without_gradient(rank):
    model = build()
    for i in range(4):
        model.blocks[i] = Cut(model.blocks[i])
    optimizer, _ = scheduled(shard(model), StaticSuffix(active=3))
    before = list(map(whole, model.parameters()))
    batch_loss(model, 0, rank).backward()
    with pytest.raises(RuntimeError, match=r"block 1 \(blocks.1\) is active and ran but got no"):
        optimizer.step()
    assert list(map(whole, model.parameters())) == before


def test_an_active_block_without_a_gradient(ranks):
    ranks(without_gradient)


def without_gradient_nor_update(rank):
    """The blocks below the top one get no gradient, so that no hook steps their optimizers."""
    model = build()
    model.blocks[3] = Cut(model.blocks[3])
    _, scheduler = hooked(shard(model), torch.optim.AdamW, blocks="blocks")
    batch_loss(model, 0, rank).backward()
    with pytest.raises(RuntimeError, match=r"block 0 \(blocks.0\) is active and ran but got no"):
        scheduler.step()


def test_an_active_block_without_a_gradient_that_no_hook_steps(ranks):
    ranks(without_gradient_nor_update)


def frozen_with_gradient(rank):
    model = shard(build())
    mechanism = Mechanism(find_blocks(model))
    mechanism.apply((0, 2, 3))
    batch_loss(model, 0, rank).backward()
    mechanism.check(range(4))
    model.blocks[1].inner.bias.requires_grad_()
    batch_loss(model, 0, rank).backward()
    assert isinstance(model.blocks[1].inner.bias.grad, DTensor)
    with pytest.raises(RuntimeError, match=r"block 1 \(blocks.1\) is frozen but got a gradient"):
        mechanism.check(range(4))


def test_a_frozen_block_with_a_gradient(ranks):
    ranks(frozen_with_gradient)


def run(rank, update, make=torch.optim.AdamW, wrap=shard):
    """A run in which `update(model, optimizer, scheduler, step, rank)` makes each step."""
    model = wrap(build())
    optimizer, scheduler = scheduled(model, make=make)
    for step in range(STEPS):
        update(model, optimizer, scheduler, step, rank)
        scheduler.step()
    scheduler.close()
    return trained(optimizer)


def plain(model, optimizer, _scheduler, step, rank):
    batch_loss(model, step, rank).backward()
    optimizer.step()
    optimizer.zero_grad()


def clipped(model, optimizer, _scheduler, step, rank):
    batch_loss(model, step, rank).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert norm.full_tensor() > 0.1
    grads = [whole(p.grad) for p in model.parameters() if p.grad is not None]
    total = sum(torch.tensor(g, dtype=torch.float64).square().sum() for g in grads).sqrt()
    assert total == pytest.approx(0.1, rel=1e-5)  # torch divides by the norm + 1e-6
    optimizer.step()
    optimizer.zero_grad()


def clipping(rank):
    run(rank, clipped)


def test_clipping(ranks):
    ranks(clipping)


def accumulated(model, optimizer, _scheduler, step, rank):
    """Reduced once, after the second half of the batch."""
    for last in (False, True):
        model.set_requires_gradient_sync(last)
        (batch_loss(model, step, rank) / 2).backward()
    optimizer.step()
    optimizer.zero_grad()


def kept_zeros(model, optimizer, _scheduler, step, rank):
    batch_loss(model, step, rank).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def skipped_if_not_finite(model, optimizer, scheduler, step, rank):
    """On one rank the loss of an extra step is not finite, and no rank takes it."""
    if step == 4:
        loss = batch_loss(model, step, rank) * (float("inf") if rank == 1 else 1.0)
        loss.backward()
        assert not scheduler.finite(loss.item())
        optimizer.zero_grad()
    loss = batch_loss(model, step, rank)
    loss.backward()
    assert scheduler.finite(loss)
    optimizer.step()
    optimizer.zero_grad()


def checkpointed(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)
    return shard(model)


LOOPS = {
    "accumulated": (accumulated, shard),
    "kept_zeros": (kept_zeros, shard),
    "skipped_if_not_finite": (skipped_if_not_finite, shard),
    "checkpointed": (plain, checkpointed),
}


def as_the_plain_loop(rank, name):
    update, wrap = LOOPS[name]
    return run(rank, update, wrap=wrap) == run(rank, plain)


@pytest.mark.parametrize("name", LOOPS)
def test_to_the_bit_as_the_plain_loop(name, ranks):
    assert ranks(as_the_plain_loop, name) == [True, True]


def hooked(model, make, **arguments):
    """An optimizer for each parameter, which hooks step; the scheduler is given all of them."""
    optimizers = {p: make([p], lr=0.01) for p in model.parameters()}

    def step_one(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(step_one)
    several = list(optimizers.values())
    return several, BlockScheduler(model, several, MOVING, total_steps=STEPS, **arguments)


def in_backward(rank, kind):
    make = {"torch": torch.optim.AdamW, "ours": bs.AdamW}[kind]
    model = shard(build())
    optimizers, scheduler = hooked(model, make)
    for step in range(STEPS):
        batch_loss(model, step, rank).backward()
        scheduler.step()
    scheduler.close()
    found = [part for optimizer in optimizers for part in trained(optimizer)]
    return found == run(rank, plain, make)


@pytest.mark.parametrize("kind", ["torch", "ours"])
def test_optimizers_that_hooks_step(kind, ranks):
    assert ranks(in_backward, kind) == [True, True]


def cached(_rank):
    model = shard(build())
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="leave out cache="):
        BlockScheduler(
            model, optimizer, StaticSuffix(active=2), total_steps=9, cache=PrefixCache(1 << 20)
        )


def test_a_prefix_cache_is_refused(ranks):
    ranks(cached)
