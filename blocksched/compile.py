"""torch.compile block by block, so that moving the boundary compiles nothing."""

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn

from blocksched.blocks import Blocks, find_blocks

COMPILED = (
    "is compiled as a whole, which makes a graph per boundary and can leave thawed blocks without "
    "gradients: compile each block instead, with blocksched.compile_blocks(model)"
)


def compile_blocks(
    model: nn.Module, blocks: str | Sequence[nn.Module] | None = None, **options: Any
) -> None:
    """Compile the forward of each block, in place, before or after BlockScheduler is built
    (before, with RowSuffix).

    Blocks that differ in nothing but their weights share their graphs, three for any boundary: in
    the prefix, as the first active block (no gradient of the input), and above it; and a fourth
    where a block is frozen above an active one or above a stem that trains. Evaluation, another
    precision or another shape adds graphs, a move of the boundary never does. Hooks, those of
    BlockScheduler included, stay outside the graphs. A deepcopy of the model is compiled too, a
    pickle is not.

    Sets torch._dynamo.config.recompile_limit to 8 graphs a block where it was lower: torch counts
    the graphs of all blocks as one function's, and at the limit goes on without compiling.

    Args:
        model: any module that find_blocks takes apart.
        blocks: where find_blocks has to be told, see there.
        options: those of torch.compile, such as backend or mode.

    Raises:
        ValueError: blocks that cannot be found, a block whose forward was replaced, or a model that
            keeps a key-value cache.
    """
    found = find_blocks(model, blocks)
    if getattr(getattr(model, "config", None), "use_cache", False):
        raise ValueError(
            "model.config.use_cache is on, and a key-value cache makes graphs of their own for "
            "each block: set model.config.use_cache = False for training"
        )
    for name, block in zip(found.names, found.modules, strict=True):
        _refuse_replaced(name, block)
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 8 * len(found))
    kinds = {type(block) for block in found.modules}
    compiled = {kind: torch.compile(kind.forward, **options) for kind in kinds}
    for block in found.modules:
        block.forward = MethodType(compiled[type(block)], block)


def refuse_compiled(model: nn.Module, blocks: Blocks) -> None:
    """Raise ValueError for a compiled module around the blocks; they themselves may be compiled."""
    held = set(blocks.modules)
    for name, module in model.named_modules():
        compiled = module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
        if compiled and module not in held and not held.isdisjoint(module.modules()):
            raise ValueError(f"{name or 'the model'} {COMPILED}")


def _refuse_replaced(name: str, block: nn.Module) -> None:
    own = vars(block).get("forward")
    plain = MethodType(type(block).forward, block)
    if own is not None and own != plain and not hasattr(own, "_torchdynamo_orig_callable"):
        raise ValueError(
            f"the forward of block {name} was replaced by {own}, which compiling its class's "
            "would undo: call compile_blocks before what replaces it"
        )
