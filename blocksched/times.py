"""How long each block's forward and backward take, measured on probes.

Stamps are the host's clock on a CPU, and on CUDA events, which the device stamps when it gets
there: nothing waits before the times are read.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from blocksched.blocks import Blocks

_Stamp = float | torch.cuda.Event
_FORWARD, _BACKWARD = ("entered", "left"), ("arrived", "done")


class BlockTimes:
    """Times the blocks of a model in the steps it is told to, by hooks that are there only then.

    A block's backward lasts from the gradient at its output to the gradient at its input, which
    is the output of the block below; where its input needs none, to those of its parameters.
    Under activation checkpointing it holds the second forward; of a segment of several blocks the
    last one's holds that of all. Several micro-batches add up.

    Args:
        blocks: of the model.
        device: of the model.
    """

    def __init__(self, blocks: Blocks, device: torch.device) -> None:
        self._blocks, self._device = blocks, device
        self._hooks: list[_Hooks] = []
        self._handles: list[RemovableHandle] = []

    def expect(self, measure: bool) -> None:
        """Begin a step, which is measured if `measure`."""
        self.close()
        if not measure:
            return
        for block, own in zip(self._blocks.modules, self._blocks.parameters, strict=True):
            hooks = _Hooks(self._now, own)
            self._hooks.append(hooks)
            self._handles.append(block.register_forward_pre_hook(hooks.enter, with_kwargs=True))
            self._handles.append(block.register_forward_hook(hooks.leave))

    def read(self) -> tuple[list[float], list[float]] | None:
        """Milliseconds of each block's forward and backward in the step that ends.

        None where the step was not told to be measured, a block did not run, or what ran was not
        seen to the end of its backward, as under reentrant checkpointing.
        """
        passes = [hooks.passes for hooks in self._hooks]
        if not passes or not all(own and all(each.whole for each in own) for own in passes):
            return None
        forward = [sum(each.ms(_FORWARD) for each in own) for own in passes]
        return forward, [sum(each.ms(_BACKWARD) for each in own) for own in passes]

    def close(self) -> None:
        """Leave the model alone."""
        while self._handles:
            self._handles.pop().remove()
        self._hooks.clear()

    def _now(self) -> _Stamp:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class _Pass:
    """The stamps of one forward through a block and of its backward; the first of each counts."""

    def __init__(self, now: Callable[[], _Stamp]) -> None:
        self._now = now
        self.stamps: dict[str, _Stamp] = {}

    def mark(self, name: str) -> None:
        self.stamps.setdefault(name, self._now())

    @property
    def whole(self) -> bool:
        return len(self.stamps) == len(_FORWARD) + len(_BACKWARD)

    def ms(self, part: tuple[str, str]) -> float:
        """The time from the first to the second stamp of `part`."""
        start, end = (self.stamps[name] for name in part)
        if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            end.synchronize()
            return float(start.elapsed_time(end))
        assert isinstance(start, float)
        assert isinstance(end, float)
        return (end - start) * 1e3


class _Hooks:
    """The hooks of one block. Copies and pickles of a model carry idle ones."""

    def __init__(
        self, now: Callable[[], _Stamp] | None = None, parameters: Sequence[nn.Parameter] = ()
    ) -> None:
        self._now, self._parameters = now, parameters
        self.passes: list[_Pass] = []

    def __reduce__(self) -> tuple[type["_Hooks"], tuple[()]]:
        return _Hooks, ()

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._now is None or not _measured(module):
            return
        made = _Pass(self._now)
        self.passes.append(made)
        tensor = _with_graph((args, kwargs))
        if tensor is not None:
            tensor.register_hook(lambda _grad: made.mark("done"))
        else:
            register_multi_grad_hook(self._parameters, lambda _grads: made.mark("done"))
        made.mark("entered")

    def leave(self, module: nn.Module, _args: Any, output: Any) -> None:
        if self._now is None or not _measured(module):
            return
        made = self.passes[-1]
        made.mark("left")
        tensor = _with_graph(output)
        if tensor is not None:
            tensor.register_hook(lambda _grad: made.mark("arrived"))


def _measured(module: nn.Module) -> bool:
    """Whether this forward is one of a training step; checkpointing runs more in backward."""
    in_backward = torch._C._current_graph_task_id() != -1
    return module.training and torch.is_grad_enabled() and not in_backward


def _with_graph(value: Any) -> Tensor | None:
    """The first tensor in it that a gradient comes to."""
    leaves = pytree.tree_leaves(value)
    return next((t for t in leaves if isinstance(t, Tensor) and t.requires_grad), None)
