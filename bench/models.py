"""The models of the benchmark as they are trained, their optimizers, and their hash."""

import hashlib
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from bench.config import Config
from bench.lora import Lora, lora_model
from bench.tasks.parts import Stack, Task
from blocksched import AdamW, compile_blocks
from blocksched.schedules import FullUpdate, Schedule


def model_of(
    task: Task, config: Config, fused: bool, schedule: Schedule[Any] | None = None
) -> Stack:
    """A model at the task's start, with adapters if `schedule` trains those; --backend compile
    compiles the blocks of those fused."""
    model = task.model(fused)
    if isinstance(schedule, Lora):
        lora_model(model, schedule, config.seed)
    if fused and config.backend == "compile":
        compile_blocks(model, "blocks")
    return model


def optimizer(model: nn.Module, config: Config, fused: bool) -> torch.optim.Optimizer:
    """torch's AdamW as it comes, or ours."""
    made = AdamW if fused else torch.optim.AdamW
    trained = [p for p in model.parameters() if p.requires_grad]
    return made(trained, lr=config.lr, weight_decay=config.weight_decay)


def weights_sha256(model: nn.Module) -> str:
    """The hash of all that a model saves: names, shapes and bits."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def parallel(
    model: nn.Module, schedule: Schedule[Any], group: ProcessGroup | None
) -> DistributedDataParallel | None:
    """The model as several processes train it: a full update plainly, the strongest baseline."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size(group) == 1:
        return None
    made = DistributedDataParallel(
        model, process_group=group, find_unused_parameters=not isinstance(schedule, FullUpdate)
    )
    made.broadcast_buffers = False  # they are constants; as an argument torch 2.13 deprecates it
    return made
