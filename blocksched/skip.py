"""Blocks that do not run: a skipped block passes on what it is given."""

from collections.abc import Sequence

from blocksched.blocks import Blocks


class Skips:
    """Lets the blocks of a residual model that are not yet in use pass their input on."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks

    def apply(self, running: Sequence[int] | None) -> None:
        """Run exactly the blocks `running` from the next forward on; None: all."""
        if running is not None:
            raise NotImplementedError

    def close(self) -> None:
        """Run all blocks."""
        self.apply(None)
