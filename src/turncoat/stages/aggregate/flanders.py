"""Forecasting every client's model from the rounds before: who is far from the forecast is out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Generator, Tensor

from turncoat.messages import Clear
from turncoat.stage import Aggregate, Memory, Verdict
from turncoat.stages.aggregate.coordinatewise import refuse_fewer
from turncoat.stages.aggregate.geometry import finite_rows, unsound
from turncoat.stages.aggregate.screening import hand_on
from turncoat.validate import at_least, positive


@dataclass(frozen=True)
class FLANDERS:
    """Keep the clients whose models lie nearest to a matrix autoregression's forecast [1]_.

    The models of a round, at a sample of the parameters, are the columns of a matrix, which is
    forecast as ``A X B`` of the round before. A and B are fitted to the window by alternating least
    squares. Memory: the sampled matrices. The first round is let pass. Traitors who are as easy to
    forecast as the honest pass; those from the first round on, of one coalition, may be.

    Differs from the paper: ridges pull A and B towards the identity (the model stays as it was), so
    that few rounds already make a forecast; the columns of those left out are remembered as they
    were forecast, lest they teach; a client that was away has its last column, or the global model.

    Args:
        num_kept: How many clients are handed on: k.
        num_sampled: Parameters that are looked at, drawn once.
        window: Earlier rounds that are fitted to.
        num_iterations: Of alternating least squares, at most.
        ridge: In units of the mean squared singular value.

    .. [1] Gabrielli et al., FLANDERS, 2023, algorithm 1. https://arxiv.org/abs/2303.16668
    """

    inner: Aggregate[Clear]
    _: KW_ONLY
    num_kept: int
    num_sampled: int = 500
    window: int = 5
    num_iterations: int = 10
    ridge: float = 0.01

    def __post_init__(self) -> None:
        at_least(1, self, num_kept=self.num_kept, num_sampled=self.num_sampled)
        at_least(1, self, window=self.window, num_iterations=self.num_iterations)
        positive(self, ridge=self.ridge)

    def check_cohort(self, num_messages: int) -> None:
        """Refuse a round of too few."""
        refuse_fewer(self, num_messages, self.num_kept, "num_kept", "lower num_kept")

    def __call__(
        self,
        messages: Sequence[Clear],
        *,
        before: Tensor,
        cohort: tuple[int, ...],
        memory: Memory[dict[str, Any]],
        rng: Generator,
        verdict: Verdict,
        **offers: Any,
    ) -> Tensor:
        self.check_cohort(len(messages))
        unfit, matrix = unsound(messages), finite_rows(messages)
        past = memory.last({})
        where = past.get("where")
        if where is None:
            where = torch.randperm(len(before), generator=rng)[: self.num_sampled].sort().values
        here = before.to(matrix)[where.to(matrix.device)].double().cpu()
        now = here[:, None] + matrix[:, where.to(matrix.device)].double().cpu().T
        history, suspects = list(past.get("history", ())), list[int]()
        if history:
            shown = _columns(history, cohort)
            a, b = autoregression(shown, self.ridge, self.num_iterations)
            forecast = a @ shown[-1] @ b
            scores = (now - forecast).square().sum(dim=0)
            scores[unfit] = torch.inf
            order = scores.argsort(stable=True).tolist()
            suspects = [i for i in order[self.num_kept :] if i not in unfit]
            out = [*suspects, *unfit]
            now = now.index_copy(1, torch.tensor(out, dtype=torch.long), forecast[:, out])
        else:
            now[:, unfit] = here[:, None]
        history.append((cohort, here, now))
        memory.keep({"where": where, "history": tuple(history[-self.window :])})
        offers |= {"before": before, "cohort": cohort, "memory": memory.inner, "rng": rng}
        return hand_on(self.inner, messages, suspects, offers, unfit=unfit, verdict=verdict)


def autoregression(
    series: Sequence[Tensor], ridge: float, num_iterations: int
) -> tuple[Tensor, Tensor]:
    """Fit ``X[t] = A X[t-1] B`` by alternating least squares; identities to one matrix alone.

    Args:
        series: Oldest first. Shape of each: ``(parameters, clients)``.
    """
    size, num_clients = series[0].shape
    a = torch.eye(size, dtype=torch.float64)
    b = torch.eye(num_clients, dtype=torch.float64)
    pairs = list(pairwise(series))
    last = torch.inf
    for _ in range(num_iterations if pairs else 0):
        before = torch.cat([x @ b for x, _ in pairs], dim=1)
        after = torch.cat([y for _, y in pairs], dim=1)
        # of A - I, by the smaller of the two Gram matrices
        inner = before.T @ before
        inner.diagonal().add_(ridge * float(inner.diagonal().mean()) + 1e-300)
        a = torch.eye(size, dtype=torch.float64) + (after - before) @ torch.linalg.solve(
            inner, before.T
        )
        moved = torch.cat([a @ x for x, _ in pairs])
        behind = torch.cat([y for _, y in pairs])
        square = moved.T @ moved
        square.diagonal().add_(ridge * float(square.diagonal().mean()) + 1e-300)
        b = torch.eye(num_clients, dtype=torch.float64) + torch.linalg.solve(
            square, moved.T @ (behind - moved)
        )
        error = float((moved @ b - behind).square().sum())
        if last - error <= 1e-3 * error:
            break
        last = error
    return a, b


def _columns(
    history: Sequence[tuple[tuple[int, ...], Tensor, Tensor]], cohort: tuple[int, ...]
) -> list[Tensor]:
    """Return one matrix per past round, with a column for each client of this one."""
    known: dict[int, Tensor] = {}
    made = []
    for senders, here, sent in history:
        known |= dict(zip(senders, sent.T, strict=True))
        made.append(torch.stack([known.get(c, here) for c in cohort], dim=1))
    return made
