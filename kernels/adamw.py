"""AdamW with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), one pass.

For each parameter p with gradient g, all of one shape, and its own step count t:

    t <- t + 1
    p <- p (1 - lr wd)
    m <- m + (g - m) (1 - b1)
    v <- b2 v + (1 - b2) g^2            (amsgrad: x <- max(x, v), and x for v below)
    p <- p - lr / (1 - b1^t)  m / (sqrt(v) / sqrt(1 - b2^t) + eps)

g is divided by grad_scale and negated by maximize first; nothing at all changes where found_inf is
not 0 or the gradient is None. The arithmetic is float32 whatever the dtypes, in the order of
torch.optim.AdamW, so that a float32 step is the same to the last bit given the same step size.

Bytes moved a parameter: 28 in float32 (p, m, v read and written, g read), 22 with p and g in
bfloat16, 14 with m and v too. The sums of block_sums ride along: g and p are read anyway.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from blocksched.kernels.block_sums import add_sums, combine, store_sums, tensor_sums_ref
from blocksched.kernels.chunk_table import (
    CHUNK,
    TableCache,
    addresses,
    dense_strides,
    same_layout,
    tile,
    typed,
)
from blocksched.kernels.jit import LAUNCH, TRITON_DTYPES, jit, tl
from blocksched.kernels.rounding import (
    random_bits,
    random_bits_ref,
    round_ref,
    round_stochastic,
)

_ROWS = 8  # of the table's pointers: p, g, m, v, x, master, step, seed
_LANES = 128  # tensors a program of _advance_kernel
_TABLES = TableCache()


@torch.no_grad()
def adamw_ref(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    weight_decay: float,
    eps: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    seeds: Sequence[int],
    blocks: Sequence[int],
    n_blocks: int,
    sums: bool,
) -> Tensor:
    """One AdamW step in place, in eager torch; the sums are those before it.

    Args:
        params: float32, bfloat16, float16 or (here only) float64, any shape and strides.
        grads: of their parameter's shape and dtype; None freezes the parameter.
        exp_avgs, exp_avg_sqs: the moments m and v, of the parameter's shape; float32 (float64 for
            float64), or bfloat16, rounded stochastically.
        max_exp_avg_sqs: the amsgrad maxima x, float32 (float64 for float64); empty: no amsgrad.
        masters: float32 weights behind lower precision parameters; empty: none.
        steps: step counts t, float32 scalars on any device.
        lr, beta1, beta2: scalars; on the CPU for plain numbers.
        weight_decay, eps, maximize: as torch.optim.AdamW.
        grad_scale: the gradients are this times too large; scalar, None: 1.
        found_inf: not 0: skip the step; its sums are NaN. Scalar, None: 0.
        seeds: a key for each parameter's random numbers; empty unless moments are bfloat16.
        blocks, n_blocks: as for block_sums.
        sums: whether to return the sums.

    Returns:
        block_sums of the gradients, unscaled, and the parameters before the update; [0, 3] without
        `sums`.
    """
    device = params[0].device if params else torch.device("cpu")
    result = torch.zeros(n_blocks if sums else 0, 3, dtype=torch.float64, device=device)
    skipped = found_inf is not None and bool(found_inf)
    rate, b1, b2 = float(lr), float(beta1), float(beta2)
    for i, (param, grad, step) in enumerate(zip(params, grads, steps, strict=True)):
        wide = torch.promote_types(param.dtype, torch.float32)
        g = None if grad is None else grad.to(wide)
        if g is not None and grad_scale is not None:
            g = g * (1.0 / grad_scale.to(g.device, wide))
        if sums and 0 <= blocks[i] < n_blocks:
            result[blocks[i]] += tensor_sums_ref(param, g).to(device)
        if g is None or skipped:
            continue
        step += 1
        t = float(step)
        if maximize:
            g = -g
        p = masters[i] if masters else param.to(wide)
        m, v = exp_avgs[i].to(wide), exp_avg_sqs[i].to(wide)
        if weight_decay:
            p.mul_(1 - rate * weight_decay)
        m.lerp_(g, 1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        x = v
        if max_exp_avg_sqs:
            x = torch.maximum(max_exp_avg_sqs[i], v, out=max_exp_avg_sqs[i])
        denom = (x.sqrt() / (1 - b2**t) ** 0.5).add_(eps)
        p.addcdiv_(m, denom, value=-rate / (1 - b1**t))
        bits = None
        if exp_avgs[i].dtype == torch.bfloat16:
            place = torch.arange(p.numel(), device=p.device)  # in memory, in the parameter's order
            place = place.as_strided(param.shape, dense_strides(param))
            bits = random_bits_ref(seeds[i], place, int(t))
        _store_ref(exp_avgs[i], m, bits)
        _store_ref(exp_avg_sqs[i], v, None if bits is None else bits >> 16)
        if p is not param:
            param.copy_(p)
    return torch.full_like(result, math.nan) if skipped else result


def _store_ref(out: Tensor, x: Tensor, bits: Tensor | None) -> None:
    if bits is not None:
        x = round_ref(x, bits & 0xFFFF)
    if x is not out:
        out.copy_(x)


@jit()
def _bias_correction(t: tl.tensor, log_beta: tl.tensor) -> tl.tensor:
    """1 - beta^t = -expm1(t log beta), which 1 - exp would cancel away, without float64."""
    x = t * log_beta
    y = tl.maximum(x, -1.0)
    series = tl.zeros_like(y)
    for n in tl.static_range(12, 1, -1):  # expm1(y) = y + y (y/2 (1 + y/3 (1 + y/4 (...))))
        series = y * (1.0 + series) * (1.0 / n)
    return tl.where(x > -1.0, -(y + y * series), 1.0 - tl.exp(x))


@jit("n_tensors")
def _advance_kernel(
    pointers: tl.tensor,
    scalars: tl.tensor,
    lr_at: tl.tensor,
    beta1_at: tl.tensor,
    beta2_at: tl.tensor,
    found_inf: tl.tensor,
    n_tensors: tl.tensor,
    weight_decay: tl.float32,
    lr: tl.float32,
    decay: tl.float32,
    weight1: tl.float32,
    beta2: tl.float32,
    weight2: tl.float32,
    log1: tl.float32,
    log2: tl.float32,
    lr_on_device: tl.constexpr,
    betas_on_device: tl.constexpr,
    has_found_inf: tl.constexpr,
    lanes: tl.constexpr,
) -> None:
    """t <- t + 1 for the tensors that have a gradient, and the six numbers their update needs."""
    if lr_on_device:
        lr = tl.load(lr_at).to(tl.float32)
        decay = 1.0 - lr * weight_decay
    if betas_on_device:
        beta1, beta2 = tl.load(beta1_at).to(tl.float32), tl.load(beta2_at).to(tl.float32)
        weight1, weight2 = 1.0 - beta1, 1.0 - beta2
        log1, log2 = tl.log(tl.maximum(beta1, 1e-37)), tl.log(tl.maximum(beta2, 1e-37))
    i = tl.program_id(0) * lanes + tl.arange(0, lanes)
    grads = tl.load(pointers + n_tensors + i, mask=i < n_tensors, other=0)
    steps = tl.load(pointers + 6 * n_tensors + i, mask=i < n_tensors, other=0)
    steps = steps.to(tl.pointer_type(tl.float32))
    t = tl.load(steps, mask=grads != 0, other=0.0) + 1.0
    if has_found_inf:
        t = tl.where(tl.load(found_inf) != 0.0, t - 1.0, t)
    tl.store(steps, t, mask=grads != 0)
    out = scalars + i * 8
    live = i < n_tensors
    t = tl.maximum(t, 1.0)  # 0 if the very first step is skipped
    tl.store(out, tl.div_rn(lr, _bias_correction(t, log1)), mask=live)
    tl.store(out + 1, tl.sqrt_rn(_bias_correction(t, log2)), mask=live)
    tl.store(out + 2, decay + tl.zeros_like(t), mask=live)
    tl.store(out + 3, weight1 + tl.zeros_like(t), mask=live)
    tl.store(out + 4, beta2 + tl.zeros_like(t), mask=live)
    tl.store(out + 5, weight2 + tl.zeros_like(t), mask=live)
    tl.store(out + 6, t, mask=live)


@jit()
def _update_chunk(
    p_address: tl.tensor,
    g_address: tl.tensor,
    m_address: tl.tensor,
    v_address: tl.tensor,
    x_address: tl.tensor,
    w_address: tl.tensor,
    scalars: tl.tensor,
    seed: tl.tensor,
    index: tl.tensor,
    count: tl.tensor,
    inv_scale: tl.tensor,
    eps: tl.tensor,
    dtype: tl.constexpr,
    moments: tl.constexpr,
    maximize: tl.constexpr,
    amsgrad: tl.constexpr,
    master: tl.constexpr,
    scaled: tl.constexpr,
    sums: tl.constexpr,
    update: tl.constexpr,
    aligned: tl.constexpr,
    tile: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Update the numbers of one chunk, or only sum p^2 where there is no gradient."""
    p_ptr = typed(p_address, dtype, aligned)
    g_ptr = typed(g_address, dtype, aligned)
    m_ptr = typed(m_address, moments, aligned)
    v_ptr = typed(v_address, moments, aligned)
    x_ptr = typed(x_address, tl.float32, aligned)
    w_ptr = typed(w_address, tl.float32, aligned)
    if aligned:
        count = count // 16 * 16  # a hint on an argument is lost when the call is inlined
    step_size, root, decay = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    weight1, beta2, weight2 = tl.load(scalars + 3), tl.load(scalars + 4), tl.load(scalars + 5)
    t = tl.load(scalars + 6).to(tl.int32)
    gp = tl.zeros((tile,), tl.float32)
    g2 = tl.zeros((tile,), tl.float32)
    p2 = tl.zeros((tile,), tl.float32)
    for start in range(0, count, tile):
        at = start + tl.arange(0, tile)
        mask = at < count
        p = tl.load(p_ptr + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.zeros((tile,), tl.float32)
        if update:
            g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
            m = tl.load(m_ptr + at, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
            if scaled:
                g = g * inv_scale
        if sums:
            gp, g2, p2 = add_sums(p, g, gp, g2, p2)
        if update:
            if maximize:
                g = -g
            if master:
                p = tl.load(w_ptr + at, mask=mask, other=0.0)
            p = p * decay
            rise = g - m
            near = weight1 < 0.5  # as lerp: exact at both ends
            m = tl.fma(tl.where(near, weight1, weight1 - 1.0), rise, tl.where(near, m, g))
            v = tl.fma(weight2 * g, g, v * beta2)
            x = v
            if amsgrad:
                x = tl.load(x_ptr + at, mask=mask, other=0.0)
                x = tl.maximum(x, v, propagate_nan=tl.PropagateNan.ALL)
                tl.store(x_ptr + at, x, mask=mask)
            p = p + tl.div_rn(-step_size * m, tl.div_rn(tl.sqrt_rn(x), root) + eps)
            if master:
                tl.store(w_ptr + at, p, mask=mask)
            tl.store(p_ptr + at, p.to(dtype), mask=mask)
            if moments == tl.bfloat16:
                bits = random_bits(seed, index + start, t, tile)
                tl.store(m_ptr + at, round_stochastic(m, bits & 0xFFFF), mask=mask)
                tl.store(v_ptr + at, round_stochastic(v, bits >> 16), mask=mask)
            else:
                tl.store(m_ptr + at, m, mask=mask)
                tl.store(v_ptr + at, v, mask=mask)
    return gp, g2, p2


@jit("first", "n_tensors")
def _adamw_kernel(
    chunks: tl.tensor,
    pointers: tl.tensor,
    scalars: tl.tensor,
    partials: tl.tensor,
    grad_scale: tl.tensor,
    found_inf: tl.tensor,
    first: tl.tensor,
    n_tensors: tl.tensor,
    eps: tl.float32,
    dtype: tl.constexpr,
    moments: tl.constexpr,
    maximize: tl.constexpr,
    amsgrad: tl.constexpr,
    master: tl.constexpr,
    scaled: tl.constexpr,
    has_found_inf: tl.constexpr,
    sums: tl.constexpr,
    chunk: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    row = chunks + (first + tl.program_id(0)).to(tl.int64) * 4
    tensor, part, count, slot = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    entry = pointers + tensor
    index = part.to(tl.int64) * chunk
    p = tl.load(entry) + index * (dtype.primitive_bitwidth // 8)
    g = tl.load(entry + n_tensors)
    frozen = g == 0
    g += index * (dtype.primitive_bitwidth // 8)
    m = tl.load(entry + 2 * n_tensors) + index * (moments.primitive_bitwidth // 8)
    v = tl.load(entry + 3 * n_tensors) + index * (moments.primitive_bitwidth // 8)
    x = tl.load(entry + 4 * n_tensors) + index * 4
    w = tl.load(entry + 5 * n_tensors) + index * 4
    seed = tl.load(entry + 7 * n_tensors)
    inv_scale = 1.0
    if scaled:
        inv_scale = 1.0 / tl.load(grad_scale).to(tl.float32)
    if has_found_inf:
        frozen = frozen | (tl.load(found_inf) != 0.0)
    aligned = ((p | g | m | v | x | w) % 16 == 0) & (count % 16 == 0)
    gp = tl.zeros((tile,), tl.float32)
    g2 = tl.zeros((tile,), tl.float32)
    p2 = tl.zeros((tile,), tl.float32)
    if frozen:
        if sums:
            gp, g2, p2 = _update_chunk(
                p, g, m, v, x, w, scalars + tensor * 8, seed, index, count, inv_scale, eps,
                dtype, moments, maximize, amsgrad, master, scaled, sums, False, False, tile,
            )  # fmt: skip
    elif aligned:
        gp, g2, p2 = _update_chunk(
            p, g, m, v, x, w, scalars + tensor * 8, seed, index, count, inv_scale, eps,
            dtype, moments, maximize, amsgrad, master, scaled, sums, True, True, tile,
        )  # fmt: skip
    else:
        gp, g2, p2 = _update_chunk(
            p, g, m, v, x, w, scalars + tensor * 8, seed, index, count, inv_scale, eps,
            dtype, moments, maximize, amsgrad, master, scaled, sums, True, False, tile,
        )  # fmt: skip
    if sums:
        store_sums(partials, slot, gp, g2, p2)


@torch.no_grad()
def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    weight_decay: float,
    eps: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    seeds: Sequence[int],
    blocks: Sequence[int],
    n_blocks: int,
    sums: bool,
) -> Tensor:
    """adamw_ref in a small launch for the step counts, one for each pair of dtypes, and with `sums`
    one that combines them in float32.

    All tensors are on one device; lr and the betas may be on the CPU. The host never waits for the
    device, so a CUDA graph can hold it all.
    """
    if not params:
        return torch.zeros(n_blocks if sums else 0, 3)
    _check_state(params, exp_avgs, exp_avg_sqs, [*max_exp_avg_sqs, *masters], steps)
    device = params[0].device
    table = _TABLES.get(
        params, [p.numel() for p in params],
        [(p.dtype, m.dtype) for p, m in zip(params, exp_avgs, strict=True)],
        list(blocks), n_blocks, _ROWS, device,
    )  # fmt: skip
    columns, copy_back = same_layout(
        [params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters]
    )
    pointers = table.write([*map(addresses, columns), addresses(steps), seeds])
    scalars = torch.empty(len(params), 8, dtype=torch.float32, device=device)
    lr_on_device, betas_on_device = not lr.is_cpu, not beta1.is_cpu
    _advance_kernel[(-(-len(params) // _LANES),)](
        pointers, scalars, lr if lr_on_device else scalars,
        beta1 if betas_on_device else scalars, beta2 if betas_on_device else scalars,
        scalars if found_inf is None else found_inf, table.n_tensors, weight_decay,
        *_host_numbers(lr, beta1, beta2, weight_decay), lr_on_device, betas_on_device,
        found_inf is not None, _LANES, **LAUNCH,
    )  # fmt: skip
    partials = torch.empty(table.n_slots if sums else 0, 3, dtype=torch.float32, device=device)
    live = [True] * len(params) if sums else [g is not None for g in grads]
    for (dtype, moments), first, count in table.launches(live):
        _adamw_kernel[(count,)](
            table.chunks, pointers, scalars, partials,
            scalars if grad_scale is None else grad_scale,
            scalars if found_inf is None else found_inf, first, table.n_tensors, eps,
            TRITON_DTYPES[dtype], TRITON_DTYPES[moments], maximize, bool(max_exp_avg_sqs),
            bool(masters), grad_scale is not None, found_inf is not None, sums, CHUNK,
            tile(dtype, moments), **LAUNCH,
        )  # fmt: skip
    copy_back([0, 2, 3, 4, 5])
    return combine(partials, table, found_inf) if sums else partials


def _check_state(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    others: Sequence[Tensor],
    steps: Sequence[Tensor],
) -> None:
    """Raise RuntimeError for state that the kernels, which see addresses only, would misread."""
    for p, m, v, t in zip(params, exp_avgs, exp_avg_sqs, steps, strict=True):
        good = m.dtype == v.dtype and m.dtype in (torch.float32, torch.bfloat16)
        if not (good and m.numel() == v.numel() == p.numel() and t.dtype == torch.float32):
            raise _misfit(p, m, v, t)
    for p, other in zip(itertools.cycle(params), others, strict=False):
        if other.dtype != torch.float32 or other.numel() != p.numel():
            raise _misfit(p, other)


def _misfit(param: Tensor, *state: Tensor) -> RuntimeError:
    found = ", ".join(f"{t.numel()} of {t.dtype}" for t in state)
    return RuntimeError(
        f"the state of a parameter must have its {param.numel()} numbers, moments of one dtype, "
        f"float32 or bfloat16, the rest float32, got {found}: load it with load_state_dict, "
        "which converts it"
    )


def _host_numbers(lr: Tensor, beta1: Tensor, beta2: Tensor, weight_decay: float) -> list[float]:
    """What _advance_kernel takes as plain numbers, lr to log2; 0 for what is on the device."""
    rate, b1, b2 = (float(x) if x.is_cpu else 0.0 for x in (lr, beta1, beta2))
    logs = [math.log(max(beta, 1e-37)) for beta in (b1, b2)]
    return [rate, 1 - rate * weight_decay, 1 - b1, b2, 1 - b2, *logs]
