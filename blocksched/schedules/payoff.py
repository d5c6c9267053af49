"""payoff: the blocks train that buy the most expected progress per measured cost.

A probe runs backward through all blocks and measures relevance and time of each, but updates only
the active set A. That set, its lowest block the boundary b, is the one of the largest

    (sum of worth_i over A) ** returns / (outside + sum f_i + sum d_i above b + sum w_i over A)

where worth is the root of relevance; f is a block's forward time, and its backward time is half
for the gradient d that it passes on and half for that of its weights, w. All blocks run forward;
above b all pass the gradient on; b itself has to only where it is block 0, for the stem.

Both powers were measured by bench/signals.py on a byte GPT of 8 blocks, from scratch and in
fine-tuning. How far 8 steps of one block alone lower the loss is ranked by |g| about as well as
other batches rank it (0.8; |g| / |p| is as good from scratch and worse in fine-tuning); its spread
over the blocks, 1.5 to 5, is that of the root of |g| rather than of |g|, 2.5 to 8. And blocks do
much of the same work: all 8 bought 2.2 to 3.5 times what the top one did, so that per cost 3 or 4
of them bought most in five moments of six, and a full update 12 to 37 % less. This is a short view
of a small model: where each block has something of its own to learn, `returns` is nearer 1.

Taking blocks above b by worth per time of their weights' gradient finds the best set if blocks take
equally long or `returns` is 1 (a linear fractional program), and else misses it by a part of one
block.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from blocksched.schedules.base import (
    Measuring,
    Metric,
    Plan,
    Progress,
    Reading,
    from_plain,
    require_blocks,
)
from blocksched.schedules.numbers import check_numbers, choice, number
from blocksched.schedules.readings import measured, usable

# A set is left only for one that pays so much more: a block's relevance differs by some 12 % from
# probe to probe (recorded runs), the payoff of a smoothed reading by about this.
_WORTH_A_CHANGE = 1.02
_MOST_STEPS = 1_000_000.0  # between probes that would cost too much
_LEAST_MS = 1e-6  # less is no time, but a clock that did not move
_LONGEST = 8  # the interval between probes doubles up to so many times the shortest

Times = tuple[float, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class PayoffState:
    """What payoff remembers.

    Attributes:
        n_blocks: blocks of the model.
        active: the blocks that train.
        worth: smoothed root of the relevance, block 0 first; () before the first reading.
        forward_ms, backward_ms: the least time of each block so far; () where none was measured.
        interval: steps from the last probe to the next.
        wait: steps before the next probe.
        not_finite: readings discarded because they held a NaN, an infinity or more than 1e150.
    """

    n_blocks: int
    active: tuple[int, ...]
    worth: tuple[float, ...] = ()
    forward_ms: tuple[float, ...] = ()
    backward_ms: tuple[float, ...] = ()
    interval: int = 1
    wait: int = 0
    not_finite: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Payoff(Measuring):
    """Train the blocks that promise the most progress per millisecond.

    What stem and head buy is not counted, so that it is the blocks that decide; before the first
    reading all count alike. A block that is left out is measured on probes, where its moments
    follow but its weights stay.

    Until freezing starts every step is a full update and a probe. At 5 % of the run that helped
    from scratch and harmed in fine-tuning (bench, preset small, one seed, equal computed cost:
    1.846 against 1.906 for the top 4 blocks throughout, and 1.625 against 1.583).

    The interval between probes doubles while they choose the same set, and falls back when they
    choose another: a block that was left out returns after 8 times the shortest interval, at the
    latest.
    """

    relevance_metric: Metric = choice(
        "grad_norm",
        "relevance of a block: grad_ratio = |g| / |p|, saliency_abs_gp = sum |g p|, "
        "grad_norm = |g|",
        ("grad_ratio", "saliency_abs_gp", "grad_norm"),
    )
    returns: float = number(
        0.4,
        "power with which what the active blocks are worth, added up, buys progress (1: "
        "each adds its own; lower: the more train, the less each adds)",
        gt=0,
        le=1,
    )
    outside: float = number(
        0.5,
        "what stem, head, loss and update take, in full steps of one block (GPT-2 small, "
        "with 50257 tokens: 5)",
        ge=0,
    )
    overhead: float = number(0.05, "the most that probes may add to the time of training", gt=0)
    freeze_start_frac: float = number(
        0.05,
        "fraction of the run after which blocks may be left out (0 suits fine-tuning)",
        ge=0,
        le=1,
    )
    ema_decay: float = number(0.7, "decay of the smoothed relevance", ge=0, lt=1)

    def __post_init__(self) -> None:
        check_numbers(self)

    @property
    def metric(self) -> tuple[Metric, float]:
        return self.relevance_metric, 1e-8

    @property
    def timed(self) -> bool:
        return True

    def init(self, n_blocks: int) -> PayoffState:
        require_blocks(n_blocks)
        alike = PayoffState(n_blocks, (), (1.0,) * n_blocks)
        active = self.best(alike.worth, Costs.of(alike, self.outside))
        return PayoffState(n_blocks, active)

    def plan(self, state: PayoffState, progress: Progress) -> Plan:
        everything = tuple(range(state.n_blocks))
        if progress.fraction < self.freeze_start_frac:
            return Plan(everything, probe=True)
        if state.wait:
            return Plan(state.active, phase="payoff", freezing=True)
        rates = [float(i in state.active) for i in everything]
        return Plan(everything, probe=True, phase="payoff", freezing=True, rates=(*rates, 1.0))

    def observe(self, state: PayoffState, plan: Plan, reading: Reading) -> PayoffState:
        if not plan.probe:
            return dataclasses.replace(state, wait=state.wait - 1)
        relevance, times = measured(reading, state.n_blocks), _times(reading)
        if relevance is None or times is None:
            return dataclasses.replace(state, wait=0, not_finite=state.not_finite + 1)
        state = dataclasses.replace(
            state,
            worth=self._smooth(state.worth, [math.sqrt(value) for value in relevance]),
            forward_ms=_least(state.forward_ms, times[0]),
            backward_ms=_least(state.backward_ms, times[1]),
        )
        return self._decide(state, plan.freezing)

    def restore(self, plain: Mapping[str, Any]) -> PayoffState:
        return from_plain(PayoffState, plain)

    def best(self, worth: Sequence[float], costs: "Costs") -> tuple[int, ...]:
        """The set that pays most; of those that pay alike one with most blocks."""
        n = len(worth)
        ranked = sorted(range(n), key=lambda i: -worth[i] / costs.half[i])
        found: tuple[int, ...] = ()
        most = -1.0, 0
        for b in range(n):
            above = [i for i in ranked if i > b]
            gain, cost = 0.0, costs.ms((b,)) - costs.half[b]
            for count, i in enumerate((b, *above), start=1):
                gain, cost = gain + worth[i], cost + costs.half[i]
                if (gain**self.returns / cost, count) > most:
                    most = gain**self.returns / cost, count
                    found = (b, *sorted(above[: count - 1]))
        return found

    def payoff(self, active: Sequence[int], worth: Sequence[float], costs: "Costs") -> float:
        """Progress per time of a step that trains `active`."""
        gain: float = sum(worth[i] for i in active) ** self.returns
        return gain / costs.ms(active)

    def _decide(self, state: PayoffState, freezing: bool) -> PayoffState:
        """The set for the next steps, and when to probe again."""
        costs = Costs.of(state, self.outside)
        active = self.best(state.worth, costs)
        kept, new = (self.payoff(each, state.worth, costs) for each in (state.active, active))
        if kept * _WORTH_A_CHANGE >= new:
            active = state.active
        extra = costs.ms(range(state.n_blocks)) / costs.ms(active) - 1.0
        shortest = max(1, math.ceil(min(extra / self.overhead, _MOST_STEPS)))
        interval = shortest
        if freezing and active == state.active:
            interval = min(max(2 * state.interval, shortest), _LONGEST * shortest)
        return dataclasses.replace(state, active=active, interval=interval, wait=interval - 1)

    def _smooth(self, before: Sequence[float], now: Sequence[float]) -> tuple[float, ...]:
        keep = self.ema_decay
        return tuple(keep * a + (1.0 - keep) * b for a, b in zip(before or now, now, strict=True))


class Costs(NamedTuple):
    """What a step costs.

    Attributes:
        fixed: whatever trains.
        half: of each block, half of its backward.
    """

    fixed: float
    half: tuple[float, ...]

    @classmethod
    def of(cls, state: PayoffState, outside: float) -> "Costs":
        """From the times so far; before the first, forward and backward are taken as 1 and 2."""
        n = state.n_blocks
        forward, backward = state.forward_ms or (1.0,) * n, state.backward_ms or (2.0,) * n
        block = sum(forward) + sum(backward)
        return cls(sum(forward) + outside * block / n, tuple(ms / 2 for ms in backward))

    def ms(self, active: Sequence[int]) -> float:
        """The time of a step that trains `active`."""
        lowest = active[0]
        passing = self.half[lowest + 1 if lowest else 0 :]
        return self.fixed + sum(passing) + sum(self.half[i] for i in active)


def _times(reading: Reading) -> tuple[Times, Times] | None:
    """Forward and backward of each block, () where there are none; None if not finite."""
    forward, backward = reading.forward_ms or (), reading.backward_ms or ()
    if not all(map(usable, (*forward, *backward))):
        return None
    if not forward or not backward or min(*forward, *backward) < _LEAST_MS:
        return (), ()
    return tuple(forward), tuple(backward)


def _least(before: Times, now: Times) -> Times:
    """What delays a block now and then only ever adds."""
    return tuple(map(min, before or now, now or before))
