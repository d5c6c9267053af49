"""Rates on shards: what the whole tensors would have done."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import blocksched as bs
from blocksched.blocks import find_blocks
from blocksched.rates import Rates
from tests.distributed.fsdp import whole

RATES = 0.25, 1.0, 1.75, 0.5  # three blocks and the head


def scaled(make, dtype, mesh=None):
    """The parameters of a small model after three steps on given gradients."""
    generator = torch.Generator().manual_seed(0)

    def drawn(like):
        tensor = torch.randn(like.shape, generator=generator).to(dtype)
        return tensor if mesh is None else distribute_tensor(tensor, mesh, [Shard(0)])

    model = nn.Sequential(nn.Sequential(*(nn.Linear(3, 5) for _ in range(3))), nn.Linear(3, 2))
    for module in [*model[0], model[1]]:
        for name, p in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(drawn(p)))
    optimizer = make(model.parameters())
    rates = Rates(find_blocks(model, blocks="0"), [optimizer])
    rates.apply(RATES)
    for _ in range(3):
        for p in model.parameters():
            p.grad = drawn(p)
        optimizer.step()
    masters = [optimizer.state[p].get("master_param", p) for p in model.parameters()]
    assert all(isinstance(p, DTensor) is (mesh is not None) for p in model.parameters())
    return [whole(t) for t in (*model.parameters(), *masters)]


def as_unsharded(_rank, kind):
    make, dtype = {
        "AdamW": (lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False), torch.float32),
        "SGD": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), torch.float32),
        "masters": (lambda p: bs.AdamW(p, lr=0.1, master_weights=True), torch.bfloat16),
    }[kind]
    return scaled(make, dtype, init_device_mesh("cpu", (2,))) == scaled(make, dtype)


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "masters"])
def test_shards_as_the_whole_tensors(kind, ranks):
    assert ranks(as_unsharded, kind) == [True, True]
