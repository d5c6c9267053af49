"""One decision on all ranks: what they measure is gathered, what each means to do is compared."""

import hashlib
import math
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, distributed

# Kept as long as the group they stand for: one made anew for the same ranks can get the name of the
# one before, and then meets that one's addresses in the store.
_HOSTS: "weakref.WeakKeyDictionary[distributed.ProcessGroup, distributed.ProcessGroup]" = (
    weakref.WeakKeyDictionary()
)


class DisagreementError(RuntimeError):
    """The ranks were about to do different things. Raised on all of them."""


class Ranks:
    """The processes that train one model, over a gloo group of their own.

    On the host, so that a vote waits for no device, and apart from the groups that carry gradients,
    so that a rank which does something else is never mistaken for an answer.

    Attributes:
        rank, world: this process's number and how many there are.
        group: that group.
        bytes: what this rank has given to the others so far.
    """

    def __init__(self, group: distributed.ProcessGroup) -> None:
        if group not in _HOSTS:
            _HOSTS[group] = distributed.new_group(
                distributed.get_process_group_ranks(group),
                backend="gloo",
                use_local_synchronization=group is not distributed.group.WORLD,
            )
        self.group = _HOSTS[group]
        self.rank = distributed.get_rank(group)
        self.world = distributed.get_world_size(group)
        self.bytes = 0

    @classmethod
    def find(cls, group: distributed.ProcessGroup | None = None) -> "Ranks | None":
        """The ranks of `group`, by default of the default group; None where there is only one.

        All of them have to call it.
        """
        if not distributed.is_available() or not distributed.is_initialized():
            return None
        given = group or distributed.group.WORLD
        return cls(given) if given is not None and given.size() > 1 else None

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """The numbers of all ranks, rank 0's first: the same rows, to the bit, on all of them.

        All ranks have to give equally many. Raises RuntimeError if one of them is gone.
        """
        rows: list[list[float]] = self._gather(torch.tensor(numbers, dtype=torch.float64)).tolist()
        return rows

    def join(
        self,
        losses: Sequence[float | None],
        sums: Sequence[float],
        alike: Sequence[str] | None,
    ) -> tuple[list[float | None], list[float]]:
        """Losses as the mean over the ranks, sums, of which each has its share, as the whole.

        Args:
            losses: those of a decision.
            sums: of the blocks, as many of each.
            alike: the blocks' names where all ranks hold the same weights.

        Raises RuntimeError where ranks that hold the same weights have other gradients.
        """
        rows = self.gather([*(math.nan if loss is None else loss for loss in losses), *sums])
        count = len(losses)
        if alike is not None:
            _refuse_unequal([row[count:] for row in rows], alike)
        totals = [sum(column) for column in zip(*rows, strict=True)]
        means = [
            None if loss is None else total / self.world
            for loss, total in zip(losses, totals, strict=False)
        ]
        return means, totals[count:]

    def agree(self, what: str) -> None:
        """Go on only if all ranks are about to do the same; else DisagreementError on all."""
        digest = hashlib.sha256(what.encode()).digest()[:8]
        votes = self._gather(torch.frombuffer(bytearray(digest), dtype=torch.int64))
        if bool((votes == votes[0]).all()):
            return
        said: list[str] = [""] * self.world
        distributed.all_gather_object(said, what, group=self.group)
        other = next(r for r in range(self.world) if said[r] != said[0])
        parts, others = said[0].split(", "), said[other].split(", ")
        here = ", ".join(part for part in parts if part not in others)
        there = ", ".join(part for part in others if part not in parts)
        raise DisagreementError(
            f"the ranks disagree, so training stops before they drift apart; rank 0: {here}; "
            f"rank {other}: {there}: give all ranks the same model, schedule, horizon and saved "
            "state, and let all of them take every step"
        )

    def _gather(self, mine: Tensor) -> Tensor:
        """Every rank's numbers, by way of rank 0: gloo's all-gather is a ring, in which as many
        messages wait for one another as there are ranks; its broadcast is a tree."""
        rows = mine.new_empty(self.world, mine.numel())
        first = list(rows) if self.rank == 0 else None
        try:
            distributed.gather(mine, first, group=self.group, group_dst=0)
            distributed.broadcast(rows, group=self.group, group_src=0)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} lost another rank: see what stopped that one ({error})"
            ) from error
        self.bytes += mine.nbytes
        return rows


def _refuse_unequal(rows: Sequence[Sequence[float]], names: Sequence[str]) -> None:
    """Gradients of different batches differ by far more than rounding does."""
    for place, column in enumerate(zip(*rows, strict=True)):
        low, high = min(column), max(column)
        if high - low > 1e-3 * abs(high):
            block = place * len(names) // len(rows[0])
            raise RuntimeError(
                f"the gradients of block {block} ({names[block]}) differ between the ranks, so "
                "nobody reduced them: wrap the model in DistributedDataParallel while all of it is "
                "trainable, before BlockScheduler is built; where ranks hold different weights, "
                "pass group= with those that hold the same"
            )
