"""A block takes over another's weights, buffers and optimizer state, or begins with none."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from blocksched.blocks import Blocks, misfit, tensors_of
from blocksched.schedules.base import Plan


def transplant(
    blocks: Blocks, optimizers: Sequence[Optimizer], last: Plan | None, plan: Plan
) -> None:
    """What `plan` asks for at the end of the step that did `last`: blocks that start to run take
    over their sources, and those of `plan.fresh` begin anew."""
    if last is not None and last.running is not None:
        running = range(len(blocks)) if plan.running is None else plan.running
        for block, source in zip(running, plan.sources, strict=bool(plan.sources)):
            if block not in last.running and source != block:
                take_over(blocks, optimizers, block, source)
    for block in plan.fresh:
        begin_anew(blocks, optimizers, block)


def take_over(blocks: Blocks, optimizers: Sequence[Optimizer], block: int, source: int) -> None:
    """Make `block` a copy of `source`: weights, buffers, and each parameter's optimizer state.

    What the source has and the block has not is left aside. What else keeps copies of weights (an
    average of the model) is not told.

    Raises ValueError, with nothing changed, for blocks that are built differently, or whose
    parameters are updated by optimizers of different classes.
    """
    new, old = blocks.modules[block], blocks.modules[source]
    why = misfit(new, old)
    if why is not None:
        raise ValueError(
            f"block {block} ({blocks.names[block]}) cannot take over block {source} "
            f"({blocks.names[source]}): {why}; grow only through blocks that are built alike"
        )
    theirs = tensors_of(old)
    pairs = [(tensor, theirs[name]) for name, tensor in tensors_of(new).items()]
    holders = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
    held = [(p, q) for p, q in pairs if id(p) in holders and id(q) in holders]
    for p, q in held:
        kinds = [type(holders[id(each)]) for each in (p, q)]
        if kinds[0] is not kinds[1]:
            raise ValueError(
                f"block {block} ({blocks.names[block]}) is updated by {kinds[0].__name__}, block "
                f"{source} ({blocks.names[source]}), which it is to take over, by "
                f"{kinds[1].__name__}: give the same parameters of both to optimizers of one class"
            )
    with torch.no_grad():
        for tensor, other in pairs:
            tensor.copy_(other)
    for p, q in held:
        holders[id(p)].state.pop(p, None)
        if q in holders[id(q)].state:
            holders[id(p)].state[p] = copy.deepcopy(holders[id(q)].state[q])


def begin_anew(blocks: Blocks, optimizers: Sequence[Optimizer], block: int) -> None:
    """Drop the optimizer state of a block's parameters: its next update is its first.

    Master weights, which bs.AdamW keeps behind bfloat16 ones, are weights and stay.
    """
    own = {id(p) for p in blocks.parameters[block]}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if id(p) in own and p in optimizer.state:
                    optimizer.state[p] = _anew(optimizer, group, p)


def _anew(optimizer: Optimizer, group: dict[str, Any], p: nn.Parameter) -> dict[str, Any]:
    """The state of a parameter before its first update."""
    state: dict[str, Any] = optimizer.state[p]
    if isinstance(optimizer, torch.optim.Adagrad):  # makes it on construction, for good
        state["step"].zero_()
        state["sum"].fill_(group["initial_accumulator_value"])
        return state
    return {name: value for name, value in state.items() if name == "master_param"}
