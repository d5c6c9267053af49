"""The lowest blocks get their gradient from a part of the batch's rows.

They run twice: on the chosen rows with a graph, on the rest without. The outputs are joined in the
batch's order, so that what surrounds the blocks sees whole batches. Where the gradient enters this
part of the model, at the output of its last block, that of the chosen rows is multiplied by all
rows / chosen ones: then every gradient below is, on average over the draws, the full one.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from blocksched.blocks import Blocks

_PLAIN = bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device


class Rows:
    """Runs the rest of the rows through the lowest blocks without a graph."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._draw = _Draw()
        self._parted: list[_Parted] = []

    def apply(self, lower: int, rows: float, step: int) -> None:
        """From the next forward on, `rows` of the rows reach the backward of the `lower` lowest
        blocks; which ones, `step` decides.

        Raises ValueError for blocks that cannot be run on some rows alone.
        """
        self._draw.begin(rows, step)
        if lower == len(self._parted):
            return
        self.close()
        for i, block in enumerate(self._blocks.modules[:lower]):
            _refuse_mixing(self._blocks.names[i], block)
            parted = _Parted(self._blocks.names[i], block, self._draw, last=i == lower - 1)
            self._parted.append(parted)

    def close(self) -> None:
        """Run the blocks as they are."""
        for parted in self._parted:
            parted.give_back()
        self._parted = []


class _Draw:
    """The rows of a step.

    All forwards of a step draw the same, so that what activation checkpointing runs again in
    backward is what ran before.
    """

    def begin(self, share: float, step: int) -> None:
        self._share, self._step = share, step
        self._known: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def __call__(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Indices of the chosen ones of `count` rows, and of the rest, both ascending."""
        if (count, device) not in self._known:
            chosen = max(1, round(self._share * count))
            generator = torch.Generator().manual_seed(self._step)
            order = torch.randperm(count, generator=generator, device="cpu")
            rows, rest = (part.sort().values.to(device) for part in order.tensor_split([chosen]))
            self._known[count, device] = rows, rest
        return self._known[count, device]


class _Parted:
    """Stands in for the forward of a block. Copies and pickles of the block have its own."""

    def __init__(self, name: str, block: nn.Module, draw: _Draw, last: bool) -> None:
        self._name, self._block, self._draw, self._last = name, block, draw, last
        self._own = block.__dict__.get("forward")
        self._forward: Callable[..., Any] = block.forward
        self._only_feeds_next = last  # else the first backward has to show it
        block.__dict__["forward"] = self

    def give_back(self) -> None:
        if self._own is None:
            del self._block.__dict__["forward"]
        else:
            self._block.__dict__["forward"] = self._own

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._forward, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._block, "forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._block.training:
            return self._forward(*args, **kwargs)
        leaves, structure = _flatten((args, kwargs))
        first = self._first(leaves)
        rows, rest = self._draw(len(first), first.device)
        if len(rest) == 0:
            return self._forward(*args, **kwargs)
        self._refuse_ambiguous(first, leaves)

        def run(part: Tensor) -> Any:
            taken = [_take(leaf, len(first), part) for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(taken, structure)
            return self._forward(*args, **kwargs)

        # First those with a graph: autocast keeps their casts of the weights for the others too.
        output = run(rows)
        with torch.no_grad():
            others = run(rest)
        return self._join(output, others, rows, rest)

    def check(self, grad: Tensor, rest: Tensor) -> None:
        """In backward: raise RuntimeError if a row that was left out has a gradient here."""
        if not self._only_feeds_next and bool(grad.index_select(0, rest).any()):
            raise RuntimeError(
                f"what block {self._name} gives is used elsewhere than in the next block, so that "
                "its gradient from a part of the rows would not average to the full one: choose a "
                "higher active, or another schedule than row_suffix"
            )
        self._only_feeds_next = True

    def _first(self, leaves: Sequence[Any]) -> Tensor:
        """The first tensor that the block is given, which says how many rows there are."""
        self._refuse_objects(leaves, "is given")
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0]
        if not tensors:
            raise ValueError(
                f"block {self._name} is given no tensor, so there are no rows to choose from: pass "
                "it the batch, its rows first, or choose another schedule than row_suffix"
            )
        return tensors[0]

    def _refuse_ambiguous(self, first: Tensor, leaves: Sequence[Any]) -> None:
        """With as many positions as rows a mask may be of either; learned scales may too."""
        positions = len(first) in first.shape[1:]
        for other in leaves:
            if not _has(other, len(first)) or other.shape == first.shape:
                continue
            scales = other.dim() == 1 and other.requires_grad
            if scales or (positions and other.dim() <= first.dim()):
                raise ValueError(
                    f"block {self._name} is given {tuple(first.shape)} and {tuple(other.shape)}, "
                    "where nothing says whether the second's first dimension is that of the rows: "
                    "train row_suffix on batches of another size"
                )

    def _join(self, output: Any, others: Any, rows: Tensor, rest: Tensor) -> Any:
        """The output of all rows; what has no rows is that of the chosen ones."""
        leaves, structure = _flatten(output)
        self._refuse_objects(leaves, "gives")
        scale = (len(rows) + len(rest)) / len(rows) if self._last else 1.0
        joined = [
            _Join.apply(leaf, other, rows, rest, scale, self)  # type: ignore[no-untyped-call]
            if _has(leaf, len(rows)) and _has(other, len(rest))
            else leaf
            for leaf, other in zip(leaves, _flatten(others)[0], strict=True)
        ]
        return pytree.tree_unflatten(joined, structure)

    def _refuse_objects(self, leaves: Sequence[Any], verb: str) -> None:
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, *_PLAIN)):
                raise ValueError(
                    f"block {self._name} {verb} a {type(leaf).__name__}, of which row_suffix "
                    "cannot run some rows alone: pass use_cache=False to a model of Hugging "
                    "Face's, or choose another schedule"
                )


class _Join(torch.autograd.Function):
    """Rows in the order of the batch, [B, ...]; only the chosen ones have a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        chosen: Tensor,
        others: Tensor,
        rows: Tensor,
        rest: Tensor,
        scale: float,
        parted: _Parted,
    ) -> Tensor:
        ctx.rows, ctx.rest, ctx.scale, ctx.parted = rows, rest, scale, parted
        joined = chosen.new_empty((len(rows) + len(rest), *chosen.shape[1:]))
        return joined.index_copy_(0, rows, chosen).index_copy_(0, rest, others)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.parted.check(grad, ctx.rest)
        chosen = grad.index_select(0, ctx.rows)
        return chosen * ctx.scale if ctx.scale != 1 else chosen, None, None, None, None, None


def _flatten(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Objects are not taken apart even where somebody told torch how: they may be written to."""
    return pytree.tree_flatten(value, is_leaf=lambda x: not isinstance(x, (tuple, list, dict)))


def _has(leaf: Any, count: int) -> bool:
    """Whether it is a tensor of so many rows."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == count


def _take(leaf: Any, count: int, part: Tensor) -> Any:
    """The rows `part` of a tensor of `count` rows; all else whole."""
    return leaf.index_select(0, part) if _has(leaf, count) else leaf


def _refuse_mixing(name: str, block: nn.Module) -> None:
    """Raise ValueError if rows do not run apart from each other in `block`, or are not first."""
    for inner, module in block.named_modules():
        if isinstance(module, _BatchNorm):
            raise ValueError(
                f"{name}.{inner} normalises over the rows of a batch, of which row_suffix runs "
                "some apart: use a LayerNorm or GroupNorm, or another schedule"
            )
        if getattr(module, "batch_first", True) is False:
            raise ValueError(
                f"{name}.{inner} has the rows of a batch in the second dimension, where row_suffix "
                "does not look for them: build it with batch_first=True"
            )
