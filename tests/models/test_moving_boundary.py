"""Every model: a moving boundary equals freezing by hand, weight for weight and bit for bit."""

import dataclasses

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import blocksched as bs
from blocksched.schedules.base import Depth, Measuring

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

BOUNDARIES = 0, 2, 1, 0, 2, 2, 0, 1


@dataclasses.dataclass(frozen=True)
class Scripted(Measuring):
    """The boundary of each step as given; full steps probe."""

    boundaries: tuple[int, ...]

    metric = "grad_ratio", 1e-12

    def init(self, n_blocks):
        return Depth(n_blocks)

    def wants(self, _state, _progress):
        return frozenset()

    def plan(self, state, progress):
        boundary = self.boundaries[min(progress.step, len(self.boundaries) - 1)]
        return bs.Plan(tuple(range(boundary, state.n_blocks)), probe=boundary == 0)

    def observe(self, state, plan, reading):
        assert not plan.probe or all(number > 0 for number in reading.relevance)
        return state


class ByHand:
    """Freezing as one writes it into a loop of one's own: requires_grad of the prefix and the stem,
    and a detach of what the prefix is given, wherever it is given."""

    def __init__(self, case, model):
        self.blocks = model.get_submodule(case.blocks)
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.stem = case.stem
        self.boundary = 0
        self.given = []
        for i, block in enumerate(self.blocks):
            block.register_forward_pre_hook(self.cut(i), with_kwargs=True)

    def freeze(self, boundary):
        self.boundary = boundary
        prefix = {id(p) for block in self.blocks[:boundary] for p in block.parameters()}
        for p in self.trainable:
            stem = self.names[id(p)].startswith(self.stem)
            p.requires_grad_(id(p) not in prefix and not (stem and boundary > 0))

    def cut(self, i):
        def hook(_module, args, kwargs):
            if self.boundary == 0:
                return None
            given = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
            if i == 0:
                self.given = []
            if i < self.boundary:
                self.given += given
            cut = {id(t) for t in given} & {id(t) for t in self.given}
            return tree_map(lambda t: t.detach() if id(t) in cut else t, (args, kwargs))

        return hook


def states(blocks):
    """What the state_dict of each block holds, copied."""
    return [{k: v.clone() for k, v in block.state_dict().items()} for block in blocks]


def moved(blocks, before):
    """Indices of the blocks of which anything has moved."""
    return [
        i
        for i, (block, old) in enumerate(zip(blocks, before, strict=True))
        if any(not torch.equal(value, old[key]) for key, value in block.state_dict().items())
    ]


def torch_adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def eager_adamw(parameters):
    return bs.AdamW(parameters, lr=0.01, weight_decay=0.1, backend="eager")


@pytest.mark.parametrize("make_optimizer", [torch_adamw, eager_adamw])
def test_a_moving_boundary_equals_freezing_by_hand(case, make_optimizer):
    model, plain = case.make(), case.make()
    optimizer, other = make_optimizer(model.parameters()), make_optimizer(plain.parameters())
    scheduler = bs.BlockScheduler(
        model, optimizer, Scripted(BOUNDARIES), total_steps=len(BOUNDARIES), blocks=case.argument
    )
    blocks, by_hand = model.get_submodule(case.blocks), ByHand(case, plain)
    buffers = {name for name, _ in plain.named_buffers()}
    for step, boundary in enumerate(BOUNDARIES):
        before = states(blocks)
        loss = case.loss_at(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(loss)
        assert moved(blocks, before) == list(range(boundary, len(blocks)))

        by_hand.freeze(boundary)
        expected = case.loss_at(plain, step)
        expected.backward()
        other.step()
        other.zero_grad()
        assert torch.equal(loss, expected)
        for (name, ours), theirs in zip(
            model.state_dict().items(), plain.state_dict().values(), strict=True
        ):
            assert name in buffers or torch.equal(ours, theirs), (step, name)


def test_the_stem_is_what_only_feeds_block_0(case):
    model = case.make()
    found = bs.find_blocks(model, case.argument)
    assert found.modules == tuple(model.get_submodule(case.blocks))
    names = {id(p): name for name, p in model.named_parameters()}
    stem = {name for name in names.values() if name.startswith(case.stem)}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {names[id(p)] for p in found.stem} == stem & trainable
    inside = {id(p) for block in found.parameters for p in block}
    assert len(inside) + len(found.stem) + len(found.head) == len(trainable)
