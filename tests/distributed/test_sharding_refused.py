"""Sharding that cannot freeze block by block is refused, with the remedy.

DeepSpeed is not installed here: what stands in for it has its marks.
"""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from blocksched import BlockScheduler, StaticSuffix
from tests.distributed.fsdp import build


def refused(model, optimizer, match):
    with pytest.raises(ValueError, match=match):
        BlockScheduler(model, optimizer, StaticSuffix(active=2), total_steps=10)


def first_fsdp(_rank, use_orig_params, whole_model):
    def wrap(module):
        return FullyShardedDataParallel(
            module, use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )

    model = build()
    if whole_model:
        model = wrap(model)
    else:
        for i, block in enumerate(model.blocks):
            model.blocks[i] = wrap(block)
    refused(model, torch.optim.AdamW(model.parameters()), "FSDP1.*fully_shard")


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("whole_model", [False, True])
def test_fsdp1(use_orig_params, whole_model, ranks):
    ranks(first_fsdp, use_orig_params, whole_model)


class Engine(nn.Module):
    """Its module is deepspeed.runtime.engine, as the real one's."""

    __module__ = "deepspeed.runtime.engine"

    def __init__(self, module):
        super().__init__()
        self.module = module


class ZeroOptimizer:
    """ZeRO's optimizers are not torch's."""

    __module__ = "deepspeed.runtime.zero.stage_1_and_2"


def test_deepspeed_engine(tiny):
    model = tiny()
    refused(Engine(model), torch.optim.AdamW(model.parameters()), "DeepSpeed.*fully_shard")


def test_deepspeed_optimizer(tiny):
    refused(tiny(), ZeroOptimizer(), "DeepSpeed.*fully_shard")
    refused(tiny(), [ZeroOptimizer()], "DeepSpeed.*fully_shard")


def test_parameters_that_zero_has_partitioned(tiny):
    model = tiny()
    model.head.weight.ds_id = 0
    refused(model, torch.optim.AdamW(model.parameters()), "DeepSpeed.*fully_shard")
