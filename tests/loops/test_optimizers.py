"""Optimizers of all kinds under a moving boundary, weight for weight against freezing by hand."""

import pytest
import torch

import blocksched as bs

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01, weight_decay=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01, weight_decay=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5, weight_decay=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1, weight_decay=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=0.1),
    "ours": lambda p: bs.AdamW(p, lr=0.01, weight_decay=0.1),
    "ours eager": lambda p: bs.AdamW(p, lr=0.01, weight_decay=0.1, backend="eager"),
    "ours bf16": lambda p: bs.AdamW(p, lr=0.01, weight_decay=0.1, moment_dtype=torch.bfloat16),
}  # fmt: skip


def loop(model, optimizers, set_to_none=True):
    def update(step):
        loss = model.loss(step)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)
        return loss

    return optimizers, update


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_optimizer_and_gradients_zeroed_in_place(lockstep, name):
    make = OPTIMIZERS[name]
    lockstep(lambda model: loop(model, [make(model.parameters())], set_to_none=False))


def test_parameter_groups_with_their_own_numbers(lockstep):
    def make(model):
        groups = [
            {"params": list(block.parameters()), "lr": 0.01 * 0.8**i, "weight_decay": 0.1 * i}
            for i, block in enumerate(model.blocks)
        ]
        rest = [*model.embed.parameters(), *model.head.parameters()]
        return loop(model, [torch.optim.AdamW([*groups, {"params": rest}], lr=0.02)])

    lockstep(make)


def test_muon_for_matrices_and_adamw_for_the_rest(lockstep):
    def make(model):
        matrices = [block.inner.weight for block in model.blocks]
        held = set(map(id, matrices))
        rest = [p for p in model.parameters() if id(p) not in held]
        return loop(model, [torch.optim.Muon(matrices, lr=0.02), bs.AdamW(rest, lr=0.01)])

    lockstep(make)


def test_an_optimizer_for_each_block(lockstep):
    def make(model):
        parts = [model.embed, *model.blocks, model.head]
        return loop(model, [torch.optim.SGD(p.parameters(), lr=0.1, momentum=0.9) for p in parts])

    lockstep(make)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "SGD8bit"])
def test_eight_bit(lockstep, name):
    optim = pytest.importorskip("bitsandbytes").optim
    more = {"momentum": 0.9} if name == "SGD8bit" else {}

    def make(model):
        optimizer = getattr(optim, name)(
            model.parameters(), lr=0.01, weight_decay=0.1, min_8bit_size=16, **more
        )
        return loop(model, [optimizer])

    scheduler = lockstep(make, width=32)
    weight = scheduler.blocks.modules[0].inner.weight
    assert scheduler._updates.optimizers[0].state[weight]["state1"].dtype == torch.uint8


def test_lbfgs_moves_what_has_no_gradient_and_is_refused(tiny):
    model = tiny()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = model.loss(0)
        loss.backward()
        return loss

    optimizer.step(closure)
    model.blocks[0].requires_grad_(False)
    model.blocks[0].zero_grad()
    before = model.blocks[0].inner.weight.clone()
    optimizer.step(closure)
    assert not before.equal(model.blocks[0].inner.weight)
    with pytest.raises(ValueError, match="LBFGS moves parameters without a gradient"):
        bs.BlockScheduler(model, optimizer, bs.StaticSuffix(active=2), total_steps=5)
    assert not optimizer._optimizer_step_pre_hooks
