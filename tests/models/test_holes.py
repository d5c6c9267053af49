"""Any active set, with the stem or without: as freezing by hand, bit for bit, on every model."""

import dataclasses

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import blocksched as bs
from blocksched.schedules.base import Memoryless
from blocksched.schedules.draw import permutation, uniform
from tests.loops.conftest import equal

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

STEPS = 9


@dataclasses.dataclass(frozen=True)
class Holes(Memoryless):
    """Any blocks, drawn for each step, and the stem with block 0, always or never in turn."""

    seed: int

    def plan(self, state, progress):
        n, step = state.n_blocks, progress.step
        count = 1 + int(uniform(self.seed, f"count {step}") * n)
        active = permutation(n, self.seed, f"active {step}")[:count]
        return bs.Plan(tuple(sorted(active)), stem=(None, True, False)[step % 3])


class ByHand:
    """Freezing as one writes it into a loop of one's own: requires_grad of blocks and stem; and
    where the stem stands still a detach of what block 0 and the prefix are given, wherever it is
    given."""

    def __init__(self, case, model):
        self.blocks = model.get_submodule(case.blocks)
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.stem = case.stem
        self.first = 0  # blocks below it are given what is detached
        self.given = []
        for i, block in enumerate(self.blocks):
            block.register_forward_pre_hook(self.cut(i), with_kwargs=True)

    def freeze(self, active, stem):
        stem = 0 in active if stem is None else stem
        self.first = 0 if stem else max(1, min(active))
        blocks = [block for i, block in enumerate(self.blocks) if i not in active]
        frozen = {id(p) for block in blocks for p in block.parameters()}
        for p in self.trainable:
            still = self.names[id(p)].startswith(self.stem) and not stem
            p.requires_grad_(id(p) not in frozen and not still)

    def cut(self, i):
        def hook(_module, args, kwargs):
            given = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
            if i == 0:
                self.given = []
            if i < self.first:
                self.given += given
            cut = {id(t) for t in given} & {id(t) for t in self.given}
            return tree_map(lambda t: t.detach() if id(t) in cut else t, (args, kwargs))

        return hook


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def compare(case, model, plain, seed):
    """Train both, the one under Holes; the plans of the steps."""
    optimizer, other = adamw(model.parameters()), adamw(plain.parameters())
    scheduler = bs.BlockScheduler(
        model, optimizer, Holes(seed), total_steps=STEPS, blocks=case.argument
    )
    by_hand, plans = ByHand(case, plain), []
    for step in range(STEPS):
        plan = scheduler.plan
        plans.append(plan)
        before = [[p.detach().clone() for p in block] for block in scheduler.blocks.parameters]
        loss = case.loss_at(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(loss)
        moved = [
            i
            for i, (block, old) in enumerate(zip(scheduler.blocks.parameters, before, strict=True))
            if not all(map(torch.equal, block, old))
        ]
        assert moved == list(plan.active), step

        by_hand.freeze(plan.active, plan.stem)
        expected = case.loss_at(plain, step)
        expected.backward()
        other.step()
        other.zero_grad()
        assert torch.equal(loss, expected), step
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours, theirs), (step, name)
        assert equal(optimizer.state_dict(), other.state_dict()), step
    return plans


def test_any_active_set_equals_freezing_by_hand(case):
    plans = compare(case, case.make(), case.make(), seed=12)
    assert sum(len(plan.active) <= plan.active[-1] - plan.active[0] for plan in plans) >= 2
    assert any(plan.stem and plan.active[0] > 0 for plan in plans)
    assert any(plan.stem is False and plan.active[0] == 0 for plan in plans)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5-decoder", "bert"])
def test_so_it_does_with_activation_checkpointing(cases, name):
    case = cases[name]
    model, plain = case.make(), case.make()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = plain.config.use_cache = False
    compare(case, model, plain, seed=8)
