"""The kernels against torch's and against their floors: `python bench/kernels.py --help`.

layer        tokens x width of x + fc2(relu(fc1(rms_norm(x)))^2), hidden 4 x, forward and backward
six products its matrix products alone, in torch, in the layer's dtype, into memory that is there:
             the floor, but where a CPU only emulates bfloat16 products, which fused avoids
of ...       ms as a multiple of another row's, round by round
kept         what forward keeps for backward, x included, weights not

ours         blocksched.AdamW; "+ sums": with measure() before each step
(a) (b) (c)  torch.optim.AdamW: (a) foreach=True on a GPU, its default elsewhere; (b), (c) fused;
             eager sums are the same sums by torch._foreach_*
active       blocks that have a gradient, the last ones, of all
ms           a step among steps back to back: median of the rounds, in each of which all variants
             and suffixes of a model have a turn, beside a plain copy
host ms      until step() returns on an idle GPU; where that is near ms, launching takes the time
GB           the least that has to move; moments are float32 in ours, the parameters' dtype in torch
of copy      GB/s over the copy's. It says little of what fits in a cache (the small tensors, and on
             a CPU a few blocks), and a CPU's copy also reads what it overwrites: above 1 can be
time         as a multiple of another row's, round by round: 2.00 of ours is half as fast as ours
"""

import argparse
import datetime
import functools
import gc
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from bench import layer
from bench.config import Config, UserError, resolve_device
from bench.provenance import system
from bench.results import output_path, write
from bench.table import number
from bench.tasks.parts import generator
from bench.timing import Call, Case, Row, mark, ratio, sample
from blocksched import AdamW, FusedMLP, extension, ops
from blocksched.kernels.jit import triton

COPY, OURS, SUMMED, ALONE = "copy", "ours", "ours + sums", "block_sums alone"
EAGER, FUSED, SEPARATE = "(a) eager sums + AdamW", "(b) torch fused", "(c) eager sums + fused"
SMALL = "1000 small"
AGAINST = {SUMMED: OURS, EAGER: SUMMED, FUSED: OURS, SEPARATE: SUMMED}
LINE = "{:17}  {:8}  {:22}  {:>6}  {:>9}  {:>7}  {:>7}  {:>6}  {:>7}  {}".format
HEADER = "model", "dtype", "variant", "active", "ms", "host ms", "GB", "GB/s", "of copy", "time"
NO_GPU = """
This run was on a CPU and on smaller models: "fused" and "ours" are the C++ extension{}, the Triton
and CUDA kernels were not timed."""
NOT_BUILT = """, which is not there,
so that "ours" is eager torch, made to be read, not to be fast ({})"""
Model = tuple[str, torch.dtype, list[list[tuple[int, ...]]], tuple[int, ...]]


class Scale(NamedTuple):
    """Width of the blocks, numbers in the large tensor and in the copy, how much is sampled."""

    width: int
    large: int
    copied: int
    rounds: int
    layers: tuple[layer.Size, ...]
    sample_ms: float = 20.0


ON_GPU = Scale(
    width=Config().dmodel, large=500_000_000, copied=2**28, rounds=30, layers=layer.ON_GPU
)
ON_CPU = Scale(  # some two minutes
    width=192, large=20_000_000, copied=2**25, rounds=7, layers=layer.ON_CPU
)


def models(scale: Scale) -> list[Model]:
    """Name, dtype, shapes of each block, numbers of active blocks; the experiment's come first."""
    n, width = Config().n_layers, scale.width
    block = [tuple(p.shape) for p in FusedMLP(width).parameters()]
    small = [[(901 + 20 * b + i % 10,) for i in range(100)] for b in range(10)]
    return [
        (f"{n} blocks, d {width}", torch.float32, [block] * n, (n, n // 2, n // 4)),
        (f"{n} blocks, d {width}", torch.bfloat16, [block] * n, (n, n // 2, n // 4)),
        (f"1 block, d {width}", torch.float32, [block], (1,)),
        (SMALL, torch.float32, small, (10,)),
        (SMALL, torch.bfloat16, small, (10,)),
        (f"one {scale.large / 1e6:g}M tensor", torch.float32, [[(scale.large,)]], (1,)),
    ]


@torch.no_grad()
def foreach_sums(params: Sequence[Tensor], place: Tensor, n_blocks: int) -> Tensor:
    """The sums of ops.block_sums, [n_blocks, 3], in as few eager calls as they take.

    The active parameters are the last ones of `params`; `place` has the block of each.
    """
    active = [p for p in params if p.grad is not None]
    grads = [p.grad for p in active]
    columns = [(torch._foreach_mul(grads, active), 1), (grads, 2), (params, 2)]
    sums = torch.zeros(n_blocks, 3, device=place.device)
    for i, (tensors, power) in enumerate(columns):
        norms = torch._foreach_norm(tensors, power, dtype=torch.float32)
        sums[:, i].index_add_(0, place[-len(norms) :], torch.stack(norms).pow(power))
    return sums


def variants(blocks: Sequence[Sequence[Tensor]]) -> dict[str, tuple[Call, int, int]]:
    """What is compared: the call, and bytes it moves a number of an active and of a frozen block.

    An update reads and writes p, m and v and reads g. Separate sums read g and p once more. All
    sums read the weights of frozen blocks too.
    """
    params = [p for block in blocks for p in block]
    where = [b for b, block in enumerate(blocks) for _ in block]
    n, size, place = len(blocks), params[0].itemsize, torch.tensor(where, device=params[0].device)
    sums = functools.partial(foreach_sums, params, place, n)
    ours = AdamW(params)
    ours.set_blocks(blocks)
    eager = torch.optim.AdamW(params, foreach=True if place.is_cuda else None)
    fused = torch.optim.AdamW(params, fused=True)
    update, torchs = 3 * size + 4 * 4, 3 * size + 4 * size  # moments of ours are float32
    return {
        OURS: (ours.step, update, 0),
        SUMMED: (lambda: (ours.measure(), ours.step()), update, size),
        EAGER: (lambda: (sums(), eager.step()), torchs + 2 * size, size),
        FUSED: (fused.step, torchs, 0),
        SEPARATE: (lambda: (sums(), fused.step()), torchs + 2 * size, size),
        ALONE: (lambda: ops.block_sums(params, [p.grad for p in params], where, n), 2 * size, size),
    }


def cases_of(model: Model, source: Tensor, target: Tensor) -> list[Case]:
    """What is timed of a model, a copy first: a row, what gives the gradients, and the call."""
    name, dtype, shapes, suffixes = model
    random = generator(source.device, 0, f"{name} {dtype}")

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=random, device=source.device, dtype=dtype)

    blocks = [[nn.Parameter(draw(shape)) for shape in block] for block in shapes]
    grads = [[draw(shape) for shape in block] for block in shapes]
    sizes = [sum(p.numel() for p in block) for block in blocks]

    def activate(k: int) -> None:
        for b, block in enumerate(blocks):
            for p, grad in zip(block, grads[b], strict=True):
                p.grad = grad if b >= len(blocks) - k else None

    def case(k: int, variant: str, call: Call, moved: int) -> Case:
        row = {
            "model": name, "dtype": str(dtype).removeprefix("torch."), "variant": variant,
            "active": k, "blocks": len(blocks), "numbers": sum(sizes[-k:]), "bytes": moved,
        }  # fmt: skip
        return row, functools.partial(activate, k), call

    cases = [case(len(blocks), COPY, lambda: target.copy_(source), source.nbytes + target.nbytes)]
    compared = variants(blocks)
    for k in suffixes:
        for variant, (call, of_active, of_frozen) in compared.items():
            moved = sum(sizes[-k:]) * of_active + sum(sizes[:-k]) * of_frozen
            cases.append(case(k, variant, call, moved))
    return cases


def measure(cases: list[Case], scale: Scale, on_gpu: bool) -> list[Row]:
    """The rows of a model's cases, with their samples and figures."""
    rows = sample(cases, scale.rounds, scale.sample_ms, on_gpu)
    found = {(row["active"], row["variant"]): row for row in rows}
    for row in rows:
        row["gb_per_s"] = row["bytes"] / row["ms"] / 1e6
        row["of_copy"] = row["gb_per_s"] / rows[0]["gb_per_s"]
        row["against"] = AGAINST.get(row["variant"])
        other = found.get((row["active"], row["against"]))
        row["ratio"] = ratio(row, other) if other else None
    return rows


def marks(rows: Sequence[Row], on_gpu: bool) -> list[Row]:
    """What the optimizer is to reach, and what it did."""
    return marks_on_gpu(rows) if on_gpu else marks_on_cpu(rows)


def marks_on_cpu(rows: Sequence[Row]) -> list[Row]:
    """With sums, against torch's fused step without, on the blocks and on many small tensors."""
    met = []
    for name in (rows[0]["model"], SMALL):
        for dtype, low in (("float32", 1.0), ("bfloat16", 2.0)):
            mine = [r for r in rows if (r["model"], r["dtype"]) == (name, dtype)]
            full = max(row["active"] for row in mine)
            found = {row["variant"]: row for row in mine if row["active"] == full}
            text = f"{name}, {dtype}: {FUSED}, at least {low:.2f} of {SUMMED}"
            met.append(mark(text, ratio(found[FUSED], found[SUMMED]), low=low))
    return met


def marks_on_gpu(rows: Sequence[Row]) -> list[Row]:
    """With the experiment's blocks."""
    met: list[Row] = []
    for dtype in ("float32", "bfloat16"):
        mine = [r for r in rows if (r["model"], r["dtype"]) == (rows[0]["model"], dtype)]
        found = {(row["active"], row["variant"]): row for row in mine}
        full, *parts = sorted({active for active, _ in found}, reverse=True)
        ours, summed = found[full, OURS], found[full, SUMMED]
        text = f"{dtype}: {SUMMED}, at least 0.90 of the copy's GB/s"
        met.append(mark(text, summed["of_copy"], low=0.9))
        text = f"{dtype}: {SUMMED}, at most 1.03 of {OURS}"
        met.append(mark(text, summed["ratio"], high=1.03))
        if dtype == "float32":  # torch's moments in bfloat16 are half as wide: it moves less
            for variant, low in ((FUSED, 1.0), (EAGER, 3.0)):
                text = f"{dtype}: {variant}, at least {low:.2f} of {SUMMED}"
                met.append(mark(text, ratio(found[full, variant], summed), low=low))
        for k in parts:
            share = found[k, OURS]["numbers"] / ours["numbers"]
            over = ratio(found[k, OURS], ours) / share
            text = f"{dtype}: {OURS}, {k} blocks, 0.95 to 1.05 of {share:.3f} of the time of {full}"
            met.append(mark(text, over, low=0.95, high=1.05))
    return met


def cells(row: Row) -> list[str]:
    """A row as under HEADER."""
    return [
        row["model"], row["dtype"], row["variant"], f"{row['active']}/{row['blocks']}",
        f"{row['ms']:.3f}", number(row["host_ms"], ".3f"), f"{row['bytes'] / 1e9:.4f}",
        f"{row['gb_per_s']:.1f}", f"{row['of_copy']:.2f}",
        number(row["ratio"], ".2f", f" of {row['against']}"),
    ]  # fmt: skip


def about(device: torch.device) -> dict[str, Any]:
    """The machine, the versions, and the commit where git knows it."""
    return system(device) | {"triton_version": triton and triton.__version__}


def benchmark(device: torch.device, scale: Scale) -> list[Row]:
    """Time all models; their rows are printed as they come."""
    source = torch.randn(scale.copied, device=device)
    target = torch.empty_like(source)
    rows: list[Row] = []
    print(LINE(*HEADER))
    for model in models(scale):
        found = measure(cases_of(model, source, target), scale, source.is_cuda)
        print("\n".join(LINE(*cells(row)) for row in found), end="\n\n", flush=True)
        rows += found
        gc.collect()  # optimizers lie in cycles, and the next model needs their memory
        if source.is_cuda:
            torch.cuda.empty_cache()
    return rows


def main(argv: Sequence[str] | None = None, scale: Scale | None = None) -> int:
    """Measure, print, and write the result file if asked; returns the exit status."""
    made = argparse.ArgumentParser(prog="bench/kernels.py", description="Time the kernels.")
    made.add_argument("--json-out", default="", metavar="FILE", help="write every sample here")
    made.add_argument("--rounds", type=int, metavar="N", help="30 on a GPU, 7 elsewhere")
    made.add_argument("--device", default="auto", metavar="X", help="auto, cpu, cuda or cuda:N")
    given = list(sys.argv[1:] if argv is None else argv)
    args = made.parse_args(given)
    try:
        device = resolve_device(args.device)
        if args.rounds is not None and args.rounds < 1:
            raise UserError(f"--rounds must be at least 1, got {args.rounds}: give more")
        path = output_path(Config(json_out=args.json_out)) if args.json_out else None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    on_gpu = device.type == "cuda"
    scale = scale or (ON_GPU if on_gpu else ON_CPU)
    scale = scale._replace(rounds=args.rounds or scale.rounds)
    if on_gpu:
        torch.cuda.set_device(device.index or 0)  # where the events are recorded
    machine = about(device)
    print(f"{machine['cuda_device_name'] or 'CPU'}, torch {torch.__version__}, ", end="")
    print(
        f"triton {machine['triton_version']}, commit {machine['commit']}, {scale.rounds} rounds\n"
    )
    layers: list[Row] = []
    if ops.backend_of("mlp", device.type) != "eager":
        layers = layer.benchmark(device, scale.layers, scale.rounds)
    rows = benchmark(device, scale)
    print(__doc__.partition("\n\n")[2].strip())
    missing = "" if extension.HAS_CPP else NOT_BUILT.format(extension.why_not())
    print("" if on_gpu else NO_GPU.format(missing))
    met = layer.marks(layers) + marks(rows, on_gpu)
    for found in met:
        print(f"{'pass' if found['passed'] else 'FAIL'}  {found['found']:.3f}  {found['mark']}")
    if path:
        content = {
            "script": "bench/kernels.py",
            "command": shlex.join(["python", "bench/kernels.py", *given]),
            "timestamp_utc": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}",
            "system": machine,
            "scale": scale._asdict(),
            "layers": layers,
            "rows": rows,
            "marks": met,
        }
        write(path, content)
        print(f"\nResult file: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
