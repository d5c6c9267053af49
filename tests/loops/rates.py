"""Rates under BlockScheduler, and the same by parameter groups."""

import dataclasses

import torch

from blocksched import BlockScheduler
from blocksched.schedules.base import Memoryless, Plan

RATES = ((1.5, 0.25, 1.0, 0.7, 0.5), (0.0, 1.0, 0.125, 1.75, 1.0), (0.3, 0.9, 0.9, 0.0, 1.25))
ACTIVE = ((0, 1, 2, 3), (0, 2, 3), (1, 2), (3,))
ALL = ((0, 1, 2, 3),)


@dataclasses.dataclass(frozen=True)
class Given(Memoryless):
    """Goes through active sets and rates, again and again."""

    active: tuple = ACTIVE
    rates: tuple = RATES

    def plan(self, _state, progress):
        i = progress.step
        return Plan(self.active[i % len(self.active)], rates=self.rates[i % len(self.rates)])


def parts(model):
    """Stem, blocks and head, each with its place among the rates."""
    return [(0, model.embed), *enumerate(model.blocks), (4, model.head)]


def trained(model, optimizers, rates, steps=4, active=ACTIVE, step=None):
    """Parameters after some steps."""
    schedule = Given(active, (rates,))
    scheduler = BlockScheduler(model, optimizers, schedule, total_steps=steps)
    for i in range(steps):
        if step is not None:
            step(i)
        else:
            model.loss(i).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()
    scheduler.close()
    return [p.detach().clone() for p in model.parameters()]


def expected(tiny, rates, lr, steps=4):
    """AdamW on groups by hand; all blocks train."""
    model = tiny()
    groups = [
        {"params": list(part.parameters()), "lr": lr * rates[place]} for place, part in parts(model)
    ]
    optimizer = torch.optim.AdamW(groups)
    for i in range(steps):
        model.loss(i).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def assert_close(some, others):
    for mine, other in zip(some, others, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def equal(some, others):
    return [torch.equal(a, b) for a, b in zip(some, others, strict=True)]
