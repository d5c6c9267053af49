"""A learning rate for each block, without touching the optimizers' groups.

The update of a parameter is cut to a share r of itself after the optimizer has made it:

    p <- p_old + r (p_new - p_old)

which is what a learning rate r times as high would have done, to rounding, wherever the update is
proportional to it: in AdamW, Adam, SGD with momentum, RMSprop, Adagrad, NAdam, RAdam, Muon, Lion,
weight decay included. It is not in Adafactor, ASGD and Rprop, nor in optimizers that keep weights
of their own (schedule-free ones); of these only float32 weights in the state as `master_param`, as
blocksched.AdamW keeps them, are followed. Moments and step counts go on as they would.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from blocksched import sharding
from blocksched.blocks import Blocks

_Kept = tuple[Tensor, float, Tensor]  # a parameter, its rate, and its weights before the update


class Rates:
    """Scales the updates of each block.

    While some rate is not 1, a copy of the weights it belongs to is kept for as long as the
    optimizer's step takes. Where all are 1 nothing is done, and no optimizer has a hook.

    Args:
        blocks: of the model.
        optimizers: all that share it.
    """

    def __init__(self, blocks: Blocks, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers
        parts = [*blocks.parameters, blocks.head]
        self._place = {id(p): place for place, part in enumerate(parts) for p in part}
        self._place |= {id(p): 0 for p in blocks.stem}
        self._count = len(parts)
        self._rates: Sequence[float] = ()
        self._kept: dict[int, list[_Kept]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def apply(self, rates: Sequence[float]) -> None:
        """Scale the next updates.

        Args:
            rates: a factor for each block (the stem has block 0's) and, last, for the head; () for
                1 everywhere.

        Raises:
            ValueError: another number of factors.
        """
        if rates and len(rates) != self._count:
            raise ValueError(
                f"rates must be one number a block and one for the head, {self._count} in all, got "
                f"{len(rates)}: have the schedule plan that many, or none"
            )
        self._rates = rates
        if all(rate == 1.0 for rate in rates):
            self.close()
        elif not self._handles:
            for optimizer in self._optimizers:
                self._handles += [
                    optimizer.register_step_pre_hook(self._keep),
                    optimizer.register_step_post_hook(self._scale),
                ]

    def close(self) -> None:
        """Leave the optimizers alone."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _keep(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        """Before the update, and before a closure has made its gradients."""
        kept = self._kept[id(optimizer)] = []
        for group in optimizer.param_groups:
            for p in group["params"]:
                place = self._place.get(id(p)) if p.requires_grad else None
                if place is not None and self._rates[place] != 1.0:
                    kept.append((p, self._rates[place], _weights(optimizer, p).detach().clone()))

    @torch.no_grad()
    def _scale(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        for parameter, rate, old in self._kept.pop(id(optimizer)):
            new = _weights(optimizer, parameter)
            new.copy_(old.to(new.dtype).lerp_(new, rate))
            shown = sharding.local(parameter)
            if new.dtype != shown.dtype:
                shown.copy_(new)


def _weights(optimizer: Optimizer, parameter: Tensor) -> Tensor:
    """What the optimizer moves: the parameter or the master weights behind it; of DTensors this
    rank's shard."""
    state = optimizer.state.get(parameter, {})
    weights: Tensor = sharding.local(state.get("master_param", parameter))
    return weights
