"""A Trainer that resumes from a checkpoint ends as the one that never stopped, to the bit."""

import pytest
import torch
from transformers import TrainerCallback

from blocksched import AdamW, BlockScheduler, DynamicSuffix, StaticSuffix
from blocksched.integrations.transformers import attach

# Step 0 and every third probe, freezing starts with step 2 at the earliest, recovery with step 9.
GATED = DynamicSuffix(
    min_active=1, max_active=2, warmup_steps=1, probe_every=3, refresh_every=0,
    freeze_start_step=2, final_full_frac=0.2, relevance_threshold=0.5, require_stable=True,
    stability_window=1, stability_rel_change=9.0, stability_cv=9.0, adapt_budget=True,
)  # fmt: skip


class StopAfter(TrainerCallback):
    """Saves and stops after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, _args, state, control, **_):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture
def run(trainer, gpt2, tmp_path):
    """Trains under GATED, from a checkpoint if one is given, and returns the trainer."""

    def run(resume=None, stop=None, schedule=GATED, fused=False, **arguments):
        model = gpt2(dropout=0.1)
        init = {}
        if fused:
            init["optimizers"] = AdamW(model.parameters(), lr=1e-2), None
        trained = trainer(model=model, init=init, lr_scheduler_type="cosine", **arguments)
        if schedule is not None:
            attach(trained, schedule)
        if stop is not None:
            trained.add_callback(StopAfter(stop))
        start = None if resume is None else str(tmp_path / "run" / f"checkpoint-{resume}")
        trained.train(resume_from_checkpoint=start)
        return trained

    return run


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_accumulation_steps": 3, "restore_callback_states_from_checkpoint": True},
        {"fused": True, "bf16": True},
    ],
)
def test_resuming_after_any_step_is_exact(run, arguments, monkeypatch):
    plans = []
    real = BlockScheduler.step

    def step(self, loss=None):
        plans.append((self.plan, loss.item()))
        real(self, loss)

    monkeypatch.setattr(BlockScheduler, "step", step)
    straight = weights(run(**arguments).model)
    story = plans[:]
    sizes = [len(plan.active) for plan, _ in story]
    assert sizes[:2] == [4, 4]
    assert sizes[9:] == [4, 4, 4]
    assert max(sizes[2:9]) == 4  # a probe
    assert min(sizes[2:9]) < 4
    assert equal(straight, weights(run(save_strategy="steps", save_steps=1, **arguments).model))
    for cut in (1, 4, 6, 10):  # before freezing, in it, before a probe, in recovery
        plans.clear()
        assert equal(straight, weights(run(resume=cut, **arguments).model)), cut
        assert plans == story[cut:]


def test_training_that_was_stopped_goes_on_where_it_was(run):
    straight = run()
    stopped = run(stop=7)
    assert stopped.state.global_step == 7
    assert all(p.requires_grad for p in stopped.model.parameters())
    again = run(resume=7)
    assert equal(weights(straight.model), weights(again.model))
    assert straight.state.log_history[7:12] == again.state.log_history[7:12]


def test_a_checkpoint_without_or_of_another_schedule_is_refused(run):
    run(schedule=None, stop=2)
    with pytest.raises(ValueError, match="step 2 was saved without a schedule"):
        run(resume=2)
    run(stop=3)
    with pytest.raises(ValueError, match=r"saved by DynamicSuffix\(.*runs StaticSuffix\(active=1"):
        run(resume=3, schedule=StaticSuffix(active=1))
    run(resume=3, schedule=None)  # Trainer ignores the state of callbacks that are not there
