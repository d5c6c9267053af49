"""What a model, its optimizer and a step of it take, in bytes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def kept_for_backward(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """What a forward keeps for backward, its inputs too, the model's weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values())


def standing(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """What stays from step to step: weights and moments."""
    moments = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    return sum(t.nbytes for t in [*model.parameters(), *moments])


def weights(model: nn.Module) -> int:
    """The model's parameters, and so their gradients."""
    return sum(p.nbytes for p in model.parameters())
