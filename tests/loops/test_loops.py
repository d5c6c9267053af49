"""Loops as people write them under a moving boundary, against freezing by hand."""

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint_sequential

from blocksched import BlockScheduler, StaticSuffix


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def plain_update(model, optimizer, then=lambda _loss: None):
    def update(step):
        loss = model.loss(step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        then(loss)
        return loss

    return update


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("parts", [2, 3])
def test_gradient_accumulation(lockstep, parts, set_to_none):
    def make(model):
        optimizer = adamw(model)

        def update(step):
            total = torch.zeros(())
            for part in range(parts):
                loss = model.loss(parts * step + part) / parts
                loss.backward()
                total += loss.detach()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
            return total

        return [optimizer], update

    lockstep(make)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_each_block_checkpointed_against_a_twin_that_is_not(lockstep, reentrant):
    kinds = iter([reentrant, None])

    def make(model):
        model.reentrant = next(kinds)
        optimizer = adamw(model)
        return [optimizer], plain_update(model, optimizer)

    lockstep(make)


def in_segments(model, reentrant):
    """Checkpoint the first two blocks as one segment."""
    model.forward = lambda tokens: model.head(
        checkpoint_sequential(model.blocks, 2, model.embed(tokens), use_reentrant=reentrant)
    )


def test_segments_of_several_blocks_checkpointed_without_reentrance(lockstep):
    kinds = iter([True, False])

    def make(model):
        if next(kinds):
            in_segments(model, reentrant=False)
        optimizer = adamw(model)
        return [optimizer], plain_update(model, optimizer)

    lockstep(make)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_a_boundary_inside_a_reentrant_segment_is_an_error_before_the_update(tiny):
    model = tiny()
    in_segments(model, reentrant=True)
    optimizer = adamw(model)
    BlockScheduler(model, optimizer, StaticSuffix(active=3), total_steps=5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.loss(0).backward()
    with pytest.raises(RuntimeError, match=r"block 1 .*no gradient.*use_reentrant=False"):
        optimizer.step()
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("built", ["before", "after a freeze"])
def test_ema_is_of_all_weights(lockstep, built):
    averages = []

    def make(model):
        optimizer = adamw(model)
        ema = []

        def average(_loss):
            if ema:
                ema[0].update_parameters(model)
            elif not model.embed.weight.requires_grad:
                ema.append(AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)))

        if built == "before":
            ema.append(AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)))
        averages.append((ema, model))
        return [optimizer], plain_update(model, optimizer, average)

    lockstep(make)
    ((ours,), model), ((twin,), _) = averages
    for (name, value), other in zip(ours.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(value, other), name
        assert not torch.equal(value, model.get_parameter(name.removeprefix("module."))), name
    ours.requires_grad_(True)
    ours.module.loss(0).backward()
    assert all(p.grad is not None for p in ours.parameters())


def chained(optimizer):
    parts = [
        lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=4),
        lr_scheduler.ExponentialLR(optimizer, gamma=0.9),
    ]
    return lr_scheduler.ChainedScheduler(parts)


def sequential(optimizer):
    parts = [
        lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=3),
        lr_scheduler.CosineAnnealingLR(optimizer, T_max=8),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


def one_cycle(optimizer):
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=20)


def plateau(optimizer):
    return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)


@pytest.mark.parametrize("kind", [chained, sequential, one_cycle, plateau])
def test_lr_schedulers(lockstep, kind):
    rates = []

    def make(model):
        optimizer = adamw(model)
        rate = kind(optimizer)

        def advance(loss):
            rate.step(*([loss.detach()] if kind is plateau else []))
            rates.append(optimizer.param_groups[0]["lr"])

        return [optimizer], plain_update(model, optimizer, advance)

    lockstep(make)
    assert rates[::2] == rates[1::2]
    assert len(set(rates)) > 2


def test_a_closure_against_a_twin_without(lockstep):
    variants = iter([True, False])

    def make(model):
        optimizer = adamw(model)

        def update(step):
            def closure():
                optimizer.zero_grad()
                loss = model.loss(step)
                loss.backward()
                return loss

            return optimizer.step(closure)

        return [optimizer], update if next(variants) else plain_update(model, optimizer)

    lockstep(make)


def test_dropout_draws_the_same_numbers(lockstep):
    def make(model):
        for block in model.blocks:
            block.norm = torch.nn.Dropout(0.2)
        optimizer = adamw(model)
        return [optimizer], plain_update(model, optimizer)

    lockstep(make)
