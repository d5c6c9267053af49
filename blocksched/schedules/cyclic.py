"""cyclic: the blocks train in turns, one at a time.

BAdam (Luo, Yu and Li, arXiv 2404.02827): block coordinate descent whose inner solver is some steps
of Adam, for full fine-tuning with the optimizer state of one block.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from blocksched.schedules.base import (
    Measuring,
    Plan,
    Progress,
    Reading,
    from_plain,
    require_blocks,
)
from blocksched.schedules.draw import permutation
from blocksched.schedules.numbers import check_numbers, choice, number, text

_SLACK = 1e-9  # a turn must not begin a step late because a share of the run was rounded


@dataclasses.dataclass(frozen=True, slots=True)
class Turns:
    """What cyclic remembers.

    Attributes:
        n_blocks: blocks of the model.
        begun: turns begun so far, over all cycles.
    """

    n_blocks: int
    begun: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cyclic(Measuring):
    """Update one block at a time, each once a cycle, with an optimizer state that begins anew.

    The paper's K is `interval`, its order a new random permutation each cycle. The authors advise
    to choose K so that a cycle is an epoch, within 50 to 100 steps; `cycles` does the first where
    the run's length is known, and suits runs that are too short for the second. Their package badam
    1.4 counts the steps of the first turn one short, and trains neither the embedding nor the head
    unless they are made blocks of their own or always active, which the authors advise for a head
    that is not pretrained. Here the head always trains, with moments that go on, and a weight that
    the embedding shares with it too. The stem does not, as theirs: in a model that is not
    pretrained let it, see `train_stem`. They drop a block's state as its turn ends, which saves
    memory; here it goes as the next one begins.
    """

    metric = None

    interval: int = number(0, "steps of a turn (0: as `cycles` says)", ge=0)
    cycles: int = number(3, "how often each block has its turn in the run, if interval is 0", ge=1)
    order: str = choice(
        "random",
        "order of the blocks in a cycle: drawn anew for each, or up or down from the input",
        ("random", "ascending", "descending"),
    )
    train_stem: bool = text(False, "train the stem in the turns of block 0, else never")
    seed: int = number(0, "of the order")

    def __post_init__(self) -> None:
        check_numbers(self)

    def init(self, n_blocks: int) -> Turns:
        require_blocks(n_blocks)
        return Turns(n_blocks)

    def plan(self, state: Turns, progress: Progress) -> Plan:
        begins = state.begun < self._due(state.n_blocks, progress)
        block = self._block(state.n_blocks, state.begun if begins else state.begun - 1)
        return Plan(
            (block,),
            phase="turn",
            freezing=True,
            stem=None if self.train_stem else False,
            fresh=(block,) if begins else (),
        )

    def observe(self, state: Turns, plan: Plan, _reading: Reading) -> Turns:
        return Turns(state.n_blocks, state.begun + len(plan.fresh))

    def restore(self, plain: Mapping[str, Any]) -> Turns:
        return from_plain(Turns, plain)

    def _due(self, n_blocks: int, progress: Progress) -> int:
        """How many turns should have begun. One begins a step at most, so that none is left out."""
        if self.interval:
            return progress.step // self.interval + 1
        turns = self.cycles * n_blocks
        return min(turns, int(progress.fraction * turns + _SLACK) + 1)

    def _block(self, n_blocks: int, turn: int) -> int:
        cycle, place = divmod(turn, n_blocks)
        if self.order == "random":
            return permutation(n_blocks, self.seed, f"cyclic {cycle}")[place]
        return place if self.order == "ascending" else n_blocks - 1 - place
