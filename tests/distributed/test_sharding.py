"""blocksched.AdamW on DTensors is blocksched.AdamW on the whole tensors, and torch's on both."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import blocksched as bs
from blocksched import sharding
from tests.distributed.fsdp import whole

SHAPES = (6, 4), (5, 3), (1, 7), (1,), (300, 70)  # halves, uneven, empty on rank 1, two chunks
PLACEMENTS = {
    "sharded": ((2,), [Shard(0)]),
    "second dimension": ((2,), [Shard(1)]),
    "replicated": ((2,), [Replicate()]),
    "hybrid": ((1, 2), [Replicate(), Shard(0)]),
    "copies": ((2, 1), [Replicate(), Shard(0)]),
}
OPTIONS = {
    "plain": {},
    "amsgrad": {"amsgrad": True, "maximize": True},
    "masters": {"master_weights": True},
    "tensor_lr": {"lr": torch.tensor(0.05)},
}


def parameters(dtype=torch.float32, placed=None, seed=0):
    """Parameters, or gradients, drawn alike on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    if placed is None:
        return tensors
    sizes, placements = PLACEMENTS[placed]
    mesh = init_device_mesh("cpu", sizes)
    only = [
        [Replicate() if p == Shard(1) and t.dim() == 1 else p for p in placements] for t in tensors
    ]
    return [distribute_tensor(t, mesh, p) for t, p in zip(tensors, only, strict=True)]


def stepped(make, dtype, placed=None, steps=3):
    """Parameters and their optimizer after some steps, the last without gradients for one."""
    params = [nn.Parameter(p) for p in parameters(dtype, placed)]
    optimizer = make(params)
    for step in range(steps):
        for p, grad in zip(params, parameters(dtype, placed, seed=step + 1), strict=True):
            p.grad = grad
        params[step].grad = None
        optimizer.step()
    return params, optimizer


def contents(params, optimizer):
    keys = "step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param"
    state = [optimizer.state[p] for p in params]
    return [list(map(whole, params))] + [[whole(s[k]) for k in keys if k in s] for s in state]


def as_unsharded(_rank, placed, backend, dtype, option):
    def make(params):
        return bs.AdamW(params, **{"lr": 0.05, **OPTIONS[option]}, backend=backend)

    sharded, unsharded = stepped(make, dtype, placed), stepped(make, dtype)
    for p in sharded[0]:
        for key, value in sharded[1].state[p].items():
            assert isinstance(value, DTensor) is (key != "step")
            assert key == "step" or value.placements == p.placements
    return contents(*sharded) == contents(*unsharded)


@pytest.mark.parametrize(
    ("placed", "backend"),
    [
        *((placed, backend) for placed in PLACEMENTS for backend in ("cpp", "eager")),
        pytest.param("sharded", "triton", marks=pytest.mark.triton),
    ],
)
def test_shards_hold_what_the_whole_tensors_would_to_the_bit(placed, backend, ranks):
    assert ranks(as_unsharded, placed, backend, torch.float32, "plain") == [True, True]


@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, ranks):
    assert ranks(as_unsharded, "sharded", "auto", torch.bfloat16, option) == [True, True]


def as_torch(_rank):
    ours = stepped(
        lambda params: bs.AdamW(params, lr=0.05, backend="eager"), torch.float32, "sharded"
    )
    theirs = stepped(lambda params: torch.optim.AdamW(params, lr=0.05), torch.float32, "sharded")
    return contents(*ours) == contents(*theirs)


def test_as_torch_on_the_same_shards_to_the_bit(ranks):
    assert ranks(as_torch) == [True, True]


def narrow(params):
    return bs.AdamW(
        params, lr=0.05, master_weights=True, moment_dtype=torch.bfloat16, seed=7, backend="auto"
    )


def resumed(_rank, way):
    """Two steps, saved and loaded, then a third; against three steps."""
    params, optimizer = stepped(narrow, torch.bfloat16, "sharded", steps=2)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    other = narrow(copies)
    if way == "file":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=False))
    else:
        model, second = nn.ParameterList(params), nn.ParameterList(copies)
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
        set_optimizer_state_dict(second, other, saved)
    for some, stepping in ((params, optimizer), (copies, other)):
        for p, grad in zip(some, parameters(torch.bfloat16, "sharded", seed=9), strict=True):
            p.grad = grad
        stepping.step()
    assert all(other.state[p]["exp_avg"].dtype == torch.bfloat16 for p in copies)
    return contents(params, optimizer) == contents(copies, other)


@pytest.mark.parametrize("way", ["file", "state_dict"])
def test_narrow_moments_and_master_weights_resume_to_the_bit(way, ranks):
    assert ranks(resumed, way) == [True, True]


def measured(_rank, placed, backend):
    """Sums of this rank's shards: two blocks, one of which never had a gradient."""
    params, grads = (parameters(torch.float32, placed, seed) for seed in (0, 1))
    params = [nn.Parameter(p) for p in params]
    optimizer = bs.AdamW(params, lr=0.05, backend=backend)
    optimizer.set_blocks([params[:2], params[2:]])
    for p, grad in zip(params[:2], grads, strict=False):
        p.grad = grad
    optimizer.measure()
    optimizer.step()
    return optimizer.block_sums.tolist()


@pytest.mark.parametrize("backend", ["cpp", "eager"])
@pytest.mark.parametrize("placed", ["sharded", "hybrid"])
def test_measured_are_the_shards_of_each_rank(placed, backend, ranks):
    """Up to the float32 of sums of some thousand terms that eager takes."""
    first, second = (torch.tensor(sums) for sums in ranks(measured, placed, backend))
    assert (first[:, 2] > 0).all()
    assert (second[:, 2] > 0).all()
    pairs = [
        (p.double(), g.double()) for p, g in zip(parameters(), parameters(seed=1), strict=True)
    ]
    sums = [[(p * g).abs().sum(), g.square().sum(), p.square().sum()] for p, g in pairs]
    expected = torch.tensor(sums)
    expected[2:, :2] = 0  # had no gradient
    expected = torch.stack([expected[:2].sum(0), expected[2:].sum(0)])
    torch.testing.assert_close(first + second, expected, rtol=1e-5, atol=0.0, check_dtype=False)


def partial(_rank, make):
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
    optimizer = make([p])
    p.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    with pytest.raises(RuntimeError, match=r"Replicate.*Partial.*redistribute"):
        optimizer.step()
    assert whole(p) == [1.0] * 4


def test_a_gradient_that_was_not_reduced_is_refused(ranks):
    ranks(partial, bs.AdamW)


def counted(_rank):
    placed = {name: sharding.copies(parameters(placed=name)[0], 2) for name in PLACEMENTS}
    several = sharding.copies(parameters(placed="sharded")[0], 6), sharding.copies(torch.ones(1), 6)
    with pytest.raises(ValueError, match=r"sharded over 2 ranks.* 3: pass group="):
        sharding.copies(parameters(placed="sharded")[0], 3)
    return placed, several


def test_copies(ranks):
    placed = {"sharded": 1, "second dimension": 1, "replicated": 2, "hybrid": 1, "copies": 2}
    assert ranks(counted) == [(placed, (3, 6))] * 2
