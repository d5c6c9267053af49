"""A run stopped after any step, rebuilt from what it saved, goes on as if it had not been."""

import io

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

import blocksched as bs
from blocksched import BlockScheduler, DynamicSuffix, FullUpdate, StaticSuffix
from blocksched.extension import HAS_CPP

STEPS = 24
SCHEDULES = {
    "full": FullUpdate(),
    "static": StaticSuffix(active=2),
    "dynamic": DynamicSuffix(
        min_active=1, warmup_steps=2, probe_every=3, refresh_every=0, freeze_start_frac=0.2,
        relevance_threshold=0.6, adapt_budget=True, require_stable=True, stability_window=3,
        stability_rel_change=9.0, stability_cv=9.0, final_full_frac=0.25, ema_decay=0.5,
        final_recovery_mode="staged", final_recovery_stage1=2, final_recovery_stage2=3,
    ),
}  # fmt: skip
OPTIMIZERS = {
    "torch": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "cpp": lambda p: bs.AdamW(p, lr=0.02, weight_decay=0.1, backend="cpp"),
    "eager": lambda p: bs.AdamW(p, lr=0.02, weight_decay=0.1, backend="eager"),
    "cpp bf16": lambda p: bs.AdamW(
        p, lr=0.02, weight_decay=0.1, backend="cpp", moment_dtype=torch.bfloat16, seed=7
    ),
    "eager bf16": lambda p: bs.AdamW(
        p, lr=0.02, weight_decay=0.1, backend="eager", moment_dtype=torch.bfloat16, seed=7
    ),
}


class Run:
    """A loop with shuffled epochs, dropout and a learning-rate schedule, and all of its state."""

    def __init__(self, tiny, schedule, make):
        self.model = tiny()
        for block in self.model.blocks:
            block.norm = torch.nn.Dropout(0.1)
        self.optimizer = make(self.model.parameters())
        self.rate = lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=STEPS)
        self.scheduler = BlockScheduler(self.model, self.optimizer, schedule, total_steps=STEPS)
        torch.manual_seed(5)
        stateful = pytest.importorskip("torchdata.stateful_dataloader")
        self.loader = stateful.StatefulDataLoader(
            list(torch.randint(16, (29, 6), generator=torch.Generator().manual_seed(3))),
            batch_size=3,  # ten batches an epoch, the last one smaller
            shuffle=True,  # no generator=: torchdata would draw from it out of turn after a resume
            num_workers=0,
        )
        self.batches = iter(self.loader)

    def parts(self):
        return {
            name: getattr(self, name)
            for name in ("model", "optimizer", "rate", "scheduler", "loader")
        }

    def save(self):
        state = {name: part.state_dict() for name, part in self.parts().items()}
        file = io.BytesIO()
        torch.save({**state, "rng": torch.get_rng_state()}, file)
        return file.getvalue()

    def load(self, saved):
        state = torch.load(io.BytesIO(saved))
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.batches = iter(self.loader)
        torch.set_rng_state(state["rng"])

    def step(self):
        """Train one step; returns what it did: loss, plan and the weights after it."""
        tokens = next(self.batches, None)
        if tokens is None:
            self.batches = iter(self.loader)
            tokens = next(self.batches)
        plan = self.scheduler.plan
        loss = cross_entropy(self.model(tokens).flatten(0, 1), tokens.roll(1).flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rate.step()
        self.scheduler.step(loss)
        weights = torch.cat([p.detach().flatten() for p in self.model.parameters()])
        return loss.item(), plan, weights


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.parametrize("on", [4, pytest.param(STEPS, marks=pytest.mark.soak)])
@pytest.mark.parametrize(
    ("schedule", "optimizer"),
    [("full", "torch"), ("full", "cpp bf16"), ("static", "torch"), ("static", "cpp bf16")]
    + [("dynamic", optimizer) for optimizer in OPTIMIZERS],
)
def test_resume_at_every_step_equals_the_uninterrupted_run(tiny, schedule, optimizer, on):
    if optimizer.startswith("cpp") and not HAS_CPP:
        pytest.skip("the extension is not built")

    def build():
        return Run(tiny, SCHEDULES[schedule], OPTIMIZERS[optimizer])

    straight = build()
    saved, story = [straight.save()], []
    for _ in range(STEPS):
        story.append(straight.step())
        saved.append(straight.save())
    if schedule == "dynamic":
        plans = [plan for _, plan, _ in story]
        assert len({plan.active for plan in plans}) > 2
        assert {plan.phase for plan in plans} >= {"full", "suffix", "recovery:stage2"}
        assert any(plan.probe and plan.freezing for plan in plans)
        assert straight.scheduler.state.budget < 4
    for cut in range(STEPS):
        resumed = build()
        resumed.load(saved[cut])
        for step in range(cut, min(cut + on, STEPS)):
            loss, plan, weights = resumed.step()
            assert (loss, plan) == story[step][:2], f"stopped before step {cut}, at {step}"
            assert torch.equal(weights, story[step][2]), f"stopped before step {cut}, at {step}"
