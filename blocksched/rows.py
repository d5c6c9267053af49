"""The lowest blocks get their gradient from a part of the batch's rows."""

from torch import nn

from blocksched.blocks import Blocks


class Rows:
    """Runs the rest of the rows through the lowest blocks without a graph."""

    def __init__(self, model: nn.Module, blocks: Blocks) -> None:
        self._blocks = blocks

    def apply(self, lower: int, rows: float, step: int) -> None:
        """From the next forward on, `rows` of the rows reach the backward of the `lower` lowest
        blocks; which ones, `step` and the number of the forward in it decide."""
        if lower:
            raise NotImplementedError

    def close(self) -> None:
        """Run the blocks as they are."""
