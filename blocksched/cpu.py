"""AdamW and the per-block sums in C++: csrc/cpu/adamw.cpp.

It sees addresses, as Triton's kernels do, so whatever it is handed is checked here first.
"""

from array import array
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from blocksched import extension
from blocksched.kernels.chunk_table import addresses, same_layout

# As csrc/mlp.h numbers them, and what the moments of each are.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_DTYPE, _IS_CPU = attrgetter("dtype"), attrgetter("is_cpu")
_WIDE = {dtype: torch.promote_types(dtype, torch.float32) for dtype in DTYPES}


def block_sums(
    params: Sequence[Tensor], grads: Sequence[Tensor | None], blocks: Sequence[int], n_blocks: int
) -> Tensor:
    """block_sums_ref: parameters of the CPU and of DTYPES, gradients of their parameter's dtype."""
    _check_lengths(params, grads, blocks)
    sizes, dtypes = _check_gradients(params, grads)
    columns, _ = same_layout([params, grads])
    none = [0] * len(params)
    codes = [DTYPES[dtype] for dtype in dtypes]
    rows = [*map(addresses, columns), *[none] * 6, sizes, codes, none, blocks]
    return _run(rows, n_blocks, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, False, False)


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
    """adamw_ref, in one parallel region; the same bits for any number of threads."""
    skip = found_inf is not None and bool(found_inf)
    if skip and sums:
        return torch.full((n_blocks, 3), float("nan"), dtype=torch.float64)
    if skip:
        return torch.zeros(0, 3, dtype=torch.float64)
    optional = [column for column in (max_exp_avg_sqs, masters, seeds) if column]
    _check_lengths(params, grads, exp_avgs, exp_avg_sqs, steps, blocks, *optional)
    sizes, dtypes = _check_gradients(params, grads)
    narrow = _check_state(
        sizes, dtypes, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, steps, seeds
    )
    columns, copy_back = same_layout(
        [params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters]
    )
    none = [0] * len(params)
    rows = [addresses(column) if column else none for column in columns]
    rows += [addresses(steps), list(seeds) or none, sizes, [DTYPES[d] for d in dtypes]]
    result = _run(
        [*rows, narrow, blocks], n_blocks if sums else 0, float(lr), float(beta1), float(beta2),
        weight_decay, eps, 1.0 if grad_scale is None else float(grad_scale), maximize, True,
    )  # fmt: skip
    copy_back([0, 2, 3, 4, 5])
    return result


def _run(rows: Sequence[Sequence[int]], n_blocks: int, *numbers: float | bool) -> Tensor:
    table = array("q")  # a third of the time that numpy takes for it
    for row in rows:
        table.fromlist(list(row))
    sums = torch.zeros(n_blocks, 3, dtype=torch.float64)
    assert extension.module is not None
    extension.module.adamw(table, sums.numpy(), *numbers)
    return sums


def _check_lengths(params: Sequence[Tensor], *others: Sequence[object]) -> None:
    for other in others:
        if len(other) != len(params):
            raise ValueError(
                f"every list must have an entry for each of the {len(params)} parameters, got one "
                f"of {len(other)}: leave out none, or all of an optional list"
            )


def _check_gradients(
    params: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> tuple[list[int], list[torch.dtype]]:
    """Raise RuntimeError for a gradient that does not fit; the parameters' sizes and dtypes."""
    sizes, dtypes = list(map(Tensor.numel, params)), [p.dtype for p in params]
    given = [i for i, grad in enumerate(grads) if grad is not None]
    some = [grad for grad in grads if grad is not None]
    _check("a gradient", some, [sizes[i] for i in given], [dtypes[i] for i in given])
    return sizes, dtypes


def _check_state(
    sizes: list[int],
    dtypes: list[torch.dtype],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    steps: Sequence[Tensor],
    seeds: Sequence[int],
) -> list[int]:
    """Raise RuntimeError for state that does not fit; which moments are bfloat16, 0 or 1."""
    wide = [_WIDE[dtype] for dtype in dtypes]
    narrow = [
        int(m.dtype == torch.bfloat16 and w == torch.float32)
        for m, w in zip(exp_avgs, wide, strict=True)
    ]
    moments = [torch.bfloat16 if n else w for n, w in zip(narrow, wide, strict=True)]
    _check("exp_avg", exp_avgs, sizes, moments)
    _check("exp_avg_sq", exp_avg_sqs, sizes, moments)
    if max_exp_avg_sqs:
        _check("max_exp_avg_sq", max_exp_avg_sqs, sizes, wide)
    if masters:
        _check("master_param", masters, sizes, wide)
    _check("step", steps, [1] * len(sizes), [torch.float32] * len(sizes))
    if any(narrow) and not seeds:
        raise RuntimeError("bfloat16 moments are rounded at random: give the seeds")
    return narrow


def _check(
    name: str, tensors: Sequence[Tensor], sizes: list[int], dtypes: list[torch.dtype]
) -> None:
    """Raise RuntimeError unless all tensors lie on the CPU and have these sizes and dtypes."""
    good = list(map(Tensor.numel, tensors)) == sizes and list(map(_DTYPE, tensors)) == dtypes
    if good and all(map(_IS_CPU, tensors)):
        return
    for t, size, dtype in zip(tensors, sizes, dtypes, strict=True):
        if not (t.is_cpu and t.dtype == dtype and t.numel() == size):
            raise RuntimeError(
                f"{name} must be {size} numbers of {dtype} on the CPU, to fit its parameter, got "
                f"{t.numel()} of {t.dtype} on {t.device}: load the state with load_state_dict, "
                "which converts it"
            )
