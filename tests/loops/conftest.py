"""Two equal models in lockstep: one under BlockScheduler, one frozen by hand."""

import dataclasses
import itertools

import pytest
import torch

from blocksched import BlockScheduler
from blocksched.schedules.base import Depth, Measuring, Plan

ALL = (0, 1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Walk(Measuring):
    """A schedule that goes through the same active sets again and again; the full ones are probes.

    `seen` gets the relevance of each probe.
    """

    seen: list = dataclasses.field(default_factory=list)
    stops: tuple = (ALL, (3,), (1, 2, 3), (2, 3), (2, 3), ALL, (0, 2), (3,), (1, 2, 3))
    metric = ("saliency_abs_gp", 0.0)

    def init(self, n_blocks):
        return Depth(n_blocks)

    def wants(self, _state, _progress):
        return frozenset()

    def plan(self, _state, progress):
        active = self.stops[progress.step % len(self.stops)]
        return Plan(active, probe=active == ALL)

    def observe(self, state, plan, reading):
        if plan.probe:
            self.seen.append(reading.relevance)
        return state


class ByHand:
    """Freezes with requires_grad and a detach, and measures with its own hooks."""

    def __init__(self, model, optimizers):
        self.model, self.active = model, set(ALL)
        self.saliency = [0.0] * 4
        self.block_of = {p: i for i, block in enumerate(model.blocks) for p in block.parameters()}
        for block in model.blocks:
            block.register_forward_pre_hook(self._detach)
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(self._measure)

    def freeze(self, active):
        self.active = set(active)
        for i, block in enumerate(self.model.blocks):
            block.requires_grad_(i in active)
        self.model.embed.requires_grad_(0 in active)
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                parameter.grad = None
        self.saliency = [0.0] * 4

    def _detach(self, block, args):
        index = list(self.model.blocks).index(block)
        return (args[0].detach(),) if index < min(self.active) else None

    def _measure(self, optimizer, _args, _kwargs):
        scale = float(getattr(optimizer, "grad_scale", None) or 1.0)
        for parameter in itertools.chain(*(group["params"] for group in optimizer.param_groups)):
            if parameter in self.block_of and parameter.grad is not None:
                product = parameter.grad.double() * parameter.detach().double()
                self.saliency[self.block_of[parameter]] += product.abs().sum().item() / scale


def equal(a, b):
    """Whether two states (of a module, of an optimizer) are the same to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def train_both(build, make, steps, states):
    """Train a model under Walk and its twin by hand, and compare weights, states and relevance.

    `build` makes the model. `make(model)` returns its optimizers and `update(step)`, one step of
    the loop under test without the scheduler's call, returning the loss. Optimizers' states are
    compared if `states`.
    """
    torch.manual_seed(1)
    ours, twin = build(), build()
    optimizers, update = make(ours)
    others, update_twin = make(twin)
    by_hand = ByHand(twin, others)
    walk = Walk()
    scheduler = BlockScheduler(ours, optimizers, walk, total_steps=steps)
    for step in range(steps):
        active, probe = scheduler.plan.active, scheduler.plan.probe
        by_hand.freeze(active)
        before = {key: value.clone() for key, value in ours.state_dict().items()}
        rng = torch.get_rng_state()
        loss = update(step)
        torch.set_rng_state(rng)
        assert torch.equal(loss, update_twin(step))
        scheduler.step(loss)
        assert equal(ours.state_dict(), twin.state_dict()), f"weights differ at step {step}"
        moved = {key for key, value in ours.state_dict().items() if not value.equal(before[key])}
        assert {int(key.split(".")[1]) for key in moved if key.startswith("blocks")} == set(active)
        assert any(key.startswith("embed") for key in moved) == (0 in active)
        if probe:
            assert walk.seen[-1] == pytest.approx(by_hand.saliency, rel=1e-4)
            assert min(by_hand.saliency) > 0
    if states:
        assert equal([o.state_dict() for o in optimizers], [o.state_dict() for o in others])
    return scheduler


@pytest.fixture
def lockstep(tiny):
    """`lockstep(make, **model)`: see train_both."""

    def run(make, steps=11, states=True, **arguments):
        return train_both(lambda: tiny(**arguments), make, steps, states)

    return run
