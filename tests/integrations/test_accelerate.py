"""The loop of Accelerate's documentation, with gradient accumulation and its checkpoints."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from blocksched import AdamW, BlockScheduler, DynamicSuffix

STEPS = 12
MOVING = DynamicSuffix(
    min_active=1, max_active=2, warmup_steps=1, probe_every=3, refresh_every=0,
    freeze_start_step=2, final_full_frac=0.2, relevance_threshold=0.5, require_stable=True,
    stability_window=1, stability_rel_change=9.0, stability_cv=9.0,
)  # fmt: skip
# One epoch: two micro-batches a step.
TOKENS = torch.randint(16, (2 * 2 * STEPS, 6), generator=torch.Generator().manual_seed(1))


class Run:
    """Everything that accelerator.prepare takes, and the scheduler; call it to train."""

    def __init__(self, tiny, make_optimizer, mixed_precision):
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=2, mixed_precision=mixed_precision
        )
        model = tiny()
        model.blocks[1].norm = torch.nn.Dropout(0.2)
        optimizer = make_optimizer(model.parameters())
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        # A new iterator draws a seed, by default from the generator that dropout uses.
        loader = DataLoader(TOKENS, batch_size=2, generator=torch.Generator())
        self.model, self.optimizer, self.loader, self.decay = self.accelerator.prepare(
            model, optimizer, loader, decay
        )
        self.scheduler = BlockScheduler(self.model, self.optimizer, MOVING, total_steps=STEPS)
        self.accelerator.register_for_checkpointing(self.scheduler)
        self.plans = []

    def __call__(self, start=0, save_at=(), folder=None):
        accelerator, total = self.accelerator, 0.0
        for tokens in accelerator.skip_first_batches(self.loader, 2 * start):
            with accelerator.accumulate(self.model):
                logits = self.model(tokens)
                loss = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), tokens.roll(1, 1).flatten()
                )
                accelerator.backward(loss)
                total = total + loss.detach() / 2
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.decay.step()
                self.optimizer.zero_grad()
            if accelerator.sync_gradients:
                self.plans.append(self.scheduler.plan)
                self.scheduler.step(total)
                total = 0.0
                done = self.scheduler.progress.step
                if done in save_at:
                    accelerator.save_state(str(folder / str(done)))
        return {name: value.clone() for name, value in self.model.state_dict().items()}


@pytest.fixture
def run(tiny):
    """Builds a Run, the same on every call."""

    def build(make_optimizer=AdamW, mixed_precision="no"):
        AcceleratorState._reset_state(True)  # it is one for the whole process
        set_seed(3)
        return Run(tiny, make_optimizer, mixed_precision)

    return build


@pytest.mark.parametrize(
    ("make_optimizer", "mixed_precision"),
    [(AdamW, "no"), (torch.optim.AdamW, "bf16"), (torch.optim.SGD, "no")],
)
def test_load_state_goes_on_to_the_bit(run, tmp_path, make_optimizer, mixed_precision):
    straight = run(make_optimizer, mixed_precision)
    cuts = (1, 3, 5, 10)  # before freezing, before a probe, in the suffix, in recovery
    end = straight(save_at=cuts, folder=tmp_path)
    sizes = [len(plan.active) for plan in straight.plans]
    assert len(sizes) == STEPS
    assert set(sizes[2:9]) >= {1, 4} or set(sizes[2:9]) >= {2, 4}
    for cut in cuts:
        resumed = run(make_optimizer, mixed_precision)
        resumed.accelerator.load_state(str(tmp_path / str(cut)))
        again = resumed(start=cut)
        assert resumed.plans == straight.plans[cut:]
        assert all(torch.equal(value, end[name]) for name, value in again.items()), cut


def test_exactly_the_active_blocks_move(run):
    trained = run()
    before = []
    real = trained.optimizer.step

    def step():
        if trained.accelerator.sync_gradients:
            old = [block.inner.weight.clone() for block in trained.model.blocks]
            real()
            new = [block.inner.weight for block in trained.model.blocks]
            before.append([i for i in range(4) if not torch.equal(old[i], new[i])])

    trained.optimizer.step = step
    trained()
    assert before == [list(plan.active) for plan in trained.plans]


def test_scheduler_step_for_each_micro_batch_is_an_error(run):
    trained = run()
    tokens = next(iter(trained.loader))
    with trained.accelerator.accumulate(trained.model):
        loss = trained.model(tokens).square().mean()
        trained.accelerator.backward(loss)
        trained.optimizer.step()
        trained.optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="not for each micro-batch"):
        trained.scheduler.step(loss)
