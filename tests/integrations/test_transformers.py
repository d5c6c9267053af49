"""attach in Hugging Face's Trainer: what the schedule sees, what trains, what is logged."""

import math

import pytest
import torch
from transformers import Trainer, TrainerCallback

from blocksched import BlockScheduler, DynamicSuffix, FullUpdate, StaticSuffix
from blocksched.integrations.transformers import attach

MOVING = DynamicSuffix(
    min_active=1, max_active=3, warmup_steps=2, probe_every=4, refresh_every=0,
    freeze_start_frac=0.2, relevance_threshold=0.5, final_full_frac=0.2, adapt_budget=True,
)  # fmt: skip


class Halved(Trainer):
    """Overrides compute_loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (loss / 2, outputs) if return_outputs else loss / 2


class Tuned(Halved):
    """Overrides training_step and log as well, as trl's SFTTrainer does."""

    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs) * 1.0

    def log(self, logs, start_time=None):
        logs["mean_token_accuracy"] = 0.5
        super().log(logs, start_time)


def squares(outputs, labels, num_items_in_batch):
    chosen = outputs.logits.square().mean(-1) * (labels != -100)
    return chosen.sum() / num_items_in_batch


@pytest.fixture
def seen(monkeypatch):
    """The plan and the loss of every step that a BlockScheduler was told of."""
    steps = []
    real = BlockScheduler.step

    def step(self, loss=None):
        steps.append((self.plan, loss.item()))
        real(self, loss)

    monkeypatch.setattr(BlockScheduler, "step", step)
    return steps


def logged(trainer, key):
    return [line[key] for line in trainer.state.log_history if key in line]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_accumulation_steps": 3},  # ten batches an epoch: the last step has one
        {"kind": Halved},
        {"kind": Tuned, "gradient_accumulation_steps": 3},
        {"init": {"compute_loss_func": squares}},
        {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
    ],
)
def test_every_steps_loss_is_the_one_that_trainer_logs(trainer, seen, arguments):
    trained = trainer(**arguments)
    attach(trained, MOVING)
    trained.train()
    assert [loss for _, loss in seen] == logged(trained, "loss")
    assert len(seen) == 12
    assert len({loss for _, loss in seen}) == 12
    assert len({plan.active for plan, _ in seen}) > 1


def test_evaluation_in_between_does_not_disturb(trainer, seen):
    runs = []
    for arguments in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}):
        trained = trainer(**arguments)
        attach(trained, MOVING)
        trained.train()
        runs.append(weights(trained.model))
    assert equal(*runs)
    assert seen[:12] == seen[12:]


def test_a_loss_that_trainer_leaves_out_of_its_log_reaches_the_schedule(trainer, seen):
    class Fails(Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            return loss * math.nan if self.state.global_step == 1 else loss

    trained = trainer(kind=Fails, max_steps=4)
    attach(trained, MOVING)
    trained.train()
    assert [math.isnan(loss) for _, loss in seen] == [False, True, False, False]
    assert seen[2][0].probe  # the reading was discarded, and is made up for


def test_full_update_is_trainer_without_a_schedule_to_the_bit(trainer):
    runs = []
    for schedule in (None, FullUpdate()):
        trained = trainer(gradient_accumulation_steps=2, lr_scheduler_type="cosine")
        if schedule is not None:
            attach(trained, schedule)
        trained.train()
        runs.append(weights(trained.model))
    assert equal(*runs)


def test_a_moving_boundary_trains_as_a_loop_by_hand_does(trainer, seen):
    scheduled, by_hand = trainer(), trainer()
    attach(scheduled, MOVING)
    scheduled.train()
    plans = [plan for plan, _ in seen]
    assert len({plan.active for plan in plans}) > 1

    class Freeze(TrainerCallback):
        """Freezes by hand: blocks, the position embedding, and the graph into the first block."""

        handle = None

        def on_step_begin(self, _args, state, _control, model, **_):
            active = plans[state.global_step].active
            body = model.transformer
            body.wpe.requires_grad_(0 in active)
            for i, block in enumerate(body.h):
                block.requires_grad_(i in active)
            if self.handle is not None:
                self.handle.remove()
                self.handle = None
            if active[0] > 0:
                self.handle = body.h[active[0]].register_forward_pre_hook(
                    lambda _m, args: (args[0].detach(), *args[1:])
                )

    by_hand.add_callback(Freeze())
    by_hand.train()
    assert equal(weights(scheduled.model), weights(by_hand.model))


def test_the_first_forward_is_planned_and_the_horizon_is_trainers(trainer, seen):
    trained = trainer(max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2)
    attach(trained, StaticSuffix(active=2))
    frozen = weights(trained.model.transformer.h[:2])
    trained.train()
    assert equal(frozen, weights(trained.model.transformer.h[:2]))
    assert [plan.active for plan, _ in seen] == [(2, 3)] * 10
    dynamic = trainer(max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2)
    attach(dynamic, MOVING)
    dynamic.train()
    phases = [plan.phase for plan, _ in seen[10:]]
    assert phases.index("suffix") == 2
    assert phases.index("recovery:full") == 8


def test_numbers_are_logged_beside_the_loss_and_nowhere_else(trainer, seen):
    class Reporter(TrainerCallback):
        """Hears what TensorBoard and the others hear."""

        heard: list = []  # noqa: RUF012

        def on_log(self, _args, _state, _control, logs, **_):
            self.heard.append(dict(logs))

    trained = trainer(logging_steps=2, eval_strategy="steps", eval_steps=6)
    attach(trained, MOVING)
    trained.add_callback(Reporter())
    trained.train()
    lines = [line for line in trained.state.log_history if "loss" in line]
    plain = [line for line in trained.state.log_history if "loss" not in line]
    assert len(lines) == 6
    assert len(plain) == 3  # two evaluations and the summary
    assert not [key for line in plain for key in line if key.startswith("blocksched")]
    plans = [plan for plan, _ in seen]
    for i, line in enumerate(lines):
        part = plans[2 * i : 2 * i + 2]
        assert line["blocksched/active"] == sum(len(plan.active) for plan in part) / 2
        assert line["blocksched/boundary"] == part[-1].active[0]
        assert line["blocksched/probes"] == sum(plan.probe for plan in part)
        measured = [f"blocksched/relevance/{b}" in line for b in range(4)]
        assert measured == [any(plan.probe for plan in part)] * 4
        numbers = [value for key, value in line.items() if key.startswith("blocksched")]
        assert all(type(value) in (int, float) for value in numbers)
    heard = [line for line in Reporter.heard if "loss" in line]
    assert heard == [{k: v for k, v in line.items() if k != "step"} for line in lines]
