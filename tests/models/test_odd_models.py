"""What models do beside calling one block after the other."""

import copy

import pytest
import torch
from torch import nn

from blocksched import find_blocks
from blocksched.mechanism import Mechanism


class Counting(nn.Module):
    """Moves one buffer in place, and puts a new tensor in the place of another."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("scratch", torch.zeros(8), persistent=False)

    def forward(self, x):
        with torch.no_grad():
            self.seen = self.seen + 1
            self.mean.mul_(0.9).add_(x.mean(0))
            self.scratch.add_(1.0)
        return x - self.mean


@pytest.mark.parametrize("active", [(3,), (0, 2, 3)])
def test_any_buffer_of_a_frozen_block_stays(tiny, active):
    model = tiny()
    for block in model.blocks:
        block.norm = Counting()
    mechanism = Mechanism(find_blocks(model))
    model.loss(0)
    mechanism.apply(active)
    before = copy.deepcopy(model.state_dict())
    kept = [block.norm.mean for block in model.blocks]
    model.loss(1).backward()
    for i, block in enumerate(model.blocks):
        moved = {k for k, v in block.state_dict().items() if not v.equal(before[f"blocks.{i}.{k}"])}
        assert moved == ({"norm.mean", "norm.seen"} if i in active else set())
        assert block.norm.mean is kept[i]


def test_a_buffer_is_given_back_if_the_forward_fails(tiny):
    model = tiny()
    model.blocks[1].norm = Counting()
    mechanism = Mechanism(find_blocks(model))
    mechanism.apply((3,))
    model.blocks[1].inner.forward = lambda _x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model.loss(0)
    assert model.blocks[1].norm.seen == 0


def test_batch_norm_of_a_copy_made_while_frozen_moves(tiny):
    model = tiny(norm=True)
    Mechanism(find_blocks(model)).apply((3,))
    model.loss(0)
    twin = copy.deepcopy(model)
    twin.loss(0)
    assert twin.blocks[0].norm.num_batches_tracked == 1
    assert model.blocks[0].norm.num_batches_tracked == 0


class Prompted(nn.Module):
    """A block that reads a parameter of the root behind its arguments' back, as a cache would."""

    def __init__(self, prompt):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.prompt = [prompt]

    def forward(self, x):
        return x + self.inner(x + self.prompt[0])


def test_what_a_prefix_block_read_elsewhere_does_not_pull_the_graph_through_it(tiny):
    model = tiny()
    model.prompt = nn.Parameter(torch.randn(8))
    for i in range(3):
        model.blocks[i] = Prompted(model.prompt)
    model.blocks[3] = Prompted(torch.zeros(8))
    Mechanism(find_blocks(model)).apply((3,))
    outputs = []
    model.blocks[2].register_forward_hook(lambda _m, _a, out: outputs.append(out.requires_grad))
    model.loss(0).backward()
    assert outputs == [False]
    assert model.prompt.grad is None


class Given(nn.Module):
    """A block that is given a parameter of the root."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x, gain):
        return x + gain * self.inner(x)


def test_a_parameter_given_to_every_block_trains_in_the_suffix(tiny):
    model = tiny()
    model.gain = nn.Parameter(torch.ones(8))
    model.blocks = nn.ModuleList(Given() for _ in range(4))
    Mechanism(find_blocks(model)).apply((2, 3))
    x = model.embed(torch.arange(4))
    for block in model.blocks:
        x = block(x, model.gain)
    x.square().sum().backward()
    assert model.gain.grad is not None


def test_a_stem_module_that_only_some_micro_batches_need_is_no_error(tiny):
    model = tiny()
    model._modules = {"image": nn.Linear(8, 8), **model._modules}
    found = find_blocks(model)
    assert any(p is model.image.weight for p in found.stem)
    mechanism = Mechanism(found)
    mechanism.apply((3,))
    model.loss(0).backward()  # text only
    model.image(torch.ones(8))  # then an image
    model.loss(1).backward()
    mechanism.check_all()
