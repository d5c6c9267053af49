"""The rules that freezing has to keep; each assertion is on weights, moments or the graph."""

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn

from blocksched import find_blocks
from blocksched.mechanism import Mechanism


def train(model, optimizer, mechanism, active, step=0):
    """One step under a plan, checked as the scheduler checks it."""
    mechanism.apply(active)
    loss = model.loss(step)
    loss.backward()
    mechanism.check(range(len(mechanism.blocks)))
    optimizer.step()
    optimizer.zero_grad()
    mechanism.check_all()
    return loss


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(module, before):
    return {name for name, value in module.state_dict().items() if not value.equal(before[name])}


def all_adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize(
    "make_optimizer",
    [
        all_adamw,
        lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1, fused=True),
        lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1, foreach=True),
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
    ],
)
@pytest.mark.parametrize("active", [(0, 1, 2, 3), (1, 2, 3), (3,), (0, 2), (1, 3)])
def test_exactly_the_active_blocks_move(tiny, make_optimizer, active):
    model = tiny()
    optimizer = make_optimizer(model)
    mechanism = Mechanism(find_blocks(model))
    train(model, optimizer, mechanism, range(4))  # moments exist, so they could move weights
    before = snapshot(model)
    train(model, optimizer, mechanism, active, step=1)
    stem_and_head = {"head.weight"} | ({"embed.weight"} if 0 in active else set())
    blocks = {f"blocks.{i}.inner.{part}" for i in active for part in ("weight", "bias")}
    assert moved(model, before) == stem_and_head | blocks


def test_moments_and_step_count_of_a_frozen_block_are_kept(tiny):
    model = tiny()
    optimizer = all_adamw(model)
    mechanism = Mechanism(find_blocks(model))
    train(model, optimizer, mechanism, range(4))
    weight = model.blocks[0].inner.weight
    frozen = copy.deepcopy(optimizer.state[weight])
    for step in range(1, 4):
        train(model, optimizer, mechanism, (2, 3), step)
    assert all(torch.equal(frozen[key], optimizer.state[weight][key]) for key in frozen)
    train(model, optimizer, mechanism, range(4), 4)
    assert optimizer.state[weight]["step"].item() == 2
    assert optimizer.state[model.blocks[3].inner.weight]["step"].item() == 5


def test_applying_is_absolute_and_idempotent(tiny):
    model = tiny()
    mechanism = Mechanism(find_blocks(model))
    mechanism.apply((2, 3))
    model.requires_grad_(True)  # somebody else's toggle
    mechanism.apply((2, 3))
    flags = [p.requires_grad for p in model.blocks.parameters()]
    assert flags == [False] * 4 + [True] * 4
    assert not model.embed.weight.requires_grad
    mechanism.apply(range(4))
    assert all(p.requires_grad for p in model.parameters())


def test_optimizer_groups_are_never_edited(tiny):
    model = tiny()
    optimizer = all_adamw(model)
    groups = [list(map(id, group["params"])) for group in optimizer.param_groups]
    mechanism = Mechanism(find_blocks(model))
    for active in ((3,), (1, 2, 3), range(4)):
        train(model, optimizer, mechanism, active)
        assert [list(map(id, g["params"])) for g in optimizer.param_groups] == groups


def test_zero_grad_to_zero_does_not_make_frozen_weights_drift(tiny):
    model = tiny()
    optimizer = all_adamw(model)
    mechanism = Mechanism(find_blocks(model))
    train(model, optimizer, mechanism, range(4))
    before = snapshot(model.blocks[0])
    for step in range(3):
        mechanism.apply((3,))
        model.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert not moved(model.blocks[0], before)


def test_a_gradient_left_from_before_the_freeze_is_not_applied(tiny):
    model = tiny()
    optimizer = all_adamw(model)
    mechanism = Mechanism(find_blocks(model))
    train(model, optimizer, mechanism, range(4))
    model.loss(1).backward()
    before = snapshot(model)
    mechanism.apply((3,))
    optimizer.step()
    assert not [name for name in moved(model, before) if name.startswith(("blocks.0", "embed"))]


@pytest.mark.parametrize("tied", [False, True])
def test_backward_of_a_suffix_touches_no_prefix_module(tiny, tied):
    model = tiny(tied=tied)
    mechanism = Mechanism(find_blocks(model))
    mechanism.apply((2, 3))
    shapes = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, _a, out: shapes.append(out.requires_grad))
    model.loss(0).backward()
    assert shapes == [False, False, True, True]
    assert (model.embed.weight.grad is not None) == tied


def test_tied_weight_gets_the_heads_part_only(tiny):
    model = tiny(tied=True)
    mechanism = Mechanism(find_blocks(model))
    mechanism.apply((2, 3))
    model.loss(0).backward()
    by_hand = tiny(tied=True)
    by_hand.blocks[:2].requires_grad_(False)
    by_hand.blocks[0].register_forward_pre_hook(lambda _m, args: (args[0].detach(),))
    by_hand.loss(0).backward()
    assert torch.equal(model.head.weight.grad, by_hand.head.weight.grad)


def test_buffers_of_a_frozen_block_do_not_move_and_its_output_is_as_before(tiny):
    model, plain = tiny(norm=True), tiny(norm=True)
    mechanism = Mechanism(find_blocks(model))
    mechanism.apply((2, 3))
    before = snapshot(model)
    assert torch.equal(model.loss(0), plain.loss(0))
    changed = moved(model, before)
    assert changed == {
        f"blocks.{i}.norm.{name}"
        for i in (2, 3)
        for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    mechanism.apply(range(4))
    model.loss(1)
    assert moved(model.blocks[0], snapshot(plain.blocks[0])) >= {"norm.running_mean"}


def test_dropout_of_a_frozen_block_stays_as_the_user_set_it(tiny):
    model = tiny()
    model.blocks[0].norm = nn.Dropout(0.5)
    Mechanism(find_blocks(model)).apply((3,))
    first, second = model.loss(0), model.loss(0)
    assert not torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("active", [(3,), (1, 2, 3), (0, 1, 2, 3)])
def test_activation_checkpointing_gives_the_same_gradients(tiny, reentrant, active):
    model, plain = tiny(), tiny()
    model.reentrant = reentrant
    for each in (model, plain):
        Mechanism(find_blocks(each)).apply(active)
        each.loss(0).backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name
    assert model.blocks[3].inner.weight.grad is not None


def test_reentrant_checkpointing_of_a_trainable_input_is_refused(tiny):
    model = tiny()
    model.reentrant = True
    model.embed.register_forward_hook(lambda _m, _a, out: out.requires_grad_())
    Mechanism(find_blocks(model)).apply((3,))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model.loss(0)


def test_an_active_block_without_gradient_is_an_error_before_the_update(tiny):
    model = tiny()
    optimizer = all_adamw(model)
    mechanism = Mechanism(find_blocks(model))
    model.blocks[2].register_forward_hook(lambda _m, _a, out: out.detach())
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"block [12] \(blocks.[12]\) is active and ran but"):
        train(model, optimizer, mechanism, (1, 2, 3))
    assert not moved(model, before)


def test_a_gradient_that_backward_left_undefined_is_none(tiny):
    class Lost(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x, _weight, _bias):
            return x + 1.0

        @staticmethod
        def backward(_ctx, grad):
            return grad, None, None

    model = tiny()
    inner = model.blocks[2].inner
    inner.forward = lambda x: Lost.apply(x, inner.weight, inner.bias)
    with pytest.raises(RuntimeError, match=r"block 2 \(blocks.2\) is active and ran but"):
        train(model, all_adamw(model), Mechanism(find_blocks(model)), (1, 2, 3))


def test_a_block_that_did_not_run_needs_no_gradient(tiny):
    model = tiny()
    mechanism = Mechanism(find_blocks(model))
    model.blocks[2].forward = lambda x: x
    skipped = model.blocks[2]
    model.blocks._modules["2"] = nn.Identity()  # dropped for this forward
    train(model, all_adamw(model), mechanism, range(4))
    assert skipped.inner.weight.grad is None


def test_a_graph_built_before_the_freeze_gives_no_gradient(tiny):
    model = tiny()
    mechanism = Mechanism(find_blocks(model))
    mechanism.apply(range(4))
    loss = model.loss(0)
    mechanism.apply((3,))
    loss.backward()
    assert model.blocks[0].inner.weight.grad is None


def test_a_frozen_block_with_a_gradient_is_an_error(tiny):
    model = tiny()
    mechanism = Mechanism(find_blocks(model))
    mechanism.apply((0, 1, 3))
    model.requires_grad_(True)  # somebody else's toggle
    model.loss(0).backward()
    with pytest.raises(RuntimeError, match=r"block 2 \(blocks.2\) is frozen but got a gradient"):
        mechanism.check(range(4))


def test_a_prefix_made_trainable_by_somebody_else_still_gets_no_gradient(tiny):
    model = tiny()
    Mechanism(find_blocks(model)).apply((3,))
    model.requires_grad_(True)
    model.loss(0).backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got == {"blocks.3.inner.weight", "blocks.3.inner.bias", "head.weight"}


@pytest.mark.parametrize("where", ["stem", "block 1 (blocks.1)"])
def test_a_gradient_set_by_hand_is_an_error_at_any_step(tiny, where):
    model = tiny()
    optimizer = all_adamw(model)
    mechanism = Mechanism(find_blocks(model))
    for step in range(3):
        train(model, optimizer, mechanism, (3,), step)
    weight = model.embed.weight if where == "stem" else model.blocks[1].inner.weight
    weight.grad = torch.zeros_like(weight)
    with pytest.raises(RuntimeError, match=re.escape(f"{where} is frozen but got a gradient")):
        mechanism.check([1])


@pytest.mark.parametrize("late", ["added", "unfrozen"])
def test_a_parameter_that_became_trainable_later_is_an_error_where_it_would_stop(tiny, late):
    model = tiny()
    inner = model.blocks[1].inner
    inner.bias.requires_grad_(late == "added")
    mechanism = Mechanism(find_blocks(model))
    mechanism.apply((2, 3))
    if late == "added":
        inner.scale = nn.Parameter(torch.ones(8))
    else:
        inner.bias.requires_grad_(True)
    mechanism.apply((1, 2, 3))
    with pytest.raises(RuntimeError, match=r"blocks.1.inner.(scale|bias) became trainable after"):
        mechanism.apply((3,))


def test_a_head_registered_before_the_blocks_is_named(tiny):
    model = tiny()
    parts = dict(model.named_children())
    model._modules.clear()
    model._modules.update(embed=parts["embed"], head=parts["head"], blocks=parts["blocks"])
    mechanism = Mechanism(find_blocks(model))
    with pytest.raises(RuntimeError, match=r"head is registered before the blocks.*stem="):
        train(model, all_adamw(model), mechanism, (3,))
    mechanism.close()
    mechanism = Mechanism(find_blocks(model, stem=["embed"]))
    for step in range(2):
        train(model, all_adamw(model), mechanism, (3,), step)


def test_copies_and_pickles_behave_as_the_plain_model(tiny):
    model = tiny()
    mechanism = Mechanism(find_blocks(model))
    mechanism.apply((3,))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ]
    for twin in copies:
        twin.requires_grad_(True)
        twin.loss(0).backward()
        assert all(p.grad is not None for p in twin.parameters())
    train(model, all_adamw(model), mechanism, (3,))
    assert model.blocks[0].inner.weight.grad is None


def test_evaluation_is_left_alone(tiny):
    model = tiny()
    Mechanism(find_blocks(model)).apply((3,))
    model.eval()
    x = torch.randn(2, 8, requires_grad=True)
    model.blocks[0](x).sum().backward()
    assert x.grad is not None


def test_close_leaves_the_model_as_it_was_found(tiny):
    model = tiny(norm=True)
    model.blocks[1].requires_grad_(False)
    mechanism = Mechanism(find_blocks(model))
    mechanism.apply((3,))
    mechanism.close()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(flag != name.startswith("blocks.1") for name, flag in flags.items())
    assert all(block.norm.track_running_stats for block in model.blocks)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_blocks_compiled_one_by_one_need_three_graphs_for_any_boundary(tiny):
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    model, plain = tiny(n=4), tiny(n=4)
    mechanism, reference = Mechanism(find_blocks(model)), Mechanism(find_blocks(plain))
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend=count, dynamic=False)
    optimizer, other = all_adamw(model), all_adamw(plain)
    order = [(0, 1, 2, 3), (3,), (1, 2, 3), (2, 3), (0, 1, 2, 3), (1, 2, 3), (3,)]
    for step, active in enumerate(order):
        train(model, optimizer, mechanism, active, step)
        train(plain, other, reference, active, step)
    assert not moved(model, snapshot(plain))
    per_block = len(graphs) / 4
    assert per_block <= 3
