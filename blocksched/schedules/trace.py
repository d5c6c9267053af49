"""The story of a dynamic_suffix run, in the fields of the original experiment's dynamic_trace."""

import collections
from collections.abc import Mapping
from typing import Any

from blocksched.schedules.base import Plan, Progress, Reading
from blocksched.schedules.dynamic_suffix import DynamicState, DynamicSuffix, stability
from blocksched.schedules.readings import usable


class DynamicTrace:
    """Collects `entries`: one for each probe, for freezing's start and for each recovery stage."""

    def __init__(self, schedule: DynamicSuffix) -> None:
        self.entries: list[dict[str, Any]] = []
        self._schedule = schedule
        self._losses: collections.deque[float] = collections.deque(
            maxlen=2 * schedule.stability_window
        )
        self._freezing = False
        self._phase = ""

    def planned(self, progress: Progress, plan: Plan) -> None:
        """Take in what the step at `progress` is about to do."""
        if plan.freezing and not self._freezing:
            self._freezing = True
            self.entries.append(self._freeze_entry(progress))
        recovery = self._schedule.recovery(progress)
        if recovery is not None and plan.phase != self._phase:
            stage, done = recovery
            self.entries.append(
                {
                    "step": progress.step,
                    "final_recovery_mode": self._schedule.final_recovery_mode,
                    "final_recovery_stage": stage,
                    "final_recovery_progress": done,
                    "final_recovery_active_layers": len(plan.active),
                }
            )
        self._phase = plan.phase

    def observed(
        self, step: int, plan: Plan, reading: Reading, old: DynamicState, new: DynamicState
    ) -> None:
        """Take in what the step gave back, with the state before and after."""
        if reading.loss is not None and usable(reading.loss):
            self._losses.append(reading.loss)
        if not plan.probe:
            return
        entry = {
            "step": step,
            "probe": True,
            "freeze_enabled": plan.freezing,
            "probe_loss": reading.loss,
            "best_probe_loss": new.best_loss,
            "probe_loss_ema_prev": old.loss_ema,
            "probe_loss_ema": new.loss_ema,
            "active_budget": new.budget,
            "active_start_next": new.n_blocks - new.active,
            "active_layers_next": new.active,
            "ema_scores": list(new.relevance_ema),
        }
        if new.not_finite > old.not_finite:
            entry["reading_finite"] = False
        self.entries.append(entry)

    def state_dict(self) -> dict[str, Any]:
        """The trace so far as plain values."""
        return {
            "entries": self.entries,
            "losses": list(self._losses),
            "freezing": self._freezing,
            "phase": self._phase,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on where `saved` was."""
        self.entries = list(saved["entries"])
        self._losses.clear()
        self._losses.extend(saved["losses"])
        self._freezing, self._phase = saved["freezing"], saved["phase"]

    def _freeze_entry(self, progress: Progress) -> dict[str, Any]:
        figures = stability(self._losses_now(), self._schedule.stability_window)
        trigger: dict[str, Any] = {
            "reached_start": self._schedule.freeze_reached(progress),
            "stable_ok": self._schedule.stable(self._losses_now()),
        }
        if figures is not None:
            trigger |= figures._asdict()
        return {"step": progress.step, "freeze_enabled": True, "freeze_trigger": trigger}

    def _losses_now(self) -> list[float]:
        return list(self._losses)
