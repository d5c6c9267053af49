"""Keeps what the frozen prefix gave for a batch, so that its forward is skipped when that returns.

AutoFreeze (arXiv 2102.01386) does so for fine-tuning. With a share f of the blocks frozen it lifts
the ceiling of a step's speed-up from 3 / (3 - 2 f) to 1 / (1 - f).
"""

import dataclasses
import functools
import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from blocksched.blocks import Blocks

_SAMPLES = 3  # of each time, until they decide
_PLAIN = bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device
_Versions = tuple[tuple[int, int], ...]


class PrefixCache:
    """The activations at the boundary, by batch. Pass it to BlockScheduler.

    A batch is known again if all that the model is called with is the same to the bit: epochs over
    fixed batches. Then the blocks of the prefix are not run, and the first active one gets the
    bits that they would have computed. What was kept is dropped once a weight or buffer that it
    came from changes (but for a write through .data, which torch does not count either), so a
    probe or a full update empties it. Where the bits cannot be promised,
    or looking up takes longer than the prefix, it turns itself off: see `off`.

    Call the model itself, in training mode. Only the next block may use what a frozen block gives:
    when skipped that is NaN, and NaN in what the model then returns is an error.

    Args:
        limit_bytes: the most that is kept; what does not fit is computed every time.
        path: a file to keep it in, overwritten, instead of memory on the model's device.

    Attributes:
        hits: forwards that skipped blocks.
        misses: forwards with a prefix that skipped none.
        off: why nothing is kept any more; None while it is on.

    Raises:
        ValueError: no positive limit.
    """

    def __init__(self, limit_bytes: int, path: str | Path | None = None) -> None:
        if not limit_bytes > 0:
            raise ValueError(f"limit_bytes must be > 0, got {limit_bytes}: say what it may keep")
        self.hits = self.misses = 0
        self.off: str | None = None
        self._store = _Store(limit_bytes, path)
        self._entries: dict[bytes, _Entry] = {}
        self._blank: dict[tuple[torch.Size, torch.dtype], Tensor] = {}
        self._boundary = 0
        self._proved = False  # blocks were skipped at this boundary, and nothing became NaN
        self._seconds: dict[bool, list[float]] = {False: [], True: []}  # by whether it was skipped
        self._pass: _Pass | None = None
        self._handles: list[RemovableHandle] = []

    def attach(self, model: nn.Module, blocks: Blocks) -> None:
        """Watch the forwards of `model`; BlockScheduler does."""
        self._blocks = blocks
        self._sources = _sources(model, blocks)
        self.device = next(model.parameters()).device
        door = _Door(self)
        self._handles = [
            model.register_forward_pre_hook(door.enter, with_kwargs=True),
            model.register_forward_hook(door.leave, always_call=True),
        ]

    def move(self, boundary: int) -> None:
        """The prefix of the next forwards is the blocks before `boundary`."""
        if boundary != self._boundary:
            self._boundary, self._proved = boundary, False
            self._seconds = {False: [], True: []}

    def close(self) -> None:
        """Forget everything and leave the model alone."""
        for handle in self._handles:
            handle.remove()
        self.turn_off("it is closed")

    def turn_off(self, why: str) -> None:
        """Keep nothing from now on."""
        self.off = why
        self._forget()

    def enter(self, args: Any, kwargs: Any) -> None:
        """Before a forward in training. Without grad mode nothing says what is trainable."""
        if self.off is not None or self._boundary == 0 or not torch.is_grad_enabled():
            return
        start = self.now()
        prefix = self._blocks.modules[: self._boundary]
        if any(getattr(block, "_compiled_call_impl", None) is not None for block in prefix):
            return self.turn_off("the blocks are compiled, so that they cannot be skipped")
        key = _fingerprint((args, kwargs), self.device)
        if key is None:
            return self.turn_off("the model is called with what is neither tensor nor number")
        versions = _versions(self._sources, prefix)
        entry = self._entries.get(key)
        if entry is not None and entry.versions != versions[: len(entry.versions)]:
            self._forget()
            entry = None
        self.hits += entry is not None
        self.misses += entry is None
        self._pass = _Pass(self, prefix, key, versions, entry)
        self._pass.looking_up_s = self.now() - start

    def leave(self, output: Any) -> None:
        """After the forward, or when it raised."""
        if self._pass is None:
            return
        skipped = self._pass.close()
        self._pass = None
        if skipped and not self._proved:
            if any(bool(t.isnan().any()) for t in _tensors(output)):
                raise RuntimeError(
                    "the model returned NaN when frozen blocks were skipped: it uses their output "
                    "elsewhere (hidden states, say), or training has diverged; train without "
                    "PrefixCache"
                )
            self._proved = True

    def keep(self, key: bytes, versions: _Versions, blanks: list[Any], output: Any) -> None:
        """Keep what the prefix gave, if there is room."""
        tensors = _tensors(output)
        old = self._entries.get(key)
        slots = [] if old is None else [leaf for leaf in _leaves(old.output) if type(leaf) is _Slot]
        if [slot.like for slot in slots] != [_layout(t) for t in tensors]:
            slots = self._store.slots(tensors)
        if len(slots) < len(tensors):
            return
        for slot, tensor in zip(slots, tensors, strict=True):
            slot.write(tensor)
        left = iter(slots)
        self._entries[key] = _Entry(versions, blanks, _map(lambda _: next(left), output))

    def spent(self, seconds: float, *, skipped: bool) -> None:
        """Take a time of the prefix. Turn off once it is known that skipping does not pay."""
        self._seconds[skipped].append(seconds)
        if min(map(len, self._seconds.values())) < _SAMPLES:
            return
        saved, cost = (statistics.median(self._seconds[k][-_SAMPLES:]) for k in (False, True))
        if cost >= saved:
            self.turn_off(f"looking up takes {cost * 1e3:.2f} ms, the prefix {saved * 1e3:.2f} ms")

    def now(self) -> float:
        """Seconds; with the device's work done until the times have decided."""
        if self.device.type == "cuda" and min(map(len, self._seconds.values())) < _SAMPLES:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def blank(self, like: Tensor) -> Tensor:
        """NaN in the shape of `like`; the same tensor for all of a shape."""
        key = like.shape, like.dtype
        if key not in self._blank:
            self._blank[key] = torch.full_like(like, torch.nan, device=self.device)
        return self._blank[key]

    def _forget(self) -> None:
        self._entries.clear()
        self._blank.clear()
        self._store.clear()


@dataclasses.dataclass(frozen=True)
class _Entry:
    """What the prefix gave for a batch."""

    versions: _Versions  # of all that it came from
    blanks: list[Any]  # for each block but the last: its output, with tensors on "meta"
    output: Any  # of the last block, with slots for tensors

    @property
    def boundary(self) -> int:
        return len(self.blanks) + 1


class _Pass:
    """One forward of the model. It stands in for `forward` of the blocks of the prefix."""

    def __init__(
        self,
        cache: PrefixCache,
        prefix: Sequence[nn.Module],
        key: bytes,
        versions: _Versions,
        entry: _Entry | None,
    ) -> None:
        self.looking_up_s = 0.0
        self._cache, self._key, self._versions, self._entry = cache, key, versions, entry
        self._skip = 0 if entry is None else entry.boundary
        self._blanks = [] if entry is None else list(entry.blanks)
        self._last = len(prefix) - 1
        self._reached = 0
        self._unfit: str | None = None
        self._random = _random_state(cache.device)
        self._start = 0.0
        self._undo: list[Callable[[], Any]] = []
        for i, block in enumerate(prefix):
            if self._skip <= self._last:
                look = functools.partial(self._look, i)
                hook = block.register_forward_pre_hook(look, prepend=True, with_kwargs=True)
                self._undo.append(hook.remove)
            own = block.__dict__.get("forward")
            block.__dict__["forward"] = functools.partial(self._run, i, block.forward)
            self._undo.append(functools.partial(_give_back, block, own))

    def close(self) -> bool:
        """Give the blocks their forward back. Whether one was skipped."""
        for undo in self._undo:
            undo()
        return min(self._skip, self._reached) > 0

    def _look(self, i: int, block: nn.Module, args: Any, kwargs: Any) -> None:
        """Before anything is detached: is this block what it is given a function of the batch?"""
        inner = (module for module in block.modules() if module is not block)
        if not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in _leaves((args, kwargs))):
            self._unfit = (
                "a block is given an object that it may change: pass use_cache=False to a model of "
                "Hugging Face's"
            )
        elif any(t.requires_grad for t in _tensors((args, kwargs))):
            self._unfit = "something trainable feeds the prefix or acts between its blocks"
        elif i != self._reached:
            self._unfit = "the blocks of the prefix do not run one after the other, once each"
        elif any(module._forward_hooks or module._forward_pre_hooks for module in inner):
            self._unfit = "something hooked into the blocks of the prefix watches their forward"

    def _run(self, i: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of block i's forward."""
        if i == 0:
            self._start = self._cache.now()
        self._reached += 1
        if i >= self._skip:
            output = forward(*args, **kwargs)
            self._note(i, output)
        elif i < self._skip - 1:
            output = _map(self._cache.blank, self._blanks[i])
        else:
            assert self._entry is not None
            output = pytree.tree_map_only(_Slot, _Slot.read, self._entry.output)
            self._blanks.append(_map(_blank, output))
        if i == self._last and self._skip in (0, self._last + 1):
            took = self._cache.now() - self._start + (self.looking_up_s if self._skip else 0.0)
            self._cache.spent(took, skipped=self._skip > 0)
        return output

    def _note(self, i: int, output: Any) -> None:
        """Remember a block's output, or why it cannot be kept."""
        leaves = _leaves(output)
        tensors = _tensors(output)
        if not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves):
            self._unfit = "a block gives something else than tensors"
        elif not all(t.is_floating_point() and _is_dense(t) for t in tensors):
            self._unfit = "a block gives tensors other than dense ones of floating point"
        elif any(t.requires_grad for t in tensors):
            self._unfit = "something in a frozen block is trainable"
        if self._unfit is None and i == self._last:
            state = _random_state(self._cache.device)
            if not all(map(torch.equal, state, self._random)):
                self._unfit = "the frozen blocks or what comes before draw random numbers (dropout)"
        if self._unfit is not None and self._cache.off is None:
            self._cache.turn_off(self._unfit)
        if self._cache.off is not None:
            return
        if i < self._last:
            self._blanks.append(_map(_blank, output))
        else:
            self._cache.keep(self._key, self._versions, self._blanks, output)


class _Slot:
    """Room for a tensor."""

    def __init__(self, room: Tensor, like: Tensor) -> None:
        self.like = _layout(like)
        self._device = like.device
        self._tensor = room.view(like.dtype).as_strided(like.shape, like.stride())

    def write(self, tensor: Tensor) -> None:
        self._tensor.copy_(tensor.detach())

    def read(self) -> Tensor:
        """A copy: the next block may change it in place."""
        return self._tensor.to(self._device, copy=True)


class _Store:
    """Bytes for slots, in memory or in a file, up to a limit."""

    def __init__(self, limit: int, path: str | Path | None) -> None:
        self._limit, self._used = limit, 0
        self._file = None
        if path is not None:
            self._file = torch.from_file(str(path), True, limit, dtype=torch.uint8)

    def slots(self, like: Sequence[Tensor]) -> list[_Slot]:
        """A slot for each tensor; none at all where they do not fit."""
        sizes = [-(-t.numel() * t.itemsize // 64) * 64 for t in like]  # any dtype is aligned so
        if self._used + sum(sizes) > self._limit:
            return []
        made = []
        for tensor, size in zip(like, sizes, strict=True):
            if self._file is None:
                room = torch.empty(size, dtype=torch.uint8, device=tensor.device)
            else:
                room = self._file[self._used : self._used + size]
            self._used += size
            made.append(_Slot(room, tensor))
        return made

    def clear(self) -> None:
        self._used = 0


class _Door:
    """The hooks around a model's forward; idle in copies."""

    def __init__(self, cache: PrefixCache | None = None) -> None:
        self._cache = cache

    def __reduce__(self) -> tuple[type["_Door"], tuple[()]]:
        return _Door, ()

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._cache is not None and module.training:
            self._cache.enter(args, kwargs)

    def leave(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if self._cache is not None:
            self._cache.leave(output)


def _give_back(block: nn.Module, own: Any) -> None:
    if own is None:
        del block.__dict__["forward"]
    else:
        block.__dict__["forward"] = own


def _sources(model: nn.Module, blocks: Blocks) -> list[Tensor]:
    """Parameters and buffers outside the blocks that block 0's input may come from."""
    first = blocks.modules[0]
    inside = {id(module) for block in blocks.modules for module in block.modules()}
    sources: list[Tensor] = list(blocks.stem)
    before = True
    for module in model.modules():
        before = before and module is not first
        if id(module) not in inside and (before or any(m is first for m in module.modules())):
            sources += [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return sources


def _versions(sources: Sequence[Tensor], prefix: Sequence[nn.Module]) -> _Versions:
    """Changes with every write to one of the tensors, or to what holds its numbers."""
    inner = [t for block in prefix for t in (*block.parameters(), *block.buffers())]
    return tuple((t.data_ptr(), t._version) for t in (*sources, *inner))


def _fingerprint(value: Any, device: torch.device) -> bytes | None:
    """128 bits of everything in `value` and how it is computed; None if that cannot be told."""
    leaves, structure = pytree.tree_flatten(value, is_leaf=_is_leaf)
    digest = hashlib.blake2b(digest_size=16)
    autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    digest.update(repr((structure, autocast)).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            digest.update(repr((leaf.dtype, leaf.shape, leaf.device)).encode())
            plain = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(plain.numpy().data)
        elif isinstance(leaf, _PLAIN):
            digest.update(repr(leaf).encode())
        else:
            return None
    return digest.digest()


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _blank(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _is_dense(tensor: Tensor) -> bool:
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def _is_leaf(value: Any) -> bool:
    """Objects are not taken apart even where somebody told torch how: they may be written to."""
    return not isinstance(value, (tuple, list, dict))


def _leaves(value: Any) -> list[Any]:
    return pytree.tree_leaves(value, is_leaf=_is_leaf)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in _leaves(value) if isinstance(leaf, Tensor)]


def _map(change: Callable[[Tensor], Any], value: Any) -> Any:
    return pytree.tree_map_only(Tensor, change, value)
