"""The processes of one benchmark, as torchrun starts them; without torchrun there is one."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup

from bench.config import UserError
from bench.tasks.parts import Stack, Task

T = TypeVar("T")


class Processes:
    """Starts and ends the process group; what is refused on one process is refused on all.

    Attributes:
        rank, world: this process's number and how many there are.
        backend: what carries the gradients, nccl or gloo; None on one process.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.backend = None
        if self.world > 1:
            self.backend = "nccl" if device.type == "cuda" else "gloo"
            if device.type == "cuda":
                torch.cuda.set_device(device)
            _join(self.backend, self.rank, self.world)

    def stop(self) -> None:
        """Leave the process group."""
        if self.backend is not None:
            distributed.destroy_process_group()

    def together(self, do: Callable[[], T]) -> T:
        """What `do` gives here. A UserError that it raises on any process is raised on all."""
        result, refused = None, None
        try:
            result = do()
        except UserError as error:
            refused = str(error)
        said = [refused] * self.world
        if self.backend is not None:
            distributed.all_gather_object(said, refused)
        for words in said:
            if words is not None:
                raise UserError(words)
        return result  # type: ignore[return-value]

    def first(self, do: Callable[[], Any]) -> None:
        """The same for what only rank 0 does, such as writing a file."""
        self.together(lambda: do() if self.rank == 0 else None)

    def local_first(self, do: Callable[[], Any]) -> None:
        """Have one process of each machine do it before the others do: it fills a cache."""
        early = int(os.environ.get("LOCAL_RANK", "0")) == 0
        for turn in (True, False):
            self.together(lambda turn=turn: do() if early is turn else None)


class Share:
    """A task's batches, of which this process has its share of the rows."""

    def __init__(self, task: Task, processes: Processes, rows: int) -> None:
        each, left = divmod(rows, processes.world)
        if left:
            raise UserError(
                f"--batch-size must be a multiple of the {processes.world} processes, got {rows}: "
                "change it, or torchrun's --nproc-per-node"
            )
        self._task = task
        self._rows = slice(processes.rank * each, (processes.rank + 1) * each)
        self.device, self.info = task.device, task.info

    def model(self, fused: bool) -> Stack:
        return self._task.model(fused)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self._task.batch(step)
        return inputs[self._rows], targets[self._rows]

    def validation(self) -> list[tuple[Tensor, Tensor]]:
        batches = self._task.validation()
        return [(inputs[self._rows], targets[self._rows]) for inputs, targets in batches]

    def forward(self, part: nn.Module, inputs: Tensor) -> Tensor:
        return self._task.forward(part, inputs)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._task.loss(outputs, targets)


def _join(backend: str, rank: int, world: int) -> None:
    """Join the process group, apart from what a torchrun of one machine restarts after.

    Its store outlives the processes that died, so those of the next attempt would meet their
    addresses in it (pytorch#135712). Several machines count attempts each for itself.
    """
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(world)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_machine else "of many"
    store, _, _ = next(distributed.rendezvous("env://"))
    store = distributed.PrefixStore(f"attempt {attempt}", store)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world)


def alone() -> ProcessGroup | None:
    """A group of this process only, for what it measures or trains by itself."""
    if not distributed.is_initialized():
        return None
    return distributed.new_group(
        [distributed.get_rank()], backend="gloo", use_local_synchronization=True
    )


@contextlib.contextmanager
def only_rank_0_speaks() -> Iterator[None]:
    """What other processes print is dropped; what stops them with a traceback is not."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield
