"""Which wraps prepare_ddp takes, what it says to the others, and what the hook sends."""

import pytest
import torch
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import blocksched as bs
from blocksched.distributed import prepare_ddp
from tests.distributed.ddp_loop import SCHEDULES, STEPS, Model, batch, loss_of, plain
from tests.distributed.pool import Pool
from tests.loops.conftest import Walk


def parts(schedule=None, wrap=True, group=None, before=None, hook=None, **options):
    """A model, wrapped after `before` saw it, its scheduler and its optimizer."""
    torch.manual_seed(0)
    model = wrapped = Model(width=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if before is not None:
        before(model)
    if wrap:
        options.setdefault("find_unused_parameters", True)
        wrapped = DistributedDataParallel(model, **options)
    if hook is not None:
        wrapped.register_comm_hook(None, hook)
    model.requires_grad_(True)
    schedule = schedule or bs.StaticSuffix(active=2)
    scheduler = bs.BlockScheduler(wrapped, optimizer, schedule, total_steps=99, group=group)
    return wrapped, scheduler, optimizer


def freeze(model):
    model.blocks[1].inner.bias.requires_grad = False


def ignore(model):
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["embed.weight"])


def too_late(_rank):
    model, *others = parts(wrap=False)
    return DistributedDataParallel(model, find_unused_parameters=True), *others


def alone(rank):
    return [distributed.new_group([0]), distributed.new_group([1])][rank]


WRONG = {
    "not wrapped": (lambda _: parts(wrap=False), "got Model: wrap it"),
    "waits for all": (
        lambda _: parts(find_unused_parameters=False),
        "find_unused_parameters=False, which waits",
    ),
    "static": (lambda _: parts(find_unused_parameters=False, static_graph=True), "static_graph=Tr"),
    "frozen in part": (lambda _: parts(before=freeze), "not reduce blocks.1.inner.bias: "),
    "ignored": (lambda _: parts(before=ignore), "not reduce embed.weight: "),
    "too late": (too_late, "not reduce embed.weight: "),
    "another model": (lambda _: (parts()[0], *parts()[1:]), "blocks.3, which are not"),
    "hooked": (lambda _: parts(hook=allreduce_hook), "communication hook allreduce_hook already"),
    "planned apart": (
        lambda rank: parts(group=alone(rank)),
        "over 2 processes, the scheduler decides over 1",
    ),
}


def message(rank, case):
    model, scheduler, _ = WRONG[case][0](rank)
    with pytest.raises(ValueError, match=": ") as error:
        prepare_ddp(model, scheduler)
    return str(error.value)


@pytest.mark.parametrize("case", WRONG)
def test_a_wrap_that_cannot_work_is_refused(case, ranks):
    for said in ranks(message, case):
        assert WRONG[case][1] in said


def train(model, scheduler, optimizer, half, steps=STEPS):
    """Weights after some steps of SGD on the batches of one rank."""
    for i in range(steps):
        loss = loss_of(model, batch(i, half))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(loss)
    return [plain(p) for p in model.parameters()]


def sent(rank, schedule):
    """Bytes that each step sent, and bytes of the parameters that trained in it."""
    model, scheduler, optimizer = parts(
        SCHEDULES[schedule](), before=lambda m: m.blocks.bfloat16(), bucket_cap_mb=0.002
    )
    traffic = prepare_ddp(model, scheduler)
    found = []
    for _ in range(STEPS):
        before = traffic.bytes
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        train(model, scheduler, optimizer, rank, steps=1)
        found.append((traffic.bytes - before, trained))
    return found


@pytest.mark.parametrize(("schedule", "sizes"), [("walk", 5), ("holes", 4)])
def test_what_trains_is_sent_and_nothing_else(schedule, sizes, ranks):
    found, other = ranks(sent, schedule)
    assert found == other
    assert len({trained for _, trained in found}) == sizes
    assert all(moved == trained for moved, trained in found)


def again(rank):
    """After one scheduler is closed the next one takes over the wrap, thawing included."""
    model, scheduler, optimizer = parts()
    traffic = prepare_ddp(model, scheduler)
    train(model, scheduler, optimizer, rank, steps=3)
    scheduler.close()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = bs.BlockScheduler(model.module, optimizer, Walk(), total_steps=99)
    assert prepare_ddp(model, scheduler) is traffic
    return train(model, scheduler, optimizer, rank)


def test_a_wrap_can_be_prepared_again(ranks):
    first, second = ranks(again)
    assert first == second


def by_ddp_itself(rank):
    model, scheduler, optimizer = parts(bs.FullUpdate(), bucket_cap_mb=0.002)
    prepare_ddp(model, scheduler)
    ours = train(model, scheduler, optimizer, rank)
    return ours == train(*parts(bs.FullUpdate(), bucket_cap_mb=0.002), rank)


def test_everything_active_gives_the_bits_of_ddp_without_a_hook(ranks):
    assert ranks(by_ddp_itself) == [True, True]


@pytest.mark.soak  # starts three processes
def test_dividing_by_three_gives_the_bits_of_ddp_too():
    pool = Pool(3)
    try:
        assert pool.run(by_ddp_itself) == [True, True, True]
    finally:
        pool.stop()


def in_groups(rank):
    """Whether a wrap over this rank alone trains as no wrap, and one over a new group of both as
    one over the default group."""
    own = alone(rank)
    model, scheduler, optimizer = parts(Walk(), group=own, process_group=own)
    assert scheduler.ranks is None
    prepare_ddp(model, scheduler)
    by_itself = train(model, scheduler, optimizer, rank) == train(
        *parts(Walk(), group=own, wrap=False), rank
    )
    weights = []
    for group in (distributed.new_group([0, 1]), None):
        model, scheduler, optimizer = parts(Walk(), group=group, process_group=group)
        prepare_ddp(model, scheduler)
        weights.append(train(model, scheduler, optimizer, rank))
    return by_itself, weights[0] == weights[1]


def test_the_wrap_may_have_a_group_of_its_own(ranks):
    assert ranks(in_groups) == [(True, True), (True, True)]
