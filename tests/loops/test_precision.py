"""Autocast, GradScaler and clipping under a moving boundary, against freezing by hand."""

import contextlib

import pytest
import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import blocksched as bs

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "ours": lambda p: bs.AdamW(p, lr=0.01, weight_decay=0.1),
}
CLIPS = {
    "none": None,
    "norm": lambda p: clip_grad_norm_(p, 0.05, error_if_nonfinite=True),
    "value": lambda p: clip_grad_value_(p, 0.002),
}


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("context", [contextlib.nullcontext, bfloat16])
def test_precision_scaler_and_clipping(lockstep, context, name, scaled, clip):
    def make(model):
        optimizer = OPTIMIZERS[name](model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)

        def update(step):
            with context():
                loss = model.loss(step)
            scaler.scale(loss).backward()
            if CLIPS[clip] is not None:
                scaler.unscale_(optimizer)
                CLIPS[clip](model.parameters())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            return loss

        return [optimizer], update

    lockstep(make)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_overflow_while_blocks_are_frozen_skips_one_update(lockstep, name):
    def make(model):
        optimizer = OPTIMIZERS[name](model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        bad = []

        def update(step):
            loss = model.loss(step)
            scaler.scale(loss).backward()
            if step == 3 and not bad:  # once more, as a loop does that repeats the batch
                bad.append(step)
                model.head.weight.grad[0, 0] = torch.inf
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                return update(step)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            return loss

        return [optimizer], update

    lockstep(make)


@pytest.mark.parametrize("name", ["AdamW fused", "ours"])
def test_a_scaler_steps_an_optimizer_that_has_no_gradient_now(lockstep, name):
    lockstep(lambda model: stem_apart(model, name, guarded=False))


def test_a_scaler_with_no_gradient_refuses_optimizers_that_do_not_unscale(lockstep):
    with pytest.raises(AssertionError, match="No inf checks were recorded for this optimizer"):
        lockstep(lambda model: stem_apart(model, "AdamW", guarded=False))
    lockstep(lambda model: stem_apart(model, "AdamW", guarded=True))


def stem_apart(model, name, guarded):
    """An optimizer of its own for the stem, which has no gradient while block 0 is frozen."""
    stem = list(model.embed.parameters())
    rest = [*model.blocks.parameters(), *model.head.parameters()]
    optimizers = [OPTIMIZERS[name](part) for part in (stem, rest)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def update(step):
        loss = model.loss(step)
        scaler.scale(loss).backward()
        for optimizer, part in zip(optimizers, (stem, rest), strict=True):
            if not guarded or any(p.grad is not None for p in part):
                scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        return loss

    return optimizers, update
