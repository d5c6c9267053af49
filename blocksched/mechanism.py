"""Applies a plan to the modules. The only file that writes requires_grad or .grad.

Applying is absolute: it states for every block whether it trains, so that running, undoing and
loading are the same call. Optimizer groups are never touched: a parameter that neither requires a
gradient nor has one is skipped by every torch optimizer, weight decay and moments included.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from blocksched import sharding
from blocksched.blocks import Blocks

_GIVEN = "_blocksched_given_to_prefix"


class Mechanism:
    """Freezes and thaws the blocks of a model, and watches that backward obeys.

    Any set of blocks may train: a frozen block above an active one passes the gradient on. The stem
    trains when block 0 does or as it is told, the head as gradients reach it. While the stem does
    not train, nothing pulls the graph through it or through the prefix (the blocks below all that
    trains): what these blocks and block 0 are given is detached, and so it is (x0, an encoder's
    states, a position bias) where later blocks are given the same tensor.

    Args:
        blocks: of the model.
        sharded: the model's FSDP2 modules.
    """

    def __init__(self, blocks: Blocks, sharded: Sequence[Any] = ()) -> None:
        _refuse_second(blocks)
        self.blocks = blocks
        self._sharded = sharded
        self._gates = [
            _Gate(name, _buffers(block))
            for name, block in zip(blocks.names, blocks.modules, strict=True)
        ]
        self._handles: list[RemovableHandle] = []
        for gate, block in zip(self._gates, blocks.modules, strict=True):
            self._handles.append(block.register_forward_pre_hook(gate.enter, with_kwargs=True))
            self._handles.append(block.register_forward_hook(gate.leave, always_call=True))
        self._active: frozenset[int] | None = None
        self._stem_trains = True
        self._watch: _Watch | None = None

    def apply(self, active: Sequence[int], stem: bool | None = None) -> None:
        """Train exactly the blocks `active` from the next forward on, and the stem if `stem`, which
        if None is when block 0 does."""
        chosen = frozenset(active)
        stem_trains = 0 in chosen if stem is None else stem
        for i, parameters in enumerate(self.blocks.parameters):
            _set_trainable(parameters, i in chosen)
        _set_trainable(self.blocks.stem, stem_trains)
        if (chosen, stem_trains) == (self._active, self._stem_trains):
            return
        for module in self._sharded:  # what a forward left gathered would train as before
            module.reshard()
        self._refuse_strangers(chosen)
        self._active, self._stem_trains = chosen, stem_trains
        self._unwatch()
        boundary = 0 if stem_trains else min(chosen)
        for i, gate in enumerate(self._gates):
            gate.state(
                frozen=i not in chosen,
                cut=not stem_trains and i < max(1, boundary),
                prefix=i < boundary,
                last_of_prefix=i == boundary - 1,
            )
        if not stem_trains:
            for parameter in self.blocks.head:  # zeros where no gradient comes would still decay
                parameter.grad = None
        self._watch = _Watch(self.blocks, chosen, stem_trains, self._gates)

    def check(self, some: Sequence[int], optimizer: Optimizer | None = None) -> None:
        """Before `optimizer` updates the blocks `some`: raise RuntimeError if one that is frozen,
        or the frozen stem, has a gradient, or if the watched backward did not train one that is
        active. Where nothing went backward, nothing is said."""
        if not self._stem_trains:
            _refuse_gradients("the stem", self.blocks.stem)
        for i in some:
            if self._active is not None and i not in self._active:
                name = f"block {i} ({self.blocks.names[i]})"
                _refuse_gradients(name, self.blocks.parameters[i])
        if self._watch is not None:
            self._watch.check(some, optimizer)

    def check_all(self) -> None:
        """At the end of a watched step: the same for all blocks; ends the watch if they trained."""
        if self._watch is not None:
            self.check(range(len(self.blocks)))
            if self._watch.ran and self._watch.heard:
                self._unwatch()

    def close(self) -> None:
        """Leave the model as it was found."""
        self.apply(range(len(self.blocks)))
        self._unwatch()
        for handle in self._handles:
            handle.remove()

    def _refuse_strangers(self, active: frozenset[int]) -> None:
        """A trainable parameter that came later would stop training in the prefix, unsaid."""
        for i, block in enumerate(self.blocks.modules):
            for name, parameter in block.named_parameters():
                if i not in active and parameter.requires_grad:
                    raise RuntimeError(
                        f"{self.blocks.names[i]}.{name} became trainable after BlockScheduler was "
                        "built, which cannot freeze it: add and unfreeze parameters first"
                    )

    def _unwatch(self) -> None:
        if self._watch is not None:
            self._watch.remove()
            self._watch = None


class _Gate:
    """The hooks of one block: cut the graph before and in the prefix, keep the buffers of a frozen
    block where they are, and note that the block ran.

    Copies and pickles of a model carry an idle gate, so that they behave as the plain model.
    """

    def __init__(self, name: str = "", buffers: Sequence[tuple[nn.Module, str]] = ()) -> None:
        self.name, self.buffers = name, buffers
        self.kept: list[tuple[nn.Module, str, Tensor]] = []
        self.state(frozen=False, cut=False, prefix=False, last_of_prefix=False)

    def state(self, *, frozen: bool, cut: bool, prefix: bool, last_of_prefix: bool) -> None:
        self.frozen, self.cut = frozen, cut
        self.prefix, self.last_of_prefix = prefix, last_of_prefix
        self.ran = False

    def __reduce__(self) -> tuple[type["_Gate"], tuple[()]]:
        return _Gate, ()

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not module.training:
            return None
        self.ran = True
        tensors = [t for t in _tensors((args, kwargs)) if t.requires_grad]
        if self.cut and tensors:
            self._mark(tensors)
        if self.frozen:
            self.kept = [
                (m, key, b) for m, key in self.buffers if (b := m._buffers[key]) is not None
            ]
            for owner, key, buffer in self.kept:
                owner._buffers[key] = buffer.clone()  # backward may need what the forward makes it
        if self.prefix and tensors:
            return _map(Tensor.detach, (args, kwargs))
        if any(_was_given(t) for t in tensors):
            return _map(lambda t: t.detach() if _was_given(t) else t, (args, kwargs))
        return None

    def leave(self, module: nn.Module, _args: Any, output: Any) -> Any:
        """Give the buffers back, and cut what the block computed from other than its arguments.

        Under reentrant checkpointing a block trains only if an input requires grad. The checkpoint
        runs this without grad mode and strips requires_grad off plain outputs; a view of a leaf
        keeps it, and is what the first active block then receives.
        """
        for owner, key, buffer in self.kept:
            owner._buffers[key] = buffer
        self.kept = []
        if not (self.prefix and module.training):
            return None
        if torch.is_grad_enabled():
            cut = any(t.requires_grad for t in _tensors(output))
            return _map(Tensor.detach, output) if cut else None
        if not self.last_of_prefix:
            return None
        hidden = next((t for t in _tensors(output) if t.is_floating_point()), None)
        if hidden is None:
            return None
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            view = leaf.view_as(leaf)
        return _map(lambda t: view if t is hidden else t, output)

    def _mark(self, tensors: Sequence[Tensor]) -> None:
        """Note on what the block is given that it is to be detached, here and in later blocks."""
        if not torch.is_grad_enabled():
            raise RuntimeError(
                f"block {self.name} or what feeds it is frozen, but reentrant checkpointing "
                "carries the graph of a trainable input around it: checkpoint with "
                "use_reentrant=False (and without enable_input_require_grads)"
            )
        for tensor in tensors:
            if not tensor.is_leaf:  # a parameter leads nowhere, and may train in later blocks
                setattr(tensor, _GIVEN, True)


class _Watch:
    """Observes the first backward after a change.

    Attributes:
        heard: whether anything got a gradient since the change.
    """

    def __init__(
        self, blocks: Blocks, active: frozenset[int], stem_trains: bool, gates: Sequence[_Gate]
    ) -> None:
        self._blocks, self._active, self._gates = blocks, active, gates
        self._got = [False] * len(blocks)
        self.heard = False
        watched: list[tuple[int | None, nn.Parameter]] = [
            (i, parameter) for i in active for parameter in blocks.parameters[i]
        ]
        around = [*blocks.head, *(blocks.stem if stem_trains else ())]
        watched += [(None, parameter) for parameter in around if parameter.requires_grad]
        self._handles = [_on_gradient(parameter, self._note(i)) for i, parameter in watched]
        self._order = [_Order(name, gates[0]) for name, _ in blocks.stem_modules]
        if not stem_trains:
            for order, (_, module) in zip(self._order, blocks.stem_modules, strict=True):
                self._handles.append(module.register_forward_pre_hook(order))

    @property
    def ran(self) -> bool:
        """Whether blocks ran since the change."""
        return any(gate.ran for gate in self._gates)

    def check(self, some: Iterable[int], optimizer: Optimizer | None) -> None:
        """Raise RuntimeError if one of `some` is active and ran but got no gradient, although
        something else did or the optimizer holds one."""
        for order in self._order:
            if order.after and not order.before:
                raise RuntimeError(
                    f"{order.name} is registered before the blocks but runs after them, so it "
                    "would be frozen with the stem: pass stem= with what runs before block 0"
                )
        if not (self.heard or (optimizer is not None and _has_gradients(optimizer))):
            return
        for i in some:
            ran = i in self._active and self._gates[i].ran
            if ran and self._blocks.parameters[i] and not self._trained(i):
                raise RuntimeError(
                    f"block {i} ({self._blocks.names[i]}) is active and ran but got no gradient: "
                    "look for a detach or no_grad after it, for whole-model torch.compile (compile "
                    "each block instead), or for reentrant checkpointing (pass use_reentrant=False)"
                )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _trained(self, i: int) -> bool:
        """Of a DTensor the gradient counts too: an optimizer's hook may be called before ours."""
        sharded = filter(sharding.is_dtensor, self._blocks.parameters[i])
        return self._got[i] or any(parameter.grad is not None for parameter in sharded)

    def _note(self, i: int | None) -> Callable[[Tensor], None]:
        def note(grad: Tensor | None) -> None:
            self.heard |= grad is not None
            if i is not None:
                self._got[i] |= grad is not None
            for order in self._order:
                order.first = None  # only the first forward tells: in the next, all come after

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


def _on_gradient(parameter: nn.Parameter, note: Callable[[Tensor], None]) -> RemovableHandle:
    """Have `note` called when a gradient comes: of a DTensor after FSDP2 has assigned it, which
    calls no other hooks, else before an optimizer that is stepped in backward."""
    after = sharding.is_dtensor(parameter)
    register: Callable[..., RemovableHandle] = (
        parameter.register_post_accumulate_grad_hook if after else parameter.register_hook
    )
    return register(note)


def _has_gradients(optimizer: Optimizer) -> bool:
    groups = optimizer.param_groups
    return any(parameter.grad is not None for group in groups for parameter in group["params"])


def _set_trainable(parameters: Sequence[nn.Parameter], trainable: bool) -> None:
    for parameter in parameters:
        if parameter.requires_grad is not trainable:
            parameter.requires_grad_(trainable)
        if not trainable:
            parameter.grad = None


def _refuse_second(blocks: Blocks) -> None:
    """What another scheduler has frozen now would count as frozen for good."""
    for block in blocks.modules:
        gates = (getattr(hook, "__self__", None) for hook in block._forward_pre_hooks.values())
        if any(isinstance(gate, _Gate) and gate.name for gate in gates):
            raise ValueError(
                "another BlockScheduler has this model's blocks: close() that one before you build "
                "the next"
            )


def _refuse_gradients(name: str, frozen: Sequence[nn.Parameter]) -> None:
    if any(parameter.grad is not None for parameter in frozen):
        raise RuntimeError(
            f"{name} is frozen but got a gradient, which an optimizer would apply: something else "
            "set its requires_grad or its grad; leave both to the scheduler"
        )


def _was_given(tensor: Tensor) -> bool:
    """Whether it was given to a prefix block; noted on the tensor, which torch.compile follows."""
    return getattr(tensor, _GIVEN, False)


def _buffers(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """Module and name of each buffer of a state_dict that a forward may move.

    Larger integer buffers hold quantised weights, too much to copy in every forward.
    """
    return [
        (module, key)
        for module in block.modules()
        for key, buffer in module.named_buffers(recurse=False)
        if key not in module._non_persistent_buffers_set
        and (buffer.is_floating_point() or buffer.numel() == 1)
    ]


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
