"""What sharded parameters need: modules under fully_shard (FSDP2), DTensors.

Nothing here imports torch.distributed.tensor, which takes a second: where nobody has, no tensor is
sharded.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_FIRST = "_blocksched_first_forward"


def is_dtensor(tensor: Tensor | None) -> bool:
    """Whether it is a torch.distributed.tensor.DTensor."""
    return isinstance(tensor, _known("torch.distributed.tensor", "DTensor"))


def any_dtensor(tensors: Iterable[Tensor]) -> bool:
    """Whether one of them is a DTensor; takes no time where none can be."""
    kind = _known("torch.distributed.tensor", "DTensor")
    return kind != () and any(isinstance(tensor, kind) for tensor in tensors)


def local(tensor: Any) -> Any:
    """The shard of a DTensor that this rank holds, without autograd; anything else as it is."""
    with torch.no_grad():
        return tensor.to_local() if is_dtensor(tensor) else tensor


def check_gradient(parameter: Tensor) -> None:
    """Raise RuntimeError for a gradient that is not sharded as its parameter is."""
    grad: Any = parameter.grad
    placed = [getattr(t, "placements", "on each rank") for t in (parameter, grad)]
    if grad is not None and placed[0] != placed[1]:
        raise RuntimeError(
            f"a gradient must be placed as its parameter is, {placed[0]}, got {placed[1]}: "
            "redistribute it before the optimizer steps"
        )


def copies(parameter: Tensor, world: int) -> int:
    """How many of `world` ranks hold each number of a parameter.

    Raises ValueError if it is sharded over other ranks than those.
    """
    if not is_dtensor(parameter):
        return world
    sharded: Any = parameter
    sizes = zip(sharded.device_mesh.shape, sharded.placements, strict=True)
    shards: int = math.prod(size for size, placement in sizes if not placement.is_replicate())
    if world % shards:
        raise ValueError(
            f"a parameter is sharded over {shards} ranks, the scheduler decides for {world}: pass "
            "group= with all ranks that train this model"
        )
    return world // shards


def warm_up(model: nn.Module) -> list[Any]:
    """Have FSDP2 initialise itself while all is trainable; returns its modules.

    At the first forward it learns from what is trainable in which dtype a module's gradients are
    reduced; one frozen then crashes once thawed (pytorch#186998). unshard() would not do: the first
    forward learns again.

    Raises ValueError for sharded weights on the meta device.
    """
    kind = _known("torch.distributed.fsdp", "FSDPModule")
    sharded: list[Any] = [module for module in model.modules() if isinstance(module, kind)]
    if sharded and any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "the model is sharded but still on the meta device: give it its weights before "
            "BlockScheduler is built (model.to_empty(device=...), then load them)"
        )
    inner = {id(part) for module in sharded for part in module.modules() if part is not module}
    for module in sharded:
        if id(module) not in inner:
            _forward_nothing(module)
        module.reshard()
    return sharded


def refuse(model: nn.Module, optimizers: Any) -> None:
    """Raise ValueError for FullyShardedDataParallel (FSDP1) and DeepSpeed."""
    remedy = "shard with torch.distributed.fsdp.fully_shard: each block, then the model"
    kind = _known("torch.distributed.fsdp", "FullyShardedDataParallel")
    if any(isinstance(module, kind) for module in model.modules()):
        raise ValueError(
            "FullyShardedDataParallel (FSDP1) puts the weights of its modules into flat tensors, "
            f"which blocks cannot share with others: {remedy}"
        )
    several = optimizers if isinstance(optimizers, Sequence) else [optimizers]
    classes = [base for each in (model, *several) for base in type(each).__mro__]
    if any(base.__module__.startswith("deepspeed") for base in classes) or any(
        hasattr(parameter, "ds_id") for parameter in model.parameters()
    ):
        raise ValueError(
            "DeepSpeed steps its own copies of the weights, so that frozen blocks would move on: "
            f"{remedy}"
        )


def _forward_nothing(root: Any) -> None:
    """What FSDP2 does around a forward, without one."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    setattr(root, _FIRST, lambda: None)
    register_fsdp_forward_method(root, _FIRST)
    with torch.no_grad():
        getattr(root, _FIRST)()
    delattr(root, _FIRST)


def _known(module: str, name: str) -> Any:
    """A class, for isinstance; nothing where its module was not imported, so no object is one."""
    return getattr(sys.modules.get(module), name, ())
