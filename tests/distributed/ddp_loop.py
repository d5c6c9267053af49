"""A training loop that runs on the ranks of DDP, or in one process as if it were all of them."""

import contextlib
import functools

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import blocksched as bs
from blocksched.distributed import prepare_ddp
from tests.conftest import TinyModel
from tests.library import holes
from tests.loops.conftest import Walk

STEPS = 14
OPTIMIZERS = {
    "torch AdamW": functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "bs.AdamW": functools.partial(bs.AdamW, lr=1e-2, weight_decay=0.1),
    "SGD": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
}
SCHEDULES = {
    "walk": Walk,
    "holes": holes.Walk,
    "probes": functools.partial(
        bs.DynamicSuffix, min_active=1, max_active=2, warmup_steps=2, probe_every=4,
        refresh_every=0, freeze_start_frac=0.2, final_full_frac=0.15, relevance_threshold=0.5,
    ),
}  # fmt: skip


class Model(TinyModel):
    """Leaves out block 2 where it is told to."""

    skip = False

    def forward(self, tokens):
        x = self.embed(tokens)
        for i, block in enumerate(self.blocks):
            x = x if self.skip and i == 2 else block(x.to(block.inner.weight.dtype))
        return self.head(x.to(self.head.weight.dtype))


@contextlib.contextmanager
def recorded():
    """Collects the active blocks and the loss of every step that any scheduler takes."""
    active, losses = [], []
    real = bs.BlockScheduler.step

    def step(self, loss=None):
        active.append(self.plan.active)
        losses.append(float(loss))
        real(self, loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bs.BlockScheduler, "step", step)
        yield active, losses


def plain(value):
    """Weights or states as bytes, to be compared bit by bit."""
    if isinstance(value, torch.Tensor):
        return value.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return value


def part_of(name):
    """The number of the block that a parameter is in, else the module's name."""
    where, *rest = name.split(".")
    return int(rest[0]) if where == "blocks" else where


def batch(step, half, micro=0):
    """[rows, length] tokens of one rank."""
    generator = torch.Generator().manual_seed(100 * step + 10 * half + micro)
    return torch.randint(16, (4, 6), generator=generator)


def loss_of(model, tokens):
    logits = model(tokens).flatten(0, 1).float()
    return nn.functional.cross_entropy(logits, tokens.roll(1, 1).flatten())


def backward(model, step, half, micro):
    """The micro-batches of one rank; their loss."""
    total = torch.zeros(())
    for i in range(micro):
        wait = i < micro - 1 and isinstance(model, DistributedDataParallel)
        with model.no_sync() if wait else contextlib.nullcontext():
            loss = loss_of(model, batch(step, half, i))
            loss.backward()
        total += loss.detach()
    return total


def train(rank, optimizer, schedule, options):
    """`run` with options in a dict, as the pool passes arguments on."""
    return run(rank, optimizer, schedule, **options)


def run(rank, optimizer, schedule, *, wrap=None, micro=1, skip=False, dtype=None, **model):
    """Active blocks, weights and states after each step.

    One process (rank None) trains on the batches of both ranks and adds their gradients up as DDP
    does: a half of each. With `skip` rank 1 leaves block 2 out in some steps, both in others.
    """
    torch.manual_seed(0)
    module = wrapped = Model(width=16, **model)
    if dtype is not None:
        module.blocks.to(getattr(torch, dtype))
    if rank is not None:
        wrapped = DistributedDataParallel(module, find_unused_parameters=True, **(wrap or {}))
    own = OPTIMIZERS[optimizer](module.parameters())
    scheduler = bs.BlockScheduler(wrapped, own, SCHEDULES[schedule](), total_steps=STEPS)
    if rank is not None:
        prepare_ddp(wrapped, scheduler)
    seen = []
    for step in range(STEPS):
        shares, loss = [], torch.zeros(())
        halves = (0, 1) if rank is None else (rank,)
        for half in halves:
            module.skip = skip and step % 3 > 1 - half
            loss += backward(wrapped, step, half, micro) / len(halves)
            shares.append([p.grad for p in module.parameters()])
            if rank is None:
                module.zero_grad()
        active = scheduler.plan.active
        still = set() if scheduler.plan.stem_trains else set(scheduler.blocks.stem)
        still.update(*(p for i, p in enumerate(scheduler.blocks.parameters) if i not in active))
        for (name, parameter), *grads in zip(module.named_parameters(), *shares, strict=True):
            assert parameter not in still or grads == [None] * len(grads), (step, name)
            if rank is None:
                some = [grad / 2 for grad in grads if grad is not None]
                parameter.grad = sum(some[1:], some[0]) if some else None
        own.step()
        own.zero_grad()
        scheduler.step(loss)
        weights = plain(dict(module.named_parameters()))
        states = {name: plain(own.state[p]) for name, p in module.named_parameters()}
        seen.append((active, weights, states))
    scheduler.close()
    return seen
