"""Active sets with holes beside compiled blocks and the cache of the frozen prefix."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import blocksched.cache
from blocksched import BlockScheduler, FusedMLP, PrefixCache, compile_blocks
from tests.library.holes import Stack, Walk, adamw, build, same, train


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", ["plain", "norm", "tied", "fused"])
def test_compiled_blocks_need_one_more_graph(tiny, kind):
    """Four: in the prefix, first active, active above it, frozen above it."""
    runs, counter = [], CompileCounterWithBackend("aot_eager")
    for compiled in (True, False):
        torch.manual_seed(0)
        if kind == "fused":
            model = Stack(lambda: FusedMLP(8))
        else:
            model = tiny(norm=kind == "norm", tied=kind == "tied")
        if compiled:
            compile_blocks(model, backend=counter, fullgraph=True)
        runs.append(train(model, *build(model), range(20)))
    assert same(runs)
    assert counter.frame_count == 4


@pytest.mark.parametrize("norm", [False, True])
def test_the_prefix_cache_skips_what_is_below_the_lowest_active_block(tiny, monkeypatch, norm):
    monkeypatch.setattr(blocksched.cache, "_SAMPLES", 10**6)  # its times never decide
    runs, cache, skipped = [], PrefixCache(1 << 20), []
    stops = 6 * (((1, 3), None),) + 3 * (((2,), None),) + 6 * (((2,), False),)
    for kept in (cache, None):
        model = tiny(norm=norm)
        optimizer = adamw(model)
        scheduler = BlockScheduler(model, optimizer, Walk(stops), total_steps=15, cache=kept)
        if kept is not None:
            model.blocks[1].inner.forward = counted(model.blocks[1].inner, skipped)
        runs.append(train(model, optimizer, scheduler, range(15)))
    assert same(runs)
    assert cache.off is None
    assert (cache.hits, cache.misses, len(skipped)) == (12, 3, 9)


def counted(linear, calls):
    forward = linear.forward

    def count(x):
        calls.append(x)
        return forward(x)

    return count


def test_the_prefix_cache_where_the_set_and_the_stem_change(tiny, monkeypatch):
    monkeypatch.setattr(blocksched.cache, "_SAMPLES", 10**6)
    runs, cache = [], PrefixCache(1 << 20)
    for kept in (cache, None):
        model = tiny()
        runs.append(train(model, *build(model, steps=40, cache=kept), range(40), batches=1))
    assert same(runs)
    assert cache.hits == 11
