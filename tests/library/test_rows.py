"""The lowest blocks on some rows: gradients that average to the full ones, at what they cost."""

import copy
import functools
import itertools
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import blocksched.rows
from blocksched import BlockScheduler
from blocksched.blocks import find_blocks
from blocksched.rows import Rows
from blocksched.schedules.row_suffix import RowSuffix
from tests.conftest import TinyModel

B = 6  # rows of TinyModel's batch


def wrap(model, lower, share, step=0):
    rows = Rows(find_blocks(model))
    rows.apply(lower, share, step)
    return rows


def gradients(model, step=0):
    model.zero_grad()
    model.loss(step).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def choose(monkeypatch, chosen):
    """Have every draw give the rows `chosen`."""
    rest = [row for row in range(B) if row not in chosen]
    drawn = torch.tensor(chosen), torch.tensor(rest, dtype=torch.long)
    monkeypatch.setattr(blocksched.rows._Draw, "__call__", lambda *_: drawn)


MODELS = {
    "plain": {},
    "tied": {"tied": True},
    "reentrant": {"reentrant": True},
    "non-reentrant": {"reentrant": False},
}


@pytest.fixture
def make(tiny):
    def build(reentrant=None, **arguments):
        model = tiny(**arguments).double()
        model.reentrant = reentrant
        return model

    return build


@pytest.mark.parametrize("lower", [1, 3, 4])
@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("kind", MODELS)
def test_the_gradient_averages_to_the_full_one(make, monkeypatch, kind, m, lower):
    """Over all choices of m of 6 rows, each as likely as the others: exactly, but for rounding.

    Gradients are below 1, so their sums of 15 at most are right to about 15 x 2**-53.
    """
    model = make(**MODELS[kind])
    full = gradients(model)
    wrap(model, lower, m / B)
    choices = list(itertools.combinations(range(B), m))
    seen = []
    for chosen in choices:
        choose(monkeypatch, chosen)
        seen.append(gradients(model))
    for name, exact in full.items():
        each = torch.stack([grads[name] for grads in seen])
        torch.testing.assert_close(each.mean(0), exact, rtol=0, atol=1e-14)
        part = name.split(".")
        above = part[0] == "head" or (part[0] == "blocks" and int(part[1]) >= lower)
        if above and not (kind == "tied" and part[0] == "head"):
            torch.testing.assert_close(each, exact.expand_as(each), rtol=0, atol=1e-15)
        else:
            assert (each - exact).abs().max() > 1e-3


@pytest.mark.parametrize("m", [1, 2, 4])
def test_every_choice_is_as_likely(m):
    """Pearson's statistic over 30 steps for each choice stays below the quantile 1 - 1e-6."""
    draw, counts = blocksched.rows._Draw(), {}
    for step in range(30 * math.comb(B, m)):
        draw.begin(m / B, step)
        rows, rest = draw(B, torch.device("cpu"))
        assert sorted([*rows.tolist(), *rest.tolist()]) == list(range(B))
        assert (rows.tolist(), rest.tolist()) == (sorted(rows.tolist()), sorted(rest.tolist()))
        counts[tuple(rows.tolist())] = counts.get(tuple(rows.tolist()), 0) + 1
    statistic = sum((c - 30) ** 2 / 30 for c in counts.values())
    assert {len(chosen) for chosen in counts} == {m}
    assert len(counts) == math.comb(B, m)
    assert statistic < {5: 37.0, 14: 55.0}[math.comb(B, m) - 1]


@pytest.mark.parametrize(
    ("share", "count", "chosen"),
    [(1e-9, 5, 1), (0.25, 8, 2), (0.25, 1, 1), (0.6, 4, 2), (1.0, 3, 3)],
)
def test_how_many_rows_are_chosen(share, count, chosen):
    draw = blocksched.rows._Draw()
    draw.begin(share, 7)
    rows, rest = draw(count, torch.device("cpu"))
    assert (len(rows), len(rest)) == (chosen, count - chosen)


def test_other_steps_draw_other_rows():
    model = TinyModel()
    rows, seen = wrap(model, 2, 0.5), []
    for step in (0, 1, 0):
        rows.apply(2, 0.5, step)
        seen.append(gradients(model)["blocks.0.inner.weight"])
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(("active", "rows"), [(1, 0.5), (2, 0.25), (3, 1.0), (4, 0.25)])
def test_what_a_step_computes(active, rows):
    """n + 2 k + 2 rows (n - k) products of a block over its 8 rows, and 3 of the head."""
    model = TinyModel(width=16)
    wrap(model, 4 - active, rows)
    tokens = torch.arange(8)
    with FlopCounterMode(display=False) as counter:
        nn.functional.cross_entropy(model(tokens), tokens).backward()
    product = 2 * 8 * 16 * 16
    lower = 4 - active
    assert counter.get_total_flops() == (4 + 2 * active + 2 * rows * lower + 3) * product


def test_what_is_kept_for_backward():
    """A tenth of the rows of all but one block: of the activations little more is kept."""

    def kept(model):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.setdefault(t.data_ptr(), (t.numel(), t))[1], lambda t: t
        ):
            model.blocks(torch.randn(400, 16, requires_grad=True))
        weights = {p.data_ptr() for p in model.parameters()}
        return sum(size for at, (size, _) in sizes.items() if at not in weights)

    model = TinyModel(n=5, width=16)
    model.blocks = nn.Sequential(*model.blocks)
    full = kept(model)
    wrap(model, 4, 0.1)
    assert kept(model) < full * (1 + 4 * 0.1) / 5 + 8 * 400


def test_forwards_give_what_the_plain_model_gives(tiny):
    model, plain = tiny(), tiny()
    wrap(model, 3, 0.5)
    torch.testing.assert_close(model.loss(0), plain.loss(0))
    assert torch.equal(model.eval().loss(0), plain.loss(0))


def test_evaluation_runs_whole_batches(tiny):
    model, sizes = tiny(), []
    wrap(model, 3, 0.5)
    model.blocks[0].inner.register_forward_hook(lambda _m, args, _o: sizes.append(len(args[0])))
    model.loss(0)
    model.eval().loss(0)
    assert sizes == [3, 3, 6]


def test_hooks_on_the_blocks_see_whole_batches(tiny):
    model, sizes = tiny(), []
    wrap(model, 3, 0.5)
    for block in model.blocks:
        block.register_forward_hook(lambda _m, args, out: sizes.append((len(args[0]), len(out))))
    model.loss(0)
    assert sizes == [(B, B)] * 4


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_plain_models(tiny, how):
    model, plain = tiny(), tiny()
    rows = wrap(model, 3, 0.5)
    copied = how(model)
    rows.close()  # what a copy still shared would be seen
    wrap(model, 4, 0.1)
    for name, exact in gradients(plain).items():
        assert torch.equal(gradients(copied)[name], exact)
    assert set(vars(copied.blocks[0])) <= {*vars(plain.blocks[0]), "forward"}


def test_close_leaves_the_plain_model(tiny):
    model, plain = tiny(), tiny()
    model.blocks[1].forward = functools.partial(type(model.blocks[1]).forward, model.blocks[1])
    own = model.blocks[1].forward
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = BlockScheduler(model, optimizer, RowSuffix(active=1), total_steps=4)
    assert model.blocks[1].forward is not own
    scheduler.close()
    assert model.blocks[1].forward is own
    assert "forward" not in vars(model.blocks[0])
    assert all(torch.equal(g, gradients(plain)[name]) for name, g in gradients(model).items())


def test_fewer_lower_blocks_later(tiny):
    model, sizes = tiny(), []
    for block in model.blocks:
        block.inner.register_forward_hook(lambda _m, args, _o: sizes.append(len(args[0])))
    rows = wrap(model, 2, 0.5)
    for lower in (2, 1, 0, 1):
        rows.apply(lower, 0.5, 0)
        model.loss(0)
    three = [3, 3, 6, 6, 6]
    assert sizes == [3, 3, 3, 3, 6, 6, *three, 6, 6, 6, 6, *three]


def test_a_block_is_taken_over_once(tiny):
    model = tiny()
    rows = wrap(model, 2, 0.5)
    stand_in = model.blocks[0].forward
    rows.apply(2, 0.25, 1)
    assert model.blocks[0].forward is stand_in
