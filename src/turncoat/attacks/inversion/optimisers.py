"""How a guess is moved to where its cost is least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, cos, pi
from typing import Any, Literal

import torch
from torch import Tensor

from turncoat.describe import ADDED
from turncoat.validate import at_least, fraction, one_of, positive

Decay = Literal["cuts", "cosine"]

_PROGRESS = 1e-3  # share of the cost that an iteration must take off to count


@dataclass(frozen=True)
class SignedAdam:
    """Adam on the sign of the slope, its step cut to a tenth at each of ``cuts`` [1]_.

    Args:
        num_steps: Iterations; the paper takes 4,800 and more.
        cuts: Shares of the way. A plateau goes on to the next cut at once, and after the last ends
            the search.
        decay: How the step shrinks: at the ``"cuts"``, or all the way as half a ``"cosine"`` [2]_,
            which wants fewer iterations.

    .. [1] Geiping et al., NeurIPS 2020, section 4. https://arxiv.org/abs/2003.14053
    .. [2] Loshchilov and Hutter, ICLR 2017, eq. (5). https://arxiv.org/abs/1608.03983
    """

    num_steps: int = 1_000
    lr: float = 0.1
    cuts: tuple[float, ...] = (3 / 8, 5 / 8, 7 / 8)
    decay: Decay = field(default="cuts", metadata=ADDED)

    def __post_init__(self) -> None:
        _check(self, self.num_steps, self.lr, self.cuts)
        one_of(Decay, self, decay=self.decay)

    def __call__(
        self,
        variables: Sequence[Tensor],
        slope: Callable[[], Tensor],
        *,
        clamp: Callable[[], None],
        patience: int | None,
    ) -> None:
        _descend(self, variables, slope, clamp, patience, signed=True)


@dataclass(frozen=True)
class Adam:
    """Adam [1]_, its step cut to a tenth at each of ``cuts``, shares of the way.

    .. [1] Kingma and Ba, ICLR 2015, algorithm 1. https://arxiv.org/abs/1412.6980
    """

    num_steps: int = 1_000
    lr: float = 0.1
    cuts: tuple[float, ...] = (3 / 8, 5 / 8, 7 / 8)

    def __post_init__(self) -> None:
        _check(self, self.num_steps, self.lr, self.cuts)

    def __call__(
        self,
        variables: Sequence[Tensor],
        slope: Callable[[], Tensor],
        *,
        clamp: Callable[[], None],
        patience: int | None,
    ) -> None:
        _descend(self, variables, slope, clamp, patience, signed=False)


@dataclass(frozen=True)
class LBFGS:
    """Limited-memory BFGS with a Wolfe line search [1]_: for smooth nets, and one guess at a time.

    Pixels are free to leave [0, 1] on the way, and are brought back at the end.

    Args:
        num_steps: Outer steps, each of up to ``num_inner`` iterations.
        history: Steps that make up the idea of the curvature.

    .. [1] Liu and Nocedal, Mathematical Programming 1989. https://doi.org/10.1007/BF01589116
    """

    num_steps: int = 300
    lr: float = 1.0
    num_inner: int = 20
    history: int = 100
    one_at_a_time = True

    def __post_init__(self) -> None:
        _check(self, self.num_steps, self.lr, ())
        at_least(1, self, num_inner=self.num_inner, history=self.history)

    def __call__(
        self,
        variables: Sequence[Tensor],
        slope: Callable[[], Tensor],
        *,
        clamp: Callable[[], None],
        patience: int | None,
    ) -> None:
        optimiser: Any = torch.optim.LBFGS(
            [v.requires_grad_() for v in variables],
            lr=self.lr,
            max_iter=self.num_inner,
            history_size=self.history,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
        plateau = _Plateau(patience)
        held = [v.detach().clone() for v in variables]
        for _ in range(self.num_steps):
            first = optimiser.step(slope)
            if not all(bool(v.isfinite().all()) for v in variables):
                break
            same = all(map(torch.equal, held, variables))
            held = [v.detach().clone() for v in variables]
            if same or plateau.reached(first):
                break
        with torch.no_grad():
            for v, last in zip(variables, held, strict=True):
                v.copy_(last)
                v.requires_grad_(False)
        slope()


class _Plateau:
    """Says when a cost has not fallen by a thousandth for ``patience`` iterations."""

    def __init__(self, patience: int | None) -> None:
        self.patience, self.best, self.waited = patience, float("inf"), 0

    def reached(self, cost: Tensor) -> bool:
        if self.patience is None:
            return False
        now = float(cost.mean())
        if now < self.best - _PROGRESS * abs(self.best) or self.best == float("inf"):
            self.best, self.waited = now, 0
            return False
        self.waited += 1
        return self.waited >= self.patience

    def forget(self) -> None:
        self.waited = 0


def _descend(
    recipe: SignedAdam | Adam,
    variables: Sequence[Tensor],
    slope: Callable[[], Tensor],
    clamp: Callable[[], None],
    patience: int | None,
    *,
    signed: bool,
) -> None:
    cuts = [ceil(recipe.num_steps * share) for share in recipe.cuts]
    optimiser = torch.optim.Adam(list(variables), lr=recipe.lr)
    plateau = _Plateau(patience)
    step = 0
    while step < recipe.num_steps:
        cost = slope()
        if signed:
            for v in variables:
                v.grad = v.grad.sign_() if v.grad is not None else None
        left = 0.1 ** sum(step >= c for c in cuts)
        if getattr(recipe, "decay", "cuts") == "cosine":
            left = (1 + cos(pi * step / recipe.num_steps)) / 2
        optimiser.param_groups[0]["lr"] = recipe.lr * left
        optimiser.step()
        clamp()
        step += 1
        if plateau.reached(cost):
            step = min((c for c in cuts if c > step), default=recipe.num_steps)
            plateau.forget()


def _check(owner: object, num_steps: int, lr: float, cuts: tuple[float, ...]) -> None:
    at_least(1, owner, num_steps=num_steps)
    positive(owner, lr=lr)
    for share in cuts:
        fraction(owner, cuts=share)
