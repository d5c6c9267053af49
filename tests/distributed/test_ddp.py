"""DDP under a moving boundary is one process that trains on everybody's batches."""

import functools
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import blocksched as bs
from blocksched.distributed import prepare_ddp
from tests.conftest import TinyModel
from tests.loops.conftest import Walk

STEPS = 14
OPTIMIZERS = {
    "torch AdamW": functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "bs.AdamW": functools.partial(bs.AdamW, lr=1e-2, weight_decay=0.1),
    "SGD": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
}
SCHEDULES = {
    "walk": Walk,
    "probes": functools.partial(
        bs.DynamicSuffix, min_active=1, max_active=2, warmup_steps=2, probe_every=4,
        refresh_every=0, freeze_start_frac=0.2, final_full_frac=0.15, relevance_threshold=0.5,
    ),
}  # fmt: skip


def batch(step, half):
    """[rows, length] tokens of one rank."""
    generator = torch.Generator().manual_seed(2 * step + half)
    return torch.randint(16, (4, 6), generator=generator)


def loss_of(model, tokens):
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())


def plain(value):
    """Weights or states as bytes, to be compared bit by bit."""
    if isinstance(value, torch.Tensor):
        return value.detach().numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return value


def part_of(name):
    """The number of the block that a parameter is in, else the module's name."""
    where, *rest = name.split(".")
    return int(rest[0]) if where == "blocks" else where


def train(rank, optimizer, schedule, view=False):
    """Active blocks, weights and states after each step; on one process, rank None, each half of
    the joined batch is a micro-batch, which DDP's arithmetic with two ranks equals to the bit."""
    torch.manual_seed(0)
    model = wrapped = TinyModel(width=16)
    halves = (0, 1) if rank is None else (rank,)
    if rank is not None:
        wrapped = DistributedDataParallel(
            model, find_unused_parameters=True, gradient_as_bucket_view=view, bucket_cap_mb=0.002
        )
    own = OPTIMIZERS[optimizer](model.parameters())
    scheduler = bs.BlockScheduler(wrapped, own, SCHEDULES[schedule](), total_steps=STEPS)
    if rank is not None:
        prepare_ddp(wrapped, scheduler)
    seen = []
    for step in range(STEPS):
        losses = [loss_of(wrapped, batch(step, half)) / len(halves) for half in halves]
        for loss in losses:
            loss.backward()
        active = scheduler.plan.active
        for name, parameter in model.named_parameters():
            frozen = part_of(name) not in {*active, "head", *(["embed"] if 0 in active else [])}
            assert (parameter.grad is None) == frozen, (step, name)
        own.step()
        own.zero_grad()
        scheduler.step(sum(losses).detach())
        weights = plain(dict(model.named_parameters()))
        states = {name: plain(own.state[p]) for name, p in model.named_parameters()}
        seen.append((active, weights, states))
    scheduler.close()
    return seen


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ddp_is_one_process_to_the_bit(optimizer, schedule, view, ranks):
    one = train(None, optimizer, schedule)
    first, second = ranks(train, optimizer, schedule, view)
    assert [step[0] for step in first] == [step[0] for step in one]
    assert len({step[0] for step in one}) > 1
    assert first == second
    assert first == one


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_frozen_stands_still_and_what_is_thawed_moves(optimizer, ranks):
    seen, _ = ranks(train, optimizer, "walk")
    assert {step[0] for step in seen} == set(Walk().stops)
    for before, (active, weights, states) in itertools.pairwise(seen):
        for name in weights:
            if isinstance(part_of(name), int):
                moved = part_of(name) in active
                assert (weights[name] != before[1][name]) == moved
                assert (states[name] != before[2][name]) == moved


def rounding(model, exact):
    """How far all weights together are from the exact ones, in the 2-norm."""
    squares = [float(((a.double() - b) ** 2).sum()) for a, b in zip(model, exact, strict=True)]
    return sum(squares) ** 0.5


def joined(optimizer, dtype, order):
    """Weights of one process after Walk on joined batches, their rows in an order drawn anew."""
    torch.manual_seed(0)
    model = TinyModel(width=16).to(dtype)
    own = OPTIMIZERS[optimizer](model.parameters())
    scheduler = bs.BlockScheduler(model, own, Walk(), total_steps=STEPS)
    generator = torch.Generator().manual_seed(order)
    for step in range(STEPS):
        tokens = torch.cat([batch(step, 0), batch(step, 1)])
        loss = loss_of(model, tokens[torch.randperm(len(tokens), generator=generator)])
        loss.backward()
        own.step()
        own.zero_grad()
        scheduler.step(loss)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ddp_is_as_exact_as_one_process_on_the_joined_batch(optimizer, ranks):
    """At most twice as far from float64 as one process that adds up its rows in other orders."""
    exact = joined(optimizer, torch.float64, 0)
    one = max(rounding(joined(optimizer, torch.float32, order), exact) for order in range(4))
    weights = ranks(train, optimizer, "walk")[0][-1][1].values()
    ddp = [
        torch.from_numpy(np.frombuffer(raw, np.float32).copy()).view(p.shape)
        for raw, p in zip(weights, exact, strict=True)
    ]
    assert 0 < rounding(ddp, exact) <= 2 * one
