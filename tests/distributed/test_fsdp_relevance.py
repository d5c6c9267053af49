"""Relevance over shards adds up to that of one process on the joined batch."""

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import blocksched as bs
from blocksched import BlockScheduler, DynamicSuffix
from tests.distributed.fsdp import batch_loss, build, shard

KINDS = {
    "torch": torch.optim.AdamW,
    "ours": bs.AdamW,
    "SGD": torch.optim.SGD,
    "eager": lambda params, lr: bs.AdamW(params, lr=lr, backend="eager"),
}


def probed(model, kind, metric, rank=None):
    """What a probe says after some steps of probes."""
    optimizer = KINDS[kind](model.parameters(), lr=0.01)
    schedule = DynamicSuffix(
        min_active=1, max_active=3, warmup_steps=0, probe_every=1, refresh_every=0,
        relevance_metric=metric, freeze_start_step=0,
    )  # fmt: skip
    scheduler = BlockScheduler(model, optimizer, schedule, total_steps=10)
    for step in range(2):
        batch_loss(model, step, rank).backward()
        for p in model.parameters():
            if rank is not None and p.grad is not None and not hasattr(p, "placements"):
                distributed.all_reduce(p.grad, distributed.ReduceOp.AVG)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert scheduler.relevance is not None
    return scheduler.relevance


def plain(model):
    """Nothing is sharded."""


def biases_apart(model):
    """All ranks hold the biases, each has a part of the rest."""
    biases = {p for name, p in model.named_parameters() if name.endswith("bias")}
    for block in model.blocks:
        fully_shard(block, ignored_params=biases)
    fully_shard(model, ignored_params=biases)


def hybrid(model, sizes):
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard"))
    shard(model, mesh=mesh)


PLACES = {
    "plain": plain,
    "sharded": shard,
    "biases_apart": biases_apart,
    "replicated": lambda model: hybrid(model, (2, 1)),
    "hybrid": lambda model: hybrid(model, (1, 2)),
}


def over_ranks(rank, place, kind, metric):
    model = build(torch.float64)
    PLACES[place](model)
    return probed(model, kind, metric, rank)


@pytest.mark.parametrize("metric", ["grad_ratio", "saliency_abs_gp"])
@pytest.mark.parametrize(
    ("place", "kind"),
    sorted({*(("sharded", kind) for kind in KINDS), *((place, "ours") for place in PLACES)}),
)
def test_over_shards_adds_up_to_the_whole(place, kind, metric, ranks):
    """In float64, where sums in another order differ by some 1e-16 of the largest term."""
    first, second = ranks(over_ranks, place, kind, metric)
    assert first == second
    assert first == pytest.approx(probed(build(torch.float64), kind, metric), rel=1e-9)
