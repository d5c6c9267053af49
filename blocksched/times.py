"""How long each block's forward and backward take, measured on probes."""

import torch

from blocksched.blocks import Blocks


class BlockTimes:
    """Times the blocks of a model in the steps it is told to."""

    def __init__(self, blocks: Blocks, device: torch.device) -> None:
        self._blocks, self._device = blocks, device

    def expect(self, measure: bool) -> None:
        """Begin a step, which is measured if `measure`."""
        raise NotImplementedError

    def read(self) -> tuple[list[float], list[float]] | None:
        """Milliseconds of each block's forward and backward in the step, None where it was not
        measured whole."""
        raise NotImplementedError

    def close(self) -> None:
        """Leave the model alone."""
