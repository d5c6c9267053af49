"""Every schedule in a loop of one's own: it goes on from JSON to the bit, and leaves no trace."""

import copy
import json

import pytest
import torch
from torch import nn

import blocksched as bs
from blocksched.schedules.flags import SCHEDULES
from blocksched.schedules.grow import Grow

STEPS, BLOCKS = 14, 4
NUMBERS = {
    "static_suffix": {"active": 2},
    "dynamic_suffix": {"min_active": 1, "warmup_steps": 2, "probe_every": 4},
    "random_suffix": {"counts": (1, 3, 2, 6)},
    "lisa": {"interval": 3},
    "cyclic": {"interval": 3},
    "grow": {"blocks": (1, 2), "until": (0.25, 0.6), "when": "loss", "window": 2},
    "row_suffix": {"active": 2, "rows": 0.5},
}
OPTIMIZERS = {
    "torch": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
    "blocksched": lambda model: bs.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


def schedule(name):
    made = SCHEDULES[name][0](**NUMBERS.get(name, {}))
    if name == "grow":
        return Grow(**NUMBERS[name], then=schedule("dynamic_suffix"))
    return made


class Training:
    """A model, its optimizer and its scheduler, from the same start each time."""

    def __init__(self, name, optimizer):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(3, 6), nn.Sequential(*[Residual() for _ in range(BLOCKS)]), nn.Linear(6, 1)
        )
        self.optimizer = OPTIMIZERS[optimizer](self.model)
        self.scheduler = bs.BlockScheduler(
            self.model, self.optimizer, schedule(name), total_steps=STEPS, blocks="1"
        )
        self.plans = []

    def run(self, first, last):
        for step in range(first, last):
            self.plans.append(self.scheduler.plan)
            source = torch.Generator().manual_seed(step)
            x = torch.randn(5, 3, generator=source)
            loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step(loss)

    def saved(self):
        tensors = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return copy.deepcopy(tensors), json.dumps(self.scheduler.state_dict(), allow_nan=False)

    def load(self, saved):
        tensors, numbers = saved
        self.scheduler.load_state_dict(json.loads(numbers))
        self.model.load_state_dict(tensors["model"])
        self.optimizer.load_state_dict(tensors["optimizer"])


# payoff decides by measured times, which no second run repeats.
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "payoff"])
def test_it_goes_on_from_json_to_the_bit(name, optimizer):
    whole = Training(name, optimizer)
    states = [whole.saved()]
    for step in range(STEPS):
        whole.run(step, step + 1)
        states.append(whole.saved())
    for step in range(1, STEPS, 2):
        resumed = Training(name, optimizer)
        resumed.load(states[step])
        resumed.run(step, STEPS)
        assert resumed.plans == whole.plans[step:], step
        for mine, its in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(mine, its), step


@pytest.mark.parametrize("name", SCHEDULES)
def test_close_leaves_the_plain_model(name):
    training = Training(name, "torch")
    training.run(0, 3)
    training.scheduler.close()
    model = training.model
    x = torch.randn(5, 3)
    plain = nn.Sequential(nn.Linear(3, 6), nn.Sequential(*[Residual() for _ in range(BLOCKS)]),
                          nn.Linear(6, 1))  # fmt: skip
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x), plain(x))
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(x).sum().backward()
    plain(x).sum().backward()
    for mine, its in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, its.grad)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)
        assert module._compiled_call_impl is None
    hooks = training.optimizer
    assert not hooks._optimizer_step_pre_hooks
    assert not hooks._optimizer_step_post_hooks


def test_a_schedule_that_does_not_fit_leaves_the_model_free():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Sequential(*[nn.BatchNorm1d(6) for _ in range(3)]))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="normalises over the rows"):
        bs.BlockScheduler(model, optimizer, bs.RowSuffix(active=1), total_steps=3, blocks="1")
    bs.BlockScheduler(model, optimizer, bs.StaticSuffix(active=1), total_steps=3, blocks="1")
