"""Finds a model's blocks, its stem and its head."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A model taken apart. Only parameters that were trainable when it was taken apart count.

    Attributes:
        names: qualified name of each block, block 0 (nearest the input) first.
        modules: the blocks.
        parameters: trainable parameters of each block.
        stem: trainable parameters of what comes before block 0.
        head: the other trainable parameters: of what comes after the last block, weights tied to
            it, and what modules around the blocks hold themselves.
        stem_modules: qualified name and module of each module that holds a stem parameter.
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    parameters: tuple[tuple[nn.Parameter, ...], ...]
    stem: tuple[nn.Parameter, ...]
    head: tuple[nn.Parameter, ...]
    stem_modules: tuple[tuple[str, nn.Module], ...]

    def __len__(self) -> int:
        return len(self.modules)

    def __repr__(self) -> str:
        stem = ", ".join(name or "the model itself" for name, _ in self.stem_modules) or "nothing"
        return (
            f"{len(self)} blocks {self.names[0]} .. {self.names[-1]}; stem: {stem}; "
            f"head: {len(self.head)} parameter tensors"
        )


def find_blocks(
    model: nn.Module,
    blocks: str | Sequence[nn.Module] | None = None,
    stem: Sequence[str | nn.Module | nn.Parameter] | None = None,
) -> Blocks:
    """Take a model apart into stem, blocks and head.

    The blocks are the longest nn.ModuleList or nn.Sequential of modules of one class, lists inside
    a block left aside; another one half as long, or with half as many parameters, is too close to
    guess. The stem is what the model registers before them (embeddings, usually), the head
    everything else.

    A weight or module that stands on both sides is the head's. So are the parameters that a module
    around the blocks holds itself, or in an nn.ParameterList or nn.ParameterDict (learned
    positions, scalars per block): nothing says where they are used. The head trains as gradients
    reach it, and while there is a prefix none reaches what only feeds block 0.

    Args:
        model: any module.
        blocks: the blocks instead, in the order they run: the name of the list ("model.layers")
            or the modules.
        stem: the stem instead: names, modules or parameters of it. For models that register their
            parts in another order than they run them.

    Raises:
        ValueError: no list of blocks, several that may be meant, a parameter in two blocks or in a
            block and outside, or a name that the model does not have.
    """
    chosen = _chosen(model, blocks) if blocks is not None else _longest(model)
    names = {id(module): name for name, module in model.named_modules()}
    owner = _owners(chosen, names)
    stem_ids = _stem(model, chosen, owner)
    if stem is not None:
        stem_ids = {id(p) for part in stem for p in _stem_part(model, part)}
    outside = [p for p in model.parameters() if id(p) not in owner and p.requires_grad]
    return Blocks(
        names=tuple(names[id(block)] for block in chosen),
        modules=tuple(chosen),
        parameters=tuple(tuple(p for p in b.parameters() if p.requires_grad) for b in chosen),
        stem=tuple(p for p in outside if id(p) in stem_ids),
        head=tuple(p for p in outside if id(p) not in stem_ids),
        stem_modules=tuple(
            (name, module)
            for name, module in model.named_modules()
            if any(id(p) in stem_ids for p in module.parameters(recurse=False))
        ),
    )


def misfit(block: nn.Module, source: nn.Module) -> str | None:
    """What keeps `block` from being a copy of `source`: the first parameter or buffer that it has
    and the other lacks, or has in another shape or dtype; None if nothing does.

    The source may have more: T5's first block holds the position bias that it hands to all others.
    """
    theirs = tensors_of(source)
    for name, tensor in tensors_of(block).items():
        other = theirs.get(name)
        if other is None:
            return f"{name} is only in the first"
        if (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
            kinds = [f"{t.dtype} {list(t.shape)}".removeprefix("torch.") for t in (tensor, other)]
            return f"{name} is {kinds[0]} in the first, {kinds[1]} in the second"
    return None


def tensors_of(block: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a block by name, trainable or not."""
    return {**dict(block.named_parameters()), **dict(block.named_buffers())}


def _stem(model: nn.Module, blocks: Sequence[nn.Module], owner: dict[int, str]) -> set[int]:
    """Ids of the parameters that only stand before block 0. Refuses those of blocks outside."""
    before: set[int] = set()
    elsewhere: set[int] = set()
    early = True
    for name, module in _places(model, set(blocks)):
        if module in blocks:
            early = early and module is not blocks[0]
            continue
        known = early and not _holds_for_others(module, blocks)
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in owner:
                raise ValueError(
                    f"parameter {name}.{key} is also in block {owner[id(parameter)]}: a block "
                    "cannot be frozen apart from weights it shares; untie them"
                )
            (before if known else elsewhere).add(id(parameter))
    return before - elsewhere


def _places(
    module: nn.Module, blocks: set[nn.Module], name: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """Every place of a module that is not inside a block, in the order of registration."""
    yield name, module
    if module not in blocks:
        for key, child in module._modules.items():  # named_children leaves out a second place
            if child is not None:
                yield from _places(child, blocks, f"{name}.{key}" if name else key)


def _holds_for_others(module: nn.Module, blocks: Sequence[nn.Module]) -> bool:
    """Whether it is around the blocks or a plain container: its own forward tells nothing."""
    if isinstance(module, (nn.ParameterList, nn.ParameterDict)):
        return True
    inside = set(module.modules())
    return any(block in inside for block in blocks)


def _longest(model: nn.Module) -> list[nn.Module]:
    candidates: dict[str, list[nn.Module]] = {}
    inside: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or id(module) in inside:
            continue
        children = list(module)
        alike = len({type(child) for child in children}) == 1
        if len(children) >= 2 and alike and any(True for _ in module.parameters()):
            candidates[name] = children
            inside |= {id(inner) for child in children for inner in child.modules()}
    if not candidates:
        raise ValueError(
            "found no list of two or more modules of one class: pass blocks= with the name of the "
            "list, or with the modules in the order they run"
        )
    sizes = {name: _size(children) for name, children in candidates.items()}
    longest = max(candidates, key=lambda name: sizes[name])
    close = [
        name
        for name, size in sizes.items()
        if any(2 * a >= b for a, b in zip(size, sizes[longest], strict=True))
    ]
    if len(close) > 1:
        lists = ", ".join(f"{name} ({len(candidates[name])})" for name in close)
        raise ValueError(
            f"found several lists that may be the blocks: {lists}; pass blocks= with the name of "
            "the one to schedule"
        )
    return candidates[longest]


def _size(modules: Sequence[nn.Module]) -> tuple[int, int]:
    """Number of modules and of the parameters they hold."""
    return len(modules), sum(p.numel() for module in modules for p in module.parameters())


def _chosen(model: nn.Module, blocks: str | Sequence[nn.Module]) -> list[nn.Module]:
    if isinstance(blocks, str):
        found = _submodule(model, blocks, "blocks")
        if not isinstance(found, Iterable):
            raise ValueError(
                f"blocks={blocks!r} is a {type(found).__name__}, not a list of modules: name an "
                "nn.ModuleList or nn.Sequential"
            )
        blocks = list(found)
    known = {id(module) for module in model.modules()}
    if not blocks or any(id(block) not in known for block in blocks):
        raise ValueError("blocks= must hold modules of this model, at least one: pass them")
    return list(blocks)


def _submodule(model: nn.Module, name: str, argument: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"{argument} names {name!r}, which this model does not have: see model.named_modules()"
        ) from None


def _stem_part(model: nn.Module, part: str | nn.Module | nn.Parameter) -> list[nn.Parameter]:
    if isinstance(part, nn.Parameter):
        return [part]
    if isinstance(part, str):
        named = dict(model.named_parameters(remove_duplicate=False))
        if part in named:
            return [named[part]]
        part = _submodule(model, part, "stem")
    return list(part.parameters())


def _owners(blocks: Sequence[nn.Module], names: dict[int, str]) -> dict[int, str]:
    """The name of the block that each block parameter belongs to."""
    owner: dict[int, str] = {}
    for block in blocks:
        for name, parameter in block.named_parameters():
            other = owner.setdefault(id(parameter), names[id(block)])
            if other != names[id(block)]:
                raise ValueError(
                    f"parameter {name} of block {names[id(block)]} is also in block {other}: "
                    "blocks that share weights cannot be frozen apart; untie them"
                )
        if len(set(map(id, blocks))) != len(blocks):
            raise ValueError(
                "the same module stands twice among the blocks: blocks that share weights cannot "
                "be frozen apart; untie them"
            )
    return owner
