"""A model whose blocks are skipped is the model of those that run."""

import copy
import io
import pickle
import weakref
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import blocksched as bs
from blocksched.skip import Skips

RUNNING = [(0,), (0, 1), (0, 2), (0, 1, 3), (0, 2, 3)]


def skipped(model, running, blocks=None):
    skips = Skips(bs.find_blocks(model, blocks))
    skips.apply(running)
    return skips


def cut(model, running, name="blocks"):
    """A plain copy of the model with only the blocks `running`."""
    plain = copy.deepcopy(model)
    blocks = plain.get_submodule(name)
    setattr(
        plain.get_submodule(name.rpartition(".")[0]),
        name.rpartition(".")[2],
        nn.ModuleList(blocks[i] for i in running),
    )
    return plain


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("running", RUNNING)
def test_output_and_gradients_are_those_of_the_running_blocks(tiny, running, mode):
    model = getattr(tiny(), mode)()
    plain = cut(model, running)
    skipped(model, running)
    loss, expected = model.loss(0), plain.loss(0)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    got = gradients(model)
    assert {key.split(".")[1] for key in got if "blocks" in key} == set(map(str, running))
    assert all(map(torch.equal, got.values(), gradients(plain).values()))


def test_applying_is_absolute_and_close_leaves_the_plain_model(tiny):
    model = tiny()
    plain = copy.deepcopy(model)
    before = set(vars(model.blocks[1]))
    skips = skipped(model, (0,))
    skips.apply((0, 2))
    assert torch.equal(model.loss(0), cut(plain, (0, 2)).loss(0))
    skips.apply(None)
    assert torch.equal(model.loss(0), plain.loss(0))
    skips.apply((0,))
    skips.close()
    assert torch.equal(model.loss(0), plain.loss(0))
    assert set(vars(model.blocks[1])) - before <= {"_compiled_call_impl"}


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: saved_and_loaded(model),
    ],
)
def test_copies_and_pickles_are_the_plain_model(tiny, duplicate):
    model = tiny()
    plain = copy.deepcopy(model)
    skipped(model, (0, 2))
    assert torch.equal(duplicate(model).loss(0), plain.loss(0))


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Giving(nn.Module):
    """A block that gives what `shape` says of its hidden state and a bias made by block 0."""

    def __init__(self, shape, first):
        super().__init__()
        self.inner, self.shape = nn.Linear(8, 8), shape
        self.bias = nn.Parameter(torch.randn(8)) if first else None

    def forward(self, x, bias=None):
        bias = self.bias.exp() if bias is None else bias
        return self.shape(x + (self.inner(x) + bias).tanh(), bias)


class Handing(nn.Module):
    """Hands the bias on from block to block, as T5 does."""

    def __init__(self, shape, named=False):
        super().__init__()
        self.blocks = nn.ModuleList(Giving(shape, i == 0) for i in range(4))
        self.named = named

    def forward(self, x):
        bias = None
        for block in self.blocks:
            output = block(x=x, bias=bias) if self.named else block(x, bias)
            x, bias = output[0], output[1]
        return x * bias

    def loss(self, step):
        return self(torch.randn(3, 8, generator=torch.Generator().manual_seed(step))).square().sum()


class Pair(NamedTuple):
    x: torch.Tensor
    bias: torch.Tensor


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("shape", [lambda *out: out, Pair, lambda *out: (*out, None)])
def test_what_else_a_block_gives_comes_from_the_running_block_below(shape, named):
    torch.manual_seed(0)
    model = Handing(shape, named)
    for running in RUNNING:
        plain = cut(model, running)
        skips = skipped(model, running)
        loss, expected = model.loss(0), plain.loss(0)
        assert torch.equal(loss, expected)
        loss.backward()
        expected.backward()
        got = gradients(model)
        assert all(map(torch.equal, got.values(), gradients(plain).values()))
        model.zero_grad()
        skips.close()


@pytest.mark.parametrize("running", [(0,), (0, 2)])
def test_nothing_is_kept_beyond_the_forward(running):
    model = Handing(lambda *out: out)
    skipped(model, running)
    kept = []
    for i in running:
        model.blocks[i].register_forward_hook(
            lambda _m, _a, out: kept.extend(weakref.ref(t) for t in out)
        )
    loss = model.loss(0)
    assert len(kept) == 2 * len(running)
    del loss
    assert [ref() for ref in kept] == [None] * len(kept)


def test_nothing_is_kept_of_what_a_checkpoint_computes_once_more():
    model = Checkpointed(lambda *out: out)
    skipped(model, (0, 2))
    kept = []
    model.blocks[0].register_forward_hook(
        lambda _m, _a, out: kept.extend(weakref.ref(t) for t in out)
    )
    with set_checkpoint_early_stop(False):
        model.loss(0).backward()
    assert len(kept) == 4
    assert [ref() for ref in kept] == [None] * 4


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("running", RUNNING)
def test_activation_checkpointing(tiny, running, reentrant):
    model = tiny()
    plain = cut(model, running)
    skipped(model, running)
    model.reentrant = reentrant
    for step in range(2):
        model.zero_grad()
        plain.zero_grad()
        model.loss(step).backward()
        plain.loss(step).backward()
        assert all(map(torch.equal, gradients(model).values(), gradients(plain).values()))


class Checkpointed(Handing):
    """Each block under checkpointing of one kind."""

    reentrant = False

    def forward(self, x):
        bias = None
        for block in self.blocks:
            x, bias = checkpoint(block, x, bias, use_reentrant=self.reentrant)
        return x * bias


def test_checkpointing_of_blocks_that_hand_on_more():
    torch.manual_seed(0)
    model = Checkpointed(lambda *out: out)
    plain = cut(model, (0, 2))
    skipped(model, (0, 2))
    model.loss(0).backward()
    plain.loss(0).backward()
    assert all(map(torch.equal, gradients(model).values(), gradients(plain).values()))
    model.reentrant = True
    x = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"without block blocks\.2 .*use_reentrant=False"):
        model(x).sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_blocks_run_compiled_and_are_skipped_plain(tiny):
    counter = CompileCounter()
    model = tiny()
    plain = cut(model, (0, 2))
    bs.compile_blocks(model, backend=counter)
    skips = skipped(model, (0, 2))
    assert torch.equal(model.loss(0), plain.loss(0))
    before = counter.frame_count
    skips.apply((0, 1, 2))
    assert torch.equal(model.loss(0), cut(tiny(), (0, 1, 2)).loss(0))
    assert counter.frame_count == before > 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.usefixtures("fresh_compiler")
def test_a_block_compiled_by_torch_is_given_back(tiny):
    model = tiny()
    model.blocks[0].compile(backend="eager")
    model.blocks[1].compile(backend="eager")
    before = [block._compiled_call_impl for block in model.blocks]
    skips = skipped(model, (0, 2))
    assert torch.equal(model.loss(0), cut(tiny(), (0, 2)).loss(0))
    skips.close()
    assert [block._compiled_call_impl for block in model.blocks] == before
