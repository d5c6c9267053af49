"""Every model: while it grows it is the plain model of the blocks that run, bit for bit."""

import copy
import re

import pytest
import torch

import blocksched as bs
from blocksched.schedules.grow import Grow
from tests.models.conftest import CASES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

UNLIKE = {
    "timm-convnext": "conv",  # several widths
    "stages": "0.weight is float32 [12, 8, 1, 1] in the first, float32 [8, 8, 1, 1] in the",
    "modernbert": "attn_norm.weight is only in the first",
}
OTHERS = {"mixed", "skip"}  # scales for each block outside of them: no plain model with fewer
SLOTS = {(3, "stack"): (0,), (3, "interleave"): (0,), (4, "stack"): (0, 1)}
SLOTS[4, "interleave"] = (0, 2)
SOURCES = {(3, "stack"): (0,) * 3, (3, "interleave"): (0,) * 3, (4, "stack"): (0, 1, 0, 1)}
SOURCES[4, "interleave"] = (0, 0, 2, 2)
for n in (3, 4):
    SLOTS[n, "none"], SOURCES[n, "none"] = SLOTS[n, "stack"], range(n)
STEPS = 6


def adamw(model):
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, lr=0.01, weight_decay=0.1)


def grow(case, model, kind):
    optimizer = adamw(model)
    n = len(model.get_submodule(case.blocks))
    schedule = Grow(blocks=(len(SLOTS[n, kind]),), until=(0.5,), copy=kind)
    blocks = case.argument
    return optimizer, bs.BlockScheduler(
        model, optimizer, schedule, total_steps=STEPS, blocks=blocks
    )


def cut(case, model, kept):
    """The model with only the blocks `kept`."""
    path, _, key = case.blocks.rpartition(".")
    blocks = model.get_submodule(case.blocks)
    chosen = [blocks[i] for i in kept]
    short = torch.nn.Sequential(*chosen) if isinstance(blocks, torch.nn.Sequential) else None
    setattr(model.get_submodule(path), key, short or torch.nn.ModuleList(chosen))
    return model


def grown(case, small, optimizer, kind):
    """A plain model of full depth and its optimizer, from one of two blocks."""
    model = case.make()
    new = adamw(model)
    old = small.get_submodule(case.blocks)
    blocks = model.get_submodule(case.blocks)
    theirs = dict(small.named_parameters())
    for name, p in model.named_parameters():
        q = theirs.get(name)
        for i, block in enumerate(blocks):
            of_block = {id(own): key for key, own in block.named_parameters()}
            if id(p) in of_block:
                slots, source = SLOTS[len(blocks), kind], SOURCES[len(blocks), kind][i]
                q = p  # as it was built
                if source in slots:
                    q = old[slots.index(source)].get_parameter(of_block[id(p)])
        with torch.no_grad():
            p.copy_(q)
        if q in optimizer.state:
            new.state[p] = copy.deepcopy(optimizer.state[q])
    return model, new


def train(case, model, optimizer, step):
    loss = case.loss_at(model, step)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


@pytest.mark.parametrize("kind", ["stack", "interleave", "none"])
@pytest.mark.parametrize("name", [name for name in CASES if name not in {*UNLIKE, *OTHERS}])
def test_growth_by_hand(name, kind):
    case = CASES[name]
    model = case.make()
    n = len(model.get_submodule(case.blocks))
    hand = cut(case, case.make(), SLOTS[n, kind])
    (optimizer, scheduler), by_hand = grow(case, model, kind), adamw(hand)
    still = [i for i in range(n) if i not in SLOTS[n, kind]]
    start = copy.deepcopy(model.get_submodule(case.blocks))
    for step in range(STEPS):
        if step == 3:
            hand, by_hand = grown(case, hand, by_hand, kind)
        assert torch.equal(train(case, model, optimizer, step), train(case, hand, by_hand, step)), (
            step
        )
        blocks = model.get_submodule(case.blocks)
        if step < 3:
            for i in still:
                pairs = zip(blocks[i].parameters(), start[i].parameters(), strict=True)
                assert all(torch.equal(p, q) for p, q in pairs)
        scheduler.step()
    assert scheduler.plan.running is None
    pairs = zip(model.parameters(), hand.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("name", UNLIKE)
def test_blocks_that_could_not_be_copies_are_refused_at_once(name):
    case = CASES[name]
    model = case.make()
    schedule = Grow(blocks=(1,), until=(0.5,))
    with pytest.raises(
        ValueError, match=rf"block 1 .* block 0 .* later: {re.escape(UNLIKE[name])}"
    ):
        bs.BlockScheduler(model, adamw(model), schedule, total_steps=9, blocks=case.blocks)
