"""What freezing must not do to real models; most of it would happen without a word."""

import copy

import pytest
import torch
from torch.utils._pytree import tree_leaves

import blocksched as bs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def schedule(case, model, optimizer, rule):
    return bs.BlockScheduler(model, optimizer, rule, total_steps=9, blocks=case.argument)


def freeze(case, model):
    """Freeze all but the last block."""
    return schedule(case, model, adamw(model), bs.StaticSuffix(active=1))


def outputs_before(model, block):
    """Fills up, in a forward, with what all modules return before `block` runs."""
    outputs, reached = [], []
    block.register_forward_pre_hook(lambda _m, _a: reached.append(True))

    def record(_module, _args, output):
        if not reached:
            outputs.extend(t for t in tree_leaves(output) if torch.is_tensor(t))

    for module in model.modules():
        module.register_forward_hook(record)
    return outputs


def graph(loss):
    """Every node that backward from `loss` runs."""
    found, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [before for before, _ in node.next_functions]
    return found


@pytest.mark.parametrize("scheduled", [True, False])
def test_backward_of_a_suffix_touches_no_module_of_prefix_or_stem(case, scheduled):
    model = case.make()
    blocks = model.get_submodule(case.blocks)
    if scheduled:
        freeze(case, model)
    outputs = outputs_before(model, blocks[-1])
    touched = graph(case.loss_at(model, 0))
    assert len(outputs) > len(blocks)
    assert scheduled != any(output.grad_fn in touched for output in outputs)


def test_the_prefix_runs_without_a_graph(case):
    model = case.make()
    freeze(case, model)
    traced = []
    for block in model.get_submodule(case.blocks)[:-1]:
        for module in block.modules():
            module.register_forward_hook(
                lambda _m, _a, out: traced.append(
                    any(t.requires_grad for t in tree_leaves(out) if torch.is_tensor(t))
                )
            )
    case.loss_at(model, 0)
    assert traced
    assert not any(traced)


def test_a_copy_of_a_frozen_model_trains_as_the_plain_one(case):
    model, plain = case.make(), case.make()
    freeze(case, model)
    case.loss_at(model, 0)
    twin = copy.deepcopy(model)
    twin.load_state_dict(plain.state_dict())  # the statistics of one forward
    for ours, theirs in zip(twin.parameters(), plain.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
    for each in (twin, plain):
        case.loss_at(each, 1).backward()
    for (name, ours), theirs in zip(twin.named_parameters(), plain.parameters(), strict=True):
        same = ours.grad is None if theirs.grad is None else torch.equal(ours.grad, theirs.grad)
        assert same, name
    for (name, ours), theirs in zip(twin.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert not any(p.grad is not None for p in model.parameters())


def test_zero_grad_to_zero_leaves_what_is_frozen_where_it_is(case):
    model = case.make()
    optimizer = adamw(model)
    names = {id(p): name for name, p in model.named_parameters()}
    for rule in (bs.FullUpdate(), bs.StaticSuffix(active=1)):
        scheduler = schedule(case, model, optimizer, rule)
        before = {name: p.clone() for name, p in model.named_parameters()}
        for step in range(3):
            loss = case.loss_at(model, step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            scheduler.step(loss)
        scheduler.close()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    frozen = [p for block in scheduler.blocks.parameters[:-1] for p in block]
    still = {names[id(p)] for p in (*frozen, *scheduler.blocks.stem)}
    assert not moved & (still | {"positions", "pos_embed", "cls_token"})
    assert moved >= {names[id(p)] for p in scheduler.blocks.parameters[-1]}


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5-decoder", "bert"])
@pytest.mark.parametrize("inputs", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(cases, name, inputs):
    case = cases[name]
    model, plain = case.make(), case.make()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = plain.config.use_cache = False
    if inputs:
        model.enable_input_require_grads()
    for each in (model, plain):
        freeze(case, each)
    outputs = outputs_before(model, model.get_submodule(case.blocks)[-1])
    loss = case.loss_at(model, 0)
    touched = graph(loss)
    assert not any(output.grad_fn in touched for output in outputs)
    loss.backward()
    case.loss_at(plain, 0).backward()
    for (key, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), key
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), key


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5-decoder", "bert"])
def test_reentrant_checkpointing_is_refused_before_the_update(cases, name):
    case = cases[name]
    model = case.make()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.config.use_cache = False
    optimizer = adamw(model)
    schedule(case, model, optimizer, bs.StaticSuffix(active=1))
    before = copy.deepcopy(model.state_dict())
    case.loss_at(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"use_reentrant=False"):
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["lora-gpt2", "lora-bert"])
def test_what_peft_froze_stays_frozen_for_good(cases, name):
    case = cases[name]
    model = case.make()
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = adamw(model)
    rule = bs.DynamicSuffix(min_active=1, warmup_steps=0, probe_every=2, freeze_start_frac=0.0)
    scheduler = schedule(case, model, optimizer, rule)
    for step in range(6):
        loss = case.loss_at(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(loss)
    scheduler.close()
    assert {key for key, p in model.named_parameters() if p.requires_grad} == trainable
    moved = {k for k, value in model.state_dict().items() if not torch.equal(value, before[k])}
    assert moved <= trainable
    assert len(moved) > len(trainable) // 2


def test_t5_as_a_whole_is_not_guessed_at(cases):
    model = cases["t5-decoder"].make()
    with pytest.raises(ValueError, match=r"encoder.block \(3\), decoder.block \(3\)"):
        bs.find_blocks(model)
