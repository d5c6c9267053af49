"""What the benchmark's models are made of: a stem, blocks and a head that gives the loss."""

import copy
import hashlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from blocksched import FusedMLP


class Stack(nn.Module):
    """A model in three parts, so that each can be timed alone.

    stem: inputs -> x; blocks: x -> x; head: x -> outputs.

    Attributes:
        before_block: is called in a forward with the number of each block that is to run; outside
            of what --backend compile compiles.
    """

    before_block: Callable[[int], None] | None = None

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.head = head

    def copy(self, fused: bool, device: torch.device) -> "Stack":
        """A copy on `device`, its fused layers in the extension or in eager torch."""
        made = copy.deepcopy(self).to(device)
        for module in made.modules():
            if isinstance(module, FusedMLP):
                module.backend = "fused" if fused else "eager"
        return made

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.stem(inputs)
        for i, block in enumerate(self.blocks):
            if self.before_block is not None:
                self.before_block(i)
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

    def model(self, fused: bool) -> Stack:
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
