"""Per-block sums: for block b over its tensors, sum |g p|, sum g^2 and sum p^2.

They are all that relevance needs, and small: three numbers a block. A program sums one chunk into a
slot of its own, and one program a block adds the slots in order, so that no result depends on which
program came first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blocksched.kernels.chunk_table import (
    CHUNK,
    ChunkTable,
    TableCache,
    addresses,
    same_layout,
    tile,
    typed,
)
from blocksched.kernels.jit import LAUNCH, TRITON_DTYPES, jit, tl

_COMBINE = 1024  # slots at a time
_ROW = 4096  # terms that the reference adds in the precision of the products
_TABLES = TableCache()


def block_sums_ref(
    params: Sequence[Tensor], grads: Sequence[Tensor | None], blocks: Sequence[int], n_blocks: int
) -> Tensor:
    """The sums of each block's parameters and gradients, in eager torch.

    Args:
        params: of any shape, strides and real floating dtype.
        grads: the gradient of each, of its shape; None counts 0.
        blocks: the block of each, 0 .. n_blocks - 1; any other number is left out.
        n_blocks: how many blocks.

    Returns:
        Tensor [n_blocks, 3] in float64, on the device of the first parameter: sum |g p|, sum g^2,
        sum p^2. Products and sums of 4096 of them are taken in float32 or wider, the rest of the
        sum in float64.
    """
    device = params[0].device if params else torch.device("cpu")
    sums = torch.zeros(n_blocks, 3, dtype=torch.float64, device=device)
    for param, grad, block in zip(params, grads, blocks, strict=True):
        if 0 <= block < n_blocks:
            sums[block] += tensor_sums_ref(param, grad).to(device)
    return sums


@torch.no_grad()
def tensor_sums_ref(param: Tensor, grad: Tensor | None) -> Tensor:
    """The three sums of one tensor, float64 [3]."""
    p = _at_least_float32(param)
    gp = g2 = torch.zeros((), dtype=torch.float64, device=p.device)
    if grad is not None:
        g = _at_least_float32(grad)
        gp, g2 = _total((g * p).abs_()), _total(g.square())
    return torch.stack([gp, g2, _total(p.square())])


def _total(terms: Tensor) -> Tensor:
    """The sum in float64; all in float64 takes a CPU 4 to 6 times as long."""
    whole = terms.numel() // _ROW * _ROW
    if not whole:
        return terms.sum(dtype=torch.float64)
    flat = terms.reshape(-1)
    rows = flat[:whole].view(-1, _ROW).sum(1)
    return rows.sum(dtype=torch.float64) + flat[whole:].sum(dtype=torch.float64)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


@jit()
def add_sums(
    p: tl.tensor, g: tl.tensor, gp: tl.tensor, g2: tl.tensor, p2: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The running sums of each lane, with the numbers of one more tile."""
    return gp + tl.abs(g * p), g2 + g * g, p2 + p * p


@jit()
def store_sums(
    partials: tl.tensor, slot: tl.tensor, gp: tl.tensor, g2: tl.tensor, p2: tl.tensor
) -> None:
    """Sum the lanes and write a chunk's partial sums; those of no block have slot -1."""
    out = partials + slot.to(tl.int64) * 3
    tl.store(out, tl.sum(gp), mask=slot >= 0)
    tl.store(out + 1, tl.sum(g2), mask=slot >= 0)
    tl.store(out + 2, tl.sum(p2), mask=slot >= 0)


@jit()
def _sum_chunk(
    p_address: tl.tensor,
    g_address: tl.tensor,
    count: tl.tensor,
    dtype: tl.constexpr,
    aligned: tl.constexpr,
    tile: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    p_ptr = typed(p_address, dtype, aligned)
    g_ptr = typed(g_address, dtype, aligned)
    if aligned:
        count = count // 16 * 16  # a hint on an argument is lost when the call is inlined
    g_count = tl.where(g_address == 0, 0, count)
    gp = tl.zeros((tile,), tl.float32)
    g2 = tl.zeros((tile,), tl.float32)
    p2 = tl.zeros((tile,), tl.float32)
    for start in range(0, count, tile):
        at = start + tl.arange(0, tile)
        p = tl.load(p_ptr + at, mask=at < count, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + at, mask=at < g_count, other=0.0).to(tl.float32)
        gp, g2, p2 = add_sums(p, g, gp, g2, p2)
    return gp, g2, p2


@jit("first", "n_tensors")
def _block_sums_kernel(
    chunks: tl.tensor,
    pointers: tl.tensor,
    partials: tl.tensor,
    first: tl.tensor,
    n_tensors: tl.tensor,
    dtype: tl.constexpr,
    chunk: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    row = chunks + (first + tl.program_id(0)).to(tl.int64) * 4
    tensor, part, count, slot = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    offset = part.to(tl.int64) * (chunk * dtype.primitive_bitwidth // 8)
    p = tl.load(pointers + tensor) + offset
    g = tl.load(pointers + n_tensors + tensor)
    g = tl.where(g == 0, g, g + offset)
    if ((p | g) % 16 == 0) & (count % 16 == 0):
        gp, g2, p2 = _sum_chunk(p, g, count, dtype, True, tile)
    else:
        gp, g2, p2 = _sum_chunk(p, g, count, dtype, False, tile)
    store_sums(partials, slot, gp, g2, p2)


@jit()
def _combine_kernel(
    partials: tl.tensor,
    bounds: tl.tensor,
    found_inf: tl.tensor,
    sums: tl.tensor,
    has_found_inf: tl.constexpr,
    width: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    begin, end = tl.load(bounds + block), tl.load(bounds + block + 1)
    for i in tl.static_range(3):
        lanes = tl.zeros((width,), tl.float32)
        for start in range(begin, end, width):
            at = start + tl.arange(0, width)
            lanes += tl.load(partials + at.to(tl.int64) * 3 + i, mask=at < end, other=0.0)
        total = tl.sum(lanes)
        if has_found_inf:
            total = tl.where(tl.load(found_inf) != 0.0, float("nan"), total)
        tl.store(sums + block * 3 + i, total)


def combine(partials: Tensor, table: ChunkTable, found_inf: Tensor | None = None) -> Tensor:
    """Partial sums [slots, 3] -> float32 [n_blocks, 3]; NaN if found_inf is not 0."""
    n_blocks = len(table.bounds) - 1
    sums = torch.empty(n_blocks, 3, dtype=torch.float32, device=partials.device)
    if n_blocks:
        marker = partials if found_inf is None else found_inf
        _combine_kernel[(n_blocks,)](
            partials, table.bounds, marker, sums, found_inf is not None, _COMBINE, **LAUNCH
        )
    return sums


@torch.no_grad()
def block_sums(
    params: Sequence[Tensor], grads: Sequence[Tensor | None], blocks: Sequence[int], n_blocks: int
) -> Tensor:
    """block_sums_ref in one launch for each dtype and one that combines, in float32.

    Parameters of float32, bfloat16 or float16 on one device; a gradient has its parameter's dtype.
    """
    if not params:
        return torch.zeros(n_blocks, 3)
    device = params[0].device
    table = _TABLES.get(
        params, [p.numel() for p in params], [p.dtype for p in params], list(blocks), n_blocks,
        2, device,
    )  # fmt: skip
    (p, g), _ = same_layout([params, grads])
    pointers = table.write([addresses(p), addresses(g)])
    partials = torch.empty(table.n_slots, 3, dtype=torch.float32, device=device)
    for dtype, first, count in table.launches([True] * len(params)):
        _block_sums_kernel[(count,)](
            table.chunks, pointers, partials, first, table.n_tensors,
            TRITON_DTYPES[dtype], CHUNK, tile(dtype), **LAUNCH,
        )  # fmt: skip
    return combine(partials, table)
