"""Times of blocks, by a clock that the blocks themselves move."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import blocksched as bs
from blocksched import times
from blocksched.blocks import find_blocks
from blocksched.schedules.payoff import Payoff
from blocksched.times import BlockTimes

CPU = torch.device("cpu")


class Clock:
    """In the place of the module `time`."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(times, "time", made)
    return made


class Takes(torch.autograd.Function):
    """The identity, which takes `forward` and `backward` seconds."""

    @staticmethod
    def forward(ctx, x, clock, forward, backward):
        ctx.clock, ctx.backward_s = clock, backward
        clock.now += forward
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.clock.now += ctx.backward_s
        return grad, None, None, None


class Block(nn.Module):
    """Residual; takes 1, 2, 3 .. ms forward and ten times that backward, by its number."""

    def __init__(self, i, clock):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.i, self.clock = i, clock

    def forward(self, x, scale=1.0):
        ms = 1e-3 * (self.i + 1)
        inner = self.inner(scale * Takes.apply(x, self.clock, ms, 0.0))
        return x + Takes.apply(inner, self.clock, 0.0, 10 * ms)


class Model(nn.Module):
    def __init__(self, n, clock, around=lambda block, x: block(x)):
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block(i, clock) for i in range(n))
        self.head = nn.Linear(4, 4)
        self.clock, self.around = clock, around

    def forward(self, x):
        x = Takes.apply(self.stem(x), self.clock, 0.5, 0.7)
        for block in self.blocks:
            x = self.around(block, x)
        return Takes.apply(self.head(x), self.clock, 0.2, 0.9)


def step(model, times, measure=True, batches=1):
    times.expect(measure)
    for _ in range(batches):
        model(torch.randn(3, 4)).square().sum().backward()
    return times.read()


def near(found, forward, backward):
    assert found[0] == pytest.approx(forward), found
    assert found[1] == pytest.approx(backward), found


def measured(model):
    return BlockTimes(find_blocks(model), CPU)


def test_each_blocks_own_time(clock):
    model = Model(3, clock)
    times = measured(model)
    near(step(model, times), [1, 2, 3], [10, 20, 30])
    assert step(model, times, measure=False) is None
    near(step(model, times, batches=2), [2, 4, 6], [20, 40, 60])


def test_a_stem_without_gradient(clock):
    model = Model(2, clock)
    model.stem.requires_grad_(False)
    near(step(model, measured(model), batches=2), [2, 4], [20, 40])


def test_blocks_called_with_keywords_that_return_tuples(clock):
    class Tuples(Block):
        def forward(self, x, scale):
            return {"mask": None, "hidden": (super().forward(x, scale),)}

    model = Model(2, clock, around=lambda block, x: block(x=x, scale=2.0)["hidden"][0])
    for i in range(2):
        model.blocks[i] = Tuples(i, clock)
    near(step(model, measured(model)), [1, 2], [10, 20])


def test_checkpointing_counts_as_backward(clock):
    around = lambda block, x: checkpoint(block, x, use_reentrant=False)  # noqa: E731
    model = Model(3, clock, around)
    near(step(model, measured(model)), [1, 2, 3], [11, 22, 33])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_what_is_not_seen_whole_gives_nothing(clock):
    reentrant = Model(2, clock, lambda block, x: checkpoint(block, x, use_reentrant=True))
    assert step(reentrant, measured(reentrant)) is None
    model = Model(3, clock, lambda block, x: x if block.i == 1 else block(x))
    assert step(model, measured(model)) is None
    model = Model(2, clock)
    times = measured(model)
    times.expect(True)
    model(torch.randn(3, 4))
    assert times.read() is None
    model.eval()
    assert step(model, times) is None


def test_forwards_beside_the_step_do_not_count(clock):
    model = Model(2, clock)
    times = measured(model)
    times.expect(True)
    with torch.no_grad():
        model(torch.randn(3, 4))
    model(torch.randn(3, 4)).sum().backward()
    near(times.read(), [1, 2], [10, 20])


def test_copies_are_plain_and_hooks_only_there_while_measuring(clock):
    model = Model(2, clock)
    times = measured(model)
    times.expect(True)
    for made in (copy.deepcopy(model.blocks), pickle.loads(pickle.dumps(model.blocks))):
        made[0](torch.randn(3, 4)).sum().backward()
    assert times.read() is None
    near(step(model, times), [1, 2], [10, 20])
    times.expect(False)
    for block in model.blocks:
        assert not block._forward_hooks
        assert not block._forward_pre_hooks


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_blocks():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.inner(x)

    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleList(Plain() for _ in range(2)))
    bs.compile_blocks(model, "1", backend="aot_eager")
    times = measured(model)
    times.expect(True)
    x = model[0](torch.randn(3, 4))
    for block in model[1]:
        x = block(x)
    x.sum().backward()
    forward, backward = times.read()
    assert min(*forward, *backward) > 0


def test_payoff_reads_them_in_a_loop(clock):
    model = Model(4, clock)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = Payoff(freeze_start_frac=0.0, outside=0.0)
    scheduler = bs.BlockScheduler(model, optimizer, schedule, total_steps=20)
    torch.manual_seed(0)
    for _ in range(6):
        before = [block.inner.weight.detach().clone() for block in model.blocks]
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = [
            i for i, block in enumerate(model.blocks) if not block.inner.weight.equal(before[i])
        ]
        assert moved == list(scheduler.state.active)  # on a probe too, where all have gradients
        scheduler.step()
    assert scheduler.reading.forward_ms == pytest.approx([1, 2, 3, 4])
    assert scheduler.state.backward_ms == pytest.approx((10, 20, 30, 40))
    assert moved != [0, 1, 2, 3]
    assert not scheduler.plan.probe
    scheduler.close()
    assert not model.blocks[0]._forward_hooks
