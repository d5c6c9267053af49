"""Several processes save and load one checkpoint: replicas (DDP) and shards (FSDP2)."""

import random
import zlib

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import blocksched as bs
from blocksched.checkpoint import load_checkpoint, save_checkpoint
from tests.conftest import TinyModel

STEPS = 8
SCHEDULE = bs.DynamicSuffix(
    min_active=1, warmup_steps=1, probe_every=3, freeze_start_frac=0.2, relevance_threshold=0.4,
    final_full_frac=0.2,
)  # fmt: skip


class Loop:
    """A model on two ranks, each with data and random numbers of its own."""

    def __init__(self, rank, kind):
        torch.manual_seed(0)
        self.model = TinyModel(width=6)
        self.model.embed.register_buffer("seen", torch.zeros(()))
        for block in self.model.blocks:
            block.norm = nn.Dropout(0.2)
        if kind.startswith("fsdp"):
            mesh = init_device_mesh("cpu", (2,))
            for block in self.model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        else:
            self.model = DistributedDataParallel(self.model, find_unused_parameters=True)
        adamw = bs.AdamW if kind.endswith("ours") else torch.optim.AdamW
        self.optimizers = [adamw(self.model.parameters(), lr=0.02)]
        self.scheduler = bs.BlockScheduler(self.model, self.optimizers, SCHEDULE, total_steps=STEPS)
        torch.manual_seed(100 + rank)
        random.seed(rank)

    def step(self):
        tokens = torch.randint(16, (6,))
        loss = nn.functional.cross_entropy(self.model(tokens), tokens.roll(1))
        loss.backward()
        self.optimizers[0].step()
        self.optimizers[0].zero_grad()
        self.scheduler.step(loss)
        return loss.item(), random.random(), len(self.scheduler.plan.active), self.state()

    def state(self):
        """Sums of everything this rank holds, to the bit."""
        states = self.optimizers[0].state_dict()["state"]
        tensors = [*self.model.parameters(), *(t for s in states.values() for t in s.values())]
        whole = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        return [zlib.crc32(t.detach().numpy().tobytes()) for t in whole]

    def parts(self):
        model = getattr(self.model, "module", self.model)
        return {"model": model, "optimizers": self.optimizers, "scheduler": self.scheduler}


def straight(rank, kind, folder):
    loop = Loop(rank, kind)
    story = []
    for step in range(STEPS):
        save_checkpoint(f"{folder}/{step}", step, **loop.parts(), extra={"mine": rank})
        story.append(loop.step())
    loop.scheduler.close()
    return story


def resumed(rank, kind, folder, cut, steps):
    loop = Loop(rank, kind)
    loaded = load_checkpoint(f"{folder}/{cut}", **loop.parts())
    assert (loaded.step, loaded.extra) == (cut, {"mine": rank})
    story = [loop.step() for _ in range(steps)]
    loop.scheduler.close()
    return story


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp ours"])
def test_resume_is_the_uninterrupted_run(ranks, tmp_path, kind):
    stories = ranks(straight, kind, str(tmp_path))
    assert stories[0] != stories[1]
    active = [count for *_, count, _ in stories[0]]
    assert set(active) == {2, 4}
    for cut in range(STEPS):
        again = ranks(resumed, kind, str(tmp_path), cut, min(2, STEPS - cut))
        assert again == [story[cut : cut + 2] for story in stories], f"stopped before step {cut}"
