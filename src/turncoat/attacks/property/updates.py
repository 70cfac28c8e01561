"""Properties by updates: what a client sends, round by round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turncoat.attacks.property.losses import of_either
from turncoat.attacks.property.weights import regressed
from turncoat.messages import Update
from turncoat.trial import Leanings
from turncoat.validate import at_least
from turncoat.views import AggregateView, ServerView, Suspects, Worlds

_Updates = list[dict[int, Tensor]]  # of each federation, by round


@dataclass(frozen=True)
class UpdateClassifier:
    """Learn from the updates of own federations what those of a round say of the data [1]_.

    One logistic regression a round; the odds of all rounds are averaged. It reads the updates of
    the client that is asked about, or the mean of all.

    Differs from the paper: the classifier learns from whole updates in federations of the
    attacker's own, not from gradients of single batches at the model of the round.

    Args:
        num_shadows: Federations to play, half on either kind of data.

    .. [1] Melis et al., S&P 2019 (passive property inference). https://arxiv.org/abs/1805.04049
    """

    num_shadows: int = 32

    def __post_init__(self) -> None:
        at_least(2, self, num_shadows=self.num_shadows)

    def __call__(
        self,
        view: Suspects[Sequence[ServerView[Update]]],
        *,
        client: int | None,
        shadows: Worlds[Sequence[ServerView[Update]]] | None,
    ) -> Leanings:
        known = of_either(self, shadows)

        def read(rounds: Sequence[ServerView[Update]]) -> dict[int, Tensor]:
            found = {}
            for seen in rounds:
                theirs = [
                    m.delta
                    for who, m in zip(seen.senders, seen.messages, strict=True)
                    if client in (None, who)
                ]
                if theirs:
                    found[seen.round] = torch.stack(theirs).mean(dim=0).cpu()
            return found

        return Leanings(
            _averaged([*map(read, known.views)], known.second, [*map(read, view.views)])
        )


@dataclass(frozen=True)
class AggregateClassifier:
    """``UpdateClassifier`` for whoever sees nothing but how the global model moves [1]_.

    Args:
        num_shadows: Federations to play, half on either kind of data.

    .. [1] Melis et al., S&P 2019 (passive property inference). https://arxiv.org/abs/1805.04049
    """

    num_shadows: int = 32

    def __post_init__(self) -> None:
        at_least(2, self, num_shadows=self.num_shadows)

    def __call__(
        self,
        view: Suspects[Sequence[AggregateView[Update]]],
        *,
        shadows: Worlds[Sequence[AggregateView[Update]]] | None,
    ) -> Leanings:
        known = of_either(self, shadows)

        def read(rounds: Sequence[AggregateView[Update]]) -> dict[int, Tensor]:
            return {seen.round: (seen.after - seen.before).cpu() for seen in rounds}

        return Leanings(
            _averaged([*map(read, known.views)], known.second, [*map(read, view.views)])
        )


def _averaged(known: _Updates, second: Tensor, asked: _Updates) -> Tensor:
    """Return the mean odds over the rounds that are known of both kinds; 0 without any."""
    second = second.cpu()
    totals, counts = torch.zeros(len(asked), dtype=torch.float64), torch.zeros(len(asked))
    for t in sorted(set().union(*known)):
        there = torch.tensor([t in updates for updates in known])
        wanted = [i for i, updates in enumerate(asked) if t in updates]
        if not wanted or len(set(second[there].tolist())) < 2:
            continue
        own = torch.stack([updates[t] for updates in known if t in updates])
        totals[wanted] += regressed(own, second[there], torch.stack([asked[i][t] for i in wanted]))
        counts[wanted] += 1
    return totals / counts.clamp(min=1)
