"""Clipping around the last step: what is new in a round may not be long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turncoat.messages import Clear
from turncoat.stage import Memory
from turncoat.stages.aggregate.geometry import combined, finite_rows, lengths, shortening
from turncoat.validate import at_least, positive


@dataclass(frozen=True)
class CentredClipping:
    """Go from the last step towards each update, ``tau`` at most, and stay at the mean [1]_.

    Memory: the last step; 0 before the first. One call moves the step by ``num_iterations * tau``
    at most, whoever sends what; but every round may, so that a traitor who is never out of the
    ordinary drags it along. Not equivariant to translation, for the memory stays where it was.
    Claimed weights are ignored.

    Differs from the paper: clients need no momentum of their own, though the theorem wants it. A
    message that is not finite counts as 0.

    Args:
        tau: The radius; the paper has 10 / (1 - beta) for gradients with momentum beta.

    .. [1] Karimireddy et al., ICML 2021, algorithm 2. https://arxiv.org/abs/2012.10333
    """

    tau: float
    num_iterations: int = 1

    def __post_init__(self) -> None:
        positive(self, tau=self.tau)
        at_least(1, self, num_iterations=self.num_iterations)

    def __call__(self, messages: Sequence[Clear], *, memory: Memory[Tensor]) -> Tensor:
        matrix = finite_rows(messages)
        centre = memory.last(torch.zeros_like(matrix[0])).to(matrix)
        for _ in range(self.num_iterations):
            share = shortening(lengths(matrix, centre), self.tau) / len(matrix)
            centre = combined(share, matrix) + (1 - float(share.sum())) * centre
        return memory.keep(centre).clone()
