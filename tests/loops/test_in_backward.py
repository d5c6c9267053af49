"""Optimizers that step in hooks of backward, one for each parameter."""

import pytest
import torch

import blocksched as bs
from blocksched import BlockScheduler, DynamicSuffix

KINDS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=False),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "ours": lambda p: bs.AdamW(p, lr=0.01, weight_decay=0.1),
}


def hooked(model, kind):
    """An optimizer for each parameter, stepped as soon as its gradient is there."""
    optimizers = {p: KINDS[kind]([p]) for p in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    return list(optimizers.values())


def backward_only(model):
    def update(step):
        loss = model.loss(step)
        loss.backward()
        return loss

    return update


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_each_parameter(lockstep, kind):
    lockstep(lambda model: (hooked(model, kind), backward_only(model)))


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_train_as_one_optimizer_stepped_by_hand_does(lockstep, kind):
    variants = iter([True, False])

    def make(model):
        if next(variants):
            return hooked(model, kind), backward_only(model)
        optimizer = KINDS[kind](model.parameters())

        def update(step):
            loss = model.loss(step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return [optimizer], update

    lockstep(make, states=False)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_apply_optimizer_in_backward(lockstep):
    from torch.distributed import optim  # warns

    def make(model):
        numbers = {"lr": 0.01, "weight_decay": 0.1}
        optim._apply_optimizer_in_backward(torch.optim.AdamW, model.parameters(), numbers)
        return optim._get_in_backward_optimizers(model), backward_only(model)

    lockstep(make)


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_without_a_gradient_is_not_taken_for_a_skipped_update(tiny, kind):
    model = tiny()
    model.blocks[1].unused = torch.nn.Linear(8, 8)
    schedule = DynamicSuffix(min_active=1, warmup_steps=1, freeze_start_step=1, probe_every=0)
    scheduler = BlockScheduler(model, hooked(model, kind), schedule, total_steps=9)
    for step in range(4):
        loss = model.loss(step)
        loss.backward()
        scheduler.step(loss)
        assert not scheduler.plan.probe
    assert scheduler.state.not_finite == 0
    assert min(scheduler.state.relevance_ema) > 0


def test_a_backward_that_leaves_a_block_out_is_an_error(tiny):
    model = tiny()
    schedule = DynamicSuffix(min_active=2, max_active=2, warmup_steps=0, freeze_start_step=0)
    model.blocks[2].register_forward_hook(lambda _m, _a, out: out.detach())
    scheduler = BlockScheduler(model, hooked(model, "SGD"), schedule, total_steps=9)
    loss = model.loss(0)
    loss.backward()
    with pytest.raises(RuntimeError, match=r"block 0 .*is active and ran but got no gradient"):
        scheduler.step(loss)
