"""attach in Hugging Face's Trainer on two processes: one process that accumulates two batches."""

import pytest
import torch
import transformers

from blocksched import DynamicSuffix
from blocksched.integrations.transformers import attach
from tests.distributed.ddp_loop import plain, recorded

MOVING = DynamicSuffix(
    min_active=1, max_active=2, warmup_steps=2, probe_every=4, refresh_every=0,
    freeze_start_frac=0.2, relevance_threshold=0.5, final_full_frac=0.2, adapt_budget=True,
)  # fmt: skip
ENVIRONMENT = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # as torchrun's


def examples():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(32, (20, 8), generator=generator)
    ignored = torch.randint(6, (20,), generator=generator)  # so that batches weigh differently
    labels = torch.where(torch.arange(8) < ignored[:, None], -100, tokens)
    return [{"input_ids": t, "labels": x} for t, x in zip(tokens, labels, strict=True)]


def build(folder, **arguments):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=4, n_head=2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    defaults = {
        "output_dir": folder, "use_cpu": True, "max_steps": 12, "seed": 5, "learning_rate": 1e-2,
        "per_device_train_batch_size": 2, "weight_decay": 0.1, "logging_steps": 1,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return transformers.Trainer(
        model=transformers.GPT2LMHeadModel(config),
        args=transformers.TrainingArguments(**defaults | arguments),
        train_dataset=examples(),
    )


def train(folder, resume=None, **arguments):
    """Weights, logged losses, active blocks and loss of each step, bytes of gradients sent."""
    trainer = build(folder, **arguments)
    attach(trainer, MOVING)
    with recorded() as (active, losses):
        trainer.train(resume_from_checkpoint=resume)
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    traffic = [state.bytes for _, state in getattr(trainer.model_wrapped, "_comm_hooks", ())]
    return [plain(p) for p in trainer.model.parameters()], logged, active, losses, traffic


def message(folder, **arguments):
    with pytest.raises(ValueError, match=": ") as error:
        train(folder, **arguments)
    return str(error.value)


def on_rank(rank, case, folder, arguments):
    environment = {**ENVIRONMENT, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        return globals()[case](folder, **arguments)


def test_two_processes_are_one_that_accumulates(ranks, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 5}
    first, second = ranks(on_rank, "train", str(tmp_path), saving)
    one = train(str(tmp_path / "one"), gradient_accumulation_steps=2)
    assert first[0] == second[0] == one[0]
    assert first[1] == pytest.approx(one[1], rel=1e-5)
    assert first[2] == second[2] == one[2]
    assert first[3] == second[3] == pytest.approx(one[3], rel=1e-5)
    assert {len(active) for active in one[2]} >= {2, 4}
    everything = 12 * sum(map(len, one[0]))
    assert first[4][0] < 0.9 * everything
    resumed = ranks(on_rank, "train", str(tmp_path), {"resume": str(tmp_path / "checkpoint-5")})
    for each in resumed:
        assert each[0] == first[0]
        assert each[2] == first[2][5:]


def test_ddp_that_waits_for_all_gradients_is_refused(ranks, tmp_path):
    arguments = {"ddp_find_unused_parameters": False}
    for said in ranks(on_rank, "message", str(tmp_path), arguments):
        assert "pass ddp_find_unused_parameters=True to TrainingArguments" in said
