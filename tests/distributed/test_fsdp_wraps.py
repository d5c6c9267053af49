"""What FSDP2 does at its first forward, and how it may be wrapped around a model."""

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import blocksched as bs
from blocksched import BlockScheduler, StaticSuffix
from tests.conftest import TinyModel
from tests.distributed.fsdp import MOVING, STEPS, batch_loss, build, shard, train, trained, whole

HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def freeze(model, active):
    """By hand: the blocks outside `active`, and the embedding with block 0."""
    for i, block in enumerate(model.blocks):
        block.requires_grad_(i in active)
    model.embed.requires_grad_(0 in active)


def by_hand(model, plans, rank, first=None):
    """Steps under these plans; `first` are the blocks that train at the very first forward."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if first is not None:
        freeze(model, first)
        with torch.no_grad():
            batch_loss(model, 0, rank)
        model.reshard()
    for step, active in enumerate(plans):
        freeze(model, active)
        batch_loss(model, step, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    freeze(model, range(4))
    return trained(optimizer)


def crash(rank):
    with pytest.raises(RuntimeError, match="dtype 'c10::BFloat16'"):
        by_hand(shard(build(), mp_policy=HALF), [(2, 3), (0, 1, 2, 3)], rank)


def test_the_crash_that_the_scheduler_avoids(ranks):
    """Where this fails, torch has mended it: then sharding.warm_up may go."""
    ranks(crash)


def half_precision(rank):
    """The first plan freezes, a later one thaws; by hand the first forward has all trainable."""
    model = shard(build(), mp_policy=HALF)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = BlockScheduler(model, optimizer, StaticSuffix(active=2), total_steps=STEPS)
    frozen = [model.embed.weight, *model.blocks[0].parameters(), *model.blocks[1].parameters()]
    before = list(map(whole, frozen))
    plans = train(model, optimizer, scheduler, range(3), rank)
    assert list(map(whole, frozen)) == before
    scheduler.close()
    scheduler = BlockScheduler(model, optimizer, MOVING, total_steps=STEPS)
    plans += train(model, optimizer, scheduler, range(3, 3 + STEPS), rank)
    scheduler.close()
    assert plans[0] == plans[4] == [2, 3]
    assert plans[3] == plans[6] == [0, 1, 2, 3]
    hand = by_hand(shard(build(), mp_policy=HALF), plans, rank, first=range(4))
    return trained(optimizer) == hand


def test_mixed_precision_freezes_and_thaws_as_by_hand_to_the_bit(ranks):
    assert ranks(half_precision) == [True, True]


def blocks_only(model):
    for block in model.blocks:
        fully_shard(block)


def nested(model):
    for block in model.blocks:
        fully_shard(block.inner)
    shard(model)


def stem_and_head_together(model):
    for block in model.blocks:
        fully_shard(block)
    fully_shard([model.embed, model.head])
    fully_shard(model)


def stays_gathered(model):
    shard(model, reshard_after_forward=False)


def root_resharded(model):
    shard(model, reshard_after_forward=True)


WRAPS = {
    wrap.__name__: wrap
    for wrap in (shard, blocks_only, nested, stem_and_head_together, stays_gathered, root_resharded)
}


def wrapped(rank, name, evaluate):
    """Weights and moments after a run; evaluating leaves weights gathered that the plan freezes."""
    model = build()
    WRAPS[name](model)
    optimizer = bs.AdamW(model.parameters(), lr=0.01)
    scheduler = BlockScheduler(model, optimizer, MOVING, total_steps=STEPS)
    for step in range(STEPS):
        batch_loss(model, step, rank).backward()
        for p in model.parameters():
            if p.grad is not None and not isinstance(p, DTensor):
                distributed.all_reduce(p.grad, distributed.ReduceOp.AVG)
        optimizer.step()
        optimizer.zero_grad()
        if evaluate:
            with torch.no_grad():
                batch_loss(model, step, rank)
        scheduler.step()
    scheduler.close()
    return trained(optimizer)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("name", WRAPS)
def test_any_wrap_trains_the_same_to_the_bit_with_evaluations(name, ranks):
    assert ranks(wrapped, name, True) == ranks(wrapped, "shard", False)


def on_meta(rank):
    with torch.device("meta"):
        model = shard(TinyModel())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with pytest.raises(ValueError, match="meta device"):
        BlockScheduler(model, optimizer, StaticSuffix(active=2), total_steps=10)
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.detach().to_local().normal_()
    before = list(map(whole, model.parameters()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = BlockScheduler(model, optimizer, StaticSuffix(active=2), total_steps=10)
    train(model, optimizer, scheduler, range(2), rank)
    after = list(map(whole, model.parameters()))
    return [a != b for a, b in zip(before, after, strict=True)]


def test_a_model_on_the_meta_device_is_materialised_first(ranks):
    moved = [False] * 5 + [True] * 5  # the embedding and two blocks, two blocks and the head
    assert ranks(on_meta) == [moved, moved]
