"""dynamic_suffix: relevance decides how many of the top blocks train, full probes keep measuring.

The rule of the original experiment: train everything until freezing starts; from then on train
only the smallest top suffix that holds a given share of the relevance, and every so often probe,
that is, train everything once and measure again; train everything (or in stages more) at the end.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from blocksched.schedules.base import (
    Measuring,
    Metric,
    Plan,
    Progress,
    Reading,
    Want,
    from_plain,
    require_blocks,
    suffix,
)
from blocksched.schedules.numbers import check_numbers, choice, number, text
from blocksched.schedules.readings import require_relevance, usable

_TINY = 1e-12


@dataclasses.dataclass(frozen=True, slots=True)
class DynamicState:
    """What dynamic_suffix remembers.

    Attributes:
        n_blocks: blocks of the model.
        active: size of the suffix in use when freezing is allowed.
        budget: the cap on `active`.
        relevance_ema: smoothed relevance, block 0 first.
        loss_ema: smoothed loss of the probes, None before the first.
        best_loss: lowest loss of a probe, None before the first.
        freezing: whether freezing has started.
        losses: the latest losses, at most two stability windows, empty where no test needs them.
        reprobe: whether the next step outside recovery has to probe.
        not_finite: readings discarded because they held a NaN, an infinity or more than 1e150.
    """

    n_blocks: int
    active: int
    budget: int
    relevance_ema: tuple[float, ...]
    loss_ema: float | None = None
    best_loss: float | None = None
    freezing: bool = False
    losses: tuple[float, ...] = ()
    reprobe: bool = False
    not_finite: int = 0


class Stability(NamedTuple):
    """The figures of the stability test, each as the original experiment defines it."""

    prev_mean: float
    curr_mean: float
    rel_change: float
    cv: float


def stability(losses: Sequence[float], window: int) -> Stability | None:
    """Compare the last `window` losses with the `window` before; None with fewer than both."""
    if window <= 0 or len(losses) < 2 * window:
        return None
    before, last = losses[-2 * window : -window], losses[-window:]
    prev_mean, curr_mean = math.fsum(before) / window, math.fsum(last) / window
    variance = math.fsum((loss - curr_mean) ** 2 for loss in last) / window
    return Stability(
        prev_mean,
        curr_mean,
        rel_change=abs(curr_mean - prev_mean) / (abs(prev_mean) + _TINY),
        cv=math.sqrt(variance) / (abs(curr_mean) + _TINY),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicSuffix(Measuring):
    """Update the relevance-guided top suffix, with periodic full probes.

    Each field is a flag of the experiment without its `dyn-` and `-layers`.
    """

    warmup_steps: int = number(40, "every one of the first steps is a probe", ge=0)
    probe_every: int = number(20, "a probe every so many steps (0: none)", ge=0)
    refresh_every: int = number(80, "a further probe every so many steps (0: none)", ge=0)
    relevance_metric: Metric = choice(
        "grad_ratio",
        "relevance of a block: grad_ratio = |g| / (|p| + eps), saliency_abs_gp = sum |g p|",
        ("grad_ratio", "saliency_abs_gp"),
    )
    relevance_threshold: float = number(
        0.9, "share of the relevance that the active suffix has to hold", gt=0, le=1
    )
    min_active: int = number(4, "fewest active blocks", ge=1)
    max_active: int = number(0, "most active blocks outside probes and recovery (0: all)", ge=0)
    adapt_budget: bool = text(False, "move the cap on active blocks with the loss of the probes")
    freeze_start_step: int = number(
        -1, "step at which freezing may start (negative: use the fraction; equal time ignores it)"
    )
    freeze_start_frac: float = number(
        0.5, "fraction of the run, in time or steps, after which freezing may start", ge=0, le=1
    )
    require_stable: bool = text(False, "freezing also waits for the loss to pass a stability test")
    stability_window: int = number(12, "stability test: steps in each of its two windows", ge=1)
    stability_rel_change: float = number(
        0.02, "stability test: largest relative change of the mean loss", ge=0
    )
    stability_cv: float = number(0.03, "stability test: largest std / mean of the loss", ge=0)
    final_full_frac: float = number(
        0.0, "fraction of the run at its end in which blocks are thawed again", ge=0, le=1
    )
    final_recovery_mode: str = choice(
        "full", "recovery: all blocks at once, or in three stages", ("full", "staged")
    )
    final_recovery_stage1_progress: float = number(
        0.34, "staged recovery: share of the window at which its second stage begins", ge=0, le=1
    )
    final_recovery_stage2_progress: float = number(
        0.67, "staged recovery: share of the window from which all blocks train", ge=0, le=1
    )
    final_recovery_stage1: int = number(14, "staged recovery: active blocks in stage 1", ge=1)
    final_recovery_stage2: int = number(16, "staged recovery: active blocks in stage 2", ge=1)
    loss_upper: float = number(
        1.03, "adapt budget: raise the cap if a probe's loss exceeds this x its average", ge=0
    )
    loss_lower: float = number(
        0.995, "adapt budget: lower the cap if a probe's loss is below this x its average", ge=0
    )
    budget_step_up: int = number(2, "adapt budget: blocks by which the cap rises", ge=1)
    budget_step_down: int = number(1, "adapt budget: blocks by which the cap falls", ge=1)
    loss_ema_decay: float | None = number(
        0.9,
        "decay of the average of the probes' losses (None: compare with the lowest, as the "
        "experiment's first recordings did)",
        optional=True,
        ge=0,
        lt=1,
    )
    ema_decay: float = number(0.9, "decay of the smoothed relevance", ge=0, lt=1)
    eps: float = number(1e-8, "grad_ratio: added to the weights' norm", ge=0)

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.loss_lower > self.loss_upper:
            raise ValueError(
                f"loss_lower must not exceed loss_upper, got {self.loss_lower} > "
                f"{self.loss_upper}: lower the first or raise the second"
            )
        if self.max_active and self.max_active < self.min_active:
            raise ValueError(
                f"max_active must be 0 or at least min_active, got {self.max_active} < "
                f"{self.min_active}: raise max_active or lower min_active"
            )

    @property
    def history(self) -> int:
        return 2 * self.stability_window if self.require_stable else 0

    @property
    def needs_loss(self) -> bool:
        return self.require_stable or self.adapt_budget

    @property
    def metric(self) -> tuple[Metric, float]:
        return self.relevance_metric, self.eps

    @property
    def staged(self) -> bool:
        """Whether the run ends in a staged recovery."""
        return self.final_full_frac > 0 and self.final_recovery_mode == "staged"

    def init(self, n_blocks: int) -> DynamicState:
        require_blocks(n_blocks)
        limits = {"min_active": (1, self.min_active), "max_active": (0, self.max_active)}
        if self.staged:
            limits["final_recovery_stage1"] = (self.min_active, self.final_recovery_stage1)
            limits["final_recovery_stage2"] = (
                self.final_recovery_stage1,
                self.final_recovery_stage2,
            )
            if self.final_recovery_stage2_progress < self.final_recovery_stage1_progress:
                raise ValueError(
                    "final_recovery_stage2_progress must be at least "
                    f"final_recovery_stage1_progress ({self.final_recovery_stage1_progress}), got "
                    f"{self.final_recovery_stage2_progress}: raise it"
                )
        for name, (low, value) in limits.items():
            if not low <= value <= n_blocks:
                raise ValueError(
                    f"{name} must be {low}..{n_blocks}, got {value}: move it into this range "
                    "or train a deeper model"
                )
        top = self.max_active or n_blocks
        return DynamicState(n_blocks, top, top, (0.0,) * n_blocks)

    def wants(self, state: DynamicState, progress: Progress) -> frozenset[Want]:
        wanted: set[Want] = set()
        if self.require_stable and not state.freezing and self.freeze_reached(progress):
            wanted.add("losses")
        if self._probes(state, progress):
            wanted.add("relevance")
        return frozenset(wanted)

    def plan(self, state: DynamicState, progress: Progress) -> Plan:
        n = state.n_blocks
        freezing = state.freezing or (self.freeze_reached(progress) and self._may_freeze(state))
        recovery = self.recovery(progress)
        probe = self._probes(state, progress)
        if recovery is not None:
            stage, _ = recovery
            k = self._recovery_active(stage, state) if freezing else n
            return Plan(suffix(n, k), phase=f"recovery:{stage}", freezing=freezing)
        if not freezing:
            return Plan(suffix(n, n), probe=probe)
        k = n if probe else state.active
        return Plan(suffix(n, k), probe=probe, phase="suffix", freezing=True)

    def observe(self, state: DynamicState, plan: Plan, reading: Reading) -> DynamicState:
        freezing = state.freezing or plan.freezing
        if not _finite(plan, reading):
            return dataclasses.replace(
                state, freezing=freezing, reprobe=True, not_finite=state.not_finite + 1
            )
        losses = state.losses
        if reading.loss is not None and self.require_stable and not freezing:
            losses = (*losses, reading.loss)[-self.history :]
        state = dataclasses.replace(state, freezing=freezing, losses=() if freezing else losses)
        if not plan.probe:
            return state
        budget, loss_ema, best_loss = self._budget(state, reading.loss)
        relevance_ema = self._smooth(state, reading.relevance or ())
        return dataclasses.replace(
            state,
            active=self._select(relevance_ema, budget),
            budget=budget,
            relevance_ema=relevance_ema,
            loss_ema=loss_ema,
            best_loss=best_loss,
            reprobe=False,
        )

    def restore(self, plain: Mapping[str, Any]) -> DynamicState:
        return from_plain(DynamicState, plain)

    def freeze_reached(self, progress: Progress) -> bool:
        """Whether freezing may start at `progress`, stability left aside."""
        if progress.budget_ms is not None:
            return progress.elapsed_ms >= self.freeze_start_frac * progress.budget_ms
        if self.freeze_start_step >= 0:
            return progress.step >= self.freeze_start_step
        return progress.step >= round(self.freeze_start_frac * progress.known_limit)

    def stable(self, losses: Sequence[float]) -> bool:
        """Whether `losses`, the training losses so far or the last of them, have settled."""
        figures = stability(losses, self.stability_window)
        return (
            figures is not None
            and figures.rel_change <= self.stability_rel_change
            and figures.cv <= self.stability_cv
        )

    def recovery(self, progress: Progress) -> tuple[str, float] | None:
        """The stage of the final window and how far into it `progress` is (0..1), or None."""
        if self.final_full_frac <= 0:
            return None
        now: float
        if progress.budget_ms is not None:
            now, end = progress.elapsed_ms, progress.budget_ms
            begin = (1.0 - self.final_full_frac) * end
        else:
            now, end = progress.step, progress.known_limit
            begin = int((1.0 - self.final_full_frac) * end)
        if now < begin:
            return None
        done = min(1.0, max(0.0, (now - begin) / (end - begin))) if end > begin else 1.0
        if self.final_recovery_mode == "full":
            return "full", done
        if done >= self.final_recovery_stage2_progress:
            return "stage3_full", done
        if done >= self.final_recovery_stage1_progress:
            return "stage2", done
        return "stage1", done

    def _recovery_active(self, stage: str, state: DynamicState) -> int:
        if stage == "stage1":
            return max(state.active, self.final_recovery_stage1)
        if stage == "stage2":
            return max(state.active, self.final_recovery_stage2)
        return state.n_blocks

    def _may_freeze(self, state: DynamicState) -> bool:
        return not self.require_stable or self.stable(state.losses)

    def _probes(self, state: DynamicState, progress: Progress) -> bool:
        if self.recovery(progress) is not None:
            return False
        periods = (self.probe_every, self.refresh_every)
        return (
            state.reprobe
            or progress.step < self.warmup_steps
            or any(period and progress.step % period == 0 for period in periods)
        )

    def _budget(
        self, state: DynamicState, loss: float | None
    ) -> tuple[int, float | None, float | None]:
        """The cap, the average and the lowest of the probes' losses, after one more of them."""
        if loss is None:
            if self.adapt_budget:
                raise ValueError(
                    "adapt_budget compares the losses of probes, and this one came without: pass "
                    "the loss to scheduler.step(loss), or switch adapt_budget off"
                )
            return state.budget, state.loss_ema, state.best_loss
        best = loss if state.best_loss is None else min(state.best_loss, loss)
        if state.loss_ema is None:
            return state.budget, loss, best
        budget, decay = state.budget, self.loss_ema_decay
        if self.adapt_budget:
            reference = best if decay is None else state.loss_ema
            if loss > reference * self.loss_upper:
                budget = min(self.max_active or state.n_blocks, budget + self.budget_step_up)
            elif loss < reference * self.loss_lower:
                budget = max(self.min_active, budget - self.budget_step_down)
        if decay is None:
            return budget, best, best
        return budget, decay * state.loss_ema + (1.0 - decay) * loss, best

    def _smooth(self, state: DynamicState, relevance: Sequence[float]) -> tuple[float, ...]:
        require_relevance(relevance, state.n_blocks)
        keep = self.ema_decay
        return tuple(
            keep * old + (1.0 - keep) * new
            for old, new in zip(state.relevance_ema, relevance, strict=True)
        )

    def _select(self, relevance: Sequence[float], budget: int) -> int:
        held = list(itertools.accumulate(reversed(relevance)))
        if held[-1] <= 0:
            return budget
        # The slack lets a tie be a tie whatever the rounding of the sums.
        wanted = self.relevance_threshold * held[-1] * (1.0 - _TINY)
        sizes = range(self.min_active, budget + 1)
        return next((k for k in sizes if held[k - 1] >= wanted), budget)


def _finite(plan: Plan, reading: Reading) -> bool:
    """Whether `reading` can be used; a probe that measured nothing cannot."""
    if plan.probe and reading.relevance is None:
        return False
    numbers = [*(reading.relevance or ()), *([] if reading.loss is None else [reading.loss])]
    return all(usable(value) for value in numbers)
