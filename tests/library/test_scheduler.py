"""BlockScheduler in training loops as people write them."""

import copy
import json
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import blocksched.scheduler
import blocksched.updates
from blocksched import BlockScheduler, DynamicSuffix, FullUpdate, StaticSuffix

MOVING = DynamicSuffix(
    min_active=1, max_active=3, warmup_steps=2, probe_every=4, refresh_every=0,
    freeze_start_frac=0.2, relevance_threshold=0.5,
)  # fmt: skip
GATED = DynamicSuffix(
    min_active=1, max_active=2, warmup_steps=0, probe_every=10, refresh_every=0,
    freeze_start_step=8, require_stable=True, stability_window=2, stability_rel_change=9.0,
    stability_cv=9.0,
)  # fmt: skip


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def one_step(model, optimizer, scheduler, step):
    loss = model.loss(step)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step(loss)
    return loss.item()


def test_full_update_changes_nothing(tiny):
    model, plain = tiny(), tiny()
    optimizer, other = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(plain.parameters())
    scheduler = BlockScheduler(model, optimizer, FullUpdate(), total_steps=5)
    for step in range(5):
        loss = plain.loss(step)
        loss.backward()
        other.step()
        other.zero_grad()
        assert one_step(model, optimizer, scheduler, step) == loss.item()
    assert scheduler.done
    assert scheduler.fraction == 1.0


def test_dynamic_with_all_blocks_always_active_is_full_update_to_the_bit(tiny):
    model, plain = tiny(), tiny()
    everything = DynamicSuffix(min_active=4, warmup_steps=1, probe_every=2, adapt_budget=True)
    runs = []
    for each, schedule in ((model, everything), (plain, FullUpdate())):
        optimizer = torch.optim.AdamW(each.parameters())
        scheduler = BlockScheduler(each, optimizer, schedule, total_steps=12)
        runs.append([one_step(each, optimizer, scheduler, step) for step in range(12)])
    assert runs[0] == runs[1]


def test_a_dynamic_run_freezes_probes_and_moves_what_it_says(tiny):
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    scheduler = BlockScheduler(model, optimizer, MOVING, total_steps=20)
    sizes = []
    for step in range(20):
        active = scheduler.plan.active
        before = [block.inner.weight.clone() for block in model.blocks]
        one_step(model, optimizer, scheduler, step)
        moved = [
            i for i, block in enumerate(model.blocks)
            if not torch.equal(block.inner.weight, before[i])
        ]  # fmt: skip
        assert moved == list(active)
        sizes.append(len(active))
    assert sizes[:5] == [4] * 5
    assert all(size == 4 for size in sizes[::4])
    assert min(sizes) < 4


def test_relevance_is_of_the_gradient_and_the_weights_before_the_update(tiny):
    model = tiny()
    schedule = DynamicSuffix(
        min_active=1, relevance_metric="saliency_abs_gp", ema_decay=0.0, warmup_steps=1
    )
    optimizer = sgd(model)
    scheduler = BlockScheduler(model, optimizer, schedule, total_steps=9)
    by_hand = copy.deepcopy(model)
    by_hand.loss(0).backward()
    want = [
        sum((p.grad.double() * p.double()).abs().sum().item() for p in block.parameters())
        for block in by_hand.blocks
    ]
    one_step(model, optimizer, scheduler, 0)
    assert scheduler.state.relevance_ema == pytest.approx(want, rel=1e-6)


def test_one_copy_to_the_host_per_probe_and_none_besides(tiny, monkeypatch):
    copies = []
    real = blocksched.scheduler._to_host

    def counted(tensors):
        if tensors:
            copies.append(len(tensors))
        return real(tensors)

    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default, "the host waited"
            return func(*args, **(kwargs or {}))

    measured = []
    sums = blocksched.updates.block_sums
    monkeypatch.setattr(
        blocksched.updates, "block_sums", lambda *given: measured.append(1) or sums(*given)
    )
    monkeypatch.setattr(blocksched.scheduler, "_to_host", counted)
    model = tiny()
    optimizer = sgd(model)
    scheduler = BlockScheduler(model, optimizer, MOVING, total_steps=40)
    for step in range(12):
        probe, before = scheduler.plan.probe, len(copies)
        loss = model.loss(step)
        with NoReads():
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step(loss)
        assert len(copies) - before == int(probe)
        assert len(measured) == len(copies)  # what is not asked for is not measured


def test_the_gate_reads_losses_only_once_it_is_pending_and_then_the_last_2w(tiny, monkeypatch):
    copies = []
    real = blocksched.scheduler._to_host
    monkeypatch.setattr(
        blocksched.scheduler,
        "_to_host",
        lambda tensors: copies.append(len(tensors)) or real(tensors),
    )
    model = tiny()
    optimizer = sgd(model)
    scheduler = BlockScheduler(model, optimizer, GATED, total_steps=30)
    losses = []
    for step in range(7):
        losses.append(one_step(model, optimizer, scheduler, step))
    assert copies == [2]  # the probe of step 0: its loss and the sums
    losses.append(one_step(model, optimizer, scheduler, 7))
    assert copies == [2, 4]  # two windows of two
    assert scheduler.plan.freezing
    assert len(losses) == 8


def test_the_loss_is_copied_before_the_user_changes_it_in_place(tiny):
    model = tiny()
    optimizer = sgd(model)
    scheduler = BlockScheduler(model, optimizer, GATED, total_steps=30)
    seen = []
    for step in range(6):
        loss = model.loss(step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
        scheduler.step(loss)
        loss.detach().mul_(0.0)
    assert [float(loss) for _, loss in scheduler.state_dict()["pending"]] == seen[-4:]


def test_floats_and_tensors_lead_to_the_same_plans(tiny):
    stories = []
    for convert in (float, lambda loss: loss):
        model = tiny()
        optimizer = sgd(model)
        scheduler = BlockScheduler(model, optimizer, GATED, total_steps=30)
        story = []
        for step in range(30):
            loss = model.loss(step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step(convert(loss.detach()))
            story.append(scheduler.plan)
        stories.append((story, scheduler.state))
    assert stories[0] == stories[1]
    assert {len(plan.active) for plan in stories[0][0]} == {2, 4}


def test_accumulation_reads_the_gradient_the_update_uses(tiny):
    model, whole = tiny(), tiny()
    schedule = DynamicSuffix(min_active=1, warmup_steps=9, ema_decay=0.0)
    states = []
    for each, parts in ((model, 2), (whole, 1)):
        optimizer = sgd(each)
        scheduler = BlockScheduler(each, optimizer, schedule, total_steps=9)
        for step in range(3):
            for _ in range(parts):
                (each.loss(step) / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step(1.0)
        states.append(scheduler.state)
    assert states[0].relevance_ema == pytest.approx(states[1].relevance_ema, rel=1e-5)


def test_accumulation_with_a_moving_boundary_and_a_late_first_micro_batch(tiny):
    model = tiny()
    optimizer = sgd(model)
    scheduler = BlockScheduler(model, optimizer, MOVING, total_steps=20)
    for step in range(20):
        for part in range(3):
            (model.loss(3 * step + part) / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(1.0)


def test_a_closure_is_measured_after_it_ran(tiny):
    states = []
    for closed in (False, True):
        model = tiny()
        optimizer = sgd(model)
        scheduler = BlockScheduler(model, optimizer, MOVING, total_steps=20)
        for step in range(6):

            def closure(model=model, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = model.loss(step)
                loss.backward()
                return loss

            if closed:
                loss = optimizer.step(closure)
            else:
                loss = closure()
                optimizer.step()
            scheduler.step(loss)
        states.append(scheduler.state)
    assert states[0] == states[1]
    assert sum(states[0].relevance_ema) > 0


def test_several_optimizers_share_a_block(tiny):
    model, single = tiny(), tiny()
    weights = [p for p in model.parameters() if p.ndim == 2]
    biases = [p for p in model.parameters() if p.ndim == 1]
    pair = [torch.optim.SGD(weights, lr=0.1), torch.optim.SGD(biases, lr=0.1)]
    several = BlockScheduler(model, pair, MOVING, total_steps=20)
    optimizer = sgd(single)
    one = BlockScheduler(single, optimizer, MOVING, total_steps=20)
    for step in range(20):
        loss = model.loss(step)
        loss.backward()
        for each in pair:
            each.step()
            each.zero_grad()
        several.step(loss)
        one_step(single, optimizer, one, step)
    assert several.state.relevance_ema == pytest.approx(one.state.relevance_ema)
    assert all(torch.equal(a, b) for a, b in zip(
        model.parameters(), single.parameters(), strict=True))  # fmt: skip


class Scaled:
    """A GradScaler on the CPU that scales by 1024 and can be told to see an infinity."""

    def __init__(self):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6)

    def step(self, model, optimizer, scheduler, step, overflow=False):
        loss = model.loss(step)
        self.scaler.scale(loss).backward()
        if overflow:
            model.head.weight.grad.fill_(float("inf"))
        self.scaler.step(optimizer)
        self.scaler.update(1024.0)
        optimizer.zero_grad()
        scheduler.step(loss)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_relevance_is_unscaled_and_a_skipped_step_is_no_error(tiny, fused):
    plain, model = tiny(), tiny()
    runs = []
    for each in (plain, model):
        optimizer = torch.optim.AdamW(each.parameters(), fused=fused)
        runs.append((each, optimizer, BlockScheduler(each, optimizer, MOVING, total_steps=40)))
    scaled = Scaled()
    for step in range(2):
        one_step(*runs[0], step)
        scaled.step(*runs[1], step)
    want, got = runs[0][2].state, runs[1][2].state
    assert got.relevance_ema == pytest.approx(want.relevance_ema, rel=1e-5)
    scheduler = runs[1][2]
    scaled.step(*runs[1], 2)
    scaled.step(*runs[1], 3)
    assert scheduler.plan.probe
    before = scheduler.state
    weights = copy.deepcopy(model.state_dict())
    scaled.step(*runs[1], 4, overflow=True)
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert scheduler.state.not_finite == before.not_finite + 1
    assert scheduler.state.relevance_ema == before.relevance_ema
    assert scheduler.plan.probe  # the lost probe is made up for
    scaled.step(*runs[1], 5)
    assert scheduler.state.relevance_ema != before.relevance_ema


def test_a_step_that_was_skipped_between_probes_is_no_error(tiny):
    model = tiny()
    optimizer = sgd(model)
    scheduler = BlockScheduler(model, optimizer, StaticSuffix(active=2), total_steps=40)
    scaled = Scaled()
    scaled.step(model, optimizer, scheduler, 0, overflow=True)
    scaled.step(model, optimizer, scheduler, 1)
    assert scheduler.progress.step == 2


def test_a_forgotten_optimizer_step_is_an_error(tiny):
    model = tiny()
    optimizer = sgd(model)
    scheduler = BlockScheduler(model, optimizer, FullUpdate(), total_steps=9)
    with pytest.raises(RuntimeError, match="without an optimizer step"):
        scheduler.step(1.0)
    one_step(model, optimizer, scheduler, 0)
    with pytest.raises(RuntimeError, match="without an optimizer step"):
        scheduler.step(1.0)
    model.loss(1).backward()
    with pytest.raises(RuntimeError, match="not for each micro-batch"):
        scheduler.step(1.0)


def test_resume_is_exact_in_the_middle_of_everything(tiny):
    for cut in range(1, 15):
        straight, resumed = tiny(), tiny()
        optimizer = torch.optim.AdamW(straight.parameters())
        scheduler = BlockScheduler(straight, optimizer, GATED, total_steps=16)
        for step in range(cut):
            one_step(straight, optimizer, scheduler, step)
        saved = json.loads(json.dumps(scheduler.state_dict(), allow_nan=False))
        other = torch.optim.AdamW(resumed.parameters())
        again = BlockScheduler(resumed, other, GATED, total_steps=16)
        resumed.load_state_dict(straight.state_dict())
        late = copy.deepcopy(optimizer.state_dict())
        if cut % 2:
            other.load_state_dict(late)
        again.load_state_dict(saved)
        if not cut % 2:
            other.load_state_dict(late)
        assert again.progress.elapsed_ms >= saved["elapsed_ms"] > 0
        for step in range(cut, 16):
            assert scheduler.plan == again.plan
            assert one_step(straight, optimizer, scheduler, step) == one_step(
                resumed, other, again, step
            )
        assert scheduler.state == again.state


def test_a_state_of_another_schedule_or_model_is_refused(tiny):
    def build(schedule, n=4):
        model = tiny(n=n)
        return BlockScheduler(model, sgd(model), schedule, total_steps=9)

    saved = build(StaticSuffix(active=2)).state_dict()
    with pytest.raises(ValueError, match=r"StaticSuffix\(active=2\).*StaticSuffix\(active=3\)"):
        build(StaticSuffix(active=3)).load_state_dict(saved)
    with pytest.raises(ValueError, match="FullUpdate"):
        build(FullUpdate()).load_state_dict(saved)
    with pytest.raises(ValueError, match="4 blocks, the model has 5"):
        build(StaticSuffix(active=2), n=5).load_state_dict(saved)


def test_time_budget_and_off_clock(tiny):
    class Hand:
        elapsed_ms = 0.0
        running = True

        def tick(self):
            pass

        def pause(self):
            self.running = False

        def resume(self):
            self.running = True

    clock = Hand()
    model = tiny()
    optimizer = sgd(model)
    schedule = DynamicSuffix(min_active=1, max_active=1, warmup_steps=0, freeze_start_frac=0.5)
    scheduler = BlockScheduler(model, optimizer, schedule, time_budget_s=1.0, clock=clock)
    one_step(model, optimizer, scheduler, 0)
    assert len(scheduler.plan.active) == 4
    clock.elapsed_ms = 500.0
    one_step(model, optimizer, scheduler, 1)
    assert len(scheduler.plan.active) == 1
    assert scheduler.fraction == 0.5
    with scheduler.off_clock():
        assert not clock.running
    assert clock.running
    assert not scheduler.done
    clock.elapsed_ms = 1000.0
    assert scheduler.done


def test_close_and_copies(tiny):
    model = tiny()
    optimizer = sgd(model)
    scheduler = BlockScheduler(model, optimizer, StaticSuffix(active=1), total_steps=9)
    twin = pickle.loads(pickle.dumps(model))
    one_step(model, optimizer, scheduler, 0)
    twin.loss(0).backward()
    scheduler.close()
    assert all(p.requires_grad for p in model.parameters())
    before = model.blocks[0].inner.weight.clone()
    model.loss(1).backward()
    optimizer.step()
    assert not torch.equal(before, model.blocks[0].inner.weight)
    assert not optimizer._optimizer_step_pre_hooks
    assert not model._forward_pre_hooks


def test_a_second_scheduler_is_refused_until_the_first_is_closed(tiny):
    model = tiny()
    optimizer = sgd(model)
    first = BlockScheduler(model, optimizer, StaticSuffix(active=1), total_steps=9)
    with pytest.raises(ValueError, match="another BlockScheduler has this model's blocks: close"):
        BlockScheduler(model, optimizer, StaticSuffix(active=1), total_steps=9)
    twin = copy.deepcopy(model).requires_grad_(True)
    for each in (twin, model):
        first.close()
        second = BlockScheduler(each, sgd(each), FullUpdate(), total_steps=9)
        assert sum(map(len, second.blocks.parameters)) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "total_steps or time_budget_s"),
        ({"total_steps": 5, "time_budget_s": 1.0}, "not both"),
        ({"total_steps": 0}, "total_steps must be > 0, got 0"),
        ({"time_budget_s": -1.0}, "time_budget_s must be > 0, got -1.0"),
        ({"total_steps": float("inf")}, "total_steps must be > 0, got inf: .* 2\\*\\*53 at most"),
        ({"total_steps": 10**400}, "total_steps must be > 0, got 1000"),
        ({"total_steps": "3"}, "total_steps must be > 0, got '3'"),
        ({"time_budget_s": 10**400}, "time_budget_s must be > 0, got 1000"),
    ],
)
def test_horizons(tiny, arguments, message):
    model = tiny()
    with pytest.raises(ValueError, match=message):
        BlockScheduler(model, sgd(model), FullUpdate(), **arguments)


def test_what_cannot_train_is_refused_before_anything_is_touched(tiny):
    model = tiny()
    with pytest.raises(ValueError, match=r"blocks.0.inner.weight is trainable but in no optimizer"):
        BlockScheduler(
            model, torch.optim.SGD(model.head.parameters(), lr=0.1), FullUpdate(), total_steps=5
        )
    with pytest.raises(ValueError, match=r"active must be 1..4, got 6: lower it"):
        BlockScheduler(model, sgd(model), StaticSuffix(), total_steps=5)
    with pytest.raises(ValueError, match="compile each block"):
        BlockScheduler(
            torch.compile(model, backend="eager"), sgd(model), FullUpdate(), total_steps=5
        )
    compiled = tiny()
    compiled.compile(backend="eager")
    with pytest.raises(ValueError, match="compile each block"):
        BlockScheduler(compiled, sgd(compiled), FullUpdate(), total_steps=5)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_bad_losses(tiny):
    model = tiny()
    optimizer = sgd(model)
    scheduler = BlockScheduler(model, optimizer, GATED, total_steps=5)
    model.loss(0).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"scheduler.step\(loss\)"):
        scheduler.step()
    with pytest.raises(ValueError, match=r"one number, got shape \(3,\)"):
        scheduler.step(torch.ones(3))
    scheduler.step(torch.ones(1))


def test_the_loss_may_be_left_out_where_nothing_asks_for_it(tiny):
    model = tiny()
    optimizer = sgd(model)
    scheduler = BlockScheduler(model, optimizer, MOVING, total_steps=9)
    for step in range(9):
        model.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert scheduler.state.loss_ema is None
    assert sum(scheduler.state.relevance_ema) > 0


@pytest.mark.cuda
def test_a_step_that_decides_nothing_never_waits_for_the_gpu(tiny):
    model = tiny().cuda()
    model.loss = lambda step: model(torch.full((6,), step % 16, device="cuda")).square().mean()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = BlockScheduler(model, optimizer, GATED, total_steps=100)
    for step in range(7):
        loss = model.loss(step)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("default" if scheduler.plan.probe else "error")
        try:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step < 6:
                scheduler.step(loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_watch_ends_with_the_first_step_after_a_change(tiny):
    model = tiny()
    optimizer = sgd(model)
    scheduler = BlockScheduler(model, optimizer, FullUpdate(), total_steps=9)
    weight = model.blocks[0].inner.weight
    assert weight._backward_hooks
    one_step(model, optimizer, scheduler, 0)
    assert not weight._backward_hooks
