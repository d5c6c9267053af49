"""Active sets with holes: what a frozen block above an active one computes, keeps and costs."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from blocksched import FusedMLP, Plan, extension, find_blocks
from blocksched.mechanism import Mechanism
from tests.library.holes import Stack, build, same, train


class Backward(TorchDispatchMode):
    """Notes the matrix products, and which gradients each fused layer is asked for."""

    def __init__(self):
        super().__init__()
        self.products, self.asked = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func is torch.ops.aten.mm.default
        if func.name() == "blocksched::mlp_backward":
            self.asked.append(args[-3:])
        return func(*args, **(kwargs or {}))


def backward_of(model, active, stem):
    Mechanism(find_blocks(model)).apply(active, stem)
    loss = model.loss(0)
    with Backward() as noted:
        loss.backward()
    return noted


@pytest.mark.parametrize(
    ("active", "stem", "dx", "dw"),
    [
        ((0, 1, 2, 3), None, 4, 4), ((1, 3), None, 2, 2), ((1, 3), True, 4, 2), ((0,), None, 4, 1),
        ((0,), False, 3, 1), ((3,), True, 4, 1), ((3,), None, 0, 1),
    ],
)  # fmt: skip
def test_a_frozen_block_passes_dx_and_skips_dw(active, stem, dx, dw):
    model = Stack(lambda: nn.Linear(8, 8))
    products = backward_of(model, active, stem).products
    assert products == dx + dw + 2  # those of the head


@pytest.mark.skipif(not extension.HAS_CPP, reason="the extension is missing")
def test_so_does_the_fused_layer():
    asked = backward_of(Stack(lambda: FusedMLP(8)), (1, 3), None).asked
    assert asked == [(True, True, True), (True, False, False), (False, True, True)]
    asked = backward_of(Stack(lambda: FusedMLP(8)), (1,), True).asked
    assert asked == [
        (True, False, False), (True, False, False), (True, True, True), (True, False, False),
    ]  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_a_stem_that_stands_still_under_an_active_block_0_is_not_reached(tiny, tied):
    """A tied weight then gets the head's part only, as it does above a prefix."""
    model, plain = tiny(tied=tied), tiny(tied=tied)
    Mechanism(find_blocks(model)).apply((0, 2), False)
    plain.blocks[0].register_forward_pre_hook(lambda _m, args: (args[0].detach(),))
    for i in (1, 3):
        plain.blocks[i].requires_grad_(False)
    inputs = []
    model.blocks[0].inner.register_forward_hook(lambda _m, args, _o: inputs.extend(args))
    for each in (model, plain):
        each.loss(0).backward()
    assert [x.requires_grad for x in inputs] == [False]
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name
    assert (model.embed.weight.grad is None) == (not tied)


def test_the_stem_may_change_while_the_active_set_stays(tiny):
    model = tiny()
    mechanism = Mechanism(find_blocks(model))
    got = []
    for stem in (None, True, False, True):
        mechanism.apply((1, 3), stem)
        model.loss(0).backward()
        mechanism.check_all()
        got.append(model.embed.weight.grad is not None)
    assert got == [False, True, False, True]


class Gain(nn.Module):
    """Multiplies by a buffer that it moves first, so that dx needs the buffer as it then is."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(8))

    def forward(self, x):
        self.mean.add_(x.detach().mean(0))
        return x * self.mean


def test_dx_of_a_frozen_block_is_that_of_the_buffers_it_ran_with(tiny):
    model, plain = tiny(), tiny()
    for each in (model, plain):
        each.blocks[2].norm = Gain()
        each.blocks[2].inner.weight.data.mul_(5.0)
    Mechanism(find_blocks(model)).apply((1, 3))
    for each in (model, plain):
        each.loss(0).backward()
    assert torch.equal(model.blocks[1].inner.weight.grad, plain.blocks[1].inner.weight.grad)
    assert torch.equal(model.blocks[2].norm.mean, torch.ones(8))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize(("reentrant", "tied"), [(False, False), (False, True), (True, False)])
def test_under_activation_checkpointing(tiny, reentrant, tied):
    steps = range(7 if reentrant else 20)  # what WALK does then is refused, see below
    runs = []
    for kind in (reentrant, None):
        model = tiny(tied=tied, norm=True)
        model.reentrant = kind
        runs.append(train(model, *build(model), steps))
    assert same(runs)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("tied", [False, True])
def test_reentrant_checkpointing_of_block_0_over_a_frozen_stem_is_refused(tiny, tied):
    model = tiny(tied=tied)
    model.reentrant = True
    mechanism = Mechanism(find_blocks(model))
    mechanism.apply((0, 2), False)

    def step():
        model.loss(0).backward()
        mechanism.check_all()

    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        step()


def test_a_resumed_run_goes_on_with_the_same_holes_and_stem(tiny):
    model = tiny()
    optimizer, scheduler = build(model)
    train(model, optimizer, scheduler, range(7))
    saved = scheduler.state_dict()
    saved["plan"] = json.loads(json.dumps(saved["plan"]))
    again = tiny()
    again.load_state_dict(model.state_dict())
    other, resumed = build(again)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.load_state_dict(saved)
    assert resumed.plan == Plan((0, 3), freezing=True, stem=False)
    steps = range(7, 20)
    runs = [train(model, optimizer, scheduler, steps), train(again, other, resumed, steps)]
    assert same(runs)
