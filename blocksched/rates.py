"""A learning rate for each block, without touching the optimizers' groups."""

from collections.abc import Sequence

from torch.optim import Optimizer

from blocksched.blocks import Blocks


class Rates:
    """Scales the updates of each block."""

    def __init__(self, blocks: Blocks, optimizers: Sequence[Optimizer]) -> None:
        self._blocks, self._optimizers = blocks, optimizers

    def apply(self, rates: Sequence[float]) -> None:
        """Scale the next updates: a factor for each block, the last for the head; () for 1."""
        if rates:
            raise NotImplementedError

    def close(self) -> None:
        """Leave the optimizers alone."""
