"""The Lightning callback on two processes: one process that accumulates two batches."""

import warnings
from datetime import timedelta

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import distributed
from torchdata.stateful_dataloader import StatefulDataLoader

from blocksched.integrations.lightning import BlockScheduling
from tests.conftest import TinyModel
from tests.distributed.ddp_loop import plain, recorded
from tests.integrations.test_lightning import MOVING, TOKENS, WARNINGS, Module, trainer

pytestmark = [
    *WARNINGS,
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
UNUSED = "ddp_find_unused_parameters_true"


def fit(tokens=TOKENS, folder=None, resume=None, **options):
    """Weights after fit, active blocks and loss of every step, and bytes of gradients sent."""
    torch.manual_seed(0)
    module = Module(TinyModel(width=16))
    callbacks = [BlockScheduling(MOVING)]
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1))
    with pytest.MonkeyPatch.context() as patch, recorded() as (active, losses):
        run = trainer(*callbacks, enable_checkpointing=folder is not None, **options)
        wraps = []
        patch.setattr(run.strategy, "teardown", lambda: wraps.append(run.strategy.model))
        run.fit(module, StatefulDataLoader(tokens, batch_size=2), ckpt_path=resume)
    sent = [state.bytes for _, state in getattr(wraps[0], "_comm_hooks", ())]
    return [plain(p) for p in module.parameters()], active, losses, sent


def message(**options):
    with pytest.raises(ValueError, match=": ") as error:
        fit(**options)
    return str(error.value)


def limited(**options):
    """By clocks that differ: rank 0's counts."""
    limit = timedelta(seconds=0.5 + distributed.get_rank())
    return fit(max_epochs=-1, max_time=limit, **options)[1]


def on_rank(rank, case, options):
    for mark in pytestmark:
        warnings.filterwarnings("ignore", mark.args[0].split(":")[1])
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {"LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": 2}.items():
            patch.setenv(key, str(value))
        tokens = TOKENS.view(-1, 2, 2, 6)[:, rank].flatten(0, 1)  # every other batch
        return globals()[case](tokens=tokens, devices=2, use_distributed_sampler=False, **options)


def test_two_processes_are_one_that_accumulates(ranks, tmp_path):
    first, second = ranks(on_rank, "fit", {"strategy": UNUSED, "folder": str(tmp_path)})
    one = fit(accumulate_grad_batches=2)
    assert first == second
    assert first[:2] == one[:2]
    assert first[2] == pytest.approx(one[2], rel=1e-6)
    assert {len(active) for active in one[1]} >= {2, 4}
    assert 0 < first[3][0] < 0.9 * len(one[1]) * sum(map(len, one[0]))
    saved = str(tmp_path / "step=4.ckpt")
    for each in ranks(on_rank, "fit", {"strategy": UNUSED, "resume": saved}):
        assert each[0] == first[0]
        assert each[1] == first[1][4:]


def test_a_clock_ends_on_both_alike(ranks):
    first, second = ranks(on_rank, "limited", {"strategy": UNUSED})
    assert first == second
    assert len({len(active) for active in first}) > 1


def test_ddp_that_waits_for_all_gradients_is_refused(ranks):
    for said in ranks(on_rank, "message", {"strategy": "ddp"}):
        assert f'pass strategy="{UNUSED}"' in said
