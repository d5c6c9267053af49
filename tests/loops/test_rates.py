"""Rates in loops of every kind: closures, a GradScaler, several optimizers, steps in backward."""

import pytest
import torch

import blocksched as bs
from tests.loops.rates import ALL, RATES, assert_close, equal, expected, trained


@pytest.mark.parametrize("kind", [torch.optim.AdamW, bs.AdamW])
def test_closures(kind, tiny):
    model = tiny()
    optimizer = kind(model.parameters(), lr=0.01)

    def step(i):
        def closure():
            optimizer.zero_grad()
            loss = model.loss(i)
            loss.backward()
            return loss

        assert optimizer.step(closure).item() > 0

    mine = trained(model, [optimizer], RATES[0], active=ALL, step=step)
    assert_close(mine, expected(tiny, RATES[0], 0.01))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, bs.AdamW])
def test_an_update_that_a_grad_scaler_skips(kind, tiny):
    model = tiny()
    optimizer = kind(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    states = []

    def step(i):
        scaler.scale(model.loss(max(0, i - 1)) * (float("inf") if i == 0 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        states.append([p.detach().clone() for p in model.parameters()])

    start = [p.detach().clone() for p in model.parameters()]
    mine = trained(model, [optimizer], RATES[0], steps=5, active=ALL, step=step)
    assert all(equal(states[0], start))
    assert_close(mine, expected(tiny, RATES[0], 0.01))


def test_several_optimizers(tiny):
    model = tiny()
    half = len(list(model.parameters())) // 2
    params = list(model.parameters())
    optimizers = [torch.optim.AdamW(params[:half], lr=0.01), bs.AdamW(params[half:], lr=0.01)]
    mine = trained(model, optimizers, RATES[0], active=ALL)
    assert_close(mine, expected(tiny, RATES[0], 0.01))


def test_optimizers_stepped_in_backward(tiny):
    model = tiny()
    optimizers = {p: torch.optim.AdamW([p], lr=0.01) for p in model.parameters()}

    def update(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    step = lambda i: model.loss(i).backward()  # noqa: E731
    mine = trained(model, list(optimizers.values()), RATES[0], active=ALL, step=step)
    assert_close(mine, expected(tiny, RATES[0], 0.01))
