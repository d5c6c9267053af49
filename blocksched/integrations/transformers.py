"""A schedule in Hugging Face's Trainer: attach(trainer, schedule), then trainer.train() as ever.

Trainer hands its callbacks no loss. So three of its public methods are wrapped on the instance,
thinly: training_step gives the losses, log takes the numbers along, and train leaves the model as
it was found however it ends. The rest is a callback. No private name of Trainer is used.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerState

from blocksched.distributed import prepare_ddp
from blocksched.integrations.metrics import Counts
from blocksched.scheduler import BlockScheduler
from blocksched.schedules.base import Schedule


def attach(
    trainer: Trainer,
    schedule: Schedule[Any],
    *,
    blocks: str | Sequence[nn.Module] | None = None,
    stem: Sequence[str | nn.Module | nn.Parameter] | None = None,
) -> None:
    """Have `trainer.train()` run `schedule`, over the optimizer steps that Trainer plans for.

    The schedule sees the loss of each optimizer step as Trainer sums it over micro-batches (a NaN
    or an infinity too, which Trainer filters out of its log). Beside each logged loss stand
    blocksched/active (blocks trained, mean since the last line), blocksched/boundary (index of the
    first active block in the last step), blocksched/probes (since the last line) and, after a
    probe, blocksched/relevance/0 and so on. Checkpoints hold the schedule's state, and resuming
    from one goes on exactly. After train() the model is as it was.

    Several processes train under DistributedDataParallel, which has to look for unused parameters
    and then reduces only the gradients of what trains; all of them call attach.

    Args:
        trainer: a Trainer or an instance of a subclass, with one device a process.
        schedule: FullUpdate, StaticSuffix, DynamicSuffix or another Schedule.
        blocks, stem: where find_blocks has to be told, see there.

    Raises:
        ValueError: a schedule is attached already, or the arguments ask for several devices in
            one process, torch_compile or reentrant activation checkpointing. What BlockScheduler
            and prepare_ddp refuse, and other wraps than DistributedDataParallel, train() raises.
    """
    _check(trainer)
    run = _Run(trainer, schedule, blocks, stem)
    for name in ("training_step", "log", "train"):
        _wrap(trainer, name, getattr(run, name))
    # restore_callback_states_from_checkpoint puts type(callback)() in the callback's place.
    bound = type(BlockScheduleCallback.__name__, (BlockScheduleCallback,), {"run": run})
    trainer.add_callback(bound())


class _Run:
    """What happens around the methods of a trainer, and between the events of its training."""

    def __init__(
        self,
        trainer: Trainer,
        schedule: Schedule[Any],
        blocks: str | Sequence[nn.Module] | None,
        stem: Sequence[str | nn.Module | nn.Parameter] | None,
    ) -> None:
        self._trainer, self._schedule = trainer, schedule
        self._blocks, self._stem = blocks, stem
        self.scheduler: BlockScheduler | None = None
        self._restart()

    def _restart(self) -> None:
        self._loss = torch.zeros((), device=self._trainer.args.device)
        self._counts: Counts | None = None

    def training_step(self, inner: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch. Its loss is scaled for accumulation, and Trainer's log is the sum."""
        loss = inner(*args, **kwargs)
        self._loss += loss.detach()
        return loss

    def log(
        self, inner: Callable[..., None], logs: dict[str, float], *args: Any, **kwargs: Any
    ) -> None:
        """Evaluation and the summary at the end are logged through here too, without a loss."""
        if "loss" in logs and self._counts is not None:
            logs.update(self._counts.take())
        inner(logs, *args, **kwargs)

    def train(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """All of the training; a model left frozen would lose blocks to the next optimizer."""
        try:
            return inner(*args, **kwargs)
        finally:
            self._close()

    def begin(self) -> None:
        """The optimizer exists and holds its loaded state; no forward has run."""
        self._close()  # auto_find_batch_size begins again after running out of memory
        trainer = self._trainer
        wrapped = trainer.model_wrapped
        _check_wrap(wrapped, trainer)
        assert trainer.optimizer is not None
        saved = _saved(trainer.state)
        self.scheduler = BlockScheduler(
            trainer.model,
            trainer.optimizer,
            self._schedule,
            total_steps=trainer.state.max_steps,
            blocks=self._blocks,
            stem=self._stem,
        )
        if isinstance(wrapped, DistributedDataParallel):
            prepare_ddp(wrapped, self.scheduler)
        if saved is not None:
            self.scheduler.load_state_dict(saved)
        self._counts = Counts(self.scheduler)

    def end_step(self) -> None:
        """After an optimizer step, before it is logged and saved."""
        assert self._counts is not None
        if self._schedule.needs_loss:  # a checkpoint holds rank 0's losses, for all of them
            self._loss = self._trainer.accelerator.reduce(self._loss, "mean")
        self._counts.step(self._loss)
        self._loss.zero_()

    def _close(self) -> None:
        if self.scheduler is not None:
            self.scheduler.close()
            self.scheduler = None
        self._restart()


class BlockScheduleCallback(TrainerCallback, ExportableState):
    """Trainer's events, and the schedule's state in its checkpoints."""

    run: _Run

    def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
        self.run.begin()

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        self.run.end_step()

    def state(self) -> dict[str, Any]:
        scheduler = self.run.scheduler
        saved = None if scheduler is None else scheduler.state_dict()
        return {"args": {}, "attributes": {"saved": saved}}


def _saved(state: TrainerState) -> dict[str, Any] | None:
    """The scheduler's state in the checkpoint that training resumes from, None at a start.

    Trainer itself restores callbacks only when asked to.
    """
    if state.global_step == 0:
        return None
    held: Any = state.stateful_callbacks
    if BlockScheduleCallback.__name__ not in held:
        raise ValueError(
            f"the checkpoint of step {state.global_step} was saved without a schedule, so a "
            "schedule cannot go on from it: start a new run from its weights, or resume without "
            "attach"
        )
    saved: dict[str, Any] = held[BlockScheduleCallback.__name__]["attributes"]["saved"]
    return saved


def _wrap(trainer: Trainer, name: str, around: Callable[..., Any]) -> None:
    """Replace a method of this one trainer by `around`, which gets the method first."""
    method = getattr(trainer, name)
    setattr(trainer, name, functools.wraps(method)(functools.partial(around, method)))


def _check_wrap(wrapped: nn.Module, trainer: Trainer) -> None:
    ddp = isinstance(wrapped, DistributedDataParallel)
    if wrapped is not trainer.model and not ddp:
        raise ValueError(
            f"the model is wrapped in a {type(wrapped).__name__}, and in Trainer blocksched drives "
            "a plain model or DistributedDataParallel so far: leave out compilation of the whole "
            "model (compile_blocks compiles each block) and DeepSpeed"
        )
    if trainer.args.world_size > 1 and not ddp:
        raise ValueError(
            f"{trainer.args.world_size} processes share the model without "
            "DistributedDataParallel, which blocksched cannot follow in Trainer so far: leave out "
            "FSDP and tensor parallelism"
        )
    if ddp and not wrapped.find_unused_parameters:
        raise ValueError(
            "DistributedDataParallel waits here for gradients that frozen blocks do not give: pass "
            "ddp_find_unused_parameters=True to TrainingArguments"
        )


def _check(trainer: Trainer) -> None:
    args = trainer.args
    callbacks = trainer.callback_handler.callbacks
    if any(isinstance(each, BlockScheduleCallback) for each in callbacks):
        raise ValueError("this trainer has a schedule already: attach one, to a new trainer")
    if args.n_gpu > 1:
        raise ValueError(
            f"one process drives {args.n_gpu} devices (DataParallel), which copies the model in "
            "every step: start a process for each with torchrun --nproc-per-node, or show it one "
            "(CUDA_VISIBLE_DEVICES=0)"
        )
    if args.torch_compile:
        raise ValueError(
            "torch_compile=True compiles the model as a whole, which makes a graph per boundary "
            "and can leave thawed blocks without gradients: leave it out and call "
            "blocksched.compile_blocks(model), which compiles each block"
        )
    for name in ("activation_checkpointing", "gradient_checkpointing"):  # the same, new and old
        how = getattr(args, f"{name}_kwargs", None) or {}
        if getattr(args, name, False) and how.get("use_reentrant"):
            raise ValueError(
                "reentrant activation checkpointing carries the graph around frozen blocks: pass "
                f'{name}_kwargs={{"use_reentrant": False}}'
            )
