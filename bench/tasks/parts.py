"""What the benchmark's models are made of: a stem, blocks and a head that gives the loss."""

import hashlib
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional


class ReluSquaredMLP(nn.Module):
    """x + fc2(relu(fc1(rms_norm(x)))^2), the experiment's fused layer in eager torch.

    x: [..., d]. The norm has no weight, the products no bias.
    """

    def __init__(self, d: int, hidden_mult: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d, hidden_mult * d, bias=False)
        self.fc2 = nn.Linear(hidden_mult * d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.fc1(functional.rms_norm(x, x.shape[-1:])))
        return x + self.fc2(hidden.square())


class Stack(nn.Module):
    """A model in three parts, so that each can be timed alone.

    stem: inputs -> x; blocks: x -> x; head: x -> outputs.
    """

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.stem(inputs)
        for block in self.blocks:
            x = block(x)
        outputs: Tensor = self.head(x)
        return outputs


class NormHead(nn.Module):
    """rms_norm, then a product without bias: [..., d] -> [..., out]."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(d, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.proj(functional.rms_norm(x, x.shape[-1:]))
        return outputs


class Task(Protocol):
    """Something to train. Batch t depends on the seed and t alone."""

    device: torch.device
    info: dict[str, Any]

    def model(self) -> Stack:
        """A model at the start that all schedules share, on the device."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of step `step`."""

    def validation(self) -> list[tuple[Tensor, Tensor]]:
        """The validation batches, the same on every call."""

    def forward(self, part: nn.Module, inputs: Tensor) -> Tensor:
        """`part` of a model (or all of it) on `inputs`, in the run's precision."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss, in float32."""


def generator(device: torch.device, seed: int, stream: str) -> torch.Generator:
    """A random generator for one purpose, such as "batch 7"."""
    # Hashed, since a CPU generator looks at the low 32 bits of its seed alone.
    digest = hashlib.sha256(f"{seed} {stream}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8]) >> 1)
