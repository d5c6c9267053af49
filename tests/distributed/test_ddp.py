"""DDP under a moving boundary is one process that trains on everybody's batches."""

import itertools

import numpy as np
import pytest
import torch

import blocksched as bs
from tests.conftest import TinyModel
from tests.distributed.ddp_loop import OPTIMIZERS, SCHEDULES, STEPS, batch, loss_of, part_of, train
from tests.loops.conftest import Walk

OPTIONS = {
    "views": {"wrap": {"gradient_as_bucket_view": True}},
    "small buckets": {"wrap": {"bucket_cap_mb": 0.002}},
    "skip_all_reduce": {"wrap": {"skip_all_reduce_unused_params": True, "bucket_cap_mb": 0.002}},
    "no_sync": {"micro": 3},
    "no_sync with views": {"micro": 2, "wrap": {"gradient_as_bucket_view": True}},
    "bfloat16 blocks": {"dtype": "bfloat16"},
    "tied": {"tied": True},
    "block left out on some ranks": {"skip": True},
}


def compare(ranks, optimizer, schedule, **options):
    first, second = ranks(train, optimizer, schedule, options)
    one = train(None, optimizer, schedule, options)
    assert [step[0] for step in first] == [step[0] for step in one]
    assert len({step[0] for step in one}) > 1
    assert first == second
    assert first == one


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ddp_is_one_process_to_the_bit(optimizer, schedule, ranks):
    compare(ranks, optimizer, schedule)


@pytest.mark.parametrize("option", OPTIONS)
def test_so_it_is_with_options(option, ranks):
    compare(ranks, "torch AdamW", "walk", **OPTIONS[option])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_frozen_stands_still_and_what_is_thawed_moves(optimizer, ranks):
    seen, _ = ranks(train, optimizer, "walk", {})
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
    weights = ranks(train, optimizer, "walk", {})[0][-1][1].values()
    ddp = [
        torch.from_numpy(np.frombuffer(raw, np.float32).copy()).view(p.shape)
        for raw, p in zip(weights, exact, strict=True)
    ]
    assert 0 < rounding(ddp, exact) <= 2 * one
