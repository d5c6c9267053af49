"""A block that took over another is it, its next updates included; one that begins anew is new."""

import copy

import pytest
import torch
from torch import nn

import blocksched as bs
from blocksched.schedules import Plan
from blocksched.transplant import begin_anew, take_over, transplant
from tests.loops.conftest import equal

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "bs.AdamW": lambda p: bs.AdamW(p, lr=0.01, amsgrad=True),
    "bs.AdamW eager": lambda p: bs.AdamW(p, lr=0.01, backend="eager"),
    "bs.AdamW, short moments": lambda p: bs.AdamW(p, lr=0.01, moment_dtype=torch.bfloat16),
    "bs.AdamW, master weights": lambda p: bs.AdamW(p, lr=0.01, master_weights=True),
}


def update(model, optimizer, step, some=None):
    """One step, with gradients for the blocks `some` alone, if given."""
    model.loss(step).backward()
    for i, block in enumerate(model.blocks):
        if some is not None and i not in some:
            block.zero_grad()
    optimizer.step()
    optimizer.zero_grad()


def made(tiny, name, **arguments):
    model = tiny(**arguments)
    if "master" in name:
        model.bfloat16()
    return model, OPTIMIZERS[name](model.parameters())


def part(model, optimizer, i):
    """Weights, buffers and optimizer state of block `i`."""
    block = model.blocks[i]
    states = {key: optimizer.state.get(p) for key, p in block.named_parameters()}
    return {"weights": block.state_dict(), "states": states}


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_block_is_the_other_with_its_state(tiny, name, ran):
    model, optimizer = made(tiny, name, norm=True)
    for step in range(3):
        update(model, optimizer, step, (0, 1, 2) if ran or step else (0, 1))
    before = [copy.deepcopy(part(model, optimizer, i)) for i in range(4)]
    take_over(bs.find_blocks(model), [optimizer], 3, 1)
    assert equal(part(model, optimizer, 3), before[1])
    assert not equal(part(model, optimizer, 3), before[3])
    for i in range(3):
        assert equal(part(model, optimizer, i), before[i])
    assert all(value is not None for value in part(model, optimizer, 3)["states"].values())


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "short" not in name])
def test_the_next_updates_are_the_same(tiny, name):
    """With the same gradients both stay equal; nothing is shared that would be updated twice."""
    model, optimizer = made(tiny, name)
    for step in range(3):
        update(model, optimizer, step, (0, 1))
    take_over(bs.find_blocks(model), [optimizer], 3, 1)
    old, new = model.blocks[1], model.blocks[3]
    for step in range(3, 6):
        model.loss(step).backward()
        for p, q in zip(old.parameters(), new.parameters(), strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        assert equal(part(model, optimizer, 3), part(model, optimizer, 1))
    alone, twin = made(tiny, name)
    for step in range(3):
        update(alone, twin, step, (0, 1))
    take_over(bs.find_blocks(alone), [twin], 3, 1)
    before = copy.deepcopy(part(alone, twin, 1))
    update(alone, twin, 3, (3,))
    assert equal(part(alone, twin, 1), before)


def test_where_the_other_has_no_state_none_is_left(tiny):
    model, optimizer = made(tiny, "AdamW")
    update(model, optimizer, 0, (3,))
    take_over(bs.find_blocks(model), [optimizer], 3, 1)
    assert part(model, optimizer, 3)["states"] == dict.fromkeys(["inner.weight", "inner.bias"])


def test_several_optimizers(tiny):
    model = tiny()
    some = [p for block in model.blocks for p in (block.inner.weight,)]
    rest = [p for p in model.parameters() if all(p is not other for other in some)]
    optimizers = [torch.optim.SGD(some, lr=0.1, momentum=0.9), bs.AdamW(rest, lr=0.01)]
    model.loss(0).backward()
    for optimizer in optimizers:
        optimizer.step()
    take_over(bs.find_blocks(model), optimizers, 2, 0)
    old, new = model.blocks[0].inner, model.blocks[2].inner
    assert equal(optimizers[0].state[new.weight], optimizers[0].state[old.weight])
    assert equal(optimizers[1].state[new.bias], optimizers[1].state[old.bias])
    assert new.weight not in optimizers[1].state


def test_an_optimizer_for_each_parameter(tiny):
    model = tiny()
    optimizers = [torch.optim.AdamW([p], lr=0.01) for p in model.parameters()]
    model.loss(0).backward()
    for optimizer in optimizers:
        optimizer.step()
    take_over(bs.find_blocks(model), optimizers, 2, 0)
    states = {id(p): o.state[p] for o in optimizers for p in o.param_groups[0]["params"]}
    old, new = model.blocks[0].inner.weight, model.blocks[2].inner.weight
    assert equal(states[id(new)], states[id(old)])
    assert states[id(new)]["exp_avg"] is not states[id(old)]["exp_avg"]


def test_what_is_frozen_for_good_is_copied_too(tiny):
    model = tiny()
    model.blocks[0].inner.weight.requires_grad_(False)
    model.blocks[2].inner.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    take_over(bs.find_blocks(model), [optimizer], 2, 0)
    assert torch.equal(model.blocks[2].inner.weight, model.blocks[0].inner.weight)


def test_the_source_may_have_more(tiny):
    """T5's first block holds the position bias that it hands on to all others."""
    model = tiny()
    model.blocks[0].position_bias = nn.Parameter(torch.ones(3))
    take_over(bs.find_blocks(model), [torch.optim.AdamW(model.parameters())], 2, 0)
    assert torch.equal(model.blocks[2].inner.weight, model.blocks[0].inner.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda block: setattr(block, "extra", nn.Parameter(torch.ones(3))), "extra is only in"),
        (lambda block: setattr(block, "inner", nn.Linear(8, 9)), r"inner\.weight is float32 \[9, "),
        (lambda block: block.inner.double(), r"float64 \[8, 8\] in the first, float32 \[8, 8\] in"),
        (lambda block: block.register_buffer("mask", torch.ones(2)), "mask is only in the first"),
    ],
)
def test_blocks_built_differently_are_refused_and_nothing_changes(tiny, change, message):
    model = tiny()
    change(model.blocks[2])
    optimizer = torch.optim.AdamW(model.parameters())
    before = copy.deepcopy(model.state_dict())
    match = rf"block 2 \(blocks\.2\) cannot take over block 0 \(blocks\.0\): .*{message}"
    with pytest.raises(ValueError, match=match):
        take_over(bs.find_blocks(model), [optimizer], 2, 0)
    assert equal(model.state_dict(), before)


def test_states_of_another_kind_are_refused_and_nothing_changes(tiny):
    model = tiny()
    low, rest = list(model.blocks[:2].parameters()), list(model.blocks[2:].parameters())
    optimizers = [torch.optim.SGD(low), bs.AdamW(rest)]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"block 2 \(blocks\.2\) is updated by AdamW, .* by SGD:"):
        take_over(bs.find_blocks(model), optimizers, 2, 0)
    assert equal(model.state_dict(), before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_after_beginning_anew_is_a_first_one(tiny, name):
    model, optimizer = made(tiny, name)
    for step in range(3):
        update(model, optimizer, step)
    other = copy.deepcopy(model)
    fresh = OPTIMIZERS[name](other.parameters())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        if "master_param" in optimizer.state[p]:  # weights, which are not to be rounded again
            fresh.state[q] = {"master_param": optimizer.state[p]["master_param"].clone()}
    kept = copy.deepcopy(part(model, optimizer, 2))
    begin_anew(bs.find_blocks(model), [optimizer], 1)
    assert equal(part(model, optimizer, 2), kept)
    update(model, optimizer, 3, (1,))
    update(other, fresh, 3, (1,))
    assert equal(part(model, optimizer, 1), part(other, fresh, 1))


def test_beginning_anew_before_any_update(tiny):
    model, optimizer = made(tiny, "AdamW")
    begin_anew(bs.find_blocks(model), [optimizer], 1)
    assert not optimizer.state
    update(model, optimizer, 0)
    assert optimizer.state[model.blocks[1].inner.weight]["step"] == 1


def test_a_block_that_ran_is_not_copied_over(tiny):
    model, optimizer = made(tiny, "AdamW")
    update(model, optimizer, 0)
    before = [copy.deepcopy(part(model, optimizer, i)) for i in range(4)]
    last = Plan((0, 1), running=(0, 1))
    transplant(bs.find_blocks(model), [optimizer], last, Plan((0, 1, 2, 3), sources=(1, 0, 0, 1)))
    for i, source in enumerate((0, 1, 0, 1)):
        assert equal(part(model, optimizer, i)["weights"], before[source]["weights"])
