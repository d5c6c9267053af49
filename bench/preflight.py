"""What a run will take on its device, from one full step on copies, before any training."""

import gc

import torch

from bench import memory
from bench.config import Config, UserError
from bench.models import model_of, optimizer
from bench.processes import alone
from bench.tasks.parts import Task
from blocksched import BlockScheduler, DynamicSuffix

_MIB = 2**20
_REMEDY = (
    "lower --batch-size, --seq-len, --dmodel or --n-layers, or run fewer --schedules at a time"
)


def preflight(task: Task, config: Config, arms: dict[str, bool], processes: int) -> None:
    """Take full steps on copies, a probe each, and print what the run takes.

    Args:
        arms: the runs by name, and whether each is fused.
        processes: how many train together; each then holds its gradients twice.

    Raises UserError if it does not fit the device.
    """
    device = task.device
    largest, standing = 0, 0
    for fused in sorted(set(arms.values())):
        try:
            stays, peak, gradients = _full_step(task, config, fused)
        except torch.OutOfMemoryError:
            raise UserError(
                f"--preflight: a full step of one schedule does not fit {device}: {_REMEDY}"
            ) from None
        largest = max(largest, peak + (gradients if processes > 1 else 0))
        standing = max(standing, stays)
    gc.collect()
    # Beside the schedule that steps stand the others and the model that parts are measured on.
    total = largest + standing * len(arms)
    line = (
        f"Preflight: a full step takes {largest / _MIB:,.1f} MiB, weights and moments "
        f"{standing / _MIB:,.1f} of it; the run {total / _MIB:,.1f} MiB"
    )
    if device.type != "cuda":
        print(f"{line}.")
        return
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    print(f"{line}, and {free / _MIB:,.1f} MiB are free on {device}.")
    if total > free:
        raise UserError(
            f"--preflight: the run takes {total / _MIB:,.1f} MiB, {free / _MIB:,.1f} are free on "
            f"{device}: {_REMEDY}"
        )


def _full_step(task: Task, config: Config, fused: bool) -> tuple[int, int, int]:
    """Bytes that stay from step to step, that a step takes with them, and of its gradients."""
    on_gpu = task.device.type == "cuda"
    before = torch.cuda.memory_allocated(task.device) if on_gpu else 0
    model = model_of(task, config, fused)
    own = optimizer(model, config, fused)
    scheduler = BlockScheduler(
        model, own, DynamicSuffix(min_active=1), total_steps=1 << 40, blocks="blocks", group=alone()
    )
    inputs, targets = task.batch(0)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(task.device)
    for _ in range(2):  # the second has moments
        loss = task.loss(task.forward(model, inputs), targets)
        loss.backward()
        if scheduler.finite(loss):
            own.step()
        own.zero_grad()
        scheduler.step(loss)
    stays, gradients = memory.standing(model, own), memory.weights(model)
    if on_gpu:
        return stays, torch.cuda.max_memory_allocated(task.device) - before, gradients
    kept = memory.kept_for_backward(model, lambda: task.forward(model, inputs))
    return stays, stays + gradients + kept, gradients
