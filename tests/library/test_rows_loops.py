"""Blocks on some rows in training loops: checkpointing, autocast, scaling, compiled blocks, resume,
and what is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import blocksched as bs
from blocksched.blocks import find_blocks
from blocksched.rows import Rows
from blocksched.schedules.row_suffix import RowSuffix
from tests.conftest import TinyModel


def wrap(model, lower=3, share=0.5):
    rows = Rows(find_blocks(model))
    rows.apply(lower, share, 0)
    return rows


def gradients(model, loss=None):
    model.zero_grad()
    (model.loss(0) if loss is None else loss).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


class Dropping(nn.Module):
    """Dropout before a block."""

    def __init__(self, block):
        super().__init__()
        self.block, self.drop = block, nn.Dropout(0.5)

    def forward(self, x):
        return self.block(self.drop(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_rows_and_the_same_dropout(tiny, reentrant):
    plain = tiny()
    plain.blocks = nn.ModuleList(map(Dropping, plain.blocks))
    model = copy.deepcopy(plain)
    model.reentrant = reentrant
    expected, got = [], []
    for each, seen in ((plain, expected), (model, got)):
        wrap(each)
        torch.manual_seed(1)
        # Two forwards before their backwards: what is run again is not of the last one only.
        seen.append(gradients(each, each.loss(0) + each.loss(1)))
    assert all(torch.equal(got[0][name], grad) for name, grad in expected[0].items())


def test_a_checkpoint_around_several_blocks_and_the_boundary(tiny):
    plain, model = tiny(), tiny()

    def segments(tokens):
        x = model.embed(tokens)
        for a, b in ((0, 1), (1, 4)):
            x = checkpoint(nn.Sequential(*model.blocks[a:b]), x, use_reentrant=False)
        return model.head(x)

    model.forward = segments
    wrap(plain), wrap(model)
    expected = gradients(plain)
    assert all(torch.equal(gradients(model)[name], grad) for name, grad in expected.items())


def test_checkpointing_runs_only_the_chosen_rows_again(tiny):
    model, sizes = tiny(), []
    model.reentrant = False
    wrap(model, lower=1, share=1 / 3)
    model.blocks[0].inner.register_forward_hook(lambda _m, args, _o: sizes.append(len(args[0])))
    model.loss(0).backward()
    assert sizes == [2, 4, 2]


def test_autocast_keeps_the_graph_of_its_casts(tiny):
    """Were the rows without a graph first, the cast weights would be kept without one."""
    model = tiny()
    wrap(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(0)
    assert all(grad.abs().max() > 0 for grad in gradients(model, loss).values())


def test_a_grad_scaler_takes_its_scale_out_again(tiny):
    model, scaled = tiny(), tiny()
    for each in (model, scaled):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.5)
        scheduler = bs.BlockScheduler(each, optimizer, RowSuffix(active=1, rows=0.5), total_steps=4)
        scaler = torch.amp.GradScaler("cpu", enabled=each is scaled, init_scale=2.0**10)
        for step in range(4):
            optimizer.zero_grad()
            loss = each.loss(step)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step(loss)
    # A power of two costs no bit.
    assert all(map(torch.equal, model.state_dict().values(), scaled.state_dict().values()))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_blocks(tiny):
    plain, model = tiny(), tiny()
    bs.compile_blocks(model, backend="aot_eager")
    wrap(plain), wrap(model)
    torch.testing.assert_close(gradients(model), gradients(plain))


def test_blocks_are_compiled_first_or_not_at_all(tiny):
    model = tiny()
    wrap(model)
    with pytest.raises(ValueError, match="call compile_blocks before what replaces it"):
        bs.compile_blocks(model)


def run(steps, saved=None):
    """Weights and losses after each step; the state is saved after step 3."""
    torch.manual_seed(0)
    model = TinyModel()
    optimizer = bs.AdamW(model.parameters(), lr=0.05)
    schedule = RowSuffix(active=1, rows=0.5)
    scheduler = bs.BlockScheduler(model, optimizer, schedule, total_steps=9)
    parts, kept, seen = (model, optimizer, scheduler), None, []
    if saved is not None:
        for part, state in zip(parts, saved, strict=True):
            part.load_state_dict(state)
    for step in steps:
        if step == 4:
            kept = copy.deepcopy([part.state_dict() for part in parts])
        for micro in range(2):
            (model.loss(2 * step + micro) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        seen.append([p.tolist() for p in model.parameters()])
    return seen, kept


def test_resume_is_exact():
    whole, saved = run(range(9))
    assert run(range(4, 9), saved)[0] == whole[4:]


class Odd(nn.Module):
    """A block that is called, and answers, in an odd way."""

    def __init__(self, answer=lambda x, *_: x):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.answer = answer

    def forward(self, *args):
        inner = self.inner(args[0]) if isinstance(args[0], torch.Tensor) else self.inner.bias.sum()
        return self.answer(inner, *args[1:])


class Line(nn.Module):
    """Two blocks, the first of which is odd."""

    def __init__(self, first):
        super().__init__()
        self.blocks = nn.ModuleList([first, Odd()])

    def forward(self, *args):
        return self.blocks[0](*args)


X = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((2.0,), "block blocks.0 is given no tensor, so there are no rows to choose from"),
        ((X, object()), "block blocks.0 is given a object, of which row_suffix cannot run some"),
        ((torch.ones(3, 3, 4), torch.ones(3, 3)), r"is given \(3, 3, 4\) and \(3, 3\), where no"),
        ((X, torch.ones(3).requires_grad_()), r"is given \(3, 4\) and \(3,\), where no"),
    ],
)
def test_calls_that_cannot_be_taken_apart(args, message):
    model = Line(Odd())
    wrap(model, lower=1)
    with pytest.raises(ValueError, match=message):
        model(*args)


@pytest.mark.parametrize(
    ("first", "second"),
    [((1, 1, 4), (1, 1)), ((3, 4), (3,)), ((3, 4), (3, 2)), ((3, 3, 4), (3, 1, 3, 3))],
)
def test_what_is_given_by_rows_comes_back_by_rows(first, second):
    model = Line(Odd(lambda x, mask: (x, mask)))
    wrap(model, lower=1)
    mask = torch.rand(second)
    assert torch.equal(model(torch.ones(first), mask)[1], mask)


def test_outputs_without_rows_are_those_of_the_chosen():
    class Named(dict):
        pass

    model = Line(Odd(lambda x: {"x": (x, None), "rows": len(x), "mean": x.mean()}))
    wrap(model, lower=1, share=0.67)
    out = model(X)
    assert (out["x"][0].shape, out["x"][1], out["rows"], out["mean"].shape) == ((3, 4), None, 2, ())
    model.blocks[0].answer = lambda x: Named(x=x)
    with pytest.raises(ValueError, match=r"block blocks\.0 gives a Named, of which row_suffix"):
        model(X)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.BatchNorm1d(4), r"blocks.0.odd normalises over the rows .* use a LayerNorm"),
        (nn.MultiheadAttention(4, 1), r"blocks.0.odd has the rows .* batch_first=True"),
    ],
)
def test_modules_that_cannot_run_on_some_rows(module, message):
    model = Line(Odd())
    model.blocks[0].odd = module
    wrap(model, lower=0)
    with pytest.raises(ValueError, match=message):
        wrap(model, lower=1)


def test_a_block_that_feeds_more_than_the_next(tiny):
    """From the last of the lower blocks it may: there the gradient is scaled."""
    model = tiny()

    def skipping(i):
        def forward(tokens):
            x = model.embed(tokens)
            for j, block in enumerate(model.blocks):
                x = block(x)
                if i == j:
                    skip = x
            return model.head(x + skip)

        return forward

    rows = wrap(model, lower=2)
    model.forward = skipping(1)
    model.loss(0).backward()
    rows.close()
    rows.apply(2, 0.5, 0)
    model.forward = skipping(0)
    with pytest.raises(RuntimeError, match=r"what block blocks\.0 gives is used elsewhere"):
        model.loss(0).backward()
