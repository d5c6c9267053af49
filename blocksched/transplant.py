"""A block takes over another's weights, buffers and optimizer state, or begins with none."""

from collections.abc import Sequence

from torch.optim import Optimizer

from blocksched.blocks import Blocks


def take_over(blocks: Blocks, optimizers: Sequence[Optimizer], block: int, source: int) -> None:
    """Make `block` a copy of `source`, its optimizer state included."""
    raise NotImplementedError


def begin_anew(blocks: Blocks, optimizers: Sequence[Optimizer], block: int) -> None:
    """Drop the optimizer state of a block's parameters: its next update is its first."""
    raise NotImplementedError
