"""Whether a step may be taken: NaN and infinities in loss or gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor


class NotFiniteError(RuntimeError):
    """Too many updates in a row were left out because loss or gradients were not finite."""


def all_finite(gradients: Sequence[Tensor], loss: Tensor | float) -> bool:
    """Whether the loss and every number of the gradients are finite; waits for the device once."""
    numbers = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    some = [each for each in numbers if each.numel() > 0]  # the largest of none is an error
    largest = torch.nn.utils.get_total_norm(some, norm_type=float("inf"))
    return bool(torch.isfinite(largest)) and bool(torch.isfinite(torch.as_tensor(loss)).all())
