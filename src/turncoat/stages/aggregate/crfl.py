"""Certified robustness: clip and perturb the model each round, and let noisy copies of it vote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from math import log, prod, sqrt
from statistics import NormalDist
from typing import Any

import torch
from torch import Generator, Tensor

from turncoat.messages import Clear, with_rows
from turncoat.stage import Aggregate, Memory, Plan, call
from turncoat.stages.aggregate.geometry import finite_rows
from turncoat.stages.aggregate.layers import noise, num_parameters
from turncoat.task import Model
from turncoat.validate import at_least, fraction, positive


@dataclass(frozen=True)
class CRFL:
    """Do as ``inner``, then clip the global parameters to ``rho_t`` and add Gaussian noise [1]_.

    ``rho_t = max_norm + growth * t``, where t counts from 1. The last round of the plan clips only:
    the noise is then ``SmoothedVote``'s, at release. Buffers of the model are left alone. Memory:
    the number of rounds so far.

    Formal guarantee: ``certified_radius``, for a backdoor of bounded size in so many clients' data,
    under the assumptions stated there. It holds of the vote, not of the bare model.

    Args:
        max_norm: The greatest norm of the parameters at first.
        growth: How much it grows in a round.
        sigma: Standard deviation of the noise.
        num_rounds: In all; None for the plan's.

    .. [1] Xie et al., ICML 2021, algorithm 1. https://arxiv.org/abs/2106.08283
    """

    inner: Aggregate[Clear]
    _: KW_ONLY
    max_norm: float = 2.0
    growth: float = 0.1
    sigma: float = 0.01
    num_rounds: int | None = None

    def __post_init__(self) -> None:
        positive(self, max_norm=self.max_norm)
        at_least(0, self, growth=self.growth, sigma=self.sigma)
        at_least(1, self, num_rounds=self.num_rounds)

    def planned(self, plan: Plan) -> CRFL:
        """Return the rule that knows which round is the last."""
        return self if self.num_rounds else replace(self, num_rounds=plan.num_rounds)

    def radius(self, round: int) -> float:
        """Return what the parameters are clipped to in a round; the first is 1."""
        return self.max_norm + self.growth * round

    def __call__(
        self,
        messages: Sequence[Clear],
        *,
        before: Tensor,
        model: Model,
        memory: Memory[int],
        rng: Generator,
        **offers: Any,
    ) -> Tensor:
        offers |= {"before": before, "model": model, "memory": memory.inner, "rng": rng}
        finite = with_rows(messages, finite_rows(messages))
        after = before + call(self.inner, finite, **offers)
        round = memory.keep(memory.last(0) + 1)
        inside = after[: num_parameters(model, after)]
        norm = float(torch.linalg.vector_norm(inside, dtype=torch.float64))
        if norm > self.radius(round):
            inside.mul_(self.radius(round) / norm)
        if self.sigma and round != self.num_rounds:
            after += noise(after, self.sigma, model, rng)
        step: Tensor = after - before
        return step


@dataclass(frozen=True)
class Backdoored:
    """One traitor of those that a certificate withstands.

    Attributes:
        weight: Its share of the mean: p.
        boost: How many times longer it makes its update: gamma.
        num_steps: Of its local training: tau.
        lr: Of its local training: eta.
        poisoned_fraction: Which part of a batch carries the trigger: q_B / n_B.
    """

    weight: float
    boost: float
    num_steps: int
    lr: float
    poisoned_fraction: float

    def __post_init__(self) -> None:
        fraction(self, weight=self.weight, poisoned_fraction=self.poisoned_fraction)
        positive(self, boost=self.boost, lr=self.lr)
        at_least(1, self, num_steps=self.num_steps)

    @property
    def reach(self) -> float:
        """Return how far a trigger of unit size moves the model, in Lipschitz constants."""
        return self.weight * self.boost * self.num_steps * self.lr * self.poisoned_fraction


def certified_radius(
    top: float,
    runner_up: float,
    traitors: Sequence[Backdoored],
    *,
    sigma: float,
    lipschitz: float,
    later_norms: Sequence[float],
    later_sigmas: Sequence[float] | None = None,
) -> float:
    """Return the largest trigger, in L2, that leaves the vote as it is: RAD [1]_. 0: abstain.

    Holds for traitors who act in one round only, for a loss whose gradient is Lipschitz in the
    data (``logistic_lipschitz`` for multi-class logistic regression; no bound is known for deep
    networks), and with the probability that both votes' bounds hold.

    Args:
        top: Lower bound on the winner's share of votes: p_A.
        runner_up: Upper bound on the second's: p_B.
        sigma: Of the noise in the round in which they act.
        lipschitz: L_Z.
        later_norms: rho_t of each round after that one; all of them help.
        later_sigmas: sigma_t of these; None for ``sigma``.

    .. [1] Xie et al., ICML 2021, theorem 3. https://arxiv.org/abs/2106.08283
    """
    positive("certified_radius", sigma=sigma, lipschitz=lipschitz)
    fraction("certified_radius", top=top, runner_up=runner_up)
    if not traitors:
        raise ValueError("certified_radius: traitors is empty: name at least one")
    if top <= runner_up:
        return 0.0
    sigmas = [sigma] * len(later_norms) if later_sigmas is None else later_sigmas
    phi = NormalDist().cdf
    contraction = prod(2 * phi(r / s) - 1 for r, s in zip(later_norms, sigmas, strict=True))
    gap = (sqrt(top) - sqrt(runner_up)) ** 2
    if gap >= 1:
        return float("inf")
    reach = sum(t.reach**2 for t in traitors)
    below = 2 * len(traitors) * lipschitz**2 * reach * contraction
    return sqrt(-log(1 - gap) * sigma**2 / below) if below else float("inf")


def logistic_lipschitz(max_norm: float) -> float:
    """Return L_Z of multi-class logistic regression whose parameters are at most so long [1]_.

    >>> logistic_lipschitz(15.0) == 257.0**0.5
    True

    .. [1] Xie et al., ICML 2021, lemma 2. https://arxiv.org/abs/2106.08283
    """
    return sqrt(2 + 2 * max_norm + max_norm**2)


def vote_bounds(votes: Tensor, alpha: float = 0.001) -> tuple[float, float]:
    """Return a lower bound on the winner's share and an upper one on the second's, by Hoeffding.

    Differs from the paper [1]_: each class's bound has ``alpha`` over the number of classes, so
    that all hold together with probability 1 - alpha.

    Args:
        votes: How many noisy copies said each class. Shape: ``(classes,)``.

    .. [1] Xie et al., ICML 2021, algorithm 2. https://arxiv.org/abs/2106.08283
    """
    if not 0 < alpha < 1:
        raise ValueError(f"vote_bounds: alpha must be between 0 and 1; it is {alpha}")
    num_votes = int(votes.sum())
    slack = sqrt(log(len(votes) / alpha) / (2 * num_votes))
    first, second = (votes.double() / num_votes).topk(2).values.tolist()
    return max(0.0, first - slack), min(1.0, second + slack)
