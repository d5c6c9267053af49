"""The fused layer y = x + fc2(relu(fc1(rms_norm(x)))^2): the op and the module.

Its ops, from the C++/CUDA extension, are torch.ops.blocksched.mlp_forward, mlp_inference and
mlp_backward. The block is that of nanoGPT's descendants: squared ReLU (Primer, arXiv 2109.08668)
after an RMS norm (arXiv 1910.07467).
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from blocksched import extension
from blocksched.cpu import DTYPES

Backend = Literal["auto", "fused", "eager"]
BACKENDS = "auto", "fused", "eager"
EPS = torch.finfo(torch.float32).eps  # what rms_norm takes by itself, but for float64


def check_backend(backend: str) -> None:
    """Raise for a back end of the fused layer that is none, or that is not installed."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "fused" and not extension.HAS_CPP:
        raise ValueError(
            f"backend='fused' needs the extension, which is missing: {extension.why_not()}"
        )


def mlp_ref(
    x: Tensor, w1: Tensor, w2: Tensor, norm_weight: Tensor | None = None, eps: float = EPS
) -> Tensor:
    """x + fc2(relu(fc1(rms_norm(x)))^2) in eager torch; arguments as for mlp."""
    z = functional.linear(functional.rms_norm(x, x.shape[-1:], norm_weight, eps), w1)
    return x + functional.linear(functional.relu(z).square(), w2)


def mlp(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = EPS,
    backend: Backend = "auto",
) -> Tensor:
    """The fused layer, x + fc2(relu(fc1(rms_norm(x)))^2); csrc/formulas.h has its backward.

    Args:
        x: [..., d] of float32, bfloat16, float16 or float64, any strides, rows may be none.
        w1, w2: the weights of fc1 [hidden, d] and fc2 [d, hidden], of x's dtype but for autocast.
        norm_weight: [d], multiplies the normalised x; None is all ones.
        eps: added to the mean square of a row.
        backend: "auto" is the extension where it serves x's device, else eager torch; "fused" and
            "eager" insist.

    Returns:
        Tensor like x. For backward x, one number a row and [rows, hidden] numbers are kept, half of
        eager's; without a gradient nothing is. The products see x and its gradient before they are
        normalised: in float16 rows whose norm is far from 1 lose range by it.

    Raises:
        ValueError: `backend` asks for what cannot be, or shapes do not fit.
        RuntimeError: dtypes or devices differ, or a second derivative is asked for.
    """
    if not uses_fused(backend, x):
        return mlp_ref(x, w1, w2, norm_weight, eps)
    if x.ndim < 1 or 0 in w1.shape or w1.shape[1:] != x.shape[-1:] or w2.shape != w1.shape[::-1]:
        shapes = ", ".join(str(list(t.shape)) for t in (x, w1, w2))
        raise ValueError(
            f"x [..., d], fc1 [hidden, d] and fc2 [d, hidden] must fit, got {shapes}: check d"
        )
    if norm_weight is not None and norm_weight.shape != x.shape[-1:]:
        raise ValueError(
            f"norm_weight must be of x's width {x.shape[-1]}, got {list(norm_weight.shape)}: give "
            "a number for each column"
        )
    if norm_weight is not None:
        w1 = w1 * norm_weight  # so that torch gives both their gradients
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        w1, w2 = w1.to(dtype), w2.to(dtype)
    if dtype == x.dtype:
        return _fused(x, w1, w2, eps, residual=True)
    return x + _fused(x.to(dtype), w1, w2, eps, residual=False)  # x keeps its precision


def uses_fused(backend: Backend, x: Tensor) -> bool:
    """Whether mlp runs in the extension for this x. Raises ValueError as mlp does."""
    check_backend(backend)
    if backend == "eager":
        return False
    served = extension.HAS_CPP and (x.is_cpu or (x.is_cuda and extension.HAS_CUDA))
    if backend == "fused" and not (served and x.dtype in DTYPES):
        why = f" ({extension.reason})" if x.is_cuda and extension.reason else ""
        raise ValueError(
            f"backend='fused' does not serve {x.dtype} on {x.device}{why}: use 'auto', which is "
            "eager torch there"
        )
    return served and x.dtype in DTYPES


def _fused(x: Tensor, w1: Tensor, w2: Tensor, eps: float, residual: bool) -> Tensor:
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w1, w2))
    if graph:
        y: Tensor = torch.ops.blocksched.mlp_forward(x, w1, w2, eps, residual)[0]
    else:
        y = torch.ops.blocksched.mlp_inference(x, w1, w2, eps, residual)
    return y


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, w1, w2, _, ctx.residual = inputs
    _, h, scale = output
    ctx.mark_non_differentiable(h, scale)
    ctx.save_for_backward(x, w1, w2, h, scale)


def _backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    grads = torch.ops.blocksched.mlp_backward(dy, *ctx.saved_tensors, ctx.residual, *needs)
    return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), None, None


def _twice(*_: Any) -> None:
    raise RuntimeError(
        "the fused layer has no second derivative: use backend='eager' where it is needed"
    )


def _forward_like(x: Tensor, w1: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    h, scale = x.new_empty(rows, w1.shape[0]), x.new_empty(rows, dtype=wide)
    return _inference_like(x), h, scale


def _inference_like(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward_like(*arguments: Any) -> tuple[Tensor, ...]:
    wanted = zip(arguments[1:4], arguments[-3:], strict=True)
    return tuple(t.new_empty(t.shape if needed else 0) for t, needed in wanted)


if extension.HAS_CPP:
    torch.library.register_fake("blocksched::mlp_forward", _forward_like)
    torch.library.register_fake("blocksched::mlp_inference", _inference_like)
    torch.library.register_fake("blocksched::mlp_backward", _backward_like)
    torch.library.register_autograd("blocksched::mlp_forward", _backward, setup_context=_setup)
    torch.library.register_autograd("blocksched::mlp_backward", _twice)


class FusedMLP(nn.Module):
    """x + fc2(relu(fc1(rms_norm(x)))^2) as one op; arguments and errors as for mlp.

    Its weights are those of two nn.Linear without bias, so that it loads what a plain module with
    fc1 and fc2 has saved. Where one of these is more than that (an adapter, a parametrisation, a
    hook), both are called as they are, in eager torch.

    Args:
        d: width of x.
        hidden: width between fc1 and fc2, 4 d by default.
        norm_weight: whether the norm has a weight.
        eps: added to the mean square of a row.
        backend: "auto", "fused" or "eager".
        device, dtype: of the weights.
    """

    def __init__(
        self,
        d: int,
        hidden: int | None = None,
        *,
        norm_weight: bool = False,
        eps: float = EPS,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_backend(backend)
        hidden = 4 * d if hidden is None else hidden
        if d < 1 or hidden < 1:
            raise ValueError(f"d and hidden must be at least 1, got {d} and {hidden}")
        self.fc1 = nn.Linear(d, hidden, bias=False, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, d, bias=False, device=device, dtype=dtype)
        self.norm_weight = (
            nn.Parameter(torch.ones(d, device=device, dtype=dtype)) if norm_weight else None
        )
        self.eps = eps
        self.backend: Backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d]. Returns a tensor like it."""
        if _plain(self.fc1) and _plain(self.fc2):
            return mlp(
                x, self.fc1.weight, self.fc2.weight, self.norm_weight, self.eps, self.backend
            )
        if self.backend == "fused":
            raise ValueError(
                "backend='fused' computes with the weights of fc1 and fc2 and would pass over what "
                "replaces or hooks them: use 'auto', which calls them"
            )
        z = self.fc1(functional.rms_norm(x, x.shape[-1:], self.norm_weight, self.eps))
        y: Tensor = x + self.fc2(functional.relu(z).square())
        return y

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"


def _plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and not (
        module.bias is not None or "forward" in vars(module) or module._forward_hooks
        or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )  # fmt: skip
