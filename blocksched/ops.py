"""One name for each op: picks the back end, and tells torch what the op changes.

torch.ops.blocksched.block_sums and torch.ops.blocksched.adamw are the functions of the same name in
blocksched.kernels, with a back end as last argument. Both are opaque to autograd; adamw declares
every list it changes. The fused layer's op is in blocksched.mlp.
"""

import contextlib
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor

from blocksched import cpu, extension
from blocksched.kernels import adamw as adamw_kernels
from blocksched.kernels import block_sums as block_sums_kernels
from blocksched.kernels.jit import HAS_TRITON, INTERPRETED, TRITON_DTYPES

Backend = Literal["auto", "triton", "cpp", "eager"]
BACKENDS = "auto", "triton", "cpp", "eager"


def check_backend(backend: str) -> None:
    """Raise for a back end of block_sums and adamw that is none, or that is not installed."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "cpp" and not extension.HAS_CPP:
        raise ValueError(
            f"backend='cpp' needs the extension, which is missing: {extension.why_not()}"
        )
    if backend == "triton" and not HAS_TRITON:
        raise ValueError(
            "backend='triton' needs the triton package (pip install triton): install it, or use "
            "'auto', which does without"
        )


def choose(backend: Backend, tensors: Sequence[Tensor]) -> Literal["triton", "cpp", "eager"]:
    """What block_sums and adamw run in for parameters like `tensors`.

    Triton on a GPU but for float64, C++ on the CPU, eager torch for the rest. Raises ValueError if
    `backend` asks for what cannot be.
    """
    check_backend(backend)
    on_gpu, on_cpu = (all(map(attrgetter(name), tensors)) for name in ("is_cuda", "is_cpu"))
    dtypes = set(map(attrgetter("dtype"), tensors))
    if backend == "auto":
        if HAS_TRITON and on_gpu and dtypes <= TRITON_DTYPES.keys() and tensors:
            return "triton"
        return "cpp" if extension.HAS_CPP and on_cpu and dtypes <= cpu.DTYPES.keys() else "eager"
    if backend == "triton" and not (on_gpu or INTERPRETED):
        raise ValueError(
            f"backend='triton' needs parameters on a GPU, got {tensors[0].device}: move the "
            "model first, or use 'auto'"
        )
    if backend == "cpp" and not on_cpu:
        where = next(t.device for t in tensors if not t.is_cpu)
        raise ValueError(
            f"backend='cpp' is for parameters on the CPU, got {where}: use 'auto', which is "
            "Triton there"
        )
    served = {"triton": TRITON_DTYPES, "cpp": cpu.DTYPES}.get(backend)
    if served is not None and not dtypes <= served.keys():
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in served)
        other = next(dtype for dtype in dtypes if dtype not in served)
        raise ValueError(f"backend={backend!r} takes {names}, got {other}: use 'auto'")
    return backend


def block_sums(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    blocks: Sequence[int],
    n_blocks: int,
    backend: Backend = "auto",
) -> Tensor:
    """Sums |g p|, g^2, p^2 of each block: blocksched.kernels.block_sums.block_sums_ref.

    Several devices, sparse gradients and gradients of another dtype are left to eager torch.
    """
    chosen = choose(backend, params)
    plain = len({p.device for p in params}) <= 1 and all(map(_plain, params, grads))
    if chosen == "triton" and plain:
        with _device_of(params):
            return block_sums_kernels.block_sums(params, grads, blocks, n_blocks)
    if chosen == "cpp" and plain:
        return cpu.block_sums(params, grads, blocks, n_blocks)
    sums = block_sums_kernels.block_sums_ref(params, grads, blocks, n_blocks)
    return sums.float() if chosen == "triton" else sums


def _device_of(params: Sequence[Tensor]) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current GPU, which need not be the parameters'."""
    return torch.cuda.device_of(params[0]) if params else contextlib.nullcontext()


def _plain(param: Tensor, grad: Tensor | None) -> bool:
    return grad is None or (grad.dtype == param.dtype and grad.layout == torch.strided)


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
    backend: Backend = "auto",
) -> Tensor:
    """One AdamW step in place: blocksched.kernels.adamw.adamw_ref.

    Triton and C++ raise RuntimeError for state of another size or dtype than adamw_ref names.
    """
    chosen = choose(backend, params)
    state = exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, steps
    step = {"triton": adamw_kernels.adamw, "cpp": cpu.adamw, "eager": adamw_kernels.adamw_ref}
    with _device_of(params):
        result = step[chosen](
            params, grads, *state, lr, beta1, beta2, weight_decay, eps, maximize, grad_scale,
            found_inf, seeds, blocks, n_blocks, sums,
        )  # fmt: skip
    if chosen != "eager":  # as an in-place operation of torch would, so that autograd notices
        torch.autograd.graph.increment_version(
            [
                t
                for column in (params, *state)
                for t, grad in zip(column, grads, strict=False)
                if grad is not None
            ]
        )
    return result


# The dispatcher takes 2 ms for the lists of 216 parameters, as long as torch's whole fused step of
# as many small ones. So the functions above are called as they are, and these where torch has to
# see an op: in torch.compile, under fake tensors, from other code.
block_sums_op = torch.library.custom_op(
    "blocksched::block_sums",
    block_sums,
    mutates_args=(),
    schema="(Tensor[] params, Tensor?[] grads, int[] blocks, int n_blocks, str backend) -> Tensor",
)
adamw_op = torch.library.custom_op(
    "blocksched::adamw",
    adamw,
    mutates_args=("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "masters", "steps"),
    schema=(
        "(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
        "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] masters, Tensor(f!)[] steps, Tensor lr, "
        "Tensor beta1, Tensor beta2, float weight_decay, float eps, bool maximize, "
        "Tensor? grad_scale, Tensor? found_inf, int[] seeds, int[] blocks, int n_blocks, "
        "bool sums, str backend) -> Tensor"
    ),
)


@block_sums_op.register_fake
def _(params: Sequence[Tensor], *arguments: Any) -> Tensor:
    n_blocks, backend = arguments[-2:]
    return _sums_like(params, n_blocks, backend)


@adamw_op.register_fake
def _(params: Sequence[Tensor], *arguments: Any) -> Tensor:
    n_blocks, sums, backend = arguments[-3:]
    return _sums_like(params, n_blocks if sums else 0, backend)


def _sums_like(params: Sequence[Tensor], n_blocks: int, backend: Backend) -> Tensor:
    dtype = torch.float32 if choose(backend, params) == "triton" else torch.float64
    device = params[0].device if params else torch.device("cpu")
    return torch.empty(n_blocks, 3, dtype=dtype, device=device)


def backend_of(op: str, device_type: str) -> str:
    """What `op` (mlp, block_sums or adamw) runs in by default for float32 on "cpu" or "cuda"."""
    on_gpu = device_type == "cuda"
    if op == "mlp":
        served = extension.HAS_CUDA if on_gpu else extension.HAS_CPP
        return ("CUDA" if on_gpu else "C++") if served else "eager"
    if on_gpu:
        return "Triton" if HAS_TRITON else "eager"
    return "C++" if extension.HAS_CPP else "eager"
