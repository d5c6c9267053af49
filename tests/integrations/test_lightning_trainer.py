"""The Lightning callback: its horizon is the Trainer's, it leaves no trace, it refuses plainly."""

import importlib
import sys
from datetime import timedelta

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    GradientAccumulationScheduler,
    LearningRateFinder,
    Timer,
)
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from blocksched import BlockScheduler, FullUpdate, StaticSuffix, compile_blocks
from blocksched.integrations.lightning import BlockScheduling
from tests.integrations.test_lightning import (
    MOVING,
    TOKENS,
    WARNINGS,
    Module,
    loader,
    story,
    trainer,
)

__all__ = ["story"]
pytestmark = WARNINGS
BRIEF = timedelta(seconds=0.3)


class Stream(IterableDataset):
    """Has no length."""

    def __iter__(self):
        return iter(TOKENS.split(2))


@pytest.fixture
def horizons(monkeypatch):
    """What every BlockScheduler that is built gets as its horizon."""
    seen = []
    real = BlockScheduler.__init__

    def init(self, *args, total_steps=None, time_budget_s=None, **options):
        seen.append((total_steps, time_budget_s))
        real(self, *args, total_steps=total_steps, time_budget_s=time_budget_s, **options)

    monkeypatch.setattr(BlockScheduler, "__init__", init)
    return seen


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({"max_epochs": 2, "limit_train_batches": 5}, 10),
        ({"max_epochs": 2, "limit_train_batches": 5, "accumulate_grad_batches": 2}, 6),
        ({"max_epochs": 2, "limit_train_batches": 5, "max_steps": 7}, 7),
        ({"max_epochs": -1, "max_steps": 3}, 3),
    ],
)
def test_the_number_of_steps_is_the_trainers(tiny, story, horizons, options, total):
    trainer(BlockScheduling(FullUpdate()), **options).fit(Module(tiny()), loader())
    assert horizons == [(total, None)]
    assert len(story) == total


def test_max_steps_is_the_horizon_of_a_stream(tiny, story, horizons):
    data = DataLoader(Stream(), batch_size=None)
    trainer(BlockScheduling(FullUpdate()), max_epochs=-1, max_steps=30).fit(Module(tiny()), data)
    assert horizons == [(30, None)]
    assert len(story) == 30


@pytest.mark.parametrize("timers", [[], [Timer(BRIEF)]])
def test_max_time_is_a_time_budget(tiny, horizons, timers):
    class Hurry(lightning.Callback):
        def on_train_batch_end(self, *_args):
            fractions.append(scheduling.scheduler.fraction)

    fractions = []
    scheduling = BlockScheduling(FullUpdate())
    max_time = None if timers else BRIEF
    trainer(scheduling, Hurry(), *timers, max_epochs=None, max_time=max_time).fit(
        Module(tiny()), loader()
    )
    ((steps, seconds),) = horizons
    assert steps is None
    assert seconds == pytest.approx(0.3, abs=0.01)
    assert fractions == sorted(fractions)
    assert fractions[0] < 0.5
    assert fractions[-1] > 0.9


@pytest.mark.parametrize(
    ("callbacks", "options", "message"),
    [
        ([], {"max_epochs": 2, "max_time": {"hours": 1}}, "one horizon.*max_epochs=-1"),
        ([], {"max_epochs": -1, "max_time": {"hours": 1}, "max_steps": 9}, "one horizon"),
        ([], {"max_epochs": -1}, "needs a horizon"),
        ([GradientAccumulationScheduler({1: 2})], {"max_epochs": 2}, "pass max_steps and"),
    ],
)
def test_a_horizon_that_the_trainer_does_not_tell_is_refused(tiny, callbacks, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(BlockScheduling(MOVING), *callbacks, **options).fit(Module(tiny()), loader())


def test_a_changing_accumulation_under_max_steps(tiny, story):
    accumulation = GradientAccumulationScheduler({1: 4})
    run = trainer(BlockScheduling(FullUpdate()), accumulation, max_epochs=-1, max_steps=23)
    run.fit(Module(tiny()), loader())
    assert len(story) == 23
    assert {plan.active for plan, _ in story} == {(0, 1, 2, 3)}


def traces(module):
    """What a scheduler touches: trainable or not, and the number of hooks."""
    flags = [p.requires_grad for p in module.parameters()]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in module.modules()]
    return flags, hooks


@pytest.mark.parametrize("fails", [False, True])
def test_after_fit_the_model_is_as_it_was_found_and_fits_again(tiny, story, fails):
    class Failing(Module):
        def training_step(self, batch, batch_idx):
            assert not self.model.embed.weight.requires_grad
            if batch_idx == 3 and fails:
                raise KeyError("the data")
            return super().training_step(batch)

    module = Failing(tiny())
    module.model.head.weight.requires_grad_(False)
    found = traces(module)
    scheduling = BlockScheduling(StaticSuffix(active=1))
    for _ in range(2):
        run = trainer(scheduling, max_steps=5)
        if fails:
            with pytest.raises(KeyError, match="the data"):
                run.fit(module, loader())
        else:
            run.fit(module, loader())
        assert traces(module) == found
        assert scheduling.scheduler is None
    assert len(story) == (6 if fails else 10)


def test_a_second_fit_with_another_trainer_starts_anew(tiny, story):
    scheduling = BlockScheduling(MOVING)
    for _ in range(2):
        trainer(scheduling).fit(Module(tiny()), loader())
    assert story[:20] == story[20:]


def test_a_second_fit_of_one_trainer_has_the_steps_that_are_added(tiny, horizons, story):
    run = trainer(BlockScheduling(MOVING))
    module = Module(tiny())
    run.fit(module, loader())
    run.fit_loop.max_epochs = 3
    run.fit(module, loader())
    assert horizons == [(20, None), (40, None)]
    assert len(story) == 60


def test_the_learning_rate_finder_runs_without_the_schedule(tiny, story, tmp_path):
    finder = LearningRateFinder(num_training_steps=5, update_attr=False)
    run = trainer(finder, BlockScheduling(MOVING), default_root_dir=tmp_path)
    module = Module(tiny())
    module.lr = 0.1
    run.fit(module, loader())
    assert len(story) == 20


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_model_compiled_as_a_whole_is_refused_and_compiled_blocks_are_not(tiny):
    whole, inner, in_place, blocks = (Module(tiny()) for _ in range(4))
    inner.model = torch.compile(inner.model, backend="eager")
    in_place.model.compile(backend="eager")
    for module in (torch.compile(whole, backend="eager"), inner, in_place):
        with pytest.raises(ValueError, match=r"compiled as a whole.*blocksched\.compile_blocks"):
            trainer(BlockScheduling(MOVING)).fit(module, loader())
    compile_blocks(blocks, backend="eager")
    blocks.model.head.compile(backend="eager")
    trainer(BlockScheduling(MOVING), max_steps=3).fit(blocks, loader())


def test_manual_optimization_is_refused(tiny):
    module = Module(tiny())
    module.automatic_optimization = False
    with pytest.raises(ValueError, match=r"by hand.*build blocksched\.BlockScheduler in its on_"):
        trainer(BlockScheduling(MOVING)).fit(module, loader())


def test_other_strategies_are_refused(tiny, monkeypatch):
    scheduling = BlockScheduling(MOVING)
    run = trainer(scheduling)
    monkeypatch.setattr(run._accelerator_connector, "strategy", FSDPStrategy())
    with pytest.raises(ValueError, match=r"under DDP, got FSDPStrategy: .*unused_parameters"):
        scheduling.setup(run, Module(tiny()), "fit")  # where fit begins, in each process


def test_a_callback_that_freezes_too_is_refused(tiny):
    with pytest.raises(ValueError, match="BackboneFinetuning freezes and thaws"):
        trainer(BlockScheduling(MOVING), BackboneFinetuning()).fit(Module(tiny()), loader())


def test_blocks_and_stem_can_be_named(tiny):
    module = Module(tiny())
    module.more = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    with pytest.raises(ValueError, match=r"several lists.*model\.blocks.*more"):
        trainer(BlockScheduling(MOVING)).fit(module, loader())
    before = module.model.embed.weight.clone()
    named = BlockScheduling(StaticSuffix(active=1), blocks="model.blocks", stem=["model.embed"])
    trainer(named).fit(module, loader())
    assert torch.equal(module.model.embed.weight, before)


@pytest.mark.parametrize("alone", [True, False])
def test_pytorch_lightning_alone_or_beside_lightning(tiny, story, monkeypatch, alone):
    pytorch_lightning = pytest.importorskip("pytorch_lightning")
    trainer(BlockScheduling(MOVING)).fit(Module(tiny()), loader())
    fitted = story.copy()
    story.clear()
    if alone:
        monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.delitem(sys.modules, "blocksched.integrations.lightning")
    ours = importlib.import_module("blocksched.integrations.lightning").BlockScheduling
    assert issubclass(ours, pytorch_lightning.Callback) is alone

    class Other(pytorch_lightning.LightningModule):
        training_step = Module.training_step
        configure_optimizers = Module.configure_optimizers

    module = Other()
    module.model, module.make_optimizer = tiny(), Module(None).make_optimizer
    pytorch_lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=1, callbacks=[ours(MOVING)],
    ).fit(module, loader())  # fmt: skip
    assert story == fitted
