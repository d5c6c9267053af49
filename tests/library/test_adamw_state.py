"""What AdamW keeps: checkpoints, from torch's and to them, copies, and nothing after an error."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from blocksched import AdamW, extension
from tests.library.test_adamw import CPP, backends, exact_root

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
AMSGRAD = [{"amsgrad": False}, {"amsgrad": True}]
EXTRAS = [  # dtype of the weights, options, names in a parameter's state beside torch's
    (F32, {}, set()),
    (BF16, {"amsgrad": True}, {"max_exp_avg_sq"}),
    (BF16, {"master_weights": True}, {"master_param"}),
    (F32, {"moment_dtype": BF16, "seed": 7}, set()),
    (F16, {"moment_dtype": BF16, "seed": 7, "master_weights": True}, {"master_param"}),
]  # fmt: skip
extras = pytest.mark.parametrize(
    ("dtype", "options", "names"), EXTRAS, ids=[f"{d} {o}" for d, o, _ in EXTRAS]
)


def weights(backend="eager", dtype=F32):
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(device, dtype)) for shape in ((5, 13), (4, 16))]


def groups(params):
    other = {"betas": (0.8, 0.9), "weight_decay": 0.5}
    return [{"params": params[:1]}, {"params": params[1:], **other}]


def train(optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator).to(p)
        optimizer.step()
    return optimizer


def saved(optimizer):
    """The state as a new process would read it: plain data."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(some, others):
    """Lists, dictionaries, numbers and tensors with their dtypes: equal to the bit."""
    torch.testing.assert_close(some, others, rtol=0, atol=0)


@backends
@pytest.mark.parametrize("options", AMSGRAD)
def test_the_state_of_torch_and_nothing_more(backend, options):
    got = train(AdamW(groups(weights(backend)), backend=backend, **options), range(2)).state_dict()
    want = train(torch.optim.AdamW(groups(weights()), **options), range(2)).state_dict()
    assert got["param_groups"] == want["param_groups"]
    assert got["state"].keys() == want["state"].keys()
    for i, state in want["state"].items():
        assert list(got["state"][i]) == list(state)
        for name, value in state.items():
            ours = got["state"][i][name]
            assert (ours.shape, ours.dtype) == (value.shape, value.dtype)


@pytest.mark.parametrize("backend", ["eager", CPP])
@pytest.mark.parametrize("options", AMSGRAD)
def test_from_torch_to_ours_and_back(backend, options):
    params, straight = weights(), weights()
    optimizer, other = (torch.optim.AdamW(groups(x), lr=0.1, **options) for x in (params, straight))
    for start, ours in enumerate((False, True, True, False)):
        state = saved(optimizer)
        optimizer = (
            AdamW(groups(params), backend=backend) if ours else torch.optim.AdamW(groups(params))
        )
        optimizer.load_state_dict(state)
        with exact_root(backend):
            train(optimizer, range(3 * start, 3 * start + 3))
            train(other, range(3 * start, 3 * start + 3))
        same(params, straight)
        same(optimizer.state_dict(), other.state_dict())


@backends
@extras
def test_a_resumed_run_goes_on_to_the_bit(backend, dtype, options, names):
    straight, params = weights(backend, dtype), weights(backend, dtype)
    other = train(AdamW(groups(straight), 0.1, backend=backend, **options), range(6))
    first = train(AdamW(groups(params), 0.1, backend=backend, **options), range(3))
    state = saved(first)
    assert set(state["state"][0]) == {"step", "exp_avg", "exp_avg_sq"} | names
    assert ("seed" in state["param_groups"][0]) == ("seed" in options)
    again = AdamW(groups(params), backend=backend, **{**options, "seed": 0})
    again.load_state_dict(state)
    train(again, range(3, 6))
    same(params, straight)
    same(again.state_dict(), other.state_dict())


@backends
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_all_options(backend, copied):
    dtype, options, names = EXTRAS[-1]
    optimizer = train(AdamW(groups(weights(backend, dtype)), backend=backend, **options), range(2))
    twin = copied(optimizer)
    late = torch.ones(3).to(optimizer.param_groups[0]["params"][0])
    for each in (optimizer, twin):
        each.add_param_group({"params": [nn.Parameter(late.clone())]})
        train(each, range(2, 4))
    same(twin.state_dict(), optimizer.state_dict())
    same(*([p for group in x.param_groups for p in group["params"]] for x in (twin, optimizer)))
    assert twin.backend == backend
    twin.zero_grad()
    twin.param_groups[0]["params"][0].grad = grad = torch.ones(5, 13).to(late)
    scaler = torch.amp.GradScaler(late.device.type)
    scaler.scale(late)
    scaler.step(twin)
    assert (grad == 1).all()  # the update unscales, not the scaler
    assert names < set(twin.state_dict()["state"][2])


@backends
def test_the_seed_decides_the_rounding(backend):
    def moments(seed):
        options = {"moment_dtype": BF16, "seed": seed, "backend": backend}
        state = train(AdamW(weights(backend), **options), range(2)).state_dict()["state"]
        return [state[i]["exp_avg"] for i in (0, 1)]

    same(moments(3), moments(3))
    assert not any(map(torch.equal, moments(3), moments(4)))


STEPS = 4, 4.0, torch.tensor([4.0]), torch.tensor(4), torch.tensor(4.0, dtype=F64)


@backends
@pytest.mark.parametrize("step", STEPS, ids=repr)
def test_a_step_count_of_any_kind(backend, step):
    params, straight = weights(backend), weights(backend)
    other = train(AdamW(straight, backend=backend), range(4))
    state = saved(other)
    with torch.no_grad():
        for p, q in zip(params, straight, strict=True):
            p.copy_(q)
    for entry in state["state"].values():
        entry["step"] = copy.deepcopy(step)
    optimizer = AdamW(params, backend=backend)
    optimizer.load_state_dict(state)
    train(optimizer, range(4, 6))
    train(other, range(4, 6))
    same(params, straight)
    assert optimizer.state[params[0]]["step"] == 6
    assert optimizer.state[params[0]]["step"].dtype == F32


@pytest.mark.cuda
@pytest.mark.triton
def test_a_checkpoint_from_the_cpu():
    params = weights("triton")
    state = train(torch.optim.AdamW(weights()), range(2)).state_dict()
    optimizer = AdamW(params)
    optimizer.load_state_dict(state)
    train(optimizer, range(2, 3))
    assert all(x.is_cuda for entry in optimizer.state.values() for x in entry.values())
    assert optimizer.state[params[0]]["step"] == 3


def test_moments_of_narrow_weights_stay_float32():
    params = weights(dtype=BF16)
    state = train(AdamW(params), range(3)).state_dict()
    kept = copy.deepcopy(state)
    assert not torch.equal(kept["state"][0]["exp_avg"], kept["state"][0]["exp_avg"].bfloat16())
    optimizer = AdamW(params)
    optimizer.load_state_dict(state)
    same(optimizer.state_dict(), kept)
    narrow = train(torch.optim.AdamW(weights(dtype=BF16)), range(3)).state_dict()
    optimizer.load_state_dict(narrow)
    for name in ("exp_avg", "exp_avg_sq"):
        same(optimizer.state[params[0]][name], narrow["state"][0][name].float())


def test_what_a_run_has_no_use_for_is_not_kept():
    """Masters that nobody updates would come back in the next run that uses them."""
    params = weights(dtype=BF16)
    state = saved(train(AdamW(params, master_weights=True), range(2)))
    optimizer = AdamW(params)
    optimizer.load_state_dict(state)
    assert "master_param" not in optimizer.state_dict()["state"][0]


@pytest.mark.parametrize("when", ["pre", "post"])
def test_hooks_on_loading_have_their_say(when):
    state = saved(train(AdamW(weights()), range(2)))
    found = []
    for new in (AdamW, torch.optim.AdamW):
        params = weights()
        optimizer = new(params)

        def before(_optimizer, state):
            state = copy.deepcopy(state)
            state["state"][0]["exp_avg"].zero_()
            return state

        def after(optimizer, params=params):
            optimizer.state[params[0]]["exp_avg"] = torch.zeros_like(params[0])

        if when == "pre":
            optimizer.register_load_state_dict_pre_hook(before)
        else:
            optimizer.register_load_state_dict_post_hook(after)
        optimizer.load_state_dict(copy.deepcopy(state))
        found.append(optimizer.state_dict())
    same(*found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "fast"}, "backend must be one of auto, triton, cpp, eager, got 'fast'"),
        ({"differentiable": True}, "got differentiable=True: use torch.optim.AdamW"),
        ({"moment_dtype": F16}, r"must be torch.bfloat16 or .*float32, got torch.float16: \w+"),
        ({"seed": -1}, r"seed must be an integer, 0 .. 2147483647, got -1: \w+"),
        ({"seed": 2**31}, r"seed must be an integer, 0 .. 2147483647, got 2147483648: \w+"),
        ({"seed": 0.5}, r"seed must be .*, got 0.5"),
    ],
)
def test_options_that_are_refused(options, message):
    """The rule, the value, the remedy."""
    with pytest.raises(ValueError, match=message):
        AdamW(weights(), **options)


def test_cpp_without_the_extension(monkeypatch):
    """Refused before the first step; "auto" does without."""
    monkeypatch.setattr(extension, "HAS_CPP", False)
    monkeypatch.setattr(extension, "reason", "no compiler: get one")
    message = "backend='cpp' needs the extension, which is missing: no compiler: get one"
    with pytest.raises(ValueError, match=message):
        AdamW(weights(), backend="cpp")
    some, others = weights(), weights()
    train(AdamW(some), range(2))
    train(AdamW(others, backend="eager"), range(2))
    same(some, others)


def test_complex_parameters_are_refused():
    bad = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    message = "real parameters, got torch.complex64: pass torch.view_as_real"
    with pytest.raises(ValueError, match=message):
        AdamW([*weights(), bad])
    optimizer = AdamW(weights())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [bad]})
    same(optimizer.state_dict(), before)


@pytest.mark.parametrize("option", [{"differentiable": True}, {"seed": -1}])
def test_options_of_a_group_are_refused_too(option):
    with pytest.raises(ValueError, match="|".join(option)):
        AdamW([{"params": weights(), **option}], moment_dtype=BF16)


def make_sparse(p):
    p.grad = p.grad.to_sparse()


def make_wide(p):
    p.grad = None
    p.grad_dtype = F64
    p.grad = torch.ones_like(p, dtype=F64)


FAULTS = [
    (make_sparse, "sparse gradients: use torch.optim.SparseAdam"),
    (make_wide, r"dtype torch.float32, got torch.float64: leave grad_dtype"),
]


@backends
@pytest.mark.parametrize(("spoil", "message"), FAULTS)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("split", [False, True])
def test_a_refused_gradient_leaves_all_as_it_was(backend, spoil, message, steps, split):
    """Though only the last parameter has it, be it in a group of its own or not."""
    params = weights(backend)
    optimizer = AdamW(groups(params) if split else params, backend=backend)
    train(optimizer, range(steps))
    for p in params:
        p.grad = torch.ones_like(p)
    spoil(params[-1])
    before = copy.deepcopy((params, optimizer.state_dict()))
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    same((params, optimizer.state_dict()), before)


MISFITS = [
    ("step", torch.Tensor.long),
    ("exp_avg", torch.Tensor.double),
    ("exp_avg", torch.Tensor.half),
    ("exp_avg_sq", torch.Tensor.bfloat16),
    ("max_exp_avg_sq", lambda t: t[1:]),
    ("master_param", lambda t: t[:, 1:]),
]


@pytest.mark.parametrize("backend", [CPP])
@pytest.mark.parametrize(("name", "make"), MISFITS)
def test_a_refused_state_leaves_all_as_it_was(backend, name, make):
    """As a hand may have changed it; that of the last parameter alone."""
    params = weights(backend, BF16)
    optimizer = AdamW(params, backend=backend, amsgrad=True, master_weights=True)
    train(optimizer, range(2))
    state = optimizer.state[params[-1]]
    state[name] = make(state[name])
    before = copy.deepcopy((params, optimizer.state_dict()))
    with pytest.raises(RuntimeError, match=f"{name} must .*: load the state with load_state_dict"):
        optimizer.step()
    same((params, optimizer.state_dict()), before)


@pytest.mark.triton
@pytest.mark.parametrize("split", [False, True])
def test_float64_is_not_for_triton_and_leaves_all_as_it_was(split):
    params = weights("triton")
    params[-1] = nn.Parameter(params[-1].detach().double())
    for p in params:
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(params)
    with pytest.raises(ValueError, match=r"float16, got torch.float64: use 'auto'"):  # noqa: PT012
        optimizer = AdamW(groups(params) if split else params, backend="triton")
        optimizer.step()
    same(params, before)
