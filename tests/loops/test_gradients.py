"""Gradients that are stale, or that somebody else wrote: a frozen weight never moves by them."""

import copy

import pytest
import torch
from torch import nn

import blocksched as bs
from blocksched import BlockScheduler, DynamicSuffix, StaticSuffix

OPTIMIZERS = {
    "AdamW": lambda p: [torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)],
    "AdamW fused": lambda p: [torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True)],
    "SGD": lambda p: [torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1)],
    "ours": lambda p: [bs.AdamW(p, lr=0.01, weight_decay=0.1)],
    "one each": lambda p: [torch.optim.SGD([q], lr=0.1, momentum=0.9, weight_decay=0.1) for q in p],
}
LATE = DynamicSuffix(min_active=2, max_active=2, warmup_steps=1, freeze_start_step=3, probe_every=0)


def one_step(model, optimizers, scheduler, step, set_to_none=True):
    loss = model.loss(step)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    scheduler.step(loss)


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def moved(model, before):
    return {key for key, value in model.state_dict().items() if not value.equal(before[key])}


@pytest.fixture(params=OPTIMIZERS)
def frozen(request, tiny):
    """Model, optimizers with moments for all parameters, and a scheduler that has frozen two."""
    model = tiny()
    optimizers = OPTIMIZERS[request.param](list(model.parameters()))
    scheduler = BlockScheduler(model, optimizers, LATE, total_steps=20)
    for step in range(3):
        one_step(model, optimizers, scheduler, step, set_to_none=False)
    assert scheduler.plan.active == (2, 3)
    return model, optimizers, scheduler


def test_zero_grad_to_zero_makes_no_gradient_of_a_frozen_weight(frozen):
    model, optimizers, scheduler = frozen
    before = snapshot(model)
    asleep = [*model.embed.parameters(), *model.blocks[:2].parameters()]
    for step in range(3, 6):
        assert all(p.grad is None for p in asleep)
        one_step(model, optimizers, scheduler, step, set_to_none=False)
    assert {key.split(".")[1] for key in moved(model, before) if "blocks" in key} == {"2", "3"}
    assert "embed.weight" not in moved(model, before)


@pytest.mark.parametrize("where", ["embed.weight", "blocks.1.inner.weight"])
@pytest.mark.parametrize("age", [0, 3])
def test_zeros_set_by_hand_are_an_error_before_they_are_applied(frozen, where, age):
    model, optimizers, scheduler = frozen
    for step in range(age):  # the watch that follows a change has ended by then
        one_step(model, optimizers, scheduler, 3 + step)
    model.loss(9).backward()
    parameter = model.get_parameter(where)
    parameter.grad = torch.zeros_like(parameter)
    before = parameter.detach().clone()
    owner = next(
        o for o in optimizers for group in o.param_groups for p in group["params"] if p is parameter
    )
    with pytest.raises(RuntimeError, match="is frozen but got a gradient, which an optimizer"):
        owner.step()
    assert torch.equal(before, parameter)


def test_a_freeze_between_backward_and_step_drops_the_gradient(frozen):
    model, optimizers, scheduler = frozen
    suffix = scheduler.state_dict()
    scheduler.close()
    fresh = BlockScheduler(model, optimizers, LATE, total_steps=20)
    assert fresh.plan.active == (0, 1, 2, 3)
    model.loss(4).backward()
    before = snapshot(model)
    fresh.load_state_dict(suffix)
    for optimizer in optimizers:
        optimizer.step()
    assert {key.split(".")[1] for key in moved(model, before) if "blocks" in key} == {"2", "3"}


def test_a_plan_before_the_update_is_refused(tiny):
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = BlockScheduler(model, optimizer, LATE, total_steps=20)
    loss = model.loss(0)
    loss.backward()
    with pytest.raises(RuntimeError, match="without an optimizer step"):
        scheduler.step(loss)


def test_what_was_frozen_after_the_optimizer_was_built_stays_frozen(tiny):
    model = tiny()
    optimizers = OPTIMIZERS["AdamW"](model.parameters())
    model.blocks[3].inner.bias.requires_grad_(False)
    before = snapshot(model)
    scheduler = BlockScheduler(model, optimizers, LATE, total_steps=20)
    for step in range(6):
        one_step(model, optimizers, scheduler, step)
    assert set(before) - moved(model, before) == {"blocks.3.inner.bias"}


def test_a_parameter_group_that_comes_later(tiny):
    model = tiny()
    optimizers = OPTIMIZERS["ours"](model.parameters())
    scheduler = BlockScheduler(model, optimizers, LATE, total_steps=20)
    one_step(model, optimizers, scheduler, 0)
    model.head.bias = nn.Parameter(torch.zeros(16))  # of the head: nobody freezes it
    optimizers[0].add_param_group({"params": [model.head.bias]})
    for step in range(1, 5):
        before = model.head.bias.detach().clone()
        one_step(model, optimizers, scheduler, step)
        assert not torch.equal(before, model.head.bias)


def test_a_group_of_a_block_that_comes_later_is_refused_where_it_would_be_frozen(tiny):
    model = tiny()
    bias = model.blocks[0].inner.bias.requires_grad_(False)
    optimizers = OPTIMIZERS["AdamW"]([p for p in model.parameters() if p.requires_grad])
    scheduler = BlockScheduler(model, optimizers, LATE, total_steps=20)
    bias.requires_grad_(True)
    optimizers[0].add_param_group({"params": [bias]})
    for step in range(2):
        one_step(model, optimizers, scheduler, step)
    with pytest.raises(RuntimeError, match=r"blocks.0.inner.bias became trainable after"):
        one_step(model, optimizers, scheduler, 2)


@pytest.mark.parametrize("when", ["before", "after"])
def test_optimizer_state_loaded_before_or_after_the_scheduler_is_built(tiny, when):
    def train(model, optimizer, scheduler):
        for step in range(6):
            one_step(model, [optimizer], scheduler, step)

    def build(state):
        model = tiny()
        optimizer = bs.AdamW(model.parameters(), lr=0.01)
        if state is not None and when == "before":
            optimizer.load_state_dict(copy.deepcopy(state))
        scheduler = BlockScheduler(model, optimizer, StaticSuffix(active=2), total_steps=20)
        if state is not None and when == "after":
            optimizer.load_state_dict(copy.deepcopy(state))
        return model, optimizer, scheduler

    source = tiny()
    plain = bs.AdamW(source.parameters(), lr=0.01)
    for step in range(3):
        source.loss(step).backward()
        plain.step()
        plain.zero_grad()
    state = plain.state_dict()
    model, optimizer, scheduler = build(state)
    train(model, optimizer, scheduler)
    by_hand = tiny()
    other = bs.AdamW(by_hand.parameters(), lr=0.01)
    other.load_state_dict(copy.deepcopy(state))
    by_hand.blocks[:2].requires_grad_(False)
    by_hand.embed.requires_grad_(False)
    for step in range(6):
        by_hand.loss(step).backward()
        other.step()
        other.zero_grad()
    assert not moved(model, by_hand.state_dict())
    assert int(optimizer.state[model.blocks[0].inner.weight]["step"]) == 3
    assert int(optimizer.state[model.blocks[3].inner.weight]["step"]) == 9
