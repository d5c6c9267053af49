"""When the watch over the first backward after a change speaks, and when it waits."""

import pytest
import torch
from torch import nn

from blocksched import find_blocks
from blocksched.mechanism import Mechanism


def test_a_forward_without_a_backward_is_not_taken_for_blocks_that_do_not_train(tiny):
    """The watch goes on: the backward that comes next is the one that tells."""
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    mechanism = Mechanism(find_blocks(model))
    mechanism.apply((2, 3))
    model.loss(0)
    mechanism.check(range(4), optimizer)
    mechanism.check_all()
    model.blocks[3].register_forward_pre_hook(lambda _, args: args[0].detach())
    model.loss(0).backward()
    with pytest.raises(RuntimeError, match=r"block 2 \(blocks.2\) is active and ran but got no"):
        mechanism.check(range(4), optimizer)
    with pytest.raises(RuntimeError, match="block 2"):
        mechanism.check_all()


@pytest.mark.parametrize("reported", ["check", "check_all"])
def test_a_backward_that_reaches_only_the_head_is_noticed(tiny, reported):
    model = tiny()
    mechanism = Mechanism(find_blocks(model))
    mechanism.apply((2, 3))
    model.head.register_forward_pre_hook(lambda _, args: args[0].detach())
    model.loss(0).backward()
    model.zero_grad()
    with pytest.raises(RuntimeError, match="block 2"):
        mechanism.check(range(4)) if reported == "check" else mechanism.check_all()


def test_an_update_by_gradients_of_others_tells_of_blocks_that_do_not_train(tiny):
    """The model ran without grad mode; what else the optimizer holds did train."""
    model, other = tiny(), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([*model.parameters(), other], lr=0.1)
    mechanism = Mechanism(find_blocks(model))
    mechanism.apply((2, 3))
    with torch.no_grad():
        loss = model.loss(0)
    (loss * other).sum().backward()
    with pytest.raises(RuntimeError, match="block 2"):
        mechanism.check(range(4), optimizer)
