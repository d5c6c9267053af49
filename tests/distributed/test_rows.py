"""Blocks on some rows under DDP and FSDP2: the mean of the ranks' gradients, each of its rows."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import blocksched as bs
from blocksched.distributed import prepare_ddp
from blocksched.schedules.row_suffix import RowSuffix
from tests.conftest import TinyModel
from tests.distributed.fsdp import shard, trained

STEPS = 6
ROWS = 4  # of each rank


def build(schedule, how, rank):
    torch.manual_seed(0)
    module = model = TinyModel(width=16).double()
    if rank is not None and how == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    elif rank is not None:
        if how == "fsdp nested":
            for block in module.blocks:
                fully_shard(block.inner)
        half = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.float32)}
        shard(module, **(half if how == "fsdp mixed" else {}))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    scheduler = bs.BlockScheduler(model, optimizer, schedule, total_steps=STEPS)
    if rank is not None and how == "ddp":
        prepare_ddp(model, scheduler)
    return module, model, optimizer, scheduler


def loss_of(model, step, half):
    """The loss on a rank's rows."""
    tokens = torch.randint(16, (2, ROWS), generator=torch.Generator().manual_seed(step))[half]
    return nn.functional.cross_entropy(model(tokens).double(), tokens.roll(1))


def train(rank, how, rows):
    """What each parameter and its moments are in the end. One process, rank None, stands for both:
    it takes the mean of the gradients of the halves."""
    schedule = RowSuffix(active=1, rows=rows)
    _, model, optimizer, scheduler = build(schedule, how, rank)
    for step in range(STEPS):
        for half in (0, 1) if rank is None else (rank,):
            loss = loss_of(model, step, half)
            (loss / 2 if rank is None else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(loss.detach())
    return trained(optimizer)


def close(one, other, within):
    return all(
        torch.allclose(torch.tensor(a), torch.tensor(b), rtol=0, atol=within)
        for one_parameter, other_parameter in zip(one, other, strict=True)
        for a, b in zip(one_parameter, other_parameter, strict=True)
    )


@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp nested", "fsdp mixed"])
def test_two_ranks_are_the_mean_of_their_halves(ranks, how):
    first, second = ranks(train, how, 0.5)
    assert first == second
    # AdamW divides by the root of a mean of squares, which float32 has to 2**-24 of its size.
    within = 1e-4 if how == "fsdp mixed" else 1e-12
    assert close(first, train(None, how, 0.5), within)
    assert not close(first, train(None, how, 1.0), 1e-3)
