"""Checkpoints of a whole run, for one's own loop."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from blocksched.agreement import Ranks
from blocksched.checkpoint import folders, shards, tensors
from blocksched.checkpoint.contents import Run, difference
from blocksched.checkpoint.folders import CheckpointError
from blocksched.checkpoint.ranks import together, told
from blocksched.scheduler import BlockScheduler

__all__ = ["CheckpointError", "Loaded", "load_checkpoint", "save_checkpoint"]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What `load_checkpoint` gives back to the caller: the step and the extra that were saved."""

    step: int
    extra: Any


def save_checkpoint(
    folder: str | Path,
    step: int,
    *,
    model: nn.Module,
    optimizers: Optimizer | Sequence[Optimizer],
    scheduler: BlockScheduler,
    extra: Any = None,
    keep: int = 2,
) -> Path:
    """Save a run between two steps, so that it goes on from there to the bit.

    Saved are parameters and buffers, the state of the optimizers (of frozen blocks too), the
    scheduler, and the random numbers of Python, numpy, torch and the CUDA devices of the model. It
    is there as a whole or not at all, whenever the process is killed and whatever fails.

    Several processes save one checkpoint together: all of them call it, and `folder` is on a file
    system that all see. Model and optimizers are rank 0's where they are replicas, and everybody's
    part where they are sharded (FSDP2); scheduler, random numbers and extra are each rank's own.

    Args:
        folder: where checkpoints go, each in a folder of its own; of one run at a time.
        step: optimizer steps so far.
        model, optimizers, scheduler: the run; one optimizer or several.
        extra: what else the loop needs (state_dicts of the data loader, the learning rate's
            schedule, a GradScaler): numbers, strings, tensors, and lists, tuples and dicts of them.
        keep: how many checkpoints stay, this one included; older ones are deleted after it.

    Returns the folder of the checkpoint.

    Raises:
        CheckpointError: it cannot be written (on all ranks, if on one); earlier ones are as they
            were. Or `folder` holds one of a later step.
        ValueError: a negative step, or nothing to keep.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step must be >= 0 and keep >= 1, got {step} and {keep}: correct them")
    run = _run(model, optimizers, scheduler)
    ranks = scheduler.ranks
    rank = 0 if ranks is None else ranks.rank
    name = ""
    with together(ranks):
        if rank == 0:
            name = folders.begin(Path(folder), step).name
    temporary = Path(folder) / told(ranks, name)[0]
    try:
        files: dict[str, Any] = {}
        sharded: dict[str, Any] = {}
        with together(ranks):
            shared, sharded = shards.take_out(run.shared(), run.parameters())
            if rank == 0:
                for part, value in shared.items():
                    files[f"{part}.pt"] = tensors.write(temporary / f"{part}.pt", value)
            own = f"rank-{rank:05d}.pt"
            files[own] = tensors.write(temporary / own, run.own(extra))
        if sharded:
            shards.write(sharded, temporary / shards.FOLDER, _group(ranks))
        with together(ranks):
            for path in shards.written(temporary / shards.FOLDER, rank):
                files[f"{shards.FOLDER}/{path.name}"] = folders.entry(path)
        for theirs in told(ranks, json.dumps(files)):
            files |= json.loads(theirs)
        with together(ranks):
            if rank == 0:
                manifest = {"run": run.description(), "files": files}
                name = folders.publish(temporary, step, keep, manifest).name
        return Path(folder) / told(ranks, name)[0]
    except BaseException:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def load_checkpoint(
    folder: str | Path,
    *,
    model: nn.Module,
    optimizers: Optimizer | Sequence[Optimizer],
    scheduler: BlockScheduler,
    allow_previous: bool = False,
) -> Loaded | None:
    """Go on from the newest checkpoint in `folder`; None, and nothing done, where there is none.

    Build model, optimizers and scheduler as in the run that saved, on as many processes; all of
    them call it. Nothing is changed before all has been verified: the sha256 of every file (each
    rank reads all files, but of shards its part), and that it is this run's. No file can run code.

    Args:
        folder, model, optimizers, scheduler: as `save_checkpoint` had them.
        allow_previous: go on from the newest one that is whole and of this run, with a warning; the
            newer ones are renamed, so that they count no more.

    Raises:
        CheckpointError: the newest one is damaged or another run's (on all ranks, if on one).
    """
    run = _run(model, optimizers, scheduler)
    ranks = scheduler.ranks
    found: list[Path] = []
    with together(ranks):
        found = folders.found(Path(folder))
    if len(set(told(ranks, " ".join(path.name for path in found)))) > 1:
        raise CheckpointError(f"{folder} must be one folder that all ranks see")
    refused: list[CheckpointError] = []
    for path in found:
        try:
            step, shared, own = _read(path, run)
        except CheckpointError as error:
            refused.append(error)
            continue
        if refused and not allow_previous:
            raise CheckpointError(
                f"{refused[0]}. {path} is whole: pass allow_previous=True to go on from there"
            ) from refused[0]
        with together(ranks):
            if ranks is None or ranks.rank == 0:
                for newer, why in zip(found, refused, strict=False):
                    aside = folders.set_aside(newer)
                    warnings.warn(f"{why}. It is now {aside.name}; loading {path}", stacklevel=2)
        run.restore(shared, own)
        return Loaded(step, own["extra"])
    if refused:
        raise refused[0]
    return None


def _read(path: Path, run: Run) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """The step and all state in `path`, verified; changes nothing."""
    ranks = run.scheduler.ranks
    rank = 0 if ranks is None else ranks.rank
    with together(ranks):
        manifest = folders.verify(path, lambda name: shards.reads(name, rank))
        other = difference(manifest["run"], run.description())
        if other is not None:
            raise CheckpointError(f"{path} is another run's; {other}: load it into the same")
        loaded = {part: tensors.read(path / f"{part}.pt") for part in ("model", "optimizers")}
        shared, missing = shards.targets(loaded, run.parameters())
        reader = shards.Reader(path / shards.FOLDER, missing) if missing else None
        own = tensors.read(path / f"rank-{rank:05d}.pt")
    if reader is not None:
        shards.read(missing, reader, _group(ranks))
    return manifest["step"], shared, own


def _run(
    model: nn.Module, optimizers: Optimizer | Sequence[Optimizer], scheduler: BlockScheduler
) -> Run:
    several = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    return Run(model, several, scheduler)


def _group(ranks: Ranks | None) -> Any:
    return None if ranks is None else ranks.group
