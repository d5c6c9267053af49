"""A run that goes on from a checkpoint is the run that was not stopped."""

import json
import random

import numpy
import pytest
import torch

import blocksched as bs
from blocksched.checkpoint import CheckpointError, load_checkpoint
from tests.library import checkpoint_loop
from tests.library.checkpoint_loop import DYNAMIC, STEPS, Loop


@pytest.mark.parametrize("on", [2, pytest.param(STEPS, marks=pytest.mark.soak)])
@pytest.mark.parametrize(
    ("optimizers", "schedule"),
    [
        ("torch_adamw", DYNAMIC),
        ("small_moments", DYNAMIC),
        ("two_optimizers", DYNAMIC),
        ("small_moments", bs.StaticSuffix(active=2)),
    ],
)
def test_resume_at_every_step_is_the_uninterrupted_run(tmp_path, optimizers, schedule, on):
    make = getattr(checkpoint_loop, optimizers)
    straight = Loop(make, schedule)
    story, states, plans = [], [], []
    for step in range(STEPS):
        straight.save(tmp_path / str(step), step)
        story.append(straight.step())
        states.append(straight.state())
        plans.append(story[-1][1])
    if schedule is DYNAMIC:
        assert {plan.phase for plan in plans} >= {"full", "suffix", "recovery:stage2"}
        assert any(plan.probe and plan.freezing for plan in plans)
        assert len({plan.active for plan in plans}) > 2
    assert straight.scaler.get_scale() > 16.0
    for cut in range(STEPS):
        resumed = Loop(make, schedule)
        for _ in range(cut % 3):
            resumed.step()  # also one that is not fresh
        assert resumed.load(tmp_path / str(cut)).step == cut
        for step in range(cut, min(cut + on, STEPS)):
            assert resumed.step() == story[step], f"stopped before step {cut}, at {step}"
            assert resumed.state() == states[step], f"stopped before step {cut}, at {step}"


def test_moments_of_frozen_blocks_are_there(tmp_path):
    loop = Loop(schedule=bs.StaticSuffix(active=1))
    loop.step()
    frozen = loop.model.blocks[0].inner.weight
    loop.optimizers[0].state[frozen] = {
        "step": torch.tensor(7.0),
        "exp_avg": torch.full_like(frozen, 2.0),
        "exp_avg_sq": torch.full_like(frozen, 3.0),
    }
    loop.save(tmp_path, 1)
    other = Loop(schedule=bs.StaticSuffix(active=1))
    other.load(tmp_path)
    state = other.optimizers[0].state[other.model.blocks[0].inner.weight]
    assert float(state["step"]) == 7.0
    assert state["exp_avg"].eq(2.0).all()
    assert state["exp_avg_sq"].eq(3.0).all()


def test_nothing_there_changes_nothing(tmp_path):
    loop = Loop()
    before, numbers = loop.state(), torch.get_rng_state()
    assert loop.load(tmp_path / "none") is None
    assert loop.load(tmp_path) is None
    assert loop.state() == before
    assert torch.equal(torch.get_rng_state(), numbers)
    assert not (tmp_path / "none").exists()


def test_saving_changes_nothing(tmp_path):
    loop = Loop()
    loop.step()
    before = loop.state(), random.getstate(), torch.get_rng_state(), loop.scheduler.state_dict()
    drawn = numpy.random.get_state()[2]
    loop.save(tmp_path, 1)
    after = loop.state(), random.getstate(), torch.get_rng_state(), loop.scheduler.state_dict()
    assert after[:2] == before[:2]
    assert torch.equal(after[2], before[2])
    assert {**after[3], "elapsed_ms": 0} == {**before[3], "elapsed_ms": 0}
    assert numpy.random.get_state()[2] == drawn


def test_the_clock_goes_on(tmp_path):
    def build():
        loop = Loop()
        loop.scheduler.close()
        loop.scheduler = bs.BlockScheduler(
            loop.model, loop.optimizers, bs.FullUpdate(), time_budget_s=3600
        )
        return loop

    loop = build()
    loop.step()
    loop.scheduler._clock.elapsed_ms = 1.8e6
    loop.save(tmp_path, 1)
    other = build()
    other.load(tmp_path)
    assert 0.5 <= other.scheduler.fraction < 0.51


def test_extra_comes_back_as_it_was(tmp_path):
    loop = Loop()
    extra = {"tensor": torch.arange(3.0), "tuple": (1, 2.5, None), "text": ["x", True], 3: b"y"}
    bs_parts = loop.parts()
    checkpoint_loop.save_checkpoint(tmp_path, 0, **bs_parts, extra=extra)
    loaded = load_checkpoint(tmp_path, **bs_parts).extra
    assert torch.equal(loaded.pop("tensor"), extra.pop("tensor"))
    assert loaded == extra


@pytest.mark.parametrize("extra", [object(), {"f": lambda: 0}, numpy.arange(3), (i for i in "x")])
def test_extra_that_only_pickle_could_read_is_refused_when_it_is_saved(tmp_path, extra):
    loop = Loop()
    loop.save(tmp_path, 0)
    with pytest.raises(CheckpointError, match=r"rank-00000\.pt must hold tensors, numbers"):
        checkpoint_loop.save_checkpoint(tmp_path, 1, **loop.parts(), extra=extra)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000000"]


def test_what_is_in_the_folder(tmp_path):
    path = Loop().save(tmp_path, 123)
    assert path == tmp_path / "step-00000123"
    files = {"manifest.json", "manifest.sha256", "model.pt", "optimizers.pt", "rank-00000.pt"}
    assert {file.name for file in path.iterdir()} == files
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["version"] == 1
    assert manifest["step"] == 123
    assert manifest["run"]["model"]["head.weight"] == "float32 [16, 8]"
    assert set(manifest["files"]) == files - {"manifest.json", "manifest.sha256"}


@pytest.mark.parametrize(("step", "keep"), [(-1, 2), (0, 0)])
def test_bad_numbers(tmp_path, step, keep):
    with pytest.raises(ValueError, match="step must be >= 0 and keep >= 1"):
        Loop().save(tmp_path, step, keep=keep)
