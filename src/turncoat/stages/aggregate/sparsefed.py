"""Global sparsification with error feedback: a round changes few parameters, those all agree on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from math import ceil, exp, inf, log

import torch
from torch import Tensor

from turncoat.messages import Clear
from turncoat.stage import Memory
from turncoat.stages.aggregate.layers import num_parameters
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.aggregate.norm_bound import NormBound
from turncoat.task import Model
from turncoat.validate import at_least, exactly_one, fraction, positive


@dataclass(frozen=True)
class SparseFed:
    """Clip each update, average, and step by the k largest entries of what has piled up [1]_.

    With ``mean`` the mean of the clipped updates, V the velocity and W the error::

        V = momentum * V + mean;  W = W + V;  step = top-k of W;  W and V are 0 where it stepped

    Without momentum nothing is lost: the means so far sum to the steps so far and W. Memory: V
    and W. Claimed weights are ignored. Buffers of the model take the clipped mean as it is. With
    k the number of parameters, and no momentum, it is FedAvg of clipped updates.

    Args:
        num_kept: How many parameters a round changes: k.
        fraction_kept: Or which part of them, rounded up.
        max_norm: What each update is shortened to.
        momentum: Of the velocity at the server; where a step was made it starts again at 0.

    .. [1] Panda et al., AISTATS 2022, algorithm 1.
       https://proceedings.mlr.press/v151/panda22a.html
    """

    _: KW_ONLY
    num_kept: int | None = None
    fraction_kept: float | None = None
    max_norm: float = 1.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        exactly_one(self, num_kept=self.num_kept, fraction_kept=self.fraction_kept)
        at_least(1, self, num_kept=self.num_kept)
        positive(self, max_norm=self.max_norm, fraction_kept=self.fraction_kept)
        fraction(self, fraction_kept=self.fraction_kept, momentum=self.momentum)

    def __call__(
        self, messages: Iterable[Clear], *, model: Model, memory: Memory[tuple[Tensor, Tensor]]
    ) -> Tensor:
        mean = NormBound(Mean(), max_norm=self.max_norm)(_alike(messages))
        size = num_parameters(model, mean)
        inside = mean[:size]
        velocity, error = memory.last((torch.zeros_like(inside), torch.zeros_like(inside)))
        velocity = self.momentum * velocity + inside
        error = error + velocity
        kept = self._largest(error)
        step = torch.zeros_like(inside).index_copy_(0, kept, error[kept])
        memory.keep((velocity.index_fill_(0, kept, 0.0), error.index_fill_(0, kept, 0.0)))
        return torch.cat([step, mean[size:]])

    def _largest(self, error: Tensor) -> Tensor:
        size = len(error)
        share = ceil((self.fraction_kept or 0.0) * size - 1e-9)
        count = min(size, max(1, share if self.num_kept is None else self.num_kept))
        return error.abs().topk(count, sorted=False).indices


def certified_radius(
    attack_size: float, *, lipschitz: float, num_kept: int, lrs: Sequence[float]
) -> float:
    """Return how far, in L1, a bounded attack can drag the parameters away from a clean run.

    ``sum(lrs) * (1 + 2 k c) ** sum(lrs) * attack_size`` [1]_; the dense protocol has the number of
    parameters d where 2 k stands. It bounds a distance between two models, and certifies no
    prediction of either. As it grows exponentially in k c it is vacuous for any network one trains:
    it says that small k helps, and not how much is left.

    Args:
        attack_size: What the traitors add to the mean update of a round, in L1: rho.
        lipschitz: By how much, at most, one coordinate of an update changes when the parameters
            move by 1 in L1: c. It is an assumption, and cannot be read off a network.
        num_kept: k; for the dense protocol half the number of parameters.
        lrs: The step sizes of the rounds.

    .. [1] Panda et al., AISTATS 2022, theorem 2. https://proceedings.mlr.press/v151/panda22a.html
    """
    at_least(0, "certified_radius", attack_size=attack_size, lipschitz=lipschitz)
    at_least(0, "certified_radius", num_kept=num_kept)
    total = sum(lrs)
    if not attack_size or not total:
        return 0.0
    exponent = log(attack_size) + log(total) + total * log(1 + 2 * num_kept * lipschitz)
    return exp(exponent) if exponent < 700 else inf


def _alike(messages: Iterable[Clear]) -> Iterator[Clear]:
    return (replace(m, weight=1.0) for m in messages)
