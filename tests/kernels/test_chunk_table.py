"""The chunk table covers every number once, in the order that makes a suffix one launch."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksched.kernels import chunk_table
from blocksched.kernels.chunk_table import CHUNK, ChunkTable, TableCache, addresses, same_layout

CPU = torch.device("cpu")
tensors = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 5, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7]),
        st.sampled_from(["fp32", "bf16"]),
        st.integers(-1, 4),
    ),
    min_size=1,
    max_size=12,
)


def table_of(numels, kinds, blocks, n_blocks=4):
    return ChunkTable(numels, kinds, blocks, n_blocks, 2, CPU)


@given(tensors)
@settings(deadline=None)
def test_every_number_in_one_chunk_and_every_block_in_one_run_of_slots(spec):
    numels, kinds, blocks = zip(*spec, strict=True)
    table = table_of(numels, kinds, blocks)
    seen = {}
    slots = {}
    for tensor, part, count, slot in table.chunks.tolist():
        assert 0 < count <= CHUNK
        seen.setdefault(tensor, []).append((part * CHUNK, count))
        if 0 <= blocks[tensor] < 4:
            slots.setdefault(blocks[tensor], []).append(slot)
        else:
            assert slot == -1
    for tensor, numel in enumerate(numels):
        end = 0
        for start, count in sorted(seen.get(tensor, [])):
            assert start == end
            end += count
        assert end == numel
    bounds = table.bounds.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == table.n_slots
    for block in range(4):
        assert sorted(slots.get(block, [])) == list(range(bounds[block], bounds[block + 1]))


@given(tensors, st.integers(0, 4))
@settings(deadline=None)
def test_a_suffix_is_one_launch_a_dtype_whatever_the_boundary(spec, boundary):
    numels, kinds, blocks = zip(*spec, strict=True)
    table = table_of(numels, kinds, blocks)
    live = [block >= boundary for block in blocks]
    launches = table.launches(live)
    assert len(launches) == len({kind for _, kind, _ in launches_of(spec, live)})
    for kind, first, count in launches:
        covered = {tensor for tensor, *_ in table.chunks[first : first + count].tolist()}
        assert covered == {i for i, k, _ in launches_of(spec, live) if k == kind}


def launches_of(spec, live):
    return [(i, k, n) for i, (n, k, _) in enumerate(spec) if live[i] and n]


def test_sets_that_are_no_suffix_take_a_few_launches():
    numels = [CHUNK * 400] * 5
    table = table_of(numels, ["fp32"] * 5, range(5), 5)
    assert table.launches([True, False, True, True, False]) == [
        ("fp32", 0, 400), ("fp32", 800, 800),
    ]  # fmt: skip
    # A gap of few programs is bridged; they return at once.
    table = table_of([CHUNK, 10 * CHUNK, CHUNK], ["fp32"] * 3, range(3), 3)
    assert table.launches([True, False, True]) == [("fp32", 0, 12)]


def test_a_tensor_beyond_32_bits():
    table = table_of([5 * 2**30 + 3, 4], ["fp32"] * 2, [0, 1])
    last, after = table.chunks[-2:].tolist()
    assert last[1] * CHUNK + last[2] == 5 * 2**30 + 3
    assert after == [1, 0, 4, len(table.chunks) - 1]


@pytest.mark.triton
def test_addresses_are_written_when_they_change_and_only_then(device, monkeypatch):
    real, launched = chunk_table._poke, []

    class Counted:
        def __getitem__(self, grid):
            launched.append(grid)
            return real[grid]

    monkeypatch.setattr(chunk_table, "_poke", Counted())
    table = ChunkTable([4] * 40, ["fp32"] * 40, [0] * 40, 1, 3, device)
    first, second = [2**60 + i for i in range(40)], [0] * 39 + [7]
    for rows, want in (
        ([first, second, []], 6),
        ([list(first), list(second), []], 0),
        ([first, first, []], 3),
    ):
        launched.clear()
        pointers = table.write(rows)
        assert len(launched) == want
        assert pointers.tolist()[:2] == rows[:2]
    assert pointers[2].tolist() == [0] * 40


def test_the_table_is_kept_until_the_tensors_differ_or_are_gone():
    cache = TableCache()
    weights = [torch.zeros(4), torch.zeros(5)]
    arguments = [4, 5], ["fp32"] * 2, [0, 1], 2, 2, CPU
    table = cache.get(weights, *arguments)
    assert cache.get(weights, *arguments) is table
    assert cache.get(weights, [4, 5], ["bf16"] * 2, [0, 1], 2, 2, CPU) is not table
    del weights
    gc.collect()
    assert len(cache._tables) == 0


def test_layouts_are_made_the_same():
    dense = torch.arange(12.0).reshape(3, 4).t()
    like = torch.zeros(3, 4).t()
    gaps = torch.arange(24.0).reshape(4, 6)[:, ::2]
    plain = torch.ones(4, 3)
    (a, b), copy_back = same_layout([[dense, gaps, dense, plain], [like, plain, plain, dense]])
    assert a[0] is a[2] is dense
    assert b[0] is like
    assert a[1].is_contiguous()
    assert b[1] is a[3] is plain
    assert b[2].stride() == dense.stride()
    assert torch.equal(b[2], plain)
    assert b[3].is_contiguous()
    assert torch.equal(b[3], dense)
    a[1].fill_(5.0)
    b[2].fill_(6.0)
    b[3].fill_(7.0)
    copy_back([1])
    assert gaps[0, 0] == 0.0
    assert plain.eq(6.0).all()
    assert dense.eq(7.0).all()
    copy_back([0])
    assert gaps.eq(5.0).all()


def test_an_empty_tensor_is_no_missing_one():
    assert addresses([None, torch.zeros(0)])[0] == 0
    assert addresses([None, torch.zeros(0)])[1] != 0
