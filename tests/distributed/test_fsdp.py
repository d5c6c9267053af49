"""FSDP2 under a moving boundary is one process on the joined batch."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import blocksched as bs
from blocksched import BlockScheduler, StaticSuffix
from tests.distributed.fsdp import MOVING, STEPS, build, shard, train, trained
from tests.library import holes

KINDS = {"torch": torch.optim.AdamW, "ours": bs.AdamW}


def setup(kind, dtype, schedule, sharded, **arguments):
    model = build(dtype)
    if sharded:
        shard(model, **arguments)
    optimizer = KINDS[kind](model.parameters(), lr=0.01, weight_decay=0.1)
    return model, optimizer, BlockScheduler(model, optimizer, schedule, total_steps=STEPS)


def one_process(kind, dtype, schedule):
    model, optimizer, scheduler = setup(kind, dtype, schedule, sharded=False)
    plans = train(model, optimizer, scheduler, range(STEPS))
    return plans, trained(optimizer)


def two_processes(rank, kind, reshard, schedule):
    model, optimizer, scheduler = setup(
        kind, torch.float32, schedule, sharded=True, reshard_after_forward=reshard
    )
    plans = train(model, optimizer, scheduler, range(STEPS), rank)
    scheduler.close()
    return plans, trained(optimizer)


def distance(some, others):
    """The largest difference of weights, of first and of second moments; steps must be equal."""
    pairs = [
        [torch.tensor(a, dtype=torch.float64) - torch.tensor(b) for a, b in zip(*both, strict=True)]
        for both in zip(some, others, strict=True)
    ]
    *rest, steps = [
        max(d.abs().max().item() for d in column) for column in zip(*pairs, strict=True)
    ]
    assert steps == 0
    return torch.tensor(rest)


def compare(ranks, kind, reshard, schedule):
    """Rounding of float32 is what separates both from float64, and summation order changes no more
    than that: the error of two processes is at most four times that of one."""
    plans, exact = one_process(kind, torch.float64, schedule)
    same_plans, single = one_process(kind, torch.float32, schedule)
    (plans_0, found), (plans_1, found_1) = ranks(two_processes, kind, reshard, schedule)
    assert plans == same_plans == plans_0 == plans_1
    assert found == found_1
    rounding = distance(single, exact)
    assert (rounding > 0).all()
    assert (distance(found, exact) <= 4 * rounding).all()
    return plans


@pytest.mark.parametrize(("kind", "reshard"), [("torch", True), ("ours", None), ("ours", False)])
def test_as_one_process_on_the_joined_batch(kind, reshard, ranks):
    plans = compare(ranks, kind, reshard, MOVING)
    assert {min(plan) for plan in plans} == {0, 2}
    assert any(min(b) < min(a) for a, b in itertools.pairwise(plans))  # thaws


@pytest.mark.parametrize(("kind", "reshard"), [("torch", True), ("ours", False)])
def test_so_it_is_with_holes(kind, reshard, ranks):
    compare(ranks, kind, reshard, holes.Walk())


class Reductions(TorchDispatchMode):
    """Notes the bytes that each reduce-scatter is given."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.c10d._reduce_scatter_base_.default:
            self.sizes.append(args[1].nbytes)
        return func(*args, **(kwargs or {}))


def reduced(rank, k):
    """Bytes of every reduce-scatter of two steps with k blocks active, and of the parameters."""
    model = shard(build(width=16))
    of_block, of_head, of_stem = (
        sum(4 * p.numel() for p in part.parameters())
        for part in (model.blocks[0], model.head, model.embed)
    )
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = BlockScheduler(model, optimizer, StaticSuffix(active=k), total_steps=10)
    with Reductions() as reductions:
        train(model, optimizer, scheduler, range(2), rank)
    return reductions.sizes, of_block, of_head, of_stem


@pytest.mark.parametrize("k", [1, 3, 4])
def test_only_what_trains_is_reduced(k, ranks):
    for sizes, of_block, of_head, of_stem in ranks(reduced, k):
        root = of_head + (of_stem if k == 4 else 0)
        assert sorted(sizes) == sorted(2 * [root, *[of_block] * k])
