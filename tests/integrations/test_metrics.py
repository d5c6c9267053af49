"""Metrics: what a scheduled loop of one's own tells a logger."""

import math
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blocksched import BlockScheduler, DynamicSuffix, FullUpdate, StaticSuffix
from blocksched.integrations.metrics import Metrics

# Of 4 blocks all train in steps 0 to 16 and from 32 on, three between, but for probes.
MOVING = DynamicSuffix(
    min_active=1, max_active=3, warmup_steps=2, probe_every=4, refresh_every=0,
    freeze_start_frac=0.4, relevance_threshold=0.5, final_full_frac=0.2,
)  # fmt: skip
PROBES = [0, 1, 4, 8, 12, 16, 20, 24, 28]
ACTIVE = [4 if step < 17 or step in PROBES or step >= 32 else 3 for step in range(40)]


class GivenClock:
    """The time of each step is given."""

    def __init__(self, times_ms):
        self.elapsed_ms, self._times_ms = 0.0, iter(times_ms)

    def tick(self):
        self.elapsed_ms += next(self._times_ms)

    def pause(self): ...
    def resume(self): ...


class Loop:
    """A small loop of 40 steps; `step` does all of one but its end."""

    def __init__(self, model, schedule, clock=None):
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.scheduler = BlockScheduler(
            model, self.optimizer, schedule, total_steps=40, clock=clock
        )

    def step(self, factor=1.0):
        loss = self.model.loss(self.scheduler.progress.step) * factor
        loss.backward()
        if self.scheduler.finite(loss):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


@pytest.fixture
def loop(tiny):
    return lambda *arguments: Loop(tiny(), *arguments)


def lines(loop, every):
    """The line of every step, and the loss."""
    metrics = Metrics(loop.scheduler, every=every)
    return [(metrics.step(loss), loss.item()) for loss in (loop.step() for _ in range(40))]


def relevance(line):
    return [value for key, value in line.items() if key.startswith("blocksched/relevance/")]


def test_a_line_says_what_the_steps_since_the_last_one_did(loop):
    for i, (line, loss) in enumerate(lines(loop(MOVING), every=3), start=1):
        if i % 3:
            assert len(line) == len(relevance(line))
            continue
        assert line["blocksched/active"] == sum(ACTIVE[i - 3 : i]) / 3
        assert line["blocksched/boundary"] == 4 - ACTIVE[i - 1]
        assert line["blocksched/probes"] == len({i - 3, i - 2, i - 1} & set(PROBES))
        assert line["blocksched/loss"] == loss
        assert "blocksched/skipped" not in line


def test_relevance_comes_in_the_step_that_measured_it(loop):
    moving = loop(MOVING)
    metrics = Metrics(moving.scheduler, every=3)
    for step in range(40):
        line = metrics.step(moving.step())
        measured = moving.scheduler.relevance if step in PROBES else ()
        assert relevance(line) == list(measured)


def test_expected_time_is_a_full_steps_by_the_rule(loop):
    times = [24.0 * (4 + 2 * k) / 12 for k in ACTIVE]
    times[:5] = [1000.0] * 5  # these warm up
    for i, (line, _) in enumerate(lines(loop(MOVING, GivenClock(times)), every=1)):
        assert line["blocksched/step_ms"] == pytest.approx(times[i])
        assert line.get("blocksched/expected_step_ms") == (
            None if i < 5 else pytest.approx(times[i])
        )


def test_times_are_means_over_the_line_and_lone_full_steps_are_no_measure(loop):
    times = [10.0 if step % 2 else 14.0 for step in range(40)]
    times[20] = 500.0
    line, _ = lines(loop(MOVING, GivenClock(times)), every=8)[23]
    assert line["blocksched/step_ms"] == pytest.approx((12.0 * 8 - 14.0 + 500.0) / 8)
    assert line["blocksched/expected_step_ms"] == pytest.approx(12.0 * (2 + 6 * 10 / 12) / 8)


def test_what_is_off_the_clock_is_no_step_time(loop):
    full = loop(FullUpdate())
    metrics = Metrics(full.scheduler, every=4)
    for _ in range(4):
        with full.scheduler.off_clock():
            time.sleep(0.1)
        line = metrics.step(full.step())
    assert 0.0 < line["blocksched/step_ms"] < 100.0


def test_no_expected_time_without_a_full_step(loop):
    static = lines(loop(StaticSuffix(active=2)), every=1)
    assert all("blocksched/step_ms" in line for line, _ in static)
    assert not any("blocksched/expected_step_ms" in line for line, _ in static)


def test_a_resumed_run_goes_on_with_the_steps_of_the_first(loop):
    first, second = loop(MOVING), loop(MOVING)
    whole = lines(first, every=3)
    cut = loop(MOVING)
    metrics = Metrics(cut.scheduler, every=3)
    for _ in range(18):
        metrics.step(cut.step())
    second.model.load_state_dict(cut.model.state_dict())
    second.optimizer.load_state_dict(cut.optimizer.state_dict())
    stale = Metrics(second.scheduler)
    second.scheduler.load_state_dict(cut.scheduler.state_dict())
    metrics = Metrics(second.scheduler, every=3)
    for step in range(18, 40):
        loss = second.step()
        if step == 18:
            with pytest.raises(RuntimeError, match="at step 18, its metrics are at 0: build"):
                stale.step(loss)
        line = metrics.step(loss)
        assert ("blocksched/expected_step_ms" in line) == (step >= 33 and (step + 1) % 3 == 0)
        timeless = {k: v for k, v in whole[step][0].items() if not k.endswith("step_ms")}
        assert {k: v for k, v in line.items() if not k.endswith("step_ms")} == timeless


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads, for which it would wait for a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_loss_on_the_device_is_read_once_a_line(loop):
    static = loop(StaticSuffix(active=2))
    metrics, counts = Metrics(static.scheduler, every=5), []
    for _ in range(20):
        loss = static.step()
        with Reads() as reads:
            metrics.step(loss)
        counts.append(reads.count)
    assert counts == [0, 0, 0, 0, 1] * 4


def test_updates_left_out_are_told_and_measure_nothing(loop):
    moving = loop(MOVING)
    metrics = Metrics(moving.scheduler, every=2)
    story = [metrics.step(moving.step(math.inf if step == 8 else 1.0)) for step in range(12)]
    assert not relevance(story[8])
    assert relevance(story[4])
    skipped = [line.get("blocksched/skipped") for line in story[1::2]]
    assert skipped == [None, None, None, None, 1, 1]


def test_a_run_without_losses_has_no_loss(loop):
    static = loop(StaticSuffix(active=2))
    metrics = Metrics(static.scheduler, every=1)
    static.step()
    assert "blocksched/loss" not in metrics.step()
    static.step()
    assert metrics.step(2.5)["blocksched/loss"] == 2.5


def test_lines_every_no_step_are_refused(loop):
    with pytest.raises(ValueError, match="every must be >= 1, got 0: give"):
        Metrics(loop(FullUpdate()).scheduler, every=0)
