"""The fused layer against its own six matrix products, eager torch and, on a GPU, torch.compile."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.memory import kept_for_backward
from bench.tasks.parts import generator
from bench.timing import Call, Case, Row, mark, ratio, sample
from blocksched import FusedMLP

PRODUCTS, FUSED, EAGER, COMPILED = "six products", "fused", "eager", "torch.compile"
FUSED_ALONE, EAGER_ALONE = "fused, no graph", "eager, no graph"
LINE = "{:15}  {:8}  {:15}  {:>9}  {:>8}  {:>12}  {:>9}  {}".format
HEADER = "layer", "dtype", "variant", "ms", "GFLOP/s", "of products", "of fused", "kept, MiB"


class Size(NamedTuple):
    """Tokens and width; the hidden width is four times that."""

    tokens: int
    d: int


ON_GPU = (Size(8192, 1024),)  # the experiment's
ON_CPU = (Size(2048, 256), Size(1024, 1024))


def six_products(x: Tensor, w1: Tensor, w2: Tensor) -> Call:
    """The layer's matrix products, forward and backward, into memory that is there already."""
    h, dy = x.new_ones(len(x), len(w1)), torch.ones_like(x)
    wide, narrow = torch.empty_like(h), torch.empty_like(x)
    dw1, dw2 = torch.empty_like(w1), torch.empty_like(w2)

    def run() -> None:
        torch.mm(x, w1.t(), out=wide)
        torch.mm(h, w2.t(), out=narrow)
        torch.mm(dy, w2, out=wide)
        torch.mm(dy.t(), h, out=dw2)
        torch.mm(h, w1, out=narrow)
        torch.mm(h.t(), x, out=dw1)

    return run


def cases_of(size: Size, dtype: torch.dtype, device: torch.device) -> list[Case]:
    """What is timed of a layer: forward and backward to x and both weights, and forward alone."""
    random = generator(device, 0, f"layer {size} {dtype}")
    x, dy = (
        torch.randn(size.tokens, size.d, generator=random, device=device).to(dtype)
        for _ in range(2)
    )
    x.requires_grad_()
    fused = FusedMLP(size.d, backend="fused", device=device, dtype=dtype)
    eager = FusedMLP(size.d, backend="eager", device=device, dtype=dtype)
    eager.load_state_dict(fused.state_dict())

    def both_ways(layer: Callable[[Tensor], Tensor]) -> Call:
        tensors = [x, *fused.parameters(), *eager.parameters()]

        def run() -> None:
            layer(x).backward(dy)
            for tensor in tensors:
                tensor.grad = None

        return run

    def alone(layer: FusedMLP) -> Call:
        return torch.no_grad()(lambda: layer(x))

    weights = fused.fc1.weight.detach(), fused.fc2.weight.detach()
    calls: dict[str, Call] = {
        PRODUCTS: six_products(x.detach(), *weights),
        FUSED: both_ways(fused),
        EAGER: both_ways(eager),
    }
    if device.type == "cuda":
        calls[COMPILED] = both_ways(torch.compile(eager))
    calls |= {FUSED_ALONE: alone(fused), EAGER_ALONE: alone(eager)}
    one = 2 * size.tokens * size.d * 4 * size.d
    kept = {
        variant: kept_for_backward(layer, lambda layer=layer: layer(x))
        for variant, layer in ((FUSED, fused), (EAGER, eager))
    }
    return [
        (
            {
                "model": f"{size.tokens} x {size.d}", "dtype": str(dtype).removeprefix("torch."),
                "variant": variant, "flops": one * (2 if "graph" in variant else 6),
                "kept_bytes": kept.get(variant),
            },
            lambda: None,
            call,
        )
        for variant, call in calls.items()
    ]  # fmt: skip


def benchmark(device: torch.device, sizes: tuple[Size, ...], rounds: int) -> list[Row]:
    """Time all layers; their rows are printed as they come."""
    rows: list[Row] = []
    print(LINE(*HEADER))
    for size in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            found = sample(cases_of(size, dtype, device), rounds, 20.0, device.type == "cuda")
            by_name = {row["variant"]: row for row in found}
            for row in found:
                row["of_products"] = ratio(row, by_name[PRODUCTS])
                row["of_fused"] = ratio(row, by_name[FUSED])
                print(LINE(*cells(row)), flush=True)
            print()
            rows += found
    return rows


def cells(row: Row) -> list[str]:
    """A row as under HEADER; "no graph" is forward alone, so it is not compared."""
    compared = "graph" not in row["variant"]
    kept = row["kept_bytes"]
    return [
        row["model"], row["dtype"], row["variant"], f"{row['ms']:.3f}",
        f"{row['flops'] / row['ms'] / 1e6:.0f}",
        f"{row['of_products']:.2f}" if compared else "-",
        f"{row['of_fused']:.2f}" if compared else "-",
        "" if kept is None else f"{kept / 2**20:.1f}",
    ]  # fmt: skip


def marks(rows: list[Row]) -> list[Row]:
    """What the layer is to reach, by device, and what it did."""
    met = []
    found = {(row["model"], row["dtype"], row["variant"]): row for row in rows}
    for model, dtype in dict.fromkeys(key[:2] for key in found):
        of = {key[2]: row for key, row in found.items() if key[:2] == (model, dtype)}
        name, fused = f"layer {model}, {dtype}", of[FUSED]
        share = fused["kept_bytes"] / of[EAGER]["kept_bytes"]
        met.append(mark(f"{name}: kept for backward, at most 0.60 of eager's", share, high=0.6))
        if COMPILED in of:
            for variant, low in ((EAGER, 1.3), (COMPILED, 1.0), (PRODUCTS, 0.85)):
                text = f"{name}: {variant}, at least {low:.2f} of fused"
                met.append(mark(text, ratio(of[variant], fused), low=low))
            continue
        small = model == f"{ON_CPU[0].tokens} x {ON_CPU[0].d}"
        high = {"float32": 1.2, "bfloat16": 1.4}[dtype] if small else 1.1
        text = f"{name}: fused, at most {high:.2f} of its products"
        met.append(mark(text, ratio(fused, of[PRODUCTS]), high=high))
        if small:
            low = {"float32": 1.3, "bfloat16": 1.9}[dtype]
            text = f"{name}: eager, at least {low:.2f} of fused"
            met.append(mark(text, ratio(of[EAGER], fused), low=low))
    return met
