"""TensorBoard: a writer for one's own loop."""

import os
from typing import TYPE_CHECKING, Self

from torch import Tensor

from blocksched.integrations.metrics import Metrics, is_first
from blocksched.scheduler import BlockScheduler

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_CHARTS = {
    "blocksched": {
        "relevance, a line per block": ["Multiline", [r"^blocksched/relevance/\d+$"]],
        "step time in ms": ["Multiline", ["^blocksched/step_ms$", "^blocksched/expected_step_ms$"]],
    }
}


class TensorBoardWriter:
    """Writes what a schedule does: `writer.step(loss)` in the place of `scheduler.step(loss)`.

    The numbers are those of Metrics, by optimizer steps. In a folder that it opens, TensorBoard's
    Custom Scalars page has the relevance of all blocks in one chart, and expected beside measured
    step time in another. Of several ranks the first writes.

    Use it in a `with`, or close it at the end: what was written last can be lost otherwise.

    Args:
        scheduler: with its state loaded, so that what a killed run wrote after its checkpoint is
            hidden.
        to: a folder, or the SummaryWriter that the loop has already. On ranks other than the first
            neither is touched.
        every: optimizer steps from line to line, >= 1.

    Attributes:
        board: the SummaryWriter, for the loop's own numbers; None where a folder was not opened.

    Raises:
        ImportError: a folder, and tensorboard is not installed.
        ValueError: `every` is less than 1.
    """

    def __init__(
        self,
        scheduler: BlockScheduler,
        to: "str | os.PathLike[str] | SummaryWriter",
        *,
        every: int = 10,
    ) -> None:
        self._scheduler = scheduler
        self._metrics = Metrics(scheduler, every=every)
        self.board: SummaryWriter | None
        if not isinstance(to, str | os.PathLike):
            self.board = to
        elif is_first(scheduler):
            self.board = _open(to, scheduler.progress.step)
        else:
            self.board = None

    def step(self, loss: Tensor | float | None = None) -> None:
        """End a step and plan the next, as scheduler.step does; write what is due."""
        numbers = self._metrics.step(loss)
        if self.board is not None:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, self._scheduler.progress.step)

    def close(self) -> None:
        """Write all to disk."""
        if self.board is not None:
            self.board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def _open(folder: str | os.PathLike[str], step: int) -> "SummaryWriter":
    """A writer into `folder`, where steps after `step` are of a run that did not go on."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "TensorBoardWriter needs tensorboard, which is not installed: pip install tensorboard"
        ) from error
    board = SummaryWriter(folder, purge_step=step + 1 if step else None)
    board.add_custom_scalars(_CHARTS)
    return board
