"""bench/kernels.py: its figures follow from its samples, its bytes from the sizes."""

import contextlib
import io
import json
import statistics

import pytest
import torch
from torch import nn

from bench import kernels, layer, timing
from bench.kernels import ALONE, COPY, EAGER, FUSED, OURS, SEPARATE, SUMMED
from blocksched import AdamW, ops
from blocksched.extension import HAS_CPP

LAYER = layer.Size(tokens=8, d=4)
TINY = kernels.Scale(width=4, large=1000, copied=4096, rounds=3, layers=(LAYER,), sample_ms=0.01)
VARIANTS = {OURS, SUMMED, EAGER, FUSED, SEPARATE, ALONE}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a run prints, and its result file."""
    path, out = tmp_path_factory.mktemp("kernels") / "r.json", io.StringIO()
    with contextlib.redirect_stdout(out):
        assert (
            kernels.main(["--device", "cpu", "--rounds", "2", "--json-out", str(path)], TINY) == 0
        )
    text = path.read_text()
    return out.getvalue(), json.loads(text, parse_constant=lambda name: pytest.fail(name))


def test_every_model_suffix_and_variant_has_a_row(run):
    rows = run[1]["rows"]
    blocks = "18 blocks, d 4"
    suffixes = {
        (blocks, "float32"): {18, 9, 4}, (blocks, "bfloat16"): {18, 9, 4},
        ("1 block, d 4", "float32"): {1}, (kernels.SMALL, "float32"): {10},
        (kernels.SMALL, "bfloat16"): {10},
        ("one 0.001M tensor", "float32"): {1},
    }  # fmt: skip
    wanted = [(*key, k, v) for key, ks in suffixes.items() for k in ks for v in VARIANTS]
    wanted += [(*key, max(ks), COPY) for key, ks in suffixes.items()]
    found = [(r["model"], r["dtype"], r["active"], r["variant"]) for r in rows]
    assert sorted(found) == sorted(wanted)


def test_figures_follow_from_the_samples(run):
    rows = run[1]["rows"]
    by_key = {(r["model"], r["dtype"], r["active"], r["variant"]): r for r in rows}
    for row in rows:
        assert len(row["samples_ms"]) == 2
        assert row["ms"] == pytest.approx(statistics.mean(row["samples_ms"]))  # of two: the median
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / 1e9 / (row["ms"] / 1e3))
        copy = by_key[row["model"], row["dtype"], row["blocks"], COPY]
        assert row["of_copy"] == pytest.approx(row["gb_per_s"] / copy["gb_per_s"])
        if row["variant"] in (COPY, OURS, ALONE):
            assert row["ratio"] is None
            continue
        other = by_key[row["model"], row["dtype"], row["active"], kernels.AGAINST[row["variant"]]]
        (a, b), (c, d) = row["samples_ms"], other["samples_ms"]
        assert row["ratio"] == pytest.approx((a / c + b / d) / 2)


def test_the_run_says_what_it_is(run):
    printed, result = run
    assert "the Triton\nand CUDA kernels were not timed" in printed
    assert ("made to be read" in printed) == (not HAS_CPP)
    assert result["command"].startswith("python bench/kernels.py --device cpu --rounds 2")
    assert result["system"]["torch_version"] == torch.__version__
    lines = printed.splitlines()
    for row in result["rows"]:
        start = f"{row['model']:17}  {row['dtype']:8}  {row['variant']:22}"
        active, ms = f" {row['active']}/{row['blocks']} ", f" {row['ms']:.3f} "
        mine = [line for line in lines if line.startswith(start) and active in line]
        assert len(mine) == 1
        assert ms in mine[0]


HAND = [  # two blocks of 3 and 5 numbers, the second active
    (torch.float32, OURS, 5 * 28),
    (torch.float32, SUMMED, 5 * 28 + 3 * 4),
    (torch.float32, EAGER, 5 * 36 + 3 * 4),
    (torch.float32, FUSED, 5 * 28),
    (torch.float32, SEPARATE, 5 * 36 + 3 * 4),
    (torch.float32, ALONE, 5 * 8 + 3 * 4),
    (torch.float32, COPY, 7 * 8),
    (torch.bfloat16, OURS, 5 * 22),
    (torch.bfloat16, SUMMED, 5 * 22 + 3 * 2),
    (torch.bfloat16, EAGER, 5 * 18 + 3 * 2),
    (torch.bfloat16, FUSED, 5 * 14),
    (torch.bfloat16, ALONE, 5 * 4 + 3 * 2),
]


@pytest.mark.parametrize(("dtype", "variant", "moved"), HAND)
def test_bytes_by_hand(dtype, variant, moved):
    model = "two", dtype, [[(3,)], [(5,)]], (1,)
    rows = [row for row, _, _ in kernels.cases_of(model, torch.ones(7), torch.ones(7))]
    assert [row["bytes"] for row in rows if row["variant"] == variant] == [moved]


def test_the_last_blocks_are_active(monkeypatch):
    seen = []

    def variants(blocks):
        return {OURS: (lambda: seen.append([b[0].grad is not None for b in blocks]), 0, 0)}

    monkeypatch.setattr(kernels, "variants", variants)
    model = "three", torch.float32, [[(2,)], [(3,)], [(4,)]], (3, 2, 1)
    for row, activate, call in kernels.cases_of(model, torch.ones(7), torch.ones(7))[1:]:
        activate()
        call()
        assert row["numbers"] == {3: 9, 2: 7, 1: 4}[row["active"]]
    assert seen == [[True, True, True], [False, True, True], [False, False, True]]


@pytest.fixture
def two_blocks():
    """Two blocks of two parameters, the first without gradients."""
    torch.manual_seed(0)
    blocks = [[nn.Parameter(torch.randn(n)) for n in sizes] for sizes in ((3, 4), (5, 6))]
    for p in blocks[1]:
        p.grad = torch.randn_like(p)
    return blocks


def test_foreach_sums_are_those_of_block_sums(two_blocks):
    params, where = [p for block in two_blocks for p in block], [0, 0, 1, 1]
    sums = kernels.foreach_sums(params, torch.tensor(where), 2)
    wanted = ops.block_sums(params, [p.grad for p in params], where, 2, "eager")
    assert (wanted[1] > 0).all()
    # In half units of float32: 11 for squares and their sum, 2 for the root (a square doubles what
    # came before), 1 for the square, 2 for adding the tensors, and 1 that the reference has.
    torch.testing.assert_close(sums.double(), wanted, rtol=17 * 2.0**-24, atol=0.0)


@pytest.mark.parametrize("variant", sorted(VARIANTS - {ALONE}))
def test_a_variant_updates_the_active_block_alone(variant, two_blocks):
    before = [[p.detach().clone() for p in block] for block in two_blocks]
    kernels.variants(two_blocks)[variant][0]()
    moved = [
        [not torch.equal(p, q) for p, q in zip(block, old, strict=True)]
        for block, old in zip(two_blocks, before, strict=True)
    ]
    assert moved == [[False, False], [True, True]]


def test_only_the_variant_with_sums_measures(two_blocks, monkeypatch):
    asked = []
    monkeypatch.setattr(AdamW, "measure", lambda self: asked.append(self))
    compared = kernels.variants(two_blocks)
    for variant in VARIANTS - {SUMMED}:
        compared[variant][0]()
    assert asked == []
    compared[SUMMED][0]()
    assert len(asked) == 1


def test_each_round_times_each_case_once_in_another_order(monkeypatch):
    log = []

    def timed(call, _repeats, _on_gpu):
        call()
        return 2.0, 1.0

    monkeypatch.setattr(timing, "timed", timed)
    cases = [
        ({"variant": v, "active": 1, "bytes": 8}, lambda: None, lambda v=v: log.append(v))
        for v in (COPY, OURS, SUMMED)
    ]
    rows = kernels.measure(cases, TINY._replace(sample_ms=10.0), on_gpu=True)
    turns = [tuple(log[i : i + 3]) for i in range(0, 12, 3)]
    assert len(log) == 12  # one warm-up and three rounds
    assert all(set(turn) == {COPY, OURS, SUMMED} for turn in turns)
    assert len(set(turns[1:])) == 3
    assert [(row["repeats"], row["ms"], row["host_ms"]) for row in rows] == [(5, 2.0, 1.0)] * 3


def test_on_a_gpu_events_enclose_the_repeats_alone(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append(self)

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            first, last = (entry for entry in log if isinstance(entry, Event))
            assert (first, last) == (self, end)
            return 12.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("idle"))
    ms, host_ms = timing.timed(lambda: log.append("call"), 3, on_gpu=True)
    names = ["event" if isinstance(entry, Event) else entry for entry in log]
    assert names == ["call", "idle", "call", "event", "call", "call", "call", "event", "wait"]
    assert ms == 4.0
    assert 0 < host_ms < 1000


def made_up(**times):
    """Rows of the experiment's blocks as a GPU might give them, in milliseconds by variant."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        for k in (18, 9, 4):
            usual = {OURS: 100.0, SUMMED: 102.0, FUSED: 150.0, EAGER: 400.0}
            samples = {v: ms * k / 18 for v, ms in usual.items()}
            if k == 18 and dtype == "float32":
                samples |= times
            rows += [
                {
                    "model": "m", "dtype": dtype, "blocks": 18, "active": k, "variant": variant,
                    "numbers": 10 * k, "samples_ms": [ms, ms], "of_copy": 95 / ms,
                    "ratio": ms / samples[OURS],
                }
                for variant, ms in samples.items()
            ]  # fmt: skip
    return rows


@pytest.mark.parametrize(
    ("times", "failed"),
    [
        ({}, []),
        ({SUMMED: 104.0}, ["ours + sums, at most 1.03 of ours"]),
        ({FUSED: 101.0}, ["(b) torch fused, at least 1.00 of ours + sums"]),
        ({EAGER: 300.0}, ["(a) eager sums + AdamW, at least 3.00 of ours + sums"]),
        ({OURS: 107.0, SUMMED: 107.0}, ["ours + sums, at least 0.90", "ours, 9", "ours, 4"]),
    ],
)
def test_marks(times, failed):
    met = kernels.marks(made_up(**times), on_gpu=True)
    assert len(met) == 10  # two of them, those against torch, are for float32 only
    missed = [mark["mark"] for mark in met if not mark["passed"]]
    assert len(missed) == len(failed)
    for mark, words in zip(missed, failed, strict=True):
        assert mark.startswith(f"float32: {words}")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--rounds", "0"], ["--rounds", "0", "give"]),
        (["--device", "cuda:99"], ["--device", "cuda:99", "choose"]),
        (["--device", "tpu"], ["--device", "tpu", "choose"]),
        (["--json-out", "/"], ["--json-out", "/", "choose"]),
    ],
)
def test_refused_before_any_work(argv, words, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "benchmark", lambda *_: pytest.fail("measuring began"))
    assert kernels.main(argv, TINY) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert all(word in said for word in words)


LAYER_VARIANTS = [
    layer.PRODUCTS, layer.FUSED, layer.EAGER, layer.FUSED_ALONE, layer.EAGER_ALONE
]  # fmt: skip
needs_extension = pytest.mark.skipif(not HAS_CPP, reason="the extension is not built")


@needs_extension
def test_every_layer_has_its_rows(run):
    printed, result = run
    found = [(r["model"], r["dtype"], r["variant"]) for r in result["layers"]]
    dtypes = "float32", "bfloat16"
    assert found == [("8 x 4", dtype, variant) for dtype in dtypes for variant in LAYER_VARIANTS]
    for row in result["layers"]:
        assert row["flops"] == (2 if "graph" in row["variant"] else 6) * 2 * 8 * 4 * 16
        assert f"{row['ms']:.3f}" in printed
    # 8 rows of x and of hidden units and a scale each; eager: x twice, the root, its square, scales
    for rows, size in ((result["layers"][:5], 4), (result["layers"][5:], 2)):
        kept = {row["variant"]: row["kept_bytes"] for row in rows}
        assert kept[layer.FUSED] == 8 * (4 + 16) * size + 8 * 4
        assert kept[layer.EAGER] >= 8 * (2 * 4 + 2 * 16) * size


@needs_extension
def test_the_products_are_the_layers(monkeypatch):
    calls = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: calls.append(real(a, b, out=out).shape))
    x, w1, w2 = torch.ones(8, 4), torch.ones(16, 4), torch.ones(4, 16)
    layer.six_products(x, w1, w2)()
    assert calls == [(8, 16), (8, 4), (8, 16), (4, 16), (8, 4), (16, 4)]


def layer_rows(**times):
    """Rows of both layers, in milliseconds by variant; `times` are those of the small one."""
    rows = []
    for size in layer.ON_CPU:
        for dtype in ("float32", "bfloat16"):
            samples = {layer.PRODUCTS: 10.0, layer.FUSED: 11.0, layer.EAGER: 22.0}
            if size == layer.ON_CPU[0] and dtype == "float32":
                samples |= times
            rows += [
                {
                    "model": f"{size.tokens} x {size.d}", "dtype": dtype, "variant": variant,
                    "samples_ms": [ms, ms], "kept_bytes": 61 if variant == layer.FUSED else 100,
                }
                for variant, ms in samples.items()
            ]  # fmt: skip
    return rows


@pytest.mark.parametrize(
    ("times", "failed"),
    [
        ({}, []),
        ({layer.FUSED: 12.1}, ["fused, at most 1.20 of its products"]),
        ({layer.EAGER: 14.0}, ["eager, at least 1.30 of fused"]),
    ],
)
def test_layer_marks(times, failed):
    met = layer.marks(layer_rows(**times))
    assert len(met) == 10
    missed = [mark["mark"] for mark in met if not mark["passed"]]
    wanted = [f"layer 2048 x 256, float32: {words}" for words in failed]
    assert [mark for mark in missed if "kept" not in mark] == wanted
    assert sum("kept for backward, at most 0.60" in mark for mark in missed) == 4


def test_layer_marks_on_a_gpu():
    rows = [row | {"kept_bytes": 1} for row in layer_rows()]
    rows += [row | {"variant": layer.COMPILED} for row in rows if row["variant"] == layer.EAGER]
    met = layer.marks(rows)
    assert len(met) == 4 * 4
    assert {mark["low"] for mark in met} == {0.0, 1.3, 1.0, 0.85}


def test_marks_on_a_cpu():
    rows = [
        {"model": model, "dtype": dtype, "active": 1, "variant": variant, "samples_ms": [ms, ms]}
        for model in ("m", kernels.SMALL)
        for dtype, fused_ms in (("float32", 10.1), ("bfloat16", 19.9))
        for variant, ms in ((SUMMED, 10.0), (FUSED, fused_ms))
    ]
    met = kernels.marks(rows, on_gpu=False)
    assert [mark["passed"] for mark in met] == [True, False] * 2
    assert met[3]["mark"] == "1000 small, bfloat16: (b) torch fused, at least 2.00 of ours + sums"
