"""What a model, its optimizer and a step of it take, in bytes."""

import torch
from torch import Tensor, nn

from bench.tasks.parts import Task


def kept_for_backward(task: Task, model: nn.Module, inputs: Tensor) -> int:
    """What a forward keeps for backward, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = task.forward(model, inputs)
    del outputs
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
