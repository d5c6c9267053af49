"""Rates: a share of every update is what a learning rate of that share would have done."""

import copy
import weakref

import pytest
import torch

import blocksched as bs
from blocksched import BlockScheduler
from blocksched.blocks import find_blocks
from blocksched.rates import Rates
from tests.loops.rates import ACTIVE, ALL, RATES, Given, assert_close, equal, parts, trained

KINDS = {
    "AdamW": lambda p, **lr: torch.optim.AdamW(p, weight_decay=0.1, **lr),
    "SGD": lambda p, **lr: torch.optim.SGD(p, momentum=0.9, nesterov=True, weight_decay=0.1, **lr),
    "Adam": lambda p, **lr: torch.optim.Adam(p, weight_decay=0.1, **lr),
    "RMSprop": lambda p, **lr: torch.optim.RMSprop(p, momentum=0.9, **lr),
    "Adagrad": lambda p, **lr: torch.optim.Adagrad(p, **lr),
    "NAdam": lambda p, **lr: torch.optim.NAdam(p, decoupled_weight_decay=True, **lr),
    "RAdam": lambda p, **lr: torch.optim.RAdam(p, **lr),
    "ours": lambda p, **lr: bs.AdamW(p, weight_decay=0.1, **lr),
}


def by_hand(model, step):
    """The plan of `step`, written out for a model without a scheduler."""
    active = ACTIVE[step % len(ACTIVE)]
    for place, part in parts(model):
        part.requires_grad_(place == 4 or place in active)


@pytest.mark.parametrize("kind", KINDS)
def test_as_groups_of_their_own_learning_rate(kind, tiny):
    ours, theirs = tiny().double(), tiny().double()
    optimizer = KINDS[kind](ours.parameters(), lr=0.01)
    scheduler = BlockScheduler(ours, optimizer, Given(), total_steps=9)
    groups = [{"params": list(part.parameters())} for _, part in parts(theirs)]
    grouped = KINDS[kind](groups, lr=0.01)
    for step in range(9):
        by_hand(theirs, step)
        for group, (place, _) in zip(grouped.param_groups, parts(theirs), strict=True):
            group["lr"] = 0.01 * RATES[step % len(RATES)][place]
        for model, opt in ((ours, optimizer), (theirs, grouped)):
            model.loss(step).backward()
            opt.step()
            opt.zero_grad()
        scheduler.step()
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_rates_of_one_change_no_bit_and_leave_no_hook(tiny):
    results = []
    for rates in ((), (1.0,) * 5):
        model = tiny()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        results.append(trained(model, [optimizer], rates))
        scheduler = BlockScheduler(model, optimizer, Given(rates=(rates,)), total_steps=4)
        assert not optimizer._optimizer_step_post_hooks
        scheduler.close()
    assert all(equal(*results))


def test_one_rate_of_one_beside_others_changes_no_bit(tiny):
    model, plain = tiny(), tiny()
    first = {"steps": 1, "active": ALL}
    trained(plain, [torch.optim.AdamW(plain.parameters(), lr=0.01)], (), **first)
    trained(model, [torch.optim.AdamW(model.parameters(), lr=0.01)], RATES[0], **first)
    same = equal(model.blocks[2].parameters(), plain.blocks[2].parameters())
    assert same == [True, True]
    assert equal(model.blocks[1].parameters(), plain.blocks[1].parameters()) == [False, False]


def test_a_rate_of_zero_and_a_frozen_block_leave_weights_as_they_are(tiny):
    model, start = tiny(), tiny()
    trained(model, [bs.AdamW(model.parameters(), lr=0.1)], (0.5, 0.5, 0.0, 0.5, 0.0), 1, ((2, 3),))
    moved = {
        place: not any(equal(part.parameters(), old.parameters()))
        for (place, part), (_, old) in zip(parts(model), parts(start), strict=True)
    }
    assert moved == {0: False, 1: False, 2: False, 3: True, 4: False}


def test_master_weights_are_scaled_too(tiny):
    """Else the update would come back with the next step. bfloat16 alone would be off by 1e-2."""
    model = tiny().bfloat16()
    start = copy.deepcopy(model).float()
    optimizer = bs.AdamW(model.parameters(), lr=1e-3, master_weights=True)
    gradients = [[torch.randn_like(p) for p in start.parameters()] for _ in range(6)]

    def step(i):
        model.loss(i).backward()
        for p, grad in zip(model.parameters(), gradients[i], strict=True):
            p.grad = grad.bfloat16()
        optimizer.step()
        optimizer.zero_grad()

    mine = trained(model, [optimizer], RATES[0], steps=6, active=ALL, step=step)
    plain = torch.optim.AdamW(
        [
            {"params": list(part.parameters()), "lr": 1e-3 * RATES[0][place]}
            for place, part in parts(start)
        ]
    )
    for grads in gradients:
        for p, grad in zip(start.parameters(), grads, strict=True):
            p.grad = grad.bfloat16().float()
        plain.step()
    masters = [optimizer.state[p]["master_param"] for p in model.parameters()]
    assert_close(masters, list(start.parameters()))
    assert all(equal(mine, [master.bfloat16() for master in masters]))


def test_what_is_kept_is_freed_and_no_more_than_is_needed(tiny, monkeypatch):
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rates = Rates(find_blocks(model), [optimizer])
    rates.apply(RATES[0])
    clone, kept = torch.Tensor.clone, []

    def remembered(tensor):
        copied = clone(tensor)
        kept.append(weakref.ref(copied))
        return copied

    monkeypatch.setattr(torch.Tensor, "clone", remembered)
    optimizer.register_step_pre_hook(lambda *_: kept.append(all(ref() is not None for ref in kept)))
    model.blocks[3].requires_grad_(False)
    model.loss(0).backward()
    optimizer.step()
    assert kept.pop() is True
    assert len(kept) == 1 + 2 + 2 + 1  # of stem, blocks 0 and 1, and head
    assert all(ref() is None for ref in kept)


def test_a_closed_scheduler_scales_nothing(tiny):
    model, plain = tiny(), tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = BlockScheduler(model, optimizer, Given(rates=(RATES[0],)), total_steps=4)
    scheduler.close()
    for each in (model, plain):
        each.loss(0).backward()
    optimizer.step()
    torch.optim.SGD(plain.parameters(), lr=0.01).step()
    assert all(equal(model.parameters(), plain.parameters()))


def test_another_number_of_rates(tiny):
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(ValueError, match="and one for the head, 5 in all, got 4"):
        BlockScheduler(model, optimizer, Given(rates=((1.0,) * 4,)), total_steps=4)
