"""--resume: the checkpoints of a whole run, and which run they are of.

DIR/run.json        the flags and the time budget, written before the first step
DIR/part-0/step-..  checkpoints (blocksched/checkpoint.py) of the schedules that run side by
                    side: all of them if interleaved, else a folder for each in turn
"""

import dataclasses
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.config import Config, UserError
from bench.processes import Processes
from bench.provenance import NO_PART_OF_A_RUN
from bench.results import parse, write
from bench.tasks.parts import Task
from bench.train import Arm
from blocksched.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from blocksched.schedules.flags import option

_LAYOUT = 4  # of what a checkpoint keeps of a schedule; None before it was noted
_DAMAGED = "give another folder to --resume, or delete this one to start again"


class Checkpoints:
    """Reads and writes them.

    Attributes:
        budget_ms: the time budget that the run had, None if it had none yet or is new.
    """

    def __init__(self, config: Config, task: Task, processes: Processes) -> None:
        self._folder, self._every = Path(config.resume), config.checkpoint_every
        self._allow_previous = config.allow_previous
        self._processes = processes
        self._identity = _identity(config, task, processes)
        self._part, self._saved_at = 0, 0
        self.budget_ms: float | None = None
        processes.together(self._open)

    def begin(self, budget_ms: float | None) -> None:
        """Note which run this is. Raises UserError if that cannot be written."""
        self.budget_ms = budget_ms
        path, content = self._folder / "run.json", self._identity | {"budget_ms": budget_ms}
        self._processes.first(lambda: write(path, content))

    def load(self, part: int, arms: Sequence[Arm]) -> dict[str, Any] | None:
        """Bring the arms of a part to their newest checkpoint, and return what `save` was given;
        None without one. Raises UserError for one that is damaged or does not fit."""
        self._part = part
        together = _Together(arms)
        loaded = _plainly(
            lambda: load_checkpoint(
                self._folder / f"part-{part}",
                model=together.model,
                optimizers=[arm.optimizer for arm in arms],
                scheduler=together,
                allow_previous=self._allow_previous,
            )
        )
        self._saved_at = _steps(arms)
        if loaded is None:
            return None
        for arm, state in zip(arms, loaded.extra["arms"], strict=True):
            arm.load_state(state)
        self._saved_at = _steps(arms)
        shared: dict[str, Any] = loaded.extra["shared"]
        return shared

    def due(self, arms: Sequence[Arm]) -> bool:
        """Whether so many steps were taken that it is time for one."""
        return _steps(arms) - self._saved_at >= self._every

    def save(self, arms: Sequence[Arm], shared: dict[str, Any]) -> None:
        """Write one of the part last loaded, unless no step was taken since the last.

        Raises UserError if that fails, the one before being there as it was.
        """
        if _steps(arms) == self._saved_at:
            return
        states = [arm.state() for arm in arms]
        together = _Together(arms)
        _plainly(
            lambda: save_checkpoint(
                self._folder / f"part-{self._part}",
                _steps(arms),
                model=together.model,
                optimizers=[arm.optimizer for arm in arms],
                scheduler=together,
                extra={"arms": states, "shared": shared},
            )
        )
        self._saved_at = _steps(arms)

    def _open(self) -> None:
        path = self._folder / "run.json"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                return
            saved = parse(path.read_bytes())
            self.budget_ms = saved.pop("budget_ms")
            _check_same(self._identity, saved, self._folder)
        except OSError as error:
            raise UserError(
                f"--resume {self._folder} cannot be used ({error.strerror}): give a folder that "
                "can be read and written"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{path} is damaged: {_DAMAGED}") from None


class _Together:
    """The arms of a part as one model and one scheduler, as checkpoint.py takes them."""

    def __init__(self, arms: Sequence[Arm]) -> None:
        self.model = nn.ModuleList(arm.model for arm in arms)
        self.schedule = [str(arm.schedule) for arm in arms]
        self.blocks = arms[0].scheduler.blocks
        self.ranks = arms[0].scheduler.ranks
        self._schedulers = [arm.scheduler for arm in arms]

    def state_dict(self) -> list[dict[str, Any]]:
        return [scheduler.state_dict() for scheduler in self._schedulers]

    def load_state_dict(self, saved: Sequence[dict[str, Any]]) -> None:
        for scheduler, state in zip(self._schedulers, saved, strict=True):
            scheduler.load_state_dict(state)


def _plainly(do: Callable[[], Any]) -> Any:
    """What `do` gives, its errors and warnings being the user's, in the words of the flags."""
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            result = do()
    except CheckpointError as error:
        said = str(error).replace("pass allow_previous=True", "give --allow-previous")
        raise UserError(said) from None
    for warning in heard:
        print(f"warning: {warning.message}", file=sys.stderr)
    return result


def _steps(arms: Sequence[Arm]) -> int:
    return sum(arm.taken for arm in arms)


def _identity(config: Config, task: Task, processes: Processes) -> dict[str, Any]:
    """All that has to be the same when a run goes on."""
    flags = {
        key: value
        for key, value in dataclasses.asdict(config).items()
        if key not in NO_PART_OF_A_RUN
    }
    return {
        "flags": flags,
        "device": task.device.type,
        "processes": processes.world,
        "text": task.info.get("corpus_sha256"),
        "torch": torch.__version__,
        "layout": _LAYOUT,
    }


def _check_same(ours: dict[str, Any], saved: dict[str, Any], folder: Path) -> None:
    """Raises UserError naming what differs."""
    theirs, flags = saved["flags"], ours["flags"]
    differ = [
        f"{option(key)} {theirs.get(key)} there, {flags.get(key)} here"
        for key in sorted(flags.keys() | theirs.keys())
        if flags.get(key) != theirs.get(key)
    ]
    differ += [
        f"{key} {saved.get(key)} there, {ours[key]} here"
        for key in ours
        if key != "flags" and saved.get(key) != ours[key]
    ]
    if differ:
        raise UserError(
            f"--resume {folder} is another run's: {'; '.join(differ)}. Give the same command line, "
            "or another folder"
        )
