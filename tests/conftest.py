"""A small model with every part that freezing has to get right, and where Triton's kernels run."""

import os
from collections.abc import Callable
from importlib import metadata

import pytest

# At these sizes more threads only wait for each other, and bits depend on how many there are: one,
# here and in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports a kernel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

torch.set_num_threads(1)  # a plug-in of pytest may have imported torch before


class TinyBlock(nn.Module):
    """A residual block, with batch norm if asked."""

    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x)).tanh()


class TinyModel(nn.Module):
    """Embedding, blocks, head; `reentrant` is None or the kind of activation checkpointing."""

    def __init__(self, n: int = 4, width: int = 8, tied: bool = False, norm: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.blocks = nn.ModuleList(TinyBlock(width, norm) for _ in range(n))
        self.head = nn.Linear(width, 16, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.reentrant: bool | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)

    def loss(self, step: int) -> Tensor:
        """The loss on the batch of `step`."""
        tokens = torch.randint(16, (6,), generator=torch.Generator().manual_seed(step))
        return nn.functional.cross_entropy(self(tokens), tokens.roll(1))


def _missing() -> dict[str, str]:
    """What cannot run here, by marker, and why."""
    missing = {}
    if not torch.cuda.is_available():
        missing["cuda"] = "no CUDA device here"
    try:
        version = tuple(map(int, metadata.version("triton").split(".")[:2]))
    except metadata.PackageNotFoundError:
        missing["triton"] = "triton is not installed"
    else:
        if "cuda" in missing and version < (3, 9):
            missing["triton"] = "its interpreter rounds as a GPU does from triton 3.9 on"
    return missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here."""
    for marker, reason in _missing().items():
        for item in items:
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def tiny() -> Callable[..., TinyModel]:
    """Builds a TinyModel, the same on every call."""

    def build(**arguments: object) -> TinyModel:
        torch.manual_seed(0)
        return TinyModel(**arguments)

    return build
