"""Blocks compiled one by one: graphs are counted, weights compared with the plain run."""

import importlib
import shutil
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from blocksched import FusedMLP, compile_blocks
from blocksched.blocks import find_blocks
from blocksched.mechanism import Mechanism

N = 12
MOVES = (0, 6, 3, 11, 0, 1, 5)  # the first active block, step by step

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.usefixtures("fresh_compiler"),
]


class Stack(nn.Module):
    """Blocks of FusedMLP."""

    def __init__(self, n=N, width=16):
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.blocks = nn.ModuleList(FusedMLP(width) for _ in range(n))
        self.head = nn.Linear(width, 16)

    def loss(self, step):
        x = tokens(16, (2, 6), step)
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return nn.functional.cross_entropy(self.head(h).float().flatten(0, 1), x.flatten())


def tokens(count, shape, step):
    return torch.randint(count, shape, generator=torch.Generator().manual_seed(step))


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=N, n_embd=16, n_head=2, vocab_size=16, n_positions=8, use_cache=False,
        resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).train()
    model.loss = lambda step: model(x := tokens(16, (2, 8), step), labels=x).loss
    return model


@pytest.fixture
def make(tiny):
    """Builds a model of a kind, the same on every call."""

    def build(kind):
        makes = {
            "plain": lambda: tiny(n=N), "norm": lambda: tiny(n=N, norm=True),
            "tied": lambda: tiny(n=N, tied=True), "fused": Stack, "gpt2": gpt2,
        }  # fmt: skip
        torch.manual_seed(0)
        return makes[kind]()

    return build


def run(model, count, *, autocast=False):
    """Train through MOVES and evaluate; graphs after each step, and losses of the evaluation."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    mechanism = Mechanism(find_blocks(model))
    graphs, losses = [], []
    for step, boundary in enumerate(MOVES):
        mechanism.apply(range(boundary, N))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model.loss(step).backward()
        mechanism.check(range(N))
        optimizer.step()
        optimizer.zero_grad()
        mechanism.check_all()
        graphs.append(count())
    model.eval()
    for boundary in (0, 6, 3):
        mechanism.apply(range(boundary, N))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses.append(model.loss(99).item())
        graphs.append(count())
    return graphs, losses


@pytest.mark.parametrize(
    ("kind", "autocast"),
    [
        ("plain", False), ("norm", False), ("tied", True), ("fused", False), ("fused", True),
        ("gpt2", True),
    ],
)  # fmt: skip
def test_three_graphs_for_any_boundary_and_the_weights_of_the_plain_run(kind, autocast, make):
    model, plain = make(kind), make(kind)
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(model, backend=counter, fullgraph=True)
    graphs, losses = run(model, lambda: counter.frame_count, autocast=autocast)
    assert graphs == [1] + [3] * (len(MOVES) - 1) + [4, 5, 5]  # 1: all active; 2 in evaluation
    assert losses == run(plain, lambda: 0, autocast=autocast)[1]
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_dropout_draws_as_in_the_plain_run(make):
    """The prefix too, as the same numbers go on for the blocks above it."""
    runs = []
    for compiled in (False, True):
        model = make("plain")
        for block in model.blocks:
            block.norm = nn.Dropout(0.2)
        if compiled:
            compile_blocks(model, backend="aot_eager")
        torch.manual_seed(1)
        runs.append((run(model, lambda: 0), model.state_dict()))
    (_, plain), (_, ours) = runs
    assert all(torch.equal(plain[name], value) for name, value in ours.items())


def test_shapes_that_come_later_hit_no_limit(make):
    """Other sizes, a row alone among them, in training and evaluation: 8 graphs would not do."""
    model = make("plain")
    counter = CompileCounter()
    compile_blocks(model, backend=counter, fullgraph=True)
    mechanism = Mechanism(find_blocks(model))

    def forwards(size):
        for train in (True, False):
            model.train(train)
            for boundary in (0, 6, 3, 11):
                mechanism.apply(range(boundary, N))
                with torch.set_grad_enabled(train):
                    model(tokens(16, (size,), boundary))

    for size in (6, 1, 5):
        forwards(size)
    assert counter.frame_count > 8
    with torch.compiler.set_stance("fail_on_recompile"):
        forwards(4)
        forwards(1)


def test_blocks_that_differ_have_graphs_of_their_own_and_hit_no_limit(make):
    model = make("plain")
    counter = CompileCounter()
    for i, block in enumerate(model.blocks):
        block.norm = nn.Dropout(i / N)
    compile_blocks(model, backend=counter, fullgraph=True)
    mechanism = Mechanism(find_blocks(model))
    for _ in range(2):
        mechanism.apply(range(N))
        model.loss(0)
        assert counter.frame_count == N


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_trains_as_the_plain_run(tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._inductor.compile_fx")  # its import warns
    model, plain = tiny(n=3), tiny(n=3)
    compile_blocks(model)
    for each in (model, plain):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        mechanism = Mechanism(find_blocks(each))
        for boundary in (0, 2, 1, 0):
            mechanism.apply(range(boundary, 3))
            each.loss(boundary).backward()
            mechanism.check_all()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
