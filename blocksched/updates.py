"""Watches the optimizers: whether they update, and on a probe the blocks' sums just before."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blocksched import sharding
from blocksched.adamw import AdamW
from blocksched.blocks import Blocks
from blocksched.ops import block_sums


class Updates:
    """The updates of one step, by hooks on the optimizers.

    Args:
        blocks: whose sums are measured, each over the parameters that the optimizers hold.
        optimizers: all that share the model, or wrappers of them, such as Accelerate's.
        world: how many ranks train the model.

    Attributes:
        optimizers: the optimizers themselves, without wrappers.

    Raises:
        ValueError: LBFGS, a trainable block parameter in no optimizer, or one that is sharded over
            other ranks.
    """

    def __init__(self, blocks: Blocks, optimizers: Sequence[Optimizer], world: int) -> None:
        self.optimizers = [_unwrapped(each) for each in optimizers]
        shares = _shares(blocks, self.optimizers)
        self._held = [[b for b, part in enumerate(share) if part] for share in shares]
        self._copies, self._rows = _rows(shares, world)
        self._stepped: set[int] = set()
        self._sums: dict[int, Tensor] = {}
        self._in_backward = False  # whether gradient hooks step the optimizers
        self._probe = False
        self._stem = blocks.stem

    def watch(self, check: Callable[[Sequence[int], Optimizer], None]) -> None:
        """Call `check` before each update, with the blocks that the optimizer holds, and it."""
        self._check = check
        self._handles = [
            optimizer.register_step_pre_hook(self._before_update(i))
            for i, optimizer in enumerate(self.optimizers)
        ]
        for optimizer, rows in zip(self.optimizers, self._rows, strict=True):
            if isinstance(optimizer, AdamW):
                optimizer.set_blocks(rows, self._stem)

    @property
    def made(self) -> bool:
        """Whether an optimizer has updated in this step."""
        return bool(self._stepped)

    def expect(self, probe: bool) -> None:
        """Begin a step, which is measured if `probe`."""
        self._probe = probe
        self._stepped.clear()

    def sums(self) -> Tensor | None:
        """This rank's share of the sums of all blocks, which over the ranks add up to the whole.

        None if a part was not measured: its update was skipped. Optimizers that gradient hooks step
        are not skipped: those left out had no gradient.
        """
        parts: list[Tensor] = []
        for i, own in enumerate(self.optimizers):
            if self._held[i]:
                part = own.block_sums if isinstance(own, AdamW) else self._sums.get(i)
                if i not in self._stepped:
                    part = _sums(self._rows[i]) if self._in_backward else None
                if part is None:
                    return None
                parts.append(part.to(torch.float64))
        sums = torch.stack([part.to(parts[0].device) for part in parts]).sum(0)
        kinds = len(self._copies)
        return torch.stack([sums[k::kinds] / c for k, c in enumerate(self._copies)]).sum(0)

    def gradients(self) -> list[Tensor]:
        """Every gradient that the optimizers would use; of DTensors, this rank's shard."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        grads = [p.grad for group in groups for p in group["params"]]
        return [sharding.local(grad) for grad in grads if grad is not None]

    def close(self) -> None:
        """Leave the optimizers alone."""
        for handle in self._handles:
            handle.remove()

    def _before_update(self, i: int) -> Callable[..., Any]:
        """The pre-hook of optimizer `i`: reads relevance once the gradients are there."""

        def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            if closure is None:
                self._measure(i, optimizer)
                return None

            def measured_closure() -> Any:
                loss = closure()
                self._measure(i, optimizer)
                return loss

            return args[:1], {**kwargs, "closure": measured_closure}

        return hook

    def _measure(self, i: int, optimizer: Optimizer) -> None:
        """Sums of the blocks' shares in optimizer `i`, before its first update of this step."""
        self._check(self._held[i], optimizer)
        self._in_backward |= torch._C._current_graph_task_id() != -1
        if i not in self._stepped:
            self._stepped.add(i)
            if not self._probe:
                return
            if isinstance(optimizer, AdamW):
                optimizer.measure()
            else:
                self._sums[i] = _unscaled(_sums(self._rows[i]), optimizer)


def _sums(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Sums of the parameters and gradients of each row, [rows, 3]; of DTensors, this rank's."""
    numbered = [(p, row) for row, part in enumerate(rows) for p in part]
    for p, _ in numbered:
        sharding.check_gradient(p)
    params = [sharding.local(p) for p, _ in numbered]
    grads = [sharding.local(p.grad) for p, _ in numbered]
    return block_sums(params, grads, [row for _, row in numbered], len(rows))


def _unscaled(sums: Tensor, optimizer: Optimizer) -> Tensor:
    """Sums of the gradients the update uses: a fused optimizer under GradScaler unscales inside."""
    sums = sums.double()
    scale = getattr(optimizer, "grad_scale", None)
    found_inf = getattr(optimizer, "found_inf", None)
    if scale is not None:
        scale = torch.as_tensor(scale, dtype=torch.float64, device=sums.device)
        sums = sums / torch.stack([scale, scale.square(), torch.ones_like(scale)])
    if found_inf is not None:
        skipped = torch.as_tensor(found_inf, device=sums.device).reshape(()) != 0
        sums = torch.where(skipped, torch.nan, sums)
    return sums


def _shares(blocks: Blocks, optimizers: Sequence[Optimizer]) -> list[list[list[nn.Parameter]]]:
    """For each optimizer, its parameters of each block."""
    holder: dict[int, int] = {}
    for i, optimizer in enumerate(optimizers):
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "LBFGS moves parameters without a gradient by the history of their last ones, so "
                "frozen blocks would not stay still: use an optimizer that skips them, as AdamW, "
                "SGD and Muon do"
            )
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                holder.setdefault(id(parameter), i)
    shares: list[list[list[nn.Parameter]]] = [[[] for _ in blocks.modules] for _ in optimizers]
    for b, module in enumerate(blocks.modules):
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            if id(parameter) not in holder:
                raise ValueError(
                    f"{blocks.names[b]}.{name} is trainable but in no optimizer, so it would never "
                    "train: build the optimizer from all parameters before BlockScheduler, or "
                    "freeze it for good"
                )
            shares[holder[id(parameter)]][b].append(parameter)
    return shares


def _rows(
    shares: Sequence[Sequence[Sequence[nn.Parameter]]], world: int
) -> tuple[list[int], list[list[list[nn.Parameter]]]]:
    """Each block's parameters apart by how many of `world` ranks hold a copy of them.

    Returns those numbers, and for each optimizer a row a block and number, in this order: what a
    rank measures in a row counts for as many ranks.
    """
    copies = {id(p): sharding.copies(p, world) for share in shares for part in share for p in part}
    kinds = sorted(set(copies.values())) or [world]
    rows = [
        [[p for p in part if copies[id(p)] == kind] for part in share for kind in kinds]
        for share in shares
    ]
    return kinds, rows


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside a wrapper, such as Accelerate's, whose step does not always update."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if isinstance(inner, Optimizer) else optimizer
