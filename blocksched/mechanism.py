"""Applies a plan to the modules. The only file that writes requires_grad or .grad.

Applying is absolute: it states for every block whether it trains, so that running, undoing and
loading are the same call. Optimizer groups are never touched: a parameter that neither requires a
gradient nor has one is skipped by every torch optimizer, weight decay and moments included.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from blocksched.blocks import Blocks


class Mechanism:
    """Freezes and thaws the blocks of a model, and watches that backward obeys.

    The stem trains exactly when block 0 does, the head always. While there is a prefix, nothing
    pulls the graph through it: the inputs of its blocks are detached.
    """

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self._gates = [_Gate(name) for name in blocks.names]
        self._norms = [
            [(m, m.track_running_stats) for m in block.modules() if isinstance(m, _BatchNorm)]
            for block in blocks.modules
        ]
        self._handles: list[RemovableHandle] = []
        for gate, block in zip(self._gates, blocks.modules, strict=True):
            self._handles.append(block.register_forward_pre_hook(gate.enter, with_kwargs=True))
            self._handles.append(block.register_forward_hook(gate.leave))
        self._active: frozenset[int] | None = None
        self._watch: _Watch | None = None

    def apply(self, active: Sequence[int]) -> None:
        """Train exactly the blocks `active` from the next forward on."""
        chosen = frozenset(active)
        for i, parameters in enumerate(self.blocks.parameters):
            _set_trainable(parameters, i in chosen)
            for norm, tracks in self._norms[i]:
                norm.track_running_stats = tracks and i in chosen
        _set_trainable(self.blocks.stem, 0 in chosen)
        if chosen == self._active:
            return
        self._active = chosen
        self._unwatch()
        boundary = min(chosen)
        for i, gate in enumerate(self._gates):
            gate.state(prefix=i < boundary, last_of_prefix=i == boundary - 1)
        self._watch = _Watch(self.blocks, chosen, self._gates)

    def check(self, some: Iterable[int]) -> None:
        """Before an update of the blocks `some`: raise RuntimeError if backward disobeyed there."""
        if self._watch is not None:
            self._watch.check(some)

    def check_all(self) -> None:
        """At the end of a step: the same for all blocks; ends the watch if one ran."""
        if self._watch is not None and self._watch.check(range(len(self.blocks))):
            self._unwatch()

    def close(self) -> None:
        """Leave the model as it was found."""
        self.apply(range(len(self.blocks)))
        self._unwatch()
        for handle in self._handles:
            handle.remove()

    def _unwatch(self) -> None:
        if self._watch is not None:
            self._watch.remove()
            self._watch = None


class _Gate:
    """The hooks of one block: cut the graph in the prefix, and note that the block ran.

    Copies and pickles of a model carry an idle gate, so that they behave as the plain model.
    """

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.ran = False
        self.state(prefix=False, last_of_prefix=False)

    def state(self, *, prefix: bool, last_of_prefix: bool) -> None:
        self.prefix = prefix
        self.last_of_prefix = last_of_prefix
        self.ran = False

    def __reduce__(self) -> tuple[type["_Gate"], tuple[()]]:
        return _Gate, ()

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not module.training:
            return None
        self.ran = True
        if not self.prefix or not any(t.requires_grad for t in _tensors((args, kwargs))):
            return None
        if not torch.is_grad_enabled():
            raise RuntimeError(
                f"block {self.name} is frozen, but reentrant checkpointing carries the graph of a "
                "trainable input around it: checkpoint with use_reentrant=False (and without "
                "enable_input_require_grads)"
            )
        return _map(Tensor.detach, (args, kwargs))

    def leave(self, module: nn.Module, _args: Any, output: Any) -> Any:
        """Under reentrant checkpointing a block trains only if an input requires grad.

        The checkpoint runs this without grad mode and strips requires_grad off plain outputs; a
        view of a leaf keeps it, and is what the first active block then receives.
        """
        if not (self.last_of_prefix and module.training) or torch.is_grad_enabled():
            return None
        hidden = next((t for t in _tensors(output) if t.is_floating_point()), None)
        if hidden is None:
            return None
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            view = leaf.view_as(leaf)
        return _map(lambda t: view if t is hidden else t, output)


class _Watch:
    """Observes the first backward after a change."""

    def __init__(self, blocks: Blocks, active: frozenset[int], gates: Sequence[_Gate]) -> None:
        self._blocks, self._active, self._gates = blocks, active, gates
        self._got = [False] * len(blocks)
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._note(i))
            for i in active
            for parameter in blocks.parameters[i]
        ]
        self._order = [_Order(name, gates[0]) for name, _ in blocks.stem_modules]
        if 0 not in active:
            for order, (_, module) in zip(self._order, blocks.stem_modules, strict=True):
                self._handles.append(module.register_forward_pre_hook(order))

    def check(self, some: Iterable[int]) -> bool:
        """Whether blocks ran since the change. Raises RuntimeError if one of `some` disobeyed."""
        for order in self._order:
            if order.after and not order.before:
                raise RuntimeError(
                    f"{order.name} is registered before the blocks but runs after them, so it "
                    "would be frozen with the stem: pass stem= with what runs before block 0"
                )
        for i in some:
            parameters = self._blocks.parameters[i]
            if i not in self._active and any(p.grad is not None for p in parameters):
                self._fail(
                    i,
                    "is frozen but got a gradient: something else set its requires_grad; leave "
                    "requires_grad of the model to the scheduler",
                )
            if i in self._active and parameters and self._gates[i].ran and not self._got[i]:
                self._fail(
                    i,
                    "is active and ran but got no gradient: look for a detach or no_grad after it, "
                    "for whole-model torch.compile (compile each block instead), or for reentrant "
                    "checkpointing (pass use_reentrant=False)",
                )
        return any(gate.ran for gate in self._gates)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _fail(self, i: int, what: str) -> None:
        raise RuntimeError(f"block {i} ({self._blocks.names[i]}) {what}")

    def _note(self, i: int) -> Callable[[Tensor], None]:
        def note(_parameter: Tensor) -> None:
            self._got[i] = True

        return note


class _Order:
    """A hook that notes whether a stem module runs before or after block 0; idle in copies."""

    def __init__(self, name: str = "", first: _Gate | None = None) -> None:
        self.name, self.first = name, first
        self.before = self.after = False

    def __reduce__(self) -> tuple[type["_Order"], tuple[()]]:
        return _Order, ()

    def __call__(self, module: nn.Module, _args: Any) -> None:
        if self.first is None or not module.training:
            return
        if self.first.ran:
            self.after = True
        else:
            self.before = True


def _set_trainable(parameters: Sequence[nn.Parameter], trainable: bool) -> None:
    for parameter in parameters:
        if parameter.requires_grad is not trainable:
            parameter.requires_grad_(trainable)
        if not trainable:
            parameter.grad = None


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif type(value) is dict:
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _tensors(inner)


def _map(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `change` done to every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) is dict:
        return {key: _map(change, inner) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        mapped = [_map(change, inner) for inner in value]
        return type(value)(*mapped) if hasattr(value, "_fields") else type(value)(mapped)
    return value
