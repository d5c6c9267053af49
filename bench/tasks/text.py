"""A byte-level GPT on real text."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.config import Config, UserError
from bench.tasks.corpus import Corpus, load_corpus
from bench.tasks.parts import NormHead, Stack, generator
from blocksched import FusedMLP

_BYTES = 256
_HEAD_DIM = 64


class Attention(nn.Module):
    """x + proj(attention(rms_norm(x))): causal, with rotary positions (arXiv 2104.09864).

    x: [batch, positions, d].
    """

    def __init__(self, d: int, heads: int, seq_len: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.proj = nn.Linear(d, d, bias=False)
        size = d // heads
        speed = 10000.0 ** (-torch.arange(0, size, 2) / size)
        angle = torch.arange(seq_len)[:, None] * speed[None, :]
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, positions, d = x.shape
        qkv = self.qkv(functional.rms_norm(x, x.shape[-1:]))
        q, k, v = qkv.view(batch, positions, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(
            self._rotate(q), self._rotate(k), v, is_causal=True
        )
        return x + self.proj(mixed.transpose(1, 2).reshape(batch, positions, d))

    def _rotate(self, x: Tensor) -> Tensor:
        cos, sin = self.cos[: x.shape[-2]].to(x.dtype), self.sin[: x.shape[-2]].to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Block(nn.Module):
    """A pre-norm transformer block: attention, then the experiment's MLP."""

    def __init__(self, config: Config, heads: int) -> None:
        super().__init__()
        self.attention = Attention(config.dmodel, heads, config.seq_len)
        self.mlp = FusedMLP(config.dmodel, config.hidden_mult * config.dmodel, backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.mlp(self.attention(x))
        return mixed


class TextTask:
    """Next-byte prediction; weights are float32, bfloat16 is autocast over them."""

    def __init__(self, config: Config, device: torch.device, corpus: Corpus | None = None) -> None:
        self.device = device
        self._config = config
        self._heads = _heads(config)
        if corpus is None:
            corpus = load_corpus(config.data, config.seq_len + 1)
        self._corpus = corpus
        self.info: dict[str, Any] = {
            "corpus": corpus.source,
            "corpus_sha256": corpus.sha256,
            "corpus_train_bytes": len(corpus.train),
            "corpus_val_bytes": len(corpus.validation),
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self._start = self._build()

    def _build(self) -> Stack:
        config = self._config
        blocks: list[nn.Module] = [Block(config, self._heads) for _ in range(config.n_layers)]
        stack = Stack(nn.Embedding(_BYTES, config.dmodel), blocks, NormHead(config.dmodel, _BYTES))
        for name, parameter in stack.named_parameters():
            # GPT-2's: what writes into the residual stream starts smaller, the deeper the stack.
            deep = name.endswith(("proj.weight", "fc2.weight")) and "blocks" in name
            nn.init.normal_(parameter, std=0.02 / (2 * config.n_layers) ** 0.5 if deep else 0.02)
        # Not 0.02: an embedding that small is overturned by AdamW's first steps. Measured on preset
        # small at 200 full steps: 0.1 gives 1.919, 0.3 1.960, 0.02 with a warm-up 1.964.
        nn.init.normal_(stack.stem.weight, std=0.1)
        return stack

    def model(self, fused: bool) -> Stack:
        return self._start.copy(fused, self.device)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        config, text = self._config, self._corpus.train
        source = generator(torch.device("cpu"), config.seed, f"batch {step}")
        last = len(text) - config.seq_len
        return self._windows(
            text, torch.randint(last, (config.batch_size,), generator=source).tolist()
        )

    def validation(self) -> list[tuple[Tensor, Tensor]]:
        config, text = self._config, self._corpus.validation
        rows = config.batch_size * config.val_batches
        last = len(text) - config.seq_len - 1
        starts = [row * last // max(1, rows - 1) for row in range(rows)]
        return [
            self._windows(text, starts[i : i + config.batch_size])
            for i in range(0, rows, config.batch_size)
        ]

    def _windows(self, text: Tensor, starts: list[int]) -> tuple[Tensor, Tensor]:
        rows = torch.stack([text[i : i + self._config.seq_len + 1] for i in starts])
        rows = rows.to(self.device).long()
        return rows[:, :-1], rows[:, 1:]

    def forward(self, part: nn.Module, inputs: Tensor) -> Tensor:
        half = self._config.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            outputs: Tensor = part(inputs)
        return outputs

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs.float().flatten(0, 1), targets.flatten())


def _heads(config: Config) -> int:
    heads = config.n_heads or max(1, config.dmodel // _HEAD_DIM)
    if config.dmodel % (2 * heads):
        raise UserError(
            f"--dmodel must be a multiple of twice the attention heads ({heads}), got "
            f"{config.dmodel}: change it, or set --n-heads"
        )
    return heads
