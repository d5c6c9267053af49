"""A tiny GPT-2 in Hugging Face's Trainer, built from its config."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:  # it was built for another torch, and transformers would fail importing it
    sys.modules["torchvision"] = None  # type: ignore[assignment]
except ModuleNotFoundError:
    pass


def _batches(seed: int, n: int, length: int = 8) -> list[dict[str, torch.Tensor]]:
    """Token sequences; some labels are ignored, so that micro-batches weigh differently."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(n):
        tokens = torch.randint(32, (length,), generator=generator)
        labels = tokens.clone()
        labels[: int(torch.randint(length - 2, (), generator=generator))] = -100
        examples.append({"input_ids": tokens, "labels": labels})
    return examples


@pytest.fixture
def gpt2() -> Callable[..., Any]:
    """Builds a GPT-2 with language-model head, the same on every call."""
    import transformers

    def build(n: int = 4, dropout: float = 0.0) -> Any:
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=32, n_positions=16, n_embd=16, n_layer=n, n_head=2, resid_pdrop=dropout,
            embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)

    return build


@pytest.fixture
def trainer(gpt2: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Builds a Trainer of 12 steps that logs each; keywords are TrainingArguments'.

    Besides: `model`, `kind` (a subclass), and `init`, more arguments of the trainer.
    """
    import transformers

    def build(model: Any = None, kind: Any = None, init: Any = None, **arguments: Any) -> Any:
        defaults = {
            "output_dir": str(tmp_path / "run"), "use_cpu": True, "max_steps": 12, "seed": 5,
            "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4,
            "learning_rate": 1e-2, "weight_decay": 0.1, "logging_steps": 1, "report_to": "none",
            "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False,
        }  # fmt: skip
        return (kind or transformers.Trainer)(
            model=model if model is not None or "model_init" in (init or {}) else gpt2(),
            args=transformers.TrainingArguments(**{**defaults, **arguments}),
            train_dataset=_batches(1, 20),
            eval_dataset=_batches(2, 4),
            **(init or {}),
        )

    return build
