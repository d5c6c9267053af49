"""The Lightning callback in Lightning's own Trainer, against the loop that one writes by hand."""

import csv
import math

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from blocksched import AdamW, BlockScheduler, DynamicSuffix
from blocksched.integrations.lightning import BlockScheduling

WARNINGS = [  # Lightning's own
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]
pytestmark = WARNINGS
MOVING = DynamicSuffix(
    min_active=1, max_active=3, warmup_steps=2, probe_every=4, refresh_every=0,
    freeze_start_frac=0.2, final_full_frac=0.2, relevance_threshold=0.5, require_stable=True,
    stability_window=1, stability_rel_change=9.0, stability_cv=9.0,
)  # fmt: skip
TOKENS = torch.randint(16, (40, 6), generator=torch.Generator().manual_seed(0))


def loss_of(model, tokens):
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())


class Module(lightning.LightningModule):
    """Wraps a model, as people do."""

    def __init__(self, model, make_optimizer=AdamW):
        super().__init__()
        self.model, self.make_optimizer = model, make_optimizer

    def training_step(self, batch):
        return loss_of(self.model, batch)

    def validation_step(self, batch):
        self.log("val_loss", loss_of(self.model, batch))

    def configure_optimizers(self):
        return self.make_optimizer(self.model.parameters(), lr=0.01)


def loader(batches=20):
    return DataLoader(TOKENS[: 2 * batches], batch_size=2)


def trainer(*callbacks, **options):
    plain = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1,
    }  # fmt: skip
    return lightning.Trainer(callbacks=list(callbacks), **plain | options)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.fixture
def story(monkeypatch):
    """Plan and loss of every step that any scheduler takes."""
    steps = []
    real = BlockScheduler.step

    def step(self, loss=None):
        steps.append((self.plan, float(loss)))
        real(self, loss)

    monkeypatch.setattr(BlockScheduler, "step", step)
    return steps


def by_hand(model, optimizer, total, batches=20, parts=1, clip=None, dtype=None, lr=None):
    """One epoch; Lightning steps on its last batch, however few micro-batches are left by then."""
    scheduler = BlockScheduler(model, optimizer, MOVING, total_steps=total)
    step_loss = 0.0
    for i, tokens in enumerate(loader(batches)):
        with torch.autocast("cpu", dtype, enabled=dtype is not None, cache_enabled=False):
            loss = loss_of(model, tokens) / parts
        loss.backward()
        step_loss = loss.detach() + step_loss
        if (i + 1) % parts == 0 or i + 1 == batches:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            if lr is not None:
                lr.step()
            scheduler.step(step_loss)
            step_loss = 0.0


@pytest.mark.parametrize("make_optimizer", [AdamW, torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize(
    ("options", "hand"),
    [
        ({}, {"total": 20}),
        ({"accumulate_grad_batches": 3}, {"total": 7, "parts": 3}),
        ({"gradient_clip_val": 0.1}, {"total": 20, "clip": 0.1}),
        ({"precision": "bf16-mixed"}, {"total": 20, "dtype": torch.bfloat16}),
        ({"max_steps": 13}, {"total": 13, "batches": 13}),
    ],
)
def test_a_fit_equals_the_loop_by_hand_to_the_bit(tiny, story, options, hand, make_optimizer):
    module, model = Module(tiny(), make_optimizer), tiny()
    trainer(BlockScheduling(MOVING), **options).fit(module, loader())
    fitted = story.copy()
    story.clear()
    by_hand(model, make_optimizer(model.parameters(), lr=0.01), **hand)
    assert fitted == story
    assert len(fitted) == hand["total"]
    assert {len(plan.active) for plan, _ in fitted} > {4}
    assert torch.equal(weights(module.model), weights(model))


def test_a_learning_rate_scheduler_steps_as_by_hand(tiny, story):
    class Decayed(Module):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return [optimizer], [{"scheduler": decay, "interval": "step"}]

    module, by_itself = Decayed(tiny()), Decayed(tiny())
    trainer(BlockScheduling(MOVING)).fit(module, loader())
    fitted = story.copy()
    story.clear()
    (optimizer,), (decay,) = by_itself.configure_optimizers()
    by_hand(by_itself.model, optimizer, total=20, lr=decay["scheduler"])
    assert fitted == story
    assert torch.equal(weights(module), weights(by_itself))


def test_validation_checkpoints_and_averages_do_not_disturb(tiny, story, tmp_path):
    trainer(BlockScheduling(MOVING)).fit(Module(tiny()), loader())
    alone = story.copy()
    story.clear()
    others = [
        EMAWeightAveraging(decay=0.5),  # swaps the weights around each validation
        ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1),
    ]
    fit = trainer(
        *others, BlockScheduling(MOVING), enable_checkpointing=True, val_check_interval=3,
        num_sanity_val_steps=2,
    )  # fmt: skip
    fit.fit(Module(tiny()), loader(), loader(4))
    assert fit.callback_metrics["val_loss"] > 0
    assert story == alone


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_steps_that_training_step_skips_count_as_losses_that_are_not_finite(tiny, story):
    class Picky(Module):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (3, 7) else {"loss": super().training_step(batch)}

    module = Picky(tiny())
    trainer(BlockScheduling(MOVING)).fit(module, loader())
    assert [i for i, (_, loss) in enumerate(story) if math.isnan(loss)] == [3, 7]
    assert len(story) == 20
    assert story[4][0].probe
    assert story[8][0].probe


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_skipped_after_its_forward_is_not_taken_for_blocks_that_do_not_train(tiny, story):
    class Picky(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch)
            return None if batch_idx in skipped else loss

    skipped = range(0)
    trainer(BlockScheduling(MOVING)).fit(Picky(tiny()), loader())
    boundaries = [min(plan.active) for plan, _ in story]
    moves = [i for i in range(1, 20) if boundaries[i] != boundaries[i - 1]]
    assert any(boundaries[i] == 0 for i in moves)
    for skipped in ([moves[0]], [moves[1]], range(20)):
        story.clear()
        trainer(BlockScheduling(MOVING)).fit(Picky(tiny()), loader())
        assert [i for i, (_, loss) in enumerate(story) if math.isnan(loss)] == list(skipped)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_skipped_micro_batch_leaves_the_loss_of_the_others(tiny, story):
    def still(parameters, lr):
        return AdamW(parameters, lr=0.0 * lr)

    class Picky(Module):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 4 else super().training_step(batch)

    module = Picky(tiny(), still)
    fit = trainer(BlockScheduling(MOVING), accumulate_grad_batches=4, max_steps=2)
    fit.fit(module, loader())
    first, second = (loss for _, loss in story)
    assert first == pytest.approx(sum(loss_of(tiny(), t).item() for t in TOKENS[:8].split(2)) / 4)
    assert second == pytest.approx(
        sum(loss_of(tiny(), t).item() for t in TOKENS[10:16].split(2)) / 4
    )


@pytest.mark.parametrize("make_optimizer", [AdamW, torch.optim.AdamW])
def test_a_step_that_the_grad_scaler_skips_is_not_an_error(tiny, story, make_optimizer):
    class Infinite(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch) * (math.inf if batch_idx == 5 else 1.0)

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    module = Infinite(tiny(), make_optimizer)
    trainer(BlockScheduling(MOVING), plugins=precision).fit(module, loader())
    assert len(story) == 20
    assert [i for i, (_, loss) in enumerate(story) if not math.isfinite(loss)] == [5]
    assert weights(module).isfinite().all()


def test_loggers_get_the_plan_and_the_relevance(tiny, story, tmp_path):
    class Logging(Module):
        def training_step(self, batch):
            loss = super().training_step(batch)
            self.log("loss", loss)
            return loss

    class Read(lightning.Callback):
        def on_train_batch_end(self, *_args):
            relevances.append(scheduling.scheduler.relevance)

    relevances = []
    scheduling = BlockScheduling(MOVING)
    trainer(scheduling, Read(), logger=CSVLogger(tmp_path), log_every_n_steps=3).fit(
        Logging(tiny()), loader()
    )
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    lines = [row for row in rows if row["blocksched/active"]]
    assert [int(line["step"]) for line in lines] == [2, 5, 8, 11, 14, 17]
    assert [row["step"] for row in rows if row["loss"]] == [line["step"] for line in lines]
    for line in lines:
        end = int(line["step"]) + 1
        plans = [plan for plan, _ in story[end - 3 : end]]
        assert float(line["blocksched/active"]) == sum(len(p.active) for p in plans) / 3
        assert int(line["blocksched/boundary"]) == plans[-1].active[0]
        assert int(line["blocksched/probes"]) == sum(p.probe for p in plans)
        values = [line[f"blocksched/relevance/{i}"] for i in range(4)]
        if any(p.probe for p in plans):
            assert tuple(map(float, values)) == relevances[end - 1]
        else:
            assert values == [""] * 4
    assert {line["blocksched/probes"] for line in lines} == {"0", "1", "2"}
