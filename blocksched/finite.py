"""Whether a step may be taken: NaN and infinities in loss or gradients."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class NotFiniteError(RuntimeError):
    """Too many updates in a row were left out because loss or gradients were not finite."""


def all_finite(gradients: Sequence[Tensor], loss: Tensor | float) -> bool:
    """Whether the loss and every number of the gradients are finite; waits for the device once."""
    numbers = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    some = [each for each in numbers if each.numel() > 0]  # the largest of none is an error
    if not bool(torch.isfinite(torch.as_tensor(loss)).all()):
        return False
    if all(g.device.type == "cpu" and g.is_floating_point() for g in some):
        # At the speed of memory: a GPU's few launches of a norm take a CPU six times as long.
        return all(math.isfinite(end.item()) for g in some for end in torch.aminmax(g))
    largest = torch.nn.utils.get_total_norm(some, norm_type=float("inf"))
    return bool(torch.isfinite(largest))
