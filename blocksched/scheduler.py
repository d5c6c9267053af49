"""BlockScheduler: joins a schedule, the mechanism, relevance and a clock to a training loop."""

import collections
import contextlib
import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from blocksched import sharding
from blocksched.agreement import Ranks
from blocksched.blocks import Blocks, find_blocks
from blocksched.cache import PrefixCache
from blocksched.clock import Clock, WallClock
from blocksched.compile import COMPILED, refuse_compiled
from blocksched.finite import NotFiniteError, all_finite
from blocksched.mechanism import Mechanism
from blocksched.rates import Rates
from blocksched.relevance import relevance
from blocksched.rows import Rows
from blocksched.schedules.base import (
    Plan,
    Progress,
    Reading,
    Schedule,
    plan_from_plain,
    to_plain,
)
from blocksched.skip import Skips
from blocksched.times import BlockTimes
from blocksched.transplant import transplant
from blocksched.updates import Updates


class BlockScheduler:
    """Decides before every step which blocks train, and makes it so.

    Call `step(loss)` once per optimizer step, after it, like an lr_scheduler. The first plan is
    applied on construction.

    Args:
        model: any module with a list of blocks; not one compiled as a whole.
        optimizer: the optimizer, or a list of those that share the model. Build them first.
        schedule: FullUpdate, StaticSuffix, DynamicSuffix or anything that follows
            blocksched.schedules.Schedule.
        total_steps: optimizer steps of the run. Give this or time_budget_s.
        time_budget_s: seconds of the run, on a clock that starts here.
        blocks, stem: where find_blocks has to be told, see there.
        clock: keeps `elapsed_ms`; by default the time of the work on the model's device.
        cache: skips the forward of the frozen prefix for batches that return, see PrefixCache.
        group: the processes that train this model; by default all of an initialised
            torch.distributed. Their readings are gathered, their clock is that of the slowest, and
            every plan is compared before it is applied. All of them have to build a scheduler, take
            every step and load a state together.
        max_skipped: how many updates in a row `finite` may have left out.

    Attributes:
        ranks: the processes of `group`, None where there is only one.
        skipped: updates that `finite` has had left out so far.
        reading: what the last probe measured; None before one since the start or load.
        times: what takes the time of the blocks, None where the schedule asks for none.

    Raises:
        ValueError: numbers that do not fit the model, no or two horizons, a trainable block
            parameter that no optimizer holds, LBFGS, a model that another BlockScheduler has, or
            blocks that cannot be found or taken apart.
        DisagreementError: ranks with different schedules, horizons or blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        schedule: Schedule[Any],
        *,
        total_steps: int | None = None,
        time_budget_s: float | None = None,
        blocks: str | Sequence[nn.Module] | None = None,
        stem: Sequence[str | nn.Module | nn.Parameter] | None = None,
        clock: Clock | None = None,
        cache: PrefixCache | None = None,
        group: distributed.ProcessGroup | None = None,
        max_skipped: int = 20,
    ) -> None:
        _check_horizon(total_steps, time_budget_s)
        sharding.refuse(model, optimizer)
        sharded = sharding.warm_up(model)
        if sharded and cache is not None:
            raise ValueError(
                "a rank that has a batch in its cache would not gather the weights of the prefix "
                "with the others: leave out cache= under fully_shard"
            )
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
        self.schedule = schedule
        self.blocks: Blocks = find_blocks(model, blocks, stem)
        refuse_compiled(model, self.blocks)
        self.state = schedule.init(len(self.blocks))
        self.ranks = Ranks.find(group)
        if self.ranks is not None:
            run = f"{schedule}, total_steps={total_steps}, time_budget_s={time_budget_s}"
            self.ranks.agree(f"{run}, blocks {', '.join(self.blocks.names)}")
        world = 1 if self.ranks is None else self.ranks.world
        self._updates = Updates(self.blocks, optimizers, world)
        self._mechanism = Mechanism(self.blocks, sharded)
        self._updates.watch(self._mechanism.check)
        self._skips = Skips(self.blocks)
        self._rows = Rows(self.blocks)
        self._rates = Rates(self.blocks, self._updates.optimizers)
        device = next(p.device for p in model.parameters())
        self.times = BlockTimes(self.blocks, device) if schedule.timed else None
        self._total_steps = total_steps
        self._budget_ms = None if time_budget_s is None else time_budget_s * 1e3
        self._steps = 0
        self._pending: collections.deque[tuple[Plan, Tensor | float | None]] = collections.deque(
            maxlen=max(1, schedule.history)
        )
        self.reading: Reading | None = None
        self._forwards = _ForwardCount()
        self._handle = model.register_forward_pre_hook(self._forwards)
        self._cache = cache
        if cache is not None:
            cache.attach(model, self.blocks)
        self._clock: Clock = WallClock(device) if clock is None else clock
        self.skipped = 0
        self._skipped_in_a_row, self._max_skipped = 0, max_skipped
        self._skip = False
        together = self.ranks is not None and time_budget_s is not None
        self._agreed_ms = 0.0 if together else None  # their clock, None where each has its own
        self._replicated = not any(map(sharding.is_dtensor, model.parameters()))
        try:
            self._plan = self._decide(None)
        except Exception:
            self.close()  # the model is free for a scheduler that fits it
            raise

    @property
    def plan(self) -> Plan:
        """What the current step does."""
        return self._plan

    @property
    def relevance(self) -> Sequence[float] | None:
        """What the last probe measured, block 0 first; None before one since the start or load."""
        return None if self.reading is None else self.reading.relevance

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        elapsed_ms = self._clock.elapsed_ms if self._agreed_ms is None else self._agreed_ms
        return Progress(self._steps, self._total_steps, elapsed_ms, self._budget_ms)

    @property
    def fraction(self) -> float:
        """How far the run is, 0..1: of the time budget, or of the steps."""
        return self.progress.fraction

    @property
    def done(self) -> bool:
        """Whether the run's steps or its time are used up."""
        return self.fraction >= 1.0

    def finite(self, loss: Tensor | float) -> bool:
        """Whether the loss and every gradient are finite, on all ranks alike; after backward.

        If not, leave optimizer.step() out, on all ranks, and go on as ever. It makes the host wait
        for the device. Under a GradScaler, which does the same by itself, it is not needed.

        Raises:
            NotFiniteError: more than `max_skipped` updates in a row were left out.
        """
        fine = all_finite(self._updates.gradients(), loss)
        if self.ranks is not None:
            fine = all(row[0] for row in self.ranks.gather([fine]))
        self._skip = not fine
        if fine:
            self._skipped_in_a_row = 0
            return True
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > self._max_skipped:
            raise NotFiniteError(
                f"loss or gradients were not finite in {self._skipped_in_a_row} steps in a row, "
                f"max_skipped is {self._max_skipped}: lower the learning rate, or look at the "
                f"batches since step {self._steps + 1 - self._skipped_in_a_row}"
            )
        return False

    def step(self, loss: Tensor | float | None = None) -> None:
        """End a step and plan the next.

        Args:
            loss: the step's training loss, one number (of several micro-batches: their sum or mean
                as the update used it); may be left out where the schedule asks for none. It stays
                on its device until a decision needs it.

        Raises:
            ValueError: no loss although the schedule needs it, or not one number.
            RuntimeError: no optimizer step since the last call, the backward after a change did
                not train exactly the active blocks, gradients that differ between ranks, a rank
                that is gone, or a model compiled as a whole.
            DisagreementError: the ranks were about to do different things.
        """
        if self._forwards.compiled:
            raise RuntimeError(f"the model {COMPILED}")
        kept = self._keep(loss)
        self._require_update()
        self._mechanism.check_all()
        plan = self._plan
        if plan.probe:
            self._pending.append((plan, kept))
            self._observe_pending(self._updates.sums())
        elif self.schedule.history and not plan.freezing:
            self._pending.append((plan, kept))
            if not isinstance(kept, Tensor) and self.ranks is None:
                self._observe_pending()
        else:
            number = None if isinstance(kept, Tensor) or self.ranks is not None else kept
            self.state = self.schedule.observe(self.state, plan, Reading(number))
        self._steps += 1
        self._forwards.count = 0
        self._skip = False
        self._clock.tick()
        if self._agreed_ms is not None:
            assert self.ranks is not None
            self._agreed_ms = max(ms for (ms,) in self.ranks.gather([self._clock.elapsed_ms]))
        self._plan = self._decide(self._plan)

    @contextlib.contextmanager
    def off_clock(self) -> Iterator[None]:
        """What runs inside (evaluation, checkpoints) does not count as time of the run."""
        self._clock.pause()
        try:
            yield
        finally:
            self._clock.resume()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler as plain numbers, JSON included; the model's and optimizer's are theirs.

        It asks the other ranks nothing. `pending`, the losses that no decision has needed so far,
        are this rank's own; all else is the same on all ranks.
        """
        return {
            "schedule": type(self.schedule).__name__,
            "numbers": to_plain(self.schedule),
            "state": to_plain(self.state),
            "plan": to_plain(self._plan),
            "steps": self._steps,
            "skipped": self.skipped,
            "elapsed_ms": self.progress.elapsed_ms,
            "pending": [
                [to_plain(plan), None if loss is None else str(loss)]
                for (plan, _), loss in zip(self._pending, self._on_host()[0], strict=True)
            ],
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on where `saved` was, before or after the optimizer's state is loaded.

        Raises ValueError if it was saved by another schedule, other numbers or another depth, and
        DisagreementError if the ranks load different states.
        """
        ours = type(self.schedule).__name__, to_plain(self.schedule)
        theirs = saved["schedule"], saved["numbers"]
        if ours != theirs:
            raise ValueError(
                f"the state was saved by {_call(*theirs)}, this scheduler runs {_call(*ours)}: "
                "build it with the same numbers"
            )
        state = self.schedule.restore(saved["state"])
        if state.n_blocks != len(self.blocks):
            raise ValueError(
                f"the state was saved with {state.n_blocks} blocks, the model has "
                f"{len(self.blocks)}: load it into the same model"
            )
        self.state = state
        self._steps = saved["steps"]
        self.skipped, self._skipped_in_a_row = saved["skipped"], 0
        self._clock.elapsed_ms = saved["elapsed_ms"]
        if self._agreed_ms is not None:
            self._agreed_ms = saved["elapsed_ms"]
        self._pending.clear()
        for plan, loss in saved["pending"]:
            self._pending.append((plan_from_plain(plan), None if loss is None else float(loss)))
        self.reading = None
        self._forwards.count = 0
        self._plan = plan_from_plain(saved["plan"])
        self._apply(self._plan)

    def close(self) -> None:
        """Leave the model as it was found: everything trainable that was, no hooks."""
        for part in (self._mechanism, self._skips, self._rows, self._rates, self.times):
            if part is not None:
                part.close()
        if self._cache is not None:
            self._cache.close()
        self._updates.close()
        self._handle.remove()

    def _decide(self, last: Plan | None) -> Plan:
        """Plan the step after `last` and apply the plan, reading losses only if it needs them."""
        progress = self.progress
        if last is not None and "losses" in self.schedule.wants(self.state, progress):
            self._observe_pending()
        plan = self.schedule.plan(self.state, progress)
        transplant(self.blocks, self._updates.optimizers, last, plan)
        self._apply(plan)
        return plan

    def _apply(self, plan: Plan) -> None:
        if self.ranks is not None:
            self.ranks.agree(f"step {self._steps} does {plan} from {self.state}")
        self._skips.apply(plan.running)
        self._mechanism.apply(plan.active, plan.stem)
        self._rows.apply(plan.lower, plan.rows, self._steps)
        self._rates.apply(plan.rates)
        self._updates.expect(plan.probe)
        if self.times is not None:
            self.times.expect(plan.probe)
        if self._cache is not None:
            self._cache.move(plan.boundary)

    def _observe_pending(self, sums: Tensor | None = None) -> None:
        """Hand the pending readings to the schedule, in order, after one copy to the host."""
        if sums is None and self.ranks is not None and self._plan.probe:
            sums = torch.full((len(self.blocks), 3), math.nan)  # all ranks give equally many
        losses, numbers = self._on_host(sums)
        if self.ranks is not None and losses:
            alike = self.blocks.names if self._replicated else None
            losses, numbers = self.ranks.join(losses, numbers, alike)
        metric = self.schedule.metric
        forward_ms, backward_ms = self._block_times() if sums is not None else (None, None)
        for (plan, _), loss in zip(self._pending, losses, strict=True):
            values = None
            if plan.probe and sums is not None and metric is not None:
                rows = [numbers[3 * b : 3 * b + 3] for b in range(len(self.blocks))]
                values = tuple(relevance(rows, *metric))
            reading = Reading(loss)
            if plan.probe:
                reading = self.reading = Reading(loss, values, forward_ms, backward_ms)
            self.state = self.schedule.observe(self.state, plan, reading)
        self._pending.clear()

    def _block_times(self) -> tuple[Sequence[float] | None, Sequence[float] | None]:
        """Of the blocks' forward and backward, in ms; on several ranks the slowest's."""
        if self.times is None:
            return None, None
        n, measured = len(self.blocks), self.times.read()
        times = [math.nan] * (2 * n) if measured is None else [*measured[0], *measured[1]]
        if self.ranks is not None:
            rows = self.ranks.gather(times)
            times = [max(column) for column in zip(*rows, strict=True)]
            times += [math.nan] * any(math.isnan(ms) for row in rows for ms in row)
        if any(map(math.isnan, times)):
            return None, None
        return times[:n], times[n:]

    def _on_host(self, sums: Tensor | None = None) -> tuple[list[float | None], list[float]]:
        """The pending losses and the sums."""
        kept = [loss for _, loss in self._pending]
        tensors = [loss for loss in kept if isinstance(loss, Tensor)]
        numbers = _to_host([*tensors, *([] if sums is None else [sums])])
        losses = [numbers.pop(0) if isinstance(loss, Tensor) else loss for loss in kept]
        return losses, numbers

    def _keep(self, loss: Tensor | float | None) -> Tensor | float | None:
        if loss is None:
            if self.schedule.needs_loss:
                raise ValueError(
                    f"{type(self.schedule).__name__} decides by the loss here: "
                    "call scheduler.step(loss)"
                )
            return None
        if not isinstance(loss, Tensor):
            return float(loss)
        if loss.numel() != 1:
            raise ValueError(
                f"the loss must be one number, got shape {tuple(loss.shape)}: pass its mean or sum"
            )
        return loss.detach().clone()  # user code divides losses in place

    def _require_update(self) -> None:
        """Tell a forgotten optimizer step from one that a GradScaler skipped.

        A skipped step had a forward, and left gradients that are gone or not finite.
        """
        if self._updates.made or self._skip:
            return
        block_grads = [p.grad for block in self.blocks.parameters for p in block]
        grads = [sharding.local(grad) for grad in block_grads if grad is not None]
        skipped = self._forwards.count > 0 and not (
            grads and all(bool(torch.isfinite(g).all()) for g in grads)
        )
        if not skipped:
            raise RuntimeError(
                "scheduler.step was called without an optimizer step since the last call: call it "
                "once after each optimizer.step(), not for each micro-batch"
            )


class _ForwardCount:
    """A hook that counts the model's forwards in training; idle in copies.

    It notes a compiler that traces it, which is one around the whole model.
    """

    def __init__(self, live: bool = True) -> None:
        self.live, self.count, self.compiled = live, 0, False

    def __reduce__(self) -> tuple[type["_ForwardCount"], tuple[bool]]:
        return _ForwardCount, (False,)

    def __call__(self, module: nn.Module, _args: Any) -> None:
        if self.live and module.training:
            self.count += 1
            self.compiled |= torch.compiler.is_compiling()


def _to_host(tensors: Sequence[Tensor]) -> list[float]:
    """All numbers of `tensors` in one copy: the only place where the host waits for the device."""
    if not tensors:
        return []
    device = tensors[-1].device
    flat = [tensor.detach().reshape(-1).to(device, torch.float64) for tensor in tensors]
    return torch.cat(flat).tolist()


def _check_horizon(total_steps: int | None, time_budget_s: float | None) -> None:
    if total_steps is None and time_budget_s is None:
        raise ValueError("a run needs a horizon: pass total_steps or time_budget_s")
    if total_steps is not None and time_budget_s is not None:
        raise ValueError("a run has one horizon: pass total_steps or time_budget_s, not both")
    for name, value in (("total_steps", total_steps), ("time_budget_s", time_budget_s)):
        # Up to 2**53 every whole number is a float.
        if value is not None and not (isinstance(value, Real) and 0 < value <= 2**53):
            raise ValueError(
                f"{name} must be > 0, got {reprlib.repr(value)}: give the length of the run, 2**53 "
                "at most"
            )


def _call(name: str, numbers: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value}' for key, value in numbers.items())})"
