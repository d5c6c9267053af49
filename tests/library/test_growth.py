"""A run that grows is, to the bit, plain models trained one after the other, each with copies."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn

import blocksched as bs
from blocksched.schedules.grow import Grow
from tests.conftest import TinyModel
from tests.library.checkpoint_loop import DYNAMIC, Loop
from tests.loops.conftest import equal

N, STEPS = 8, 12
ENDS = (3, 6)  # steps at which two blocks become four, and four eight
OPTIMIZERS = {
    "torch": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "ours": lambda p: bs.AdamW(p, lr=0.01, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
}
COPIES = {
    "stack": lambda blocks, _: [*blocks, *(copy.deepcopy(b) for b in blocks)],
    "interleave": lambda blocks, _: [x for b in blocks for x in (b, copy.deepcopy(b))],
    "none": lambda blocks, built: [*blocks, *built[len(blocks) : 2 * len(blocks)]],
}


def clock(kind="stack", **numbers):
    return Grow(blocks=(2, 4), until=tuple(end / STEPS for end in ENDS), copy=kind, **numbers)


class ByHand:
    """A plain model of as many blocks as run, made anew by hand at each growth."""

    def __init__(self, model, kind, make):
        self.kind, self.make = kind, make
        self.model = copy.deepcopy(model)
        self.built = list(self.model.blocks)
        self.model.blocks = nn.ModuleList(self.built[i] for i in slots(kind, 2))
        self.optimizer = make(self.model.parameters())

    def grow(self):
        old = list(self.model.blocks)
        self.model.blocks = nn.ModuleList(COPIES[self.kind](old, self.built))
        others = [b for b in old for _ in range(2)] if self.kind == "interleave" else old
        origins = {
            p: q
            for new, block in zip(self.model.blocks, itertools.cycle(others), strict=False)
            for p, q in zip(new.parameters(), block.parameters(), strict=True)
        }
        before, self.optimizer = self.optimizer, self.make(self.model.parameters())
        for p in self.model.parameters():
            origin = p if self.kind == "none" else origins.get(p, p)
            if origin in before.state:
                self.optimizer.state[p] = copy.deepcopy(before.state[origin])

    def train(self, step, autocast):
        loss = backward(self.model, step, autocast)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def backward(model, step, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model.loss(step)
    loss.backward()
    return loss


def slots(kind, depth):
    return list(range(0, N, N // depth)) if kind == "interleave" else list(range(depth))


def states(optimizer, module):
    return [optimizer.state[p] for p in module.parameters()]


def lockstep(model, kind, make, schedule, *, autocast=False, steps=STEPS):
    """Train under grow and by hand; weights, buffers and states are compared after every step."""
    hand = ByHand(model, kind, make)
    start = copy.deepcopy(model.blocks)
    optimizer = make(model.parameters())
    scheduler = bs.BlockScheduler(model, optimizer, schedule, total_steps=STEPS)
    for step in range(steps):
        if step in ENDS:
            hand.grow()
        depth = 2 ** (1 + sum(step >= end for end in ENDS))
        chosen = slots(kind, depth)
        loss = backward(model, step, autocast)
        assert torch.equal(loss, hand.train(step, autocast))
        optimizer.step()
        optimizer.zero_grad()
        for own, slot in zip(hand.model.blocks, chosen, strict=True):
            assert equal(own.state_dict(), model.blocks[slot].state_dict()), (step, slot)
            assert equal(states(hand.optimizer, own), states(optimizer, model.blocks[slot]))
        assert torch.equal(hand.model.embed.weight, model.embed.weight)
        assert torch.equal(hand.model.head.weight, model.head.weight)
        for i in set(range(N)) - set(chosen):
            assert equal(model.blocks[i].state_dict(), start[i].state_dict())
            assert all(p not in optimizer.state for p in model.blocks[i].parameters())
        scheduler.step(loss)
    return scheduler


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_stage_is_the_plain_model_of_its_blocks(tiny, name, kind):
    model = tiny(n=N, norm=True)
    scheduler = lockstep(model, kind, OPTIMIZERS[name], clock(kind))
    assert scheduler.plan.running is None
    scheduler.close()


def test_the_step_of_a_growth_and_the_loss_after_it(tiny):
    """Nothing but copies: at full depth the model is the small one's blocks, again and again."""
    model = tiny(n=N)
    optimizer = OPTIMIZERS["torch"](model.parameters())
    scheduler = bs.BlockScheduler(
        model, optimizer, Grow(blocks=(2,), until=(0.5,)), total_steps=STEPS
    )
    for step in range(6):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        if step == 5:
            built = copy.deepcopy(model)
            built.blocks = nn.ModuleList([built.blocks[0], built.blocks[1]] * 4)
        scheduler.step()
    assert scheduler.plan.running is None
    assert torch.equal(model.loss(7), built.loss(7))
    assert torch.equal(model.eval().loss(7), built.eval().loss(7))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", ["compiled", "checkpoint", "reentrant", "autocast"])
def test_so_it_is(tiny, kind):
    model = tiny(n=N)
    if kind == "compiled":
        bs.compile_blocks(model, backend="eager")
    if kind in ("checkpoint", "reentrant"):
        model.reentrant = kind == "reentrant"
    lockstep(model, "stack", OPTIMIZERS["ours"], clock(), autocast=kind == "autocast")


def test_close_leaves_a_plain_model(tiny):
    model = tiny(n=N)
    scheduler = lockstep(model, "stack", OPTIMIZERS["torch"], clock(), steps=4)
    plain = TinyModel(n=N)
    plain.load_state_dict(model.state_dict())
    assert not torch.equal(model.loss(9), plain.loss(9))
    scheduler.close()
    assert torch.equal(model.loss(9), plain.loss(9))
    assert all(p.requires_grad for p in model.parameters())


BY_LOSS = Grow(blocks=(1, 2), until=(0.6, 0.7), when="loss", window=3, gain=0.9)
THEN = Grow(blocks=(1, 2), until=(0.1, 0.3), then=DYNAMIC)
SCHEDULES = {
    "clock": Grow(blocks=(1, 2), until=(0.2, 0.5)),
    "interleave": Grow(blocks=(1, 2), until=(0.2, 0.5), copy="interleave"),
    "none": Grow(blocks=(1, 2), until=(0.2, 0.5), copy="none"),
    "loss": BY_LOSS,
    "then": THEN,
    "loss, then": Grow(blocks=(2,), until=(0.4,), when="loss", window=2, gain=0.9, then=DYNAMIC),
}


class Run:
    """A loop whose whole state is saved and loaded."""

    def __init__(self, tiny, schedule, *, number):
        self.model = tiny()
        self.optimizer = bs.AdamW(self.model.parameters(), lr=0.05)
        self.scheduler = bs.BlockScheduler(self.model, self.optimizer, schedule, total_steps=24)
        self.number = number

    def step(self):
        plan = self.scheduler.plan
        loss = backward(self.model, self.scheduler.progress.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step(loss.item() if self.number else loss)
        weights = torch.cat([p.detach().flatten() for p in self.model.parameters()])
        return loss.item(), plan, weights.numpy().tobytes()

    def save(self):
        parts = self.model, self.optimizer, self.scheduler
        file = io.BytesIO()
        torch.save([part.state_dict() for part in parts], file)
        return file

    def load(self, file):
        file.seek(0)
        saved = torch.load(file)
        for part, state in zip((self.model, self.optimizer, self.scheduler), saved, strict=True):
            part.load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "number"), [*((name, False) for name in SCHEDULES), ("loss", True)]
)
def test_resume_at_every_step_is_the_uninterrupted_run(tiny, name, number):
    straight = Run(tiny, SCHEDULES[name], number=number)
    files, story = [], []
    for _ in range(24):
        files.append(straight.save())
        story.append(straight.step())
    for cut, file in enumerate(files):
        resumed = Run(tiny, SCHEDULES[name], number=number)
        resumed.load(file)
        for expected in story[cut : cut + 2]:
            assert resumed.step() == expected, f"stopped before step {cut}"


def test_late_losses_decide_as_those_at_hand(tiny):
    for schedule in SCHEDULES.values():
        stories = []
        for number in (False, True):
            run = Run(tiny, schedule, number=number)
            stories.append([run.step() for _ in range(24)])
        assert stories[0] == stories[1]
    depths = [len(plan.running or range(4)) for _, plan, _ in stories[0]]
    assert depths.index(4) < 0.4 * 24  # it grew by the loss


@pytest.mark.parametrize("name", ["loss", "then"])
def test_checkpoints_of_a_whole_run(tmp_path, name):
    straight, story = Loop(schedule=SCHEDULES[name]), []
    for step in range(18):
        straight.save(tmp_path / str(step), step)
        story.append((*straight.step(), straight.state()))
    plans = [plan for _, plan, _ in story]
    growths = [step for step, plan in enumerate(plans) if plan.sources]
    assert len(growths) == 2
    for cut in {0, *(step + i for step in growths for i in (-1, 0, 1))}:
        resumed = Loop(schedule=SCHEDULES[name])
        assert resumed.load(tmp_path / str(cut)).step == cut
        for expected in story[cut : cut + 2]:
            assert (*resumed.step(), resumed.state()) == expected, f"stopped before step {cut}"


def test_after_growth_the_next_schedule_freezes(tiny):
    run = Run(tiny, THEN, number=False)
    plans = [run.step()[1] for _ in range(24)]
    assert [len(plan.running or range(4)) for plan in plans[:8]] == [1] * 3 + [2] * 5
    later = plans[8:]
    assert all(plan.running is None for plan in later)
    assert {plan.active[0] for plan in later} >= {0, 2}
    assert any(plan.probe for plan in later)
