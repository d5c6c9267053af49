"""lisa and cyclic in a loop, against their papers' algorithms written by hand."""

import pytest
import torch

from blocksched import AdamW, BlockScheduler
from blocksched.schedules.cyclic import Cyclic
from blocksched.schedules.lisa import Lisa
from tests.loops.conftest import equal

OPTIMIZERS = pytest.mark.parametrize("kind", [torch.optim.AdamW, AdamW])


def make(kind, parameters):
    return kind(parameters, lr=0.02, weight_decay=0.1)


def scheduled(model, kind, schedule, steps):
    """Train; the active blocks of each step."""
    optimizer = make(kind, model.parameters())
    scheduler = BlockScheduler(model, optimizer, schedule, total_steps=steps)
    active = []
    for step in range(steps):
        active.append(scheduler.plan.active)
        loss = model.loss(step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(loss)
    return active


@OPTIMIZERS
def test_badam_by_hand(tiny, kind):
    """An optimizer is made for each turn, as its Adam starts from nothing; the head has one."""
    model, plain = tiny(), tiny()
    active = scheduled(model, kind, Cyclic(interval=3, seed=1), steps=26)
    assert set(active[:12]) == {(0,), (1,), (2,), (3,)}
    plain.requires_grad_(False)
    head = make(kind, plain.head.requires_grad_(True).parameters())
    for step, (i,) in enumerate(active):
        if step % 3 == 0:
            plain.blocks.requires_grad_(False)
            block = make(kind, plain.blocks[i].requires_grad_(True).parameters())
        plain.loss(step).backward()
        for optimizer in (head, block):
            optimizer.step()
            optimizer.zero_grad()
    assert equal(model.state_dict(), plain.state_dict())


@OPTIMIZERS
def test_lisa_by_hand(tiny, kind):
    """One optimizer of everything, as in LMFlow: moments wait for their block."""
    model, plain = tiny(), tiny()
    active = scheduled(model, kind, Lisa(interval=3, seed=1), steps=14)
    assert len(set(active)) > 2
    optimizer = make(kind, plain.parameters())
    for step, blocks in enumerate(active):
        for i, block in enumerate(plain.blocks):
            block.requires_grad_(i in blocks)
        plain.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert equal(model.state_dict(), plain.state_dict())
