"""fit(ckpt_path=...) goes on as if it had never stopped, whatever the schedule was doing."""

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torchdata.stateful_dataloader import StatefulDataLoader

from blocksched import AdamW, StaticSuffix
from blocksched.integrations.lightning import BlockScheduling
from tests.integrations.test_lightning import (
    MOVING,
    TOKENS,
    WARNINGS,
    Module,
    story,
    trainer,
    weights,
)

__all__ = ["story"]
pytestmark = [
    *WARNINGS,
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def fit(tiny, *callbacks, resume=None, make_optimizer=AdamW, shuffle=True, **options):
    """Epochs of 7 batches."""
    module = Module(tiny(), make_optimizer)
    data = StatefulDataLoader(TOKENS[:14], batch_size=2, shuffle=shuffle)
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    run = trainer(*callbacks, enable_checkpointing=saves, **options)
    run.fit(module, data, ckpt_path=resume)
    return module


def every_step(folder):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 21},
        {"max_steps": 12, "accumulate_grad_batches": 2, "make_optimizer": torch.optim.AdamW},
    ],
)
def test_resume_at_every_step_equals_the_uninterrupted_run(tiny, story, tmp_path, options):
    options["max_epochs"] = -1
    whole = fit(tiny, BlockScheduling(MOVING), every_step(tmp_path), **options)
    steps = story.copy()
    assert len(steps) == options["max_steps"]
    for step in range(1, len(steps)):
        story.clear()
        path = tmp_path / f"step={step}.ckpt"
        resumed = fit(tiny, BlockScheduling(MOVING), resume=path, **options)
        assert story == steps[step:], step
        assert torch.equal(weights(resumed), weights(whole)), step
    kinds = {(len(plan.active) < 4, plan.probe, plan.phase) for plan, _ in steps}
    assert (True, False, "suffix") in kinds
    assert (False, True, "suffix") in kinds
    assert (False, False, "recovery:full") in kinds


def test_resume_at_the_end_of_an_epoch(tiny, story, tmp_path):
    each_epoch = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    options = {"max_epochs": 3, "shuffle": False}  # Lightning does not restore the order here
    whole = fit(tiny, BlockScheduling(MOVING), each_epoch, **options)
    steps = story.copy()
    for epoch in range(2):
        story.clear()
        path = tmp_path / f"epoch={epoch}.ckpt"
        resumed = fit(tiny, BlockScheduling(MOVING), resume=path, **options)
        assert story == steps[7 * (epoch + 1) :]
        assert torch.equal(weights(resumed), weights(whole))


def test_a_checkpoint_is_read_without_unpickling_code(tiny, tmp_path):
    fit(tiny, BlockScheduling(MOVING), every_step(tmp_path), max_steps=5)
    saved = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    assert saved["callbacks"]["BlockScheduling"]["steps"] == 5


def test_another_schedule_does_not_go_on_from_a_checkpoint(tiny, tmp_path):
    fit(tiny, BlockScheduling(MOVING), every_step(tmp_path), max_steps=5)
    with pytest.raises(ValueError, match="was saved by DynamicSuffix"):
        fit(
            tiny, BlockScheduling(StaticSuffix(active=1)), resume=tmp_path / "step=5.ckpt",
            max_steps=9,
        )  # fmt: skip


def test_a_checkpoint_without_a_schedule_leaves_the_schedule_the_rest_of_the_run(
    tiny, story, tmp_path
):
    fit(tiny, every_step(tmp_path), max_epochs=-1, max_steps=10)
    scheduling = BlockScheduling(MOVING)
    fit(tiny, scheduling, resume=tmp_path / "step=10.ckpt", max_epochs=-1, max_steps=30)
    assert len(story) == 20
    assert [plan.phase for plan, _ in story].index("recovery:full") == 16
    assert scheduling.state_dict()["steps"] == 20


def test_a_checkpoint_within_a_step_is_refused(tiny, tmp_path):
    class Save(lightning.Callback):
        def on_train_batch_end(self, trainer, *_args):
            trainer.save_checkpoint(tmp_path / "x.ckpt")

    fit(tiny, BlockScheduling(MOVING), Save(), max_steps=2)
    with pytest.raises(RuntimeError, match="list BlockScheduling before the callback that saves"):
        fit(tiny, Save(), BlockScheduling(MOVING), max_steps=2)
