"""A loop whose active sets have holes; the stem trains with block 0, always or never."""

import dataclasses

import torch
from torch import nn

from blocksched import BlockScheduler, Plan
from blocksched.schedules.base import Memoryless

# Active blocks and stem, step by step. Boundaries: 1, 0, 2, 2, 0, 1, 2, 0, 0, 1.
WALK = (
    ((1, 3), None), ((1, 3), True), ((2,), None), ((2,), False), ((0, 2), None),
    ((1, 2), None), ((2, 3), None), ((0, 3), False), ((0,), None), ((1, 3), None),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Walk(Memoryless):
    """Through WALK, again and again."""

    stops: tuple = WALK

    def plan(self, _state, progress):
        active, stem = self.stops[progress.step % len(self.stops)]
        return Plan(active, freezing=True, stem=stem)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)


def build(model, steps=20, **arguments):
    optimizer = adamw(model)
    return optimizer, BlockScheduler(model, optimizer, Walk(), total_steps=steps, **arguments)


def train(model, optimizer, scheduler, steps, batches=3):
    """Some steps, on a few batches in turn; losses and weights after each."""
    seen = []
    for step in steps:
        loss = model.loss(step % batches)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(loss)
        seen.append((loss.item(), [p.detach().clone() for p in model.parameters()]))
    return seen


def same(runs):
    return all(
        a == b and all(map(torch.equal, ours, theirs))
        for (a, ours), (b, theirs) in zip(*runs, strict=True)
    )


class Stack(nn.Module):
    """Blocks of one kind between an embedding and a head."""

    def __init__(self, block):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(block() for _ in range(4))
        self.head = nn.Linear(8, 16)

    def loss(self, step):
        tokens = torch.randint(16, (6,), generator=torch.Generator().manual_seed(step))
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x), tokens)
