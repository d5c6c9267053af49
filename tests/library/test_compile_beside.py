"""compile_blocks beside hooks, copies and the watch, and what is refused."""

import copy
import pickle
import types

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from blocksched import BlockScheduler, FullUpdate, StaticSuffix, compile_blocks

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.usefixtures("fresh_compiler"),
]


def one_step(model, optimizer, scheduler):
    loss = model.loss(0)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step(loss)


@pytest.mark.parametrize("first", ["compile", "scheduler"])
def test_hooks_stay_outside_in_either_order(first, tiny):
    """The watch sees each block, the prefix is cut off, and a moved boundary compiles nothing."""
    model = tiny(tied=True)
    counter = CompileCounter()
    seen = []
    if first == "compile":
        compile_blocks(model, backend=counter, fullgraph=True)
        model.loss(0).backward()
        model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = BlockScheduler(model, optimizer, StaticSuffix(active=2), total_steps=9)
    if first == "scheduler":
        compile_blocks(model, backend=counter, fullgraph=True)
    for block in model.blocks:
        block.register_forward_hook(
            lambda *of: seen.append((torch.compiler.is_compiling(), of[-1].requires_grad))
        )
    one_step(model, optimizer, scheduler)
    assert seen == [(False, False)] * 2 + [(False, True)] * 2
    assert counter.frame_count <= 3


def test_a_compiled_layer_that_does_not_train_is_an_error_before_the_update(tiny):
    """A back end that loses the graph of block 2."""
    model = tiny()

    def loses(graph, _inputs):
        return lambda *args: tuple(out.detach() for out in graph(*args))

    compile_blocks(model, blocks=[model.blocks[2]], backend=loses)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = BlockScheduler(model, optimizer, StaticSuffix(active=1), total_steps=9)
    one_step(model, optimizer, scheduler)  # block 2 is frozen
    scheduler.close()
    BlockScheduler(model, optimizer, StaticSuffix(active=3), total_steps=9)
    before = copy.deepcopy(model.state_dict())
    model.loss(1).backward()
    with pytest.raises(RuntimeError, match=r"block [12] .* is active and ran but got no gradient"):
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_copy_computes_with_its_own_weights_and_a_pickle_is_plain(tiny):
    model = tiny()
    counter = CompileCounter()
    compile_blocks(model, backend=counter)
    want = model.loss(0)
    twin, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        model.blocks[3].inner.weight.zero_()
    assert not torch.equal(model.loss(0), want)
    assert torch.equal(twin.loss(0), want)
    torch.compiler.reset()
    compiled = counter.frame_count
    assert torch.equal(loaded.loss(0), want)
    assert counter.frame_count == compiled
    compile_blocks(loaded, backend=counter)
    loaded.loss(0)
    assert counter.frame_count == compiled + 1


def test_compiling_again_replaces_the_options_and_another_models_graphs_serve(tiny):
    model, other = tiny(), tiny()
    first, second = CompileCounter(), CompileCounter()
    compile_blocks(model, backend=first)
    compile_blocks(model, backend=second)
    compile_blocks(other, backend=second)
    model.loss(0)
    other.loss(1)
    assert (first.frame_count, second.frame_count) == (0, 1)


def test_what_cannot_be_compiled_is_refused(tiny):
    model = tiny()
    model.blocks[2].forward = lambda x: x
    with pytest.raises(ValueError, match=r"forward of block blocks.2 was replaced.*before"):
        compile_blocks(model)
    assert "forward" not in vars(model.blocks[0])
    cached = tiny()
    cached.config = types.SimpleNamespace(use_cache=True)
    with pytest.raises(ValueError, match=r"set model.config.use_cache = False"):
        compile_blocks(cached)


@pytest.mark.parametrize("how", ["model.compile()", "torch.compile(model)", "a compiled loss"])
def test_a_whole_model_compiled_after_the_scheduler_was_built_is_refused(how, tiny):
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = BlockScheduler(model, optimizer, StaticSuffix(active=2), total_steps=9)
    called, loss = model, nn.functional.cross_entropy
    if how == "model.compile()":
        model.compile(backend="eager")
    elif how == "torch.compile(model)":
        called = torch.compile(model, backend="eager")

    def closure():
        x = torch.arange(6)
        return loss(called(x), x)

    if how == "a compiled loss":
        closure = torch.compile(closure, backend="eager")
    value = closure()
    value.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"compiled as a whole.*blocksched.compile_blocks"):
        scheduler.step(value)


def test_a_compiled_container_of_the_blocks_is_refused(tiny):
    outer = nn.Module()
    outer.inner, outer.head = tiny(), nn.Linear(16, 16)
    optimizer = torch.optim.SGD(outer.parameters(), lr=0.1)
    outer.head.compile(backend="eager")
    for block in outer.inner.blocks:
        block.compile(backend="eager")
    BlockScheduler(outer, optimizer, FullUpdate(), total_steps=9).close()
    outer.inner.compile(backend="eager")
    with pytest.raises(ValueError, match=r"^inner is compiled as a whole.*compile each block"):
        BlockScheduler(outer, optimizer, FullUpdate(), total_steps=9)
