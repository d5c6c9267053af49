"""attach in trl's SFTTrainer, which overrides training_step, compute_loss and log."""

import datasets
import pytest
import tokenizers
import torch
import transformers
import trl

from blocksched import BlockScheduler, DynamicSuffix
from blocksched.integrations.transformers import attach

# trl asks transformers under an old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")
MOVING = DynamicSuffix(
    min_active=1, max_active=2, warmup_steps=1, probe_every=3, refresh_every=0,
    freeze_start_frac=0.1, relevance_threshold=0.5, require_stable=True, stability_window=1,
    stability_rel_change=9.0, stability_cv=9.0,
)  # fmt: skip
WORDS = [f"w{i}" for i in range(28)]


def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "<bos>", *WORDS])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def pairs(n):
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(len(WORDS), (n, 8), generator=generator).tolist()
    return datasets.Dataset.from_list(
        [
            {
                "prompt": " ".join(WORDS[i] for i in row[: 2 + k % 3]),
                "completion": " " + " ".join(WORDS[i] for i in row[4:]),
            }
            for k, row in enumerate(drawn)
        ]
    )


@pytest.fixture
def tune(gpt2, tmp_path):
    """Runs an SFTTrainer of 10 steps and returns it."""

    def tune(resume=None, save="no"):
        trainer = trl.SFTTrainer(
            model=gpt2(dropout=0.1),
            args=trl.SFTConfig(
                output_dir=str(tmp_path / "run"), use_cpu=True, max_steps=10, report_to="none",
                per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
                learning_rate=1e-2, disable_tqdm=True, dataloader_pin_memory=False,
                save_strategy=save, save_steps=5, max_length=16,
            ),
            train_dataset=pairs(24),
            processing_class=tokenizer(),
        )  # fmt: skip
        attach(trainer, MOVING)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return tune


def test_sft_trainer_is_driven_and_resumes_to_the_bit(tune, monkeypatch, tmp_path):
    seen = []
    real = BlockScheduler.step

    def step(self, loss=None):
        seen.append((len(self.plan.active), loss.item()))
        real(self, loss)

    monkeypatch.setattr(BlockScheduler, "step", step)
    straight = tune()
    lines = [line for line in straight.state.log_history if "loss" in line]
    assert seen == [(line["blocksched/active"], line["loss"]) for line in lines]
    assert all("mean_token_accuracy" in line for line in lines)
    assert min(seen)[0] < 4 == max(seen)[0]
    tune(save="steps")
    resumed = tune(resume=str(tmp_path / "run" / "checkpoint-5"))
    ends = zip(straight.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in ends)
