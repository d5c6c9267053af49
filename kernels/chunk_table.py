"""The chunk table: many tensors as one list of equal chunks, so that one launch serves them all.

A tensor of n numbers is cut into ceil(n / CHUNK) chunks, and a program of a kernel does one chunk.
Two device arrays say where:

    chunks    int32 [chunks, 4]      tensor, its part number, how many numbers, slot of its sums
    pointers  int64 [rows, tensors]  addresses: a row for parameters, one for gradients, ...

Chunks are ordered by dtype, then by block, so that the active suffix is one contiguous range of a
launch; slots by block alone, so that a block's partial sums lie together and are added in an order
that depends on nothing else. `chunks` depends on sizes and blocks only. `pointers` is written again
row by row, when an address has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from blocksched.kernels.jit import LAUNCH, jit, tl

CHUNK = 8192  # numbers a program; its 12 bytes of partial sums are then nothing beside them
_THREADS = 128  # of 4 warps; each takes 16 bytes at a time
_BRIDGE = 256  # idle programs in a row that cost less than a launch of their own
_WORDS = 16  # addresses a launch of _poke writes
_CAPTURED: list[ChunkTable] = []  # a CUDA graph reads its table as long as it may be replayed


class ChunkTable:
    """See the top of the file.

    Args:
        numels: size of each tensor.
        kinds: what a launch has to have in common, one for each tensor (its dtypes).
        blocks: block of each tensor, 0 .. n_blocks - 1; any other number belongs to no block.
        n_blocks: number of blocks.
        rows: rows of `pointers`.
        device: where the arrays live.
    """

    def __init__(
        self,
        numels: Sequence[int],
        kinds: Sequence[Hashable],
        blocks: Sequence[int],
        n_blocks: int,
        rows: int,
        device: torch.device,
    ) -> None:
        ranks = {kind: rank for rank, kind in enumerate(dict.fromkeys(kinds))}
        order = sorted(range(len(numels)), key=lambda i: (ranks[kinds[i]], blocks[i]))
        parts = np.array([-(-numels[i] // CHUNK) for i in order], dtype=np.int64)
        ends = np.cumsum(parts)
        self._ranges = {
            i: range(int(end - n), int(end)) for i, n, end in zip(order, parts, ends, strict=True)
        }
        self._members = {kind: [i for i in order if kinds[i] == kind] for kind in ranks}
        self.n_tensors = len(numels)
        rows_of = np.zeros((int(parts.sum()), 4), dtype=np.int32)
        rows_of[:, 0] = np.repeat(order, parts)
        rows_of[:, 1] = np.arange(len(rows_of)) - np.repeat(ends - parts, parts)
        left = np.repeat([numels[i] for i in order], parts) - rows_of[:, 1].astype(np.int64) * CHUNK
        rows_of[:, 2] = np.minimum(left, CHUNK)
        of_block = np.repeat([blocks[i] for i in order], parts)
        by_block = np.argsort(of_block, kind="stable")
        by_block = by_block[(of_block[by_block] >= 0) & (of_block[by_block] < n_blocks)]
        rows_of[:, 3] = -1
        rows_of[by_block, 3] = np.arange(len(by_block))
        bounds = np.searchsorted(of_block[by_block], np.arange(n_blocks + 1)).astype(np.int32)
        self.n_slots = len(by_block)
        self.chunks = torch.from_numpy(rows_of).to(device)
        self.bounds = torch.from_numpy(bounds).to(device)
        self.pointers = torch.zeros(rows, self.n_tensors, dtype=torch.int64, device=device)
        self._written: list[list[int] | None] = [None] * rows

    def write(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """`pointers` brought up to date. `rows` are lists of integers, an empty one is left alone.

        A CUDA graph gets an array of its own, written in the graph, for others write this one.
        """
        pointers, written = self.pointers, self._written
        if pointers.is_cuda and torch.cuda.is_current_stream_capturing():
            pointers, written = torch.zeros_like(pointers), [None] * len(rows)
            _CAPTURED.append(self)
        for r, row in enumerate(rows):
            if len(row) and row != written[r]:
                written[r] = list(row)
                for start in range(0, len(row), _WORDS):
                    words = list(row[start : start + _WORDS])
                    words += [0] * (_WORDS - len(words))
                    at = r * self.n_tensors + start
                    _poke[(1,)](pointers, at, len(row) - start, *words, **LAUNCH)
        return pointers

    def launches(self, live: Sequence[bool]) -> list[tuple[Any, int, int]]:
        """(kind, first chunk, number of chunks) of the launches that cover the live tensors."""
        found = []
        for kind, members in self._members.items():
            runs: list[list[int]] = []
            for chunks in (self._ranges[i] for i in members if live[i] and self._ranges[i]):
                if runs and chunks.start - runs[-1][1] <= _BRIDGE:
                    runs[-1][1] = chunks.stop
                else:
                    runs.append([chunks.start, chunks.stop])
            found += [(kind, first, stop - first) for first, stop in runs]
        return found


class TableCache:
    """One table for each list of tensors, kept as long as the list's first tensor lives."""

    def __init__(self) -> None:
        self._tables = WeakIdKeyDictionary()

    def get(self, tensors: Sequence[Tensor], *arguments: Any) -> ChunkTable:
        """The ChunkTable of these `arguments`, built unless the last one for `tensors` will do."""
        kept = self._tables.get(tensors[0])
        if kept is None or kept[0] != arguments:
            if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "the first step over a set of gradients cannot be captured: run one step "
                    "before torch.cuda.graph, as its warm-up does"
                )
            kept = self._tables[tensors[0]] = arguments, ChunkTable(*arguments)
        table: ChunkTable = kept[1]
        return table


def tile(*dtypes: torch.dtype) -> int:
    """How many numbers a program takes at a time: 16 bytes a thread of the narrowest dtype."""
    return _THREADS * 16 // min(dtype.itemsize for dtype in dtypes)


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Where each tensor lies; 0 for None. An empty tensor has no address and gets one of no use."""
    return [0 if t is None else t.data_ptr() or 16 for t in tensors]


def same_layout(
    columns: Sequence[Sequence[Tensor | None]],
) -> tuple[list[list[Tensor | None]], Callable[[Sequence[int]], None]]:
    """`columns` such that the tensors at one index lie in memory in the same order, without gaps.

    That is the order of the first column.

    Args:
        columns: lists of tensors; those at one index have the same shape. A list may be empty.

    Returns:
        The lists, with copies where that was needed, and a function that copies those of the
        columns it is given back into the tensors they were made from.
    """
    same = [list(column) for column in columns]
    if all(map(Tensor.is_contiguous, (t for column in same for t in column if t is not None))):
        return same, lambda _: None
    copied: list[tuple[int, Tensor, Tensor]] = []
    for i in range(len(columns[0])):
        tensors = {c: t for c, column in enumerate(same) if column and (t := column[i]) is not None}
        if all(t.is_contiguous() for t in tensors.values()) or _one_dense_order(tensors.values()):
            continue
        strides = dense_strides(tensors[0])
        for c, tensor in tensors.items():
            if tensor.stride() != strides:
                same[c][i] = copy = tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)
                copied.append((c, tensor, copy))

    def copy_back(written: Sequence[int]) -> None:
        for c, tensor, copy in copied:
            if c in written:
                tensor.copy_(copy)

    return same, copy_back


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Those of `tensor`, or contiguous ones where it has gaps."""
    if torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return tensor.stride()
    return torch.empty(tensor.shape, device="meta").stride()


def _one_dense_order(tensors: Any) -> bool:
    strides = {t.stride() for t in tensors}
    return len(strides) == 1 and all(t.stride() == dense_strides(t) for t in tensors)


@jit()
def typed(address: tl.tensor, dtype: tl.constexpr, aligned: tl.constexpr) -> tl.tensor:
    """An address as a pointer; the hint that makes loads 16 bytes wide is lost before the cast."""
    pointer = address.to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if aligned else pointer


@jit("at", "count", *(f"w{i}" for i in range(_WORDS)))
def _poke(
    out: tl.tensor,
    at: tl.tensor,
    count: tl.tensor,
    w0: tl.int64,
    w1: tl.int64,
    w2: tl.int64,
    w3: tl.int64,
    w4: tl.int64,
    w5: tl.int64,
    w6: tl.int64,
    w7: tl.int64,
    w8: tl.int64,
    w9: tl.int64,
    w10: tl.int64,
    w11: tl.int64,
    w12: tl.int64,
    w13: tl.int64,
    w14: tl.int64,
    w15: tl.int64,
) -> None:
    """out[at : at + count] = words. Arguments, not a copy from pinned memory, since a CUDA graph
    would have to keep that alive (pytorch#146924)."""
    out += at
    tl.store(out + 0, w0, mask=count > 0)
    tl.store(out + 1, w1, mask=count > 1)
    tl.store(out + 2, w2, mask=count > 2)
    tl.store(out + 3, w3, mask=count > 3)
    tl.store(out + 4, w4, mask=count > 4)
    tl.store(out + 5, w5, mask=count > 5)
    tl.store(out + 6, w6, mask=count > 6)
    tl.store(out + 7, w7, mask=count > 7)
    tl.store(out + 8, w8, mask=count > 8)
    tl.store(out + 9, w9, mask=count > 9)
    tl.store(out + 10, w10, mask=count > 10)
    tl.store(out + 11, w11, mask=count > 11)
    tl.store(out + 12, w12, mask=count > 12)
    tl.store(out + 13, w13, mask=count > 13)
    tl.store(out + 14, w14, mask=count > 14)
    tl.store(out + 15, w15, mask=count > 15)
