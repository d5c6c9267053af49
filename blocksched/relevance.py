"""Block sums -> relevance: one number >= 0 per block."""

import math
from collections.abc import Sequence

from blocksched.schedules.base import Metric


def relevance(sums: Sequence[Sequence[float]], metric: Metric, eps: float) -> list[float]:
    """Relevance of each block from its sums |g p|, g^2, p^2.

    Args:
        sums: three numbers a block, as blocksched.kernels.block_sums gives them.
        metric: "grad_ratio" = |g| / (|p| + eps) with Euclidean norms over all of the block's
            parameters; "saliency_abs_gp" = sum |g p|, the first-order saliency of pruning
            (Molchanov et al., arXiv 1906.10771, before squaring); "grad_norm" = |g|.
        eps: guards grad_ratio against weights of norm zero.
    """
    if metric == "saliency_abs_gp":
        return [gp for gp, _, _ in sums]
    if metric == "grad_norm":
        return [math.sqrt(g2) for _, g2, _ in sums]
    return [_ratio(math.sqrt(g2), math.sqrt(p2) + eps) for _, g2, p2 in sums]


def _ratio(grad: float, weight: float) -> float:
    if weight == 0.0:
        return math.inf if grad else 0.0
    return grad / weight
