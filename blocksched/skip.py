"""Blocks that do not run: a skipped block passes on what it is given."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from blocksched.blocks import Blocks, misfit


class Skips:
    """Lets the blocks of a residual model that do not run yet pass their input on.

    In training and in evaluation alike: the blocks that run are the model. A skipped block gives
    what the running block below it gave, with the hidden state, which comes first, replaced by the
    first argument of its own. Its hooks are not called, FSDP2's included, so that it gathers no
    weights. Copies and pickles of the model run all blocks.
    """

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        # Where it is set, nn.Module calls this in place of hooks and forward. block.compile() sets
        # it; copies of a module are without it.
        self._own = [block._compiled_call_impl for block in blocks.modules]
        self._running = frozenset(range(len(blocks)))

    def apply(self, running: Sequence[int] | None) -> None:
        """Run exactly the blocks `running` from the next forward on; None: all.

        Raises ValueError if block 0 is not among them, or where one that is not could not take over
        any of those that are.
        """
        n = len(self._blocks)
        now = frozenset(range(n) if running is None else running)
        if now == self._running:
            return
        self._refuse(now)
        self._running = now
        below = None
        for i, block in enumerate(self._blocks.modules):
            last = i + 1 == n or i + 1 in now
            call: Callable[..., Any] | None = self._own[i]
            if i not in now:
                assert below is not None
                call = _Skipped(self._blocks.names[i], below, last)
            elif not last:
                call = below = _Below(self._blocks.names[i], call or block._call_impl)
            block._compiled_call_impl = call

    def close(self) -> None:
        """Run all blocks."""
        self.apply(None)

    def _refuse(self, running: frozenset[int]) -> None:
        names, modules = self._blocks.names, self._blocks.modules
        if 0 not in running:
            raise ValueError(
                f"block 0 ({names[0]}) has to run, got {sorted(running)}: a skipped block passes "
                "on what a running one below it gave"
            )
        for i in set(range(len(modules))) - running:
            for j in sorted(running):
                why = misfit(modules[i], modules[j])
                if why is not None:
                    raise ValueError(
                        f"block {i} ({names[i]}) does not run yet and could not be a copy of block "
                        f"{j} ({names[j]}) later: {why}; pass blocks= with those that are built "
                        "alike"
                    )


class _Below:
    """Calls a running block that has skipped ones above it, and notes what it gives beside the
    hidden state, until the last of them has passed that on."""

    def __init__(self, name: str, call: Callable[..., Any]) -> None:
        self.name, self._call = name, call
        self._kind: Any = Tensor
        self._rest: tuple[Any, ...] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._call(*args, **kwargs)
        if torch._C._current_graph_task_id() != -1:  # a checkpoint runs it once more in backward
            return output
        first = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(first, Tensor):
            raise TypeError(
                f"block {self.name} gives {type(output).__name__}, so that blocks above it cannot "
                "be skipped: have it give a tensor, or a tuple that begins with the hidden state"
            )
        given = _given(self.name, args, kwargs)
        if first.shape != given.shape:
            raise ValueError(
                f"block {self.name} gives {list(first.shape)} for {list(given.shape)}, so that "
                "blocks above it cannot be skipped: pass blocks= with a list of blocks that keep "
                "the shape"
            )
        self._kind, self._rest = type(output), () if first is output else output[1:]
        return output

    def with_hidden(self, name: str, hidden: Tensor) -> Any:
        """What the block gave, with another hidden state, for the skipped block `name`."""
        if self._rest is None:
            raise RuntimeError(
                f"block {name} is skipped, but was called without block {self.name} before it, "
                "as reentrant checkpointing does in backward: checkpoint with use_reentrant=False"
            )
        if issubclass(self._kind, Tensor):
            return hidden
        return getattr(self._kind, "_make", self._kind)((hidden, *self._rest))

    def forget(self) -> None:
        """Keep no tensor beyond the forward."""
        if any(value is not None for value in self._rest or ()):
            self._rest = None


class _Skipped:
    """Stands in for a block that does not run; `last` before one that does."""

    def __init__(self, name: str, below: _Below, last: bool) -> None:
        self._name, self._below, self._last = name, below, last

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = _given(self._name, args, kwargs)
        output = self._below.with_hidden(self._name, hidden)
        if self._last:
            self._below.forget()
        return output


def _given(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state that a block is called with: its first argument."""
    hidden = next(iter((*args, *kwargs.values())), None)
    if not isinstance(hidden, Tensor):
        raise TypeError(
            f"block {name} is called with {type(hidden).__name__} as its first argument, so that "
            "it cannot be skipped: pass it the hidden state first"
        )
    return hidden
