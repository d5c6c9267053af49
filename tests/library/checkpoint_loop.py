"""A loop with everything that a checkpoint has to bring back, for the tests of checkpoints."""

import itertools
import random

import numpy
import torch
from torch import nn

import blocksched as bs
from blocksched.checkpoint import load_checkpoint, save_checkpoint
from tests.conftest import TinyModel

STEPS = 24
DYNAMIC = bs.DynamicSuffix(
    min_active=1, warmup_steps=2, probe_every=3, refresh_every=0, freeze_start_frac=0.2,
    relevance_threshold=0.4, adapt_budget=True, require_stable=True, stability_window=3,
    stability_rel_change=9.0, stability_cv=9.0, final_full_frac=0.25, ema_decay=0.5,
    final_recovery_mode="staged", final_recovery_stage1=2, final_recovery_stage2=3,
)  # fmt: skip


def torch_adamw(model):
    return [torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)]


def small_moments(model):
    return [bs.AdamW(model.parameters(), lr=0.02, moment_dtype=torch.bfloat16, seed=7)]


def two_optimizers(model):
    low = list(model.blocks[:2].parameters())
    rest = [p for p in model.parameters() if all(p is not other for other in low)]
    return [torch.optim.SGD(low, lr=0.02, momentum=0.9), bs.AdamW(rest, lr=torch.tensor(0.02))]


class Loop:
    """Draws its batches and dropout from every source of random numbers there is."""

    def __init__(self, make=torch_adamw, schedule=DYNAMIC, width=8, blocks=None):
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        self.model = TinyModel(width=width, norm=True)
        chosen = None if blocks is None else self.model.blocks[:blocks]
        for block in self.model.blocks:
            block.norm = nn.Sequential(block.norm, nn.Dropout(0.2))
        self.optimizers = make(self.model)
        self.scheduler = bs.BlockScheduler(
            self.model, self.optimizers, schedule, total_steps=STEPS, blocks=chosen
        )
        self.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=3)
        self.data = torch.Generator().manual_seed(3)

    def step(self):
        """Train one step; returns its loss and plan."""
        plan = self.scheduler.plan
        first = [random.randrange(16), int(numpy.random.randint(16)), int(torch.randint(16, ()))]
        rest = torch.randint(16, (5,), generator=self.data)
        tokens = torch.cat([torch.tensor(first), rest])
        loss = nn.functional.cross_entropy(self.model(tokens), tokens.roll(1))
        self.scaler.scale(loss).backward()
        for optimizer in self.optimizers:
            if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
                self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()
        self.scheduler.step(loss)
        return loss.item(), plan

    def parts(self):
        return {name: getattr(self, name) for name in ("model", "optimizers", "scheduler")}

    def save(self, folder, step, **arguments):
        extra = {"scaler": self.scaler.state_dict(), "data": self.data.get_state()}
        return save_checkpoint(folder, step, **self.parts(), extra=extra, **arguments)

    def load(self, folder, **arguments):
        loaded = load_checkpoint(folder, **self.parts(), **arguments)
        if loaded is not None:
            self.scaler.load_state_dict(loaded.extra["scaler"])
            self.data.set_state(loaded.extra["data"])
        return loaded

    def state(self):
        """Every number of model and optimizers, as bytes."""
        states = [self.model.state_dict(), *(o.state_dict() for o in self.optimizers)]
        return b"".join(itertools.chain(*map(_bytes, states)))


def _bytes(value):
    if isinstance(value, torch.Tensor):
        yield value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield str(key).encode()
            yield from _bytes(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _bytes(inner)
    else:
        yield repr(value).encode()
