"""The ops as torch sees them, and the sums that the optimizer hands to BlockScheduler."""

import copy

import pytest
import torch
from torch import nn

from blocksched import AdamW, BlockScheduler, DynamicSuffix, extension, ops
from blocksched.kernels.block_sums import block_sums_ref
from tests.library.test_adamw import CPP, TRITON, backends, exact_root

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
MOVING = DynamicSuffix(
    min_active=1, max_active=3, warmup_steps=2, probe_every=4, refresh_every=0,
    freeze_start_frac=0.2, relevance_threshold=0.5,
)  # fmt: skip
CHANGED = "params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "masters", "steps"
CASES = {
    "plain": {},
    "sums": {"sums": True},
    "amsgrad": {"amsgrad": True, "maximize": True},
    "masters": {"dtype": BF16, "master": True, "sums": True},
    "scaled": {"scale": 8.0, "found": 0.0, "sums": True},
    "skipped": {"dtype": F16, "scale": 8.0, "found": 1.0},
    "all at rest": {"resting": (0, 1, 2), "sums": True},
    "bfloat16 moments": {"moments": BF16},
    "nothing": {"shapes": ()},
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def place(backend):
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def arguments(
    backend, dtype=F32, moments=F32, amsgrad=False, master=False, maximize=False, scale=None,
    found=None, resting=(1,), shapes=((5, 13), (4,), (4, 16)), sums=False,
):  # fmt: skip
    """Those of torch.ops.blocksched.adamw, by name."""
    torch.manual_seed(0)
    device = place(backend)
    params = [torch.randn(shape).to(device, dtype) for shape in shapes]
    grads = [torch.randn(shape).to(device, dtype) for shape in shapes]
    return {
        "params": params,
        "grads": [None if i in resting else g for i, g in enumerate(grads)],
        "exp_avgs": [torch.zeros_like(p, dtype=moments) for p in params],
        "exp_avg_sqs": [torch.zeros_like(p, dtype=moments) for p in params],
        "max_exp_avg_sqs": [torch.zeros_like(p, dtype=F32) for p in params] if amsgrad else [],
        "masters": [p.float() for p in params] if master else [],
        "steps": [torch.tensor(2.0, device=device) for _ in params],
        "lr": torch.tensor(0.1),
        "beta1": torch.tensor(0.9),
        "beta2": torch.tensor(0.99),
        "weight_decay": 0.1,
        "eps": 1e-8,
        "maximize": maximize,
        "grad_scale": None if scale is None else torch.tensor(scale, device=device),
        "found_inf": None if found is None else torch.tensor(found, device=device),
        "seeds": list(range(len(params))) if moments == BF16 else [],
        "blocks": [0, 1, 0][: len(params)],
        "n_blocks": 2,
        "sums": sums,
        "backend": backend,
    }


@backends
@cases
def test_adamw_is_an_op_as_torch_wants_it(backend, case):
    torch.library.opcheck(torch.ops.blocksched.adamw, (), arguments(backend, **case))


@backends
@cases
def test_the_op_and_the_function_are_one(backend, case):
    runs = [arguments(backend, **case) for _ in range(2)]
    results = [torch.ops.blocksched.adamw(**runs[0]), ops.adamw(**runs[1])]
    for name in CHANGED:
        assert all(map(torch.equal, runs[0][name], runs[1][name]))
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)
    assert results[0].shape == (2 if case.get("sums") else 0, 3)


@backends
@pytest.mark.parametrize("grad_dtype", [F32, BF16])
@pytest.mark.parametrize("resting", [(), (1,), (0, 1, 2)])
def test_block_sums_is_an_op_as_torch_wants_it(backend, grad_dtype, resting):
    given = arguments(backend, resting=resting)
    grads = [None if g is None else g.to(grad_dtype) for g in given["grads"]]
    given = (given["params"], grads, given["blocks"], 2, backend)
    torch.library.opcheck(torch.ops.blocksched.block_sums, given)
    assert torch.equal(torch.ops.blocksched.block_sums(*given), ops.block_sums(*given))


@pytest.mark.parametrize("given", [(), (torch.ones(3),)], ids=["no", "one"])
def test_block_sums_refuses_a_back_end_that_is_none(given):
    for op in (ops.block_sums, torch.ops.blocksched.block_sums):
        with pytest.raises(ValueError, match=r"backend must be one of auto, .* got 'fast'"):
            op(list(given), [None] * len(given), [0] * len(given), 1, "fast")


@backends
@pytest.mark.parametrize("name", CHANGED)
def test_autograd_notices_what_was_changed(backend, name):
    given = arguments(backend, dtype=BF16, amsgrad=True, master=True)
    kept = given[name][0]
    leaf = torch.ones_like(kept, requires_grad=True)
    loss = (leaf * kept).sum()  # keeps `kept` for backward
    ops.adamw(**given)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@backends
@pytest.mark.parametrize("name", ["grads", *CHANGED])
def test_autograd_may_use_what_was_not(backend, name):
    """Gradients, and all of a parameter that had none."""
    given = arguments(backend, dtype=BF16, amsgrad=True, master=True)
    kept = given[name][0 if name == "grads" else 1]
    leaf = torch.ones_like(kept, requires_grad=True)
    loss = (leaf * kept).sum()
    ops.adamw(**given)
    loss.backward()
    assert torch.equal(leaf.grad, kept)


@backends
@pytest.mark.parametrize("case", [{"amsgrad": True}, {"dtype": BF16, "master": True, "sums": True}])
def test_in_a_compiled_function(backend, case):
    def step(given):
        given["grads"] = [None if g is None else g * 2 for g in given["grads"]]
        return torch.ops.blocksched.adamw(**given), given["params"][0] + 1

    runs = [arguments(backend, **case) for _ in range(2)]
    results = step(runs[0]), torch.compile(step, fullgraph=True, backend="aot_eager")(runs[1])
    for name in CHANGED:
        assert all(map(torch.equal, runs[0][name], runs[1][name]))
    assert all(map(torch.equal, *results))
    assert torch.equal(results[0][1], runs[0]["params"][0] + 1)


@pytest.mark.parametrize("backend", ["eager", CPP])
def test_a_compiled_step(backend):
    """AdamW hands the op, not the function, to a compiler."""
    runs = []
    for compiled in (False, True):
        params = [nn.Parameter(p) for p in arguments(backend)["params"]]
        optimizer = AdamW(params, lr=0.1, amsgrad=True, backend=backend)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for turn in range(3):
            for p in params:
                p.grad = torch.full_like(p, turn - 0.5)
            step()
        runs.append([*params, *(t for state in optimizer.state.values() for t in state.values())])
    assert all(map(torch.equal, *runs))
    assert len(runs[0]) == 5 * len(params)


def close(backend, got, want):
    """Fewer than 256 positive terms are added in another order, but for eager torch in float32: at
    most as many roundings, and twice that in a quotient of two."""
    unit = 2**-53 if backend == "eager" else 2**-24
    torch.testing.assert_close(got.to("cpu", F64), want.to("cpu", F64), rtol=512 * unit, atol=0)


@backends
def test_block_sums_of_tensors_with_gaps(backend):
    torch.manual_seed(0)
    p, g = (torch.randn(5, 26, device=place(backend))[:, ::2] for _ in range(2))
    want = block_sums_ref([p.contiguous(), p.contiguous()], [g.contiguous(), None], [0, 1], 2)
    close(backend, ops.block_sums([p, p], [g, None], [0, 1], 2, backend), want)


@backends
def test_block_sums_of_a_sparse_gradient(backend):
    p, g = (torch.randn(5, 13, device=place(backend)) for _ in range(2))
    g[2:] = 0
    want = block_sums_ref([p, p], [g, None], [0, 1], 2)
    close(backend, ops.block_sums([p, p], [g.to_sparse(), None], [0, 1], 2, backend), want)


@pytest.mark.parametrize("backend", ["eager", CPP, TRITON, "auto"])
@pytest.mark.parametrize("turned", [False, True])
def test_block_sums_are_opaque_to_autograd(backend, turned):
    p = torch.randn(5, 13, device=place(backend))
    p = nn.Parameter(p.t().contiguous().t() if turned else p)
    grads = [torch.randn(5, 13, device=place(backend)), None]
    sums = ops.block_sums([p, p], grads, [0, 1], 2, backend)
    assert not sums.requires_grad
    assert p.grad is None


def test_auto_is_cpp_on_a_cpu_that_has_it():
    """Their sums differ: eager torch adds in float64."""
    found = {}
    for backend in ("eager", "auto", *["cpp"] * extension.HAS_CPP):
        given = {**arguments("eager", shapes=((70, 50),), resting=(), sums=True), "n_blocks": 1}
        sums = [ops.block_sums(given["params"], given["grads"], [0], 1, backend)]
        sums.append(ops.adamw(**{**given, "backend": backend}))
        found[backend] = [s.tolist() for s in sums]
    assert found["auto"] == found["cpp" if extension.HAS_CPP else "eager"]
    assert (found["auto"] != found["eager"]) == extension.HAS_CPP


CHOSEN = [  # of what has C++ and Triton, for parameters of these dtypes
    ("auto", True, [F32, F64, BF16, F16], "cpp"),
    ("auto", True, [], "cpp"),
    ("auto", True, [F32, torch.complex64], "eager"),
    ("auto", True, [torch.int32], "eager"),
    ("auto", False, [F32], "eager"),
    ("cpp", True, [F32, F64, BF16, F16], "cpp"),
    ("eager", True, [F32], "eager"),
    ("eager", False, [torch.complex64], "eager"),
]


@pytest.mark.parametrize(("backend", "has_cpp", "dtypes", "chosen"), CHOSEN)
def test_what_is_chosen_on_a_cpu(monkeypatch, backend, has_cpp, dtypes, chosen):
    monkeypatch.setattr(extension, "HAS_CPP", has_cpp)
    assert ops.choose(backend, [torch.ones(3, dtype=dtype) for dtype in dtypes]) == chosen
    somewhere = [torch.ones(3), torch.ones(3, device="meta")]
    if backend == "auto":
        assert ops.choose(backend, somewhere) == "eager"


@pytest.mark.parametrize(
    ("backend", "dtype", "device", "message"),
    [
        ("fast", F32, "cpu", "backend must be one of auto, triton, cpp, eager, got 'fast'"),
        ("cpp", F32, "meta", "backend='cpp' is for parameters on the CPU, got meta: use 'auto'"),
        ("cpp", torch.complex64, "cpu", r"backend='cpp' takes .*, got torch.complex64: use 'auto'"),
        ("cpp", torch.int32, "cpu", r"backend='cpp' takes .*, got torch.int32: use 'auto'"),
    ],
)
def test_what_cannot_be_chosen(monkeypatch, backend, dtype, device, message):
    monkeypatch.setattr(extension, "HAS_CPP", True)
    tensors = [torch.ones(3), torch.ones(3, dtype=dtype, device=device)]
    with pytest.raises(ValueError, match=message):
        ops.choose(backend, tensors)


def test_cpp_cannot_be_chosen_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(extension, "HAS_CPP", False)
    monkeypatch.setattr(extension, "reason", "no compiler: get one")
    for tensors in ([], [torch.ones(3)]):
        with pytest.raises(ValueError, match="which is missing: no compiler: get one"):
            ops.choose("cpp", tensors)


SERVED = [  # by what was built: C++, CUDA, Triton; for mlp, then block_sums and adamw
    ("cpu", (True, True, True), ("C++", "C++")),
    ("cpu", (True, False, False), ("C++", "C++")),
    ("cpu", (False, False, True), ("eager", "eager")),
    ("cuda", (True, True, True), ("CUDA", "Triton")),
    ("cuda", (True, False, True), ("eager", "Triton")),
    ("cuda", (True, True, False), ("CUDA", "eager")),
]


@pytest.mark.parametrize(("device", "built", "served"), SERVED)
def test_what_serves_an_op_by_default(monkeypatch, device, built, served):
    monkeypatch.setattr(extension, "HAS_CPP", built[0])
    monkeypatch.setattr(extension, "HAS_CUDA", built[1])
    monkeypatch.setattr(ops, "HAS_TRITON", built[2])
    assert ops.backend_of("mlp", device) == served[0]
    assert {ops.backend_of(op, device) for op in ("block_sums", "adamw")} == {served[1]}


def prepared(backend, **options):
    """Two blocks, a stem, one parameter elsewhere; 1 rests after a step, 2 has no gradient ever."""
    params = [
        nn.Parameter(p) for p in arguments(backend, shapes=((5, 13), (4, 16), (7,)) * 2)["params"]
    ]
    options = {"lr": 0.1, "backend": backend, **options}
    optimizer = AdamW([{"params": params[:1], "lr": 0.5}, {"params": params[1:]}], **options)
    optimizer.set_blocks([params[:3], params[3:4]], stem=[params[4]])
    for resting in ((2,), (1, 2)):
        for i, p in enumerate(params):
            p.grad = None if i in resting else torch.randn(p.shape, device="cpu").to(p)
        if 1 not in resting:
            optimizer.step()
    blocks = [0, 0, 0, 1, -1, 2]
    return params, optimizer, block_sums_ref(params, [p.grad for p in params], blocks, 2)


@backends
def test_sums_are_those_before_the_update(backend):
    _, optimizer, want = prepared(backend)
    optimizer.measure()
    optimizer.step()
    close(backend, optimizer.block_sums, want)
    optimizer.measure()
    assert optimizer.block_sums is None


@backends
def test_sums_are_those_after_the_closure(backend):
    params, optimizer, want = prepared(backend)
    grads = [None if p.grad is None else p.grad.clone() for p in params]

    def closure():
        for p, g in zip(params, grads, strict=True):
            p.grad = g

    optimizer.zero_grad()
    optimizer.measure()
    optimizer.step(closure)
    close(backend, optimizer.block_sums, want)


@backends
def test_sums_under_a_grad_scaler(backend):
    """Of the gradients without the scale; of a skipped step they are no numbers."""
    params, optimizer, want = prepared(backend)
    scaler = torch.amp.GradScaler(place(backend), init_scale=1024.0)
    for bad in (False, True):
        for p in params:
            if p.grad is not None:
                p.grad *= scaler.scale(torch.ones((), device=p.device))
        if bad:
            params[3].grad[0] = torch.inf
        optimizer.measure()
        scaler.step(optimizer)
        scaler.update()
        if bad:
            assert optimizer.block_sums.isnan().all()
        else:
            close(backend, optimizer.block_sums, want)


def split(model):
    weights = [p for p in model.parameters() if p.ndim == 2]
    return [
        {"params": weights},
        {"params": [p for p in model.parameters() if p.ndim == 1], "lr": 0.02},
    ]


def story(model, make, closed=False, steps=8):
    """Losses, plans and states of a run; `make` builds its optimizers."""
    optimizers = make(model)
    scheduler = BlockScheduler(model, optimizers, MOVING, total_steps=20)
    told = []
    for step in range(steps):

        def closure(step=step):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = model.loss(step)
            loss.backward()
            return loss

        if closed:
            loss = optimizers[0].step(closure)
        else:
            loss = closure()
            for optimizer in optimizers:
                optimizer.step()
        told.append((loss.item(), scheduler.plan, scheduler.state))
        scheduler.step(loss)
    return told


@backends
@pytest.mark.parametrize("kind", ["one", "closure", "two, one ours"])
def test_a_scheduler_decides_as_with_the_optimizer_of_torch(tiny, backend, kind):
    def torchs(model):
        if kind == "two, one ours":
            return [torch.optim.AdamW(**group) for group in split(model)]
        return [torch.optim.AdamW(split(model))]

    def ours(model):
        if kind == "two, one ours":
            weights, biases = split(model)
            return [AdamW(**weights, backend=backend), torch.optim.AdamW(**biases)]
        return [AdamW(split(model), backend=backend)]

    with exact_root(backend):
        got = story(tiny().to(place(backend)), ours, closed=kind == "closure")
        want = story(tiny(), torchs, closed=kind == "closure")
    assert [plan for _, plan, _ in got] == [plan for _, plan, _ in want]
    assert len({plan.active for _, plan, _ in want}) == 2
    if backend != "triton":
        assert [loss for loss, _, _ in got] == [loss for loss, _, _ in want]
    read = [[torch.tensor(state.relevance_ema, dtype=F64) for *_, state in x] for x in (got, want)]
    assert sum(read[1][1]) > 0
    steps = 2 if backend == "triton" else len(want)  # then its weights have their own roundings
    for a, b in zip(read[0][:steps], read[1][:steps], strict=True):
        close("auto", a, b)  # which sums for the optimizers of torch


@backends
def test_a_probe_whose_update_was_left_out_reads_nothing(tiny, backend):
    """As users do who look at the loss first: `if loss.isfinite(): optimizer.step()`."""
    states = []
    for new in (AdamW, torch.optim.AdamW):
        model = tiny()
        model = model.to(place(backend)) if new is AdamW else model
        optimizer = new(model.parameters(), **({"backend": backend} if new is AdamW else {}))
        scheduler = BlockScheduler(model, optimizer, MOVING, total_steps=20)
        for step in range(5):
            loss = model.loss(step)
            loss.backward()
            if step == 4:
                assert scheduler.plan.probe
                before = copy.deepcopy(scheduler.state)
            else:
                optimizer.step()
            optimizer.zero_grad()
            scheduler.step(loss)
        states.append((before.relevance_ema == scheduler.state.relevance_ema, scheduler.plan))
    assert states[0] == states[1]
    assert states[1][0]
