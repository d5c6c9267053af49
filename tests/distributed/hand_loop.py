"""A loop whose gradients are averaged by hand, as DistributedDataParallel does."""

import torch
from torch import distributed

from blocksched import BlockScheduler, DynamicSuffix
from tests.conftest import TinyModel

DYNAMIC = DynamicSuffix(
    min_active=1, max_active=3, warmup_steps=0, probe_every=3, refresh_every=0,
    freeze_start_step=4, require_stable=True, stability_window=2, stability_rel_change=10.0,
    stability_cv=10.0, adapt_budget=True, final_full_frac=0.0, relevance_threshold=0.5,
)  # fmt: skip


def reduce(model):
    """What DistributedDataParallel does: the mean of the gradients over the ranks."""
    for p in model.parameters():
        if p.grad is not None:
            distributed.all_reduce(p.grad)
            p.grad /= distributed.get_world_size()


def build(schedule, **arguments):
    torch.manual_seed(0)
    model = TinyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    arguments = arguments or {"total_steps": 40}
    return model, optimizer, BlockScheduler(model, optimizer, schedule, **arguments)


def one_step(model, optimizer, scheduler, batch, reduced=True, kind=torch.Tensor):
    """A step on this rank's own batch; `kind` of loss goes to the scheduler. Returns the loss."""
    loss = model.loss(batch)
    loss.backward()
    if reduced:
        reduce(model)
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step(loss.item() if kind is float else loss.detach())
    return loss.item()
