"""Per-block sums: for block b over its tensors, sum |g p|, sum g^2 and sum p^2.

They are all that relevance needs, and small: three numbers a block.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def block_sums_ref(blocks: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    """The sums of each block's tensors and their gradients, in eager torch.

    Args:
        blocks: the parameters of each block, of any shape, floating dtype and device. A gradient
            of None counts 0.
        device: where the result goes.

    Returns:
        Tensor [blocks, 3] in float64: sum |g p|, sum g^2, sum p^2. Products are taken in float32
        or wider, sums in float64, so that no dtype of the weights overflows.
    """
    return torch.stack([_sums(tensors, device) for tensors in blocks])


@torch.no_grad()
def _sums(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros(3, dtype=torch.float64, device=device)
    for tensor in tensors:
        p = _at_least_float32(tensor)
        gp = g2 = torch.zeros((), dtype=torch.float64, device=p.device)
        if tensor.grad is not None:
            g = _at_least_float32(tensor.grad)
            gp = (g * p).abs().sum(dtype=torch.float64)
            g2 = g.square().sum(dtype=torch.float64)
        total += torch.stack([gp, g2, p.square().sum(dtype=torch.float64)]).to(device)
    return total


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
