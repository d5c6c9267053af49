"""Lightning: a callback that runs a BlockScheduler in the Trainer's loop."""

import importlib.util
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from blocksched.distributed import prepare_ddp
from blocksched.integrations.metrics import Counts
from blocksched.scheduler import BlockScheduler
from blocksched.schedules.base import Schedule

if TYPE_CHECKING or importlib.util.find_spec("lightning"):
    from lightning.pytorch import Callback, LightningModule
else:
    from pytorch_lightning import Callback, LightningModule


class BlockScheduling(Callback):
    """Decides before every optimizer step which blocks of the LightningModule train.

    The run is as long as the Trainer says: max_time is a time budget, else max_steps and max_epochs
    give the number of steps. The loss of a step is the sum over its micro-batches of what
    training_step returned, divided by accumulate_grad_batches, as in the update; a step that
    training_step skipped by returning None counts as a loss that is not finite. Checkpoints hold
    the schedule's state and fit(ckpt_path=...) goes on from it; without a saved state the schedule
    starts anew and has the steps that the Trainer has left. After fit the model is as it was found.

    Every log_every_n_steps the loggers get blocksched/active (blocks trained, mean since the last
    line), blocksched/boundary (index of the first active block in the last step),
    blocksched/probes (since the last line) and, after a probe, blocksched/relevance/0 and so on.

    Several processes train under strategy="ddp_find_unused_parameters_true", and only the gradients
    of what trains are reduced.

    Own callbacks that save checkpoints come after this one in the list; ModelCheckpoint always
    does.

    Args:
        schedule: FullUpdate, StaticSuffix, DynamicSuffix or anything that follows
            blocksched.schedules.Schedule.
        blocks, stem: where find_blocks has to be told, see there; names are the LightningModule's
            ("model.layers").

    Attributes:
        scheduler: the BlockScheduler while training, else None.

    Raises:
        ValueError: by fit, for what cannot be scheduled: strategies for several devices other than
            DDP, manual optimization, a model compiled as a whole, a callback that freezes too, no
            or two horizons, and what BlockScheduler and prepare_ddp refuse.
    """

    def __init__(
        self,
        schedule: Schedule[Any],
        *,
        blocks: str | Sequence[nn.Module] | None = None,
        stem: Sequence[str | nn.Module | nn.Parameter] | None = None,
    ) -> None:
        self.schedule = schedule
        self.scheduler: BlockScheduler | None = None
        self._blocks, self._stem = blocks, stem
        self._saved: dict[str, Any] = {}
        self._counts: Counts | None = None
        self._step = 0  # the Trainer's, up to which the schedule has seen the losses
        self._loss: Tensor | None = None

    @override
    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            _check_trainer(trainer)
            _check_module(pl_module)
            self._saved = {}

    @override
    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        horizon = _horizon(trainer, self._saved.get("steps", 0))
        total_steps, time_budget_s = trainer.strategy.broadcast(horizon)  # clocks differ
        self.scheduler = BlockScheduler(
            pl_module,
            trainer.optimizers,
            self.schedule,
            total_steps=total_steps,
            time_budget_s=time_budget_s,
            blocks=self._blocks,
            stem=self._stem,
        )
        if isinstance(trainer.model, DistributedDataParallel):
            if not trainer.model.find_unused_parameters:
                raise ValueError(
                    "this strategy waits for gradients that frozen blocks do not give: pass "
                    'strategy="ddp_find_unused_parameters_true" to the Trainer'
                )
            prepare_ddp(trainer.model, self.scheduler)
        if self._saved:
            self.scheduler.load_state_dict(self._saved)
        self._counts = Counts(self.scheduler)
        self._step = trainer.global_step
        self._loss = None

    @override
    def on_train_batch_start(
        self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert self.scheduler is not None
        # Lightning calls training_step instead of forward, by which the scheduler tells a step that
        # a GradScaler skipped from a forgotten one.
        self.scheduler._forwards.count += 1

    @override
    def on_before_zero_grad(
        self, trainer: Any, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self._loss = None  # the gradients start anew, and so does what they add up to

    @override
    def on_train_batch_end(
        self,
        trainer: Any,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert self._counts is not None
        if outputs:
            loss = outputs["loss"]
            self._loss = loss if self._loss is None else self._loss + loss
        if trainer.global_step == self._step:
            return  # more micro-batches to come
        self._step = trainer.global_step
        loss = torch.tensor(math.nan) if self._loss is None else self._loss
        if self.schedule.needs_loss and trainer.world_size > 1:
            loss = loss.to(pl_module.device, copy=True)
            distributed.all_reduce(loss)  # a checkpoint holds rank 0's losses, for all of them
            loss /= trainer.world_size
        self._counts.step(loss)
        every = trainer.log_every_n_steps
        if every and self._step % every == 0:
            numbers = self._counts.take()
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=self._step - 1)  # as Lightning numbers its own

    @override
    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        self._close()

    @override
    def on_exception(
        self, trainer: Any, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._close()

    @override
    def on_save_checkpoint(
        self, trainer: Any, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.scheduler is not None and trainer.global_step != self._step:
            raise RuntimeError(
                "a checkpoint is saved between the update of a step and BlockScheduling, which has "
                "not seen its loss yet: list BlockScheduling before the callback that saves"
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._saved if self.scheduler is None else self.scheduler.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict

    def _close(self) -> None:
        if self.scheduler is not None:
            self.scheduler.close()
            self._saved = self.scheduler.state_dict()
            self.scheduler = self._counts = None


def _horizon(trainer: Any, steps: int) -> tuple[int | None, float | None]:
    """The steps or the seconds of a schedule that has taken `steps` steps."""
    timers = [callback for callback in trainer.callbacks if hasattr(callback, "time_remaining")]
    budgets = [t.time_elapsed() + t.time_remaining() for t in timers if t.time_remaining()]
    total = trainer.estimated_stepping_batches
    endless = total == -1 or math.isinf(total)
    if not endless and budgets:
        raise ValueError(
            "a run has one horizon, and this Trainer has a time limit and a number of steps: leave "
            "out max_time, or pass max_epochs=-1 and no max_steps"
        )
    if budgets:
        return None, budgets[0]
    if endless:
        raise ValueError(
            "a run needs a horizon: pass max_steps, max_time or (where the data has a length) "
            "max_epochs to the Trainer"
        )
    varying = any(hasattr(c, "get_accumulate_grad_batches") for c in trainer.callbacks)
    if varying and trainer.max_epochs != -1:
        raise ValueError(
            "GradientAccumulationScheduler makes the number of steps in max_epochs unknown: pass "
            "max_steps and max_epochs=-1 to the Trainer"
        )
    return int(total) - trainer.global_step + steps, None


def _check_trainer(trainer: Any) -> None:
    strategy = type(trainer.strategy).__name__  # DeepSpeedStrategy is a DDPStrategy too
    if strategy not in ("SingleDeviceStrategy", "DDPStrategy"):
        raise ValueError(
            f"BlockScheduling drives one device, or several under DDP, got {strategy}: pass "
            'strategy="ddp_find_unused_parameters_true", or devices=1 and no strategy'
        )
    for callback in trainer.callbacks:
        if hasattr(callback, "freeze_before_training"):  # BaseFinetuning
            raise ValueError(
                f"{type(callback).__name__} freezes and thaws parameters too, and BlockScheduling "
                "would not know of it: use one of them"
            )


def _check_module(module: LightningModule) -> None:
    name = type(module).__name__
    if not module.automatic_optimization:
        raise ValueError(
            f"{name} optimizes by hand (automatic_optimization=False), so that no callback knows "
            "the loss of an update: build blocksched.BlockScheduler in its on_train_start, and "
            "call scheduler.step(loss) after its optimizers have stepped"
        )
    if module._compiler_ctx is not None:
        raise ValueError(
            f"{name} is compiled as a whole, which makes a graph per boundary and can leave thawed "
            "blocks without gradients: pass it plain, after blocksched.compile_blocks, which "
            "compiles each block"
        )
