"""The shortest vector between gradients: a direction that helps every task, or none."""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_STEPS = 250
_TOLERANCE = 1e-14  # of the longest gradient's square


def mgda_weights(gradients: Tensor) -> Tensor:
    """Return the weights, positive and of sum 1, of the shortest combination of the rows [1]_.

    By Frank and Wolfe's method on the Gram matrix, each step as long as it should be; for two rows
    the first step ends at the solution. Computed in float64.

    Args:
        gradients: Shape: ``(tasks, d)``.

    Returns:
        Shape: ``(tasks,)``, float64.

    >>> mgda_weights(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    tensor([0.8000, 0.2000], dtype=torch.float64)

    .. [1] Sener and Koltun, NeurIPS 2018, algorithms 1 and 2. https://arxiv.org/abs/1810.04650
    """
    rows = gradients.detach().double()
    gram = rows @ rows.T
    weights = torch.full((len(gram),), 1 / len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(_MAX_STEPS):
        slope = gram @ weights
        best = int(slope.argmin())
        step = torch.zeros_like(weights)
        step[best] = 1.0
        step -= weights
        curvature = step @ gram @ step
        gain = -(step @ slope)
        if gain <= _TOLERANCE * gram.diagonal().max() or curvature <= 0:
            break
        weights = weights + (gain / curvature).clamp(0.0, 1.0) * step
    return weights


def weight_of_two(first: Tensor, second: Tensor) -> float:
    """Return the weight of the first of two gradients, in closed form: the oracle.

    .. [1] Sener and Koltun, NeurIPS 2018, eq. (6). https://arxiv.org/abs/1810.04650
    """
    one, other = first.double(), second.double()
    apart = other - one
    squared = float(apart @ apart)
    return 0.5 if squared == 0 else min(1.0, max(0.0, float(apart @ other) / squared))
