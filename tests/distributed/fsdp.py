"""Models under fully_shard, and the same on one process."""

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from blocksched import DynamicSuffix
from tests.conftest import TinyModel

# Freezes below a boundary that moves, probes, and thaws all in the end.
MOVING = DynamicSuffix(
    min_active=1, max_active=3, warmup_steps=0, probe_every=3, refresh_every=0,
    freeze_start_step=1, final_full_frac=0.2, relevance_threshold=0.3,
)  # fmt: skip
STEPS = 12


def build(dtype=torch.float32, width=15, **arguments):
    """A model whose parameters two ranks cannot halve."""
    torch.manual_seed(0)
    return TinyModel(width=width, **arguments).to(dtype)


def shard(model, **arguments):
    """fully_shard for each block, then the model."""
    for block in model.blocks:
        fully_shard(block, **arguments)
    return fully_shard(model, **arguments)


def whole(tensor):
    """The numbers of a parameter or a state on all ranks, as a list."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).tolist()


def batch_loss(model, step, rank=None):
    """The loss on the batch of `step`, or on a rank's half of it."""
    tokens = torch.randint(16, (2, 6), generator=torch.Generator().manual_seed(step))
    if rank is not None:
        tokens = tokens[rank]
    return nn.functional.cross_entropy(model(tokens).view(-1, 16), tokens.roll(1, -1).view(-1))


def train(model, optimizer, scheduler, steps, rank=None):
    """Some steps; the plans of them."""
    plans = []
    for step in steps:
        plans.append(list(scheduler.plan.active))
        loss = batch_loss(model, step, rank)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(loss)
    return plans


def trained(optimizer):
    """For each parameter the weights, moments and step count, on one process or of all shards."""
    names = "exp_avg", "exp_avg_sq", "step"
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [[whole(p), *(whole(optimizer.state[p][key]) for key in names)] for p in params]
