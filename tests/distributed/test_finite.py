"""Steps whose loss or gradients are not finite are left out, on all ranks alike."""

import math

import pytest
import torch
from torch import nn

from blocksched import BlockScheduler, StaticSuffix
from blocksched.finite import NotFiniteError
from tests.distributed.fsdp import batch_loss, shard
from tests.distributed.fsdp import build as build_sharded
from tests.distributed.hand_loop import DYNAMIC, build


def faulty(rank, where, max_skipped=3):
    """Answers, weights that moved and skips, when rank 1 is not finite at steps 2, 3 and 6."""
    model, optimizer, scheduler = build(DYNAMIC, total_steps=40, max_skipped=max_skipped)
    answers, moved = [], []
    try:
        for step in range(7):
            optimizer.zero_grad()
            loss = model.loss(step)
            loss.backward()
            if rank == 1 and step in (2, 3, 6):
                if where == "loss":
                    loss = loss * math.inf
                else:
                    model.head.weight.grad[0, 0] = math.nan
            before = model.head.weight.clone()
            answers.append(scheduler.finite(loss))
            if answers[-1]:
                optimizer.step()
            scheduler.step(loss)
            moved.append(not torch.equal(before, model.head.weight))
        optimizer.zero_grad()
        model.loss(7).backward()
        with pytest.raises(RuntimeError, match="without an optimizer step"):
            scheduler.step(1.0)
    except NotFiniteError as error:
        return str(error)
    finally:
        saved = scheduler.state_dict()
        scheduler.close()
    _, _, again = build(DYNAMIC)
    again.load_state_dict(saved)
    assert again.skipped == scheduler.skipped
    again.close()
    return answers, moved, scheduler.skipped


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_everywhere(where, ranks):
    first, second = ranks(faulty, where, 2)
    expected = [True, True, False, False, True, True, False]
    assert first == second == (expected, expected, 3)


def test_too_many_skips_are_an_error_everywhere(ranks):
    first, second = ranks(faulty, "loss", 1)
    assert first == second
    assert "2 steps in a row, max_skipped is 1" in first
    assert "since step 2" in first


def test_finite_on_one_process():
    model, optimizer, scheduler = build(StaticSuffix(active=2), total_steps=9, max_skipped=0)
    assert scheduler.ranks is None
    model.loss(0).backward()
    assert scheduler.finite(1.0)
    assert scheduler.finite(torch.tensor(2.0))
    model.head.weight.grad = None
    empty = nn.Parameter(torch.empty(0))
    empty.grad = torch.empty(0)
    optimizer.add_param_group({"params": [empty]})
    assert scheduler.finite(1.0)
    nn.init.constant_(model.blocks[3].inner.weight.grad, math.inf)
    with pytest.raises(NotFiniteError, match="1 steps in a row"):
        scheduler.finite(1.0)
    assert scheduler.skipped == 1


def sharded(rank):
    """Whether a step counts as finite when one shard, on rank 1, is not."""
    model = shard(build_sharded())
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = BlockScheduler(model, optimizer, StaticSuffix(active=2), total_steps=9)
    batch_loss(model, 0, rank).backward()
    answers = [scheduler.finite(1.0)]
    if rank == 1:
        model.blocks[3].inner.weight.grad.to_local()[0, 0] = math.nan
    answers.append(scheduler.finite(1.0))
    scheduler.close()
    return answers


def test_a_shard_that_is_not_finite(ranks):
    assert ranks(sharded) == [[True, False]] * 2
