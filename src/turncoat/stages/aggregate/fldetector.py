"""Cross-round consistency: honest clients send what their last update foretells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from turncoat.columns import by_columns
from turncoat.messages import Clear
from turncoat.stage import Aggregate, Memory, Verdict
from turncoat.stages.aggregate.clusters import has_two_groups, split_in_two
from turncoat.stages.aggregate.geometry import sound_rows, unsound
from turncoat.stages.aggregate.screening import hand_on
from turncoat.validate import at_least


@dataclass(frozen=True)
class FLDetector:
    """Leave out clients whose updates their earlier ones do not foretell [1]_.

    The forecast is the client's last update, moved by a Hessian-vector product that L-BFGS makes of
    the last ``window`` steps of the server. A client's score is its share of the forecasts' errors,
    averaged over ``window`` rounds. Where the gap statistic sees more than one group of scores, the
    upper of two is left out.

    Memory: every client's last update, ``window`` pairs of vectors as long as the model, and the
    scores. A traitor that is consistent from round to round (a label flipper, a steady sign flip of
    ordinary length) foretells itself, and passes.

    Differs from the paper: training goes on without the detected instead of beginning anew, and the
    decision is made afresh in each round; a client that was not in the round before has no new
    score.

    Args:
        window: Rounds that a score is averaged over, and that pass before anyone is left out: N.
        num_references: Draws of the gap statistic.

    .. [1] Zhang et al., KDD 2022, algorithms 1-3. https://arxiv.org/abs/2207.09209
    """

    inner: Aggregate[Clear]
    _: KW_ONLY
    window: int = 10
    num_references: int = 20

    def __post_init__(self) -> None:
        at_least(1, self, window=self.window, num_references=self.num_references)

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
        past = memory.last({})
        unfit, matrix = unsound(messages), sound_rows(messages)
        moves, bends = past.get("moves", ()), past.get("bends", ())
        scores = dict(past.get("scores", {}))
        if moves:
            self._score(scores, past, before, cohort, matrix, unfit)
        suspects: list[int] = []
        if past.get("num_scored", 0) + bool(moves) >= self.window:
            known = [i for i, c in enumerate(cohort) if c in scores and i not in unfit]
            means = [sum(scores[cohort[i]]) / len(scores[cohort[i]]) for i in known]
            values = torch.tensor(means, dtype=torch.float64)
            if len(known) > 2 and has_two_groups(values, rng, self.num_references):
                upper = split_in_two(values)[0].tolist()
                suspects = [i for i, high in zip(known, upper, strict=True) if high]
        offers |= {"before": before, "cohort": cohort, "memory": memory.inner, "rng": rng}
        step = hand_on(self.inner, messages, suspects, offers, unfit=unfit, verdict=verdict)
        if past:
            moves = (*moves, before - past["before"])[-self.window :]
            bends = (*bends, past["step"] - step)[-self.window :]  # of gradients: minus the step's
        memory.keep(
            {
                "before": before.clone(),
                "step": step.clone(),
                "moves": moves,
                "bends": bends,
                "senders": cohort,
                "sent": matrix.clone(),
                "scores": scores,
                "num_scored": past.get("num_scored", 0) + bool(past.get("moves")),
            }
        )
        return step

    def _score(
        self,
        scores: dict[int, tuple[float, ...]],
        past: dict[str, Any],
        before: Tensor,
        cohort: tuple[int, ...],
        matrix: Tensor,
        unfit: Sequence[int],
    ) -> None:
        """Add each client's share of this round's errors to ``scores``."""
        bent = hessian_product(past["moves"], past["bends"], before - past["before"])
        was = {c: i for i, c in enumerate(past["senders"])}
        now = [i for i, c in enumerate(cohort) if c in was and i not in unfit]
        then = [was[cohort[i]] for i in now]
        last = past["sent"].to(matrix)

        def part(where: slice) -> Tensor:
            off = last[then, where] - bent[where] - matrix[now, where]
            squared: Tensor = torch.linalg.vector_norm(off.double(), dim=1).square().cpu()
            return squared

        errors = torch.zeros(len(now), dtype=torch.float64)
        for squared in by_columns(part, matrix.shape[1]):
            errors += squared
        found = dict(zip((cohort[i] for i in now), errors.sqrt().tolist(), strict=True))
        total = sum(found.values()) or 1.0
        for client, error in found.items():
            scores[client] = (*scores.get(client, ()), error / total)[-self.window :]


def hessian_product(moves: Sequence[Tensor], bends: Sequence[Tensor], vector: Tensor) -> Tensor:
    """Return L-BFGS's Hessian times a vector, in compact form [1]_; 0 where it is not finite.

    Args:
        moves: Differences of parameters, oldest first.
        bends: Differences of gradients along them.

    .. [1] Byrd et al., Mathematical Programming 63, 1994, theorem 2.3.
    """
    s = torch.stack([m.double() for m in moves])
    y = torch.stack([b.double() for b in bends])
    v = vector.double()
    along = float(s[-1] @ s[-1])
    if not along:
        return torch.zeros_like(vector)
    sigma = float(y[-1] @ s[-1]) / along
    crossed = s @ y.T
    below = crossed.tril(-1)
    middle = torch.cat(
        [
            torch.cat([sigma * (s @ s.T), below], dim=1),
            torch.cat([below.T, -crossed.diagonal().diag()], dim=1),
        ]
    )
    right = torch.cat([sigma * (s @ v), y @ v])
    weights = torch.linalg.pinv(middle, hermitian=True) @ right
    half = len(s)
    product = (sigma * v - sigma * (weights[:half] @ s) - weights[half:] @ y).to(vector)
    return product if bool(product.isfinite().all()) else torch.zeros_like(vector)
