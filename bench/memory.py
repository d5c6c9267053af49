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
    """The model's parameters that train, and so their gradients."""
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)


class ByActive:
    """What a step takes at most, by number of active blocks.

    On CUDA what it takes beside what stands before it, plus the model's own weights, gradients and
    moments; on a CPU, where nothing counts that, the bytes that a forward keeps for backward.

    Attributes:
        bytes: by number of active blocks.
    """

    def __init__(
        self, device: torch.device, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.bytes: dict[int, int] = {}
        self._device, self._model, self._optimizer = device, model, optimizer
        self._before = 0

    @property
    def peak(self) -> int:
        """The most of all steps."""
        return max(self.bytes.values(), default=0)

    def begin(self) -> None:
        """A step begins."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)

    def end(self, active: int, forward: Callable[[], Tensor]) -> None:
        """A step has ended; a CPU repeats its forward, once for each number of active blocks."""
        if self._device.type == "cuda":
            beside = torch.cuda.max_memory_allocated(self._device) - self._before
            peak = beside + standing(self._model, self._optimizer)
            self.bytes[active] = max(peak, self.bytes.get(active, 0))
        elif active not in self.bytes:
            self.bytes[active] = kept_for_backward(self._model, forward)
