"""Accelerate's loop on two processes: one process that accumulates two batches."""

import pytest
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader

import blocksched as bs
from blocksched.distributed import prepare_ddp
from tests.conftest import TinyModel
from tests.distributed.ddp_loop import SCHEDULES, loss_of, plain

STEPS = 12
TOKENS = torch.randint(16, (4 * STEPS, 6), generator=torch.Generator().manual_seed(1))


def train(accumulate, folder=None, start=0):
    """Weights and active blocks of every step; saves after step 5, goes on from `start`."""
    AcceleratorState._reset_state(True)  # it is one for the whole process
    torch.manual_seed(0)
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=accumulate,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    model = TinyModel(width=16)
    optimizer = bs.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(TOKENS, batch_size=2)
    )
    scheduler = bs.BlockScheduler(model, optimizer, SCHEDULES["probes"](), total_steps=STEPS)
    if accelerator.num_processes > 1:
        prepare_ddp(model, scheduler)
    accelerator.register_for_checkpointing(scheduler)
    if start:
        accelerator.load_state(folder)
    active = []
    for tokens in accelerator.skip_first_batches(loader, accumulate * start):
        with accelerator.accumulate(model):
            loss = loss_of(model, tokens)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            active.append(scheduler.plan.active)
            scheduler.step(loss)
            if scheduler.progress.step == 5 and folder is not None and not start:
                accelerator.save_state(folder)
    scheduler.close()
    return [plain(p) for p in model.parameters()], active


def on_rank(rank, *arguments):
    environment = {"WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "localhost")
        for key, value in environment.items():
            patch.setenv(key, str(value))
        return train(1, *arguments)


def test_two_processes_are_one_that_accumulates(ranks, tmp_path):
    first, second = ranks(on_rank, str(tmp_path))
    one = train(2)
    assert first == second == one
    assert {len(active) for active in one[1]} >= {2, 4}
    for weights, active in ranks(on_rank, str(tmp_path), 5):
        assert weights == one[0]
        assert active == one[1][5:]
