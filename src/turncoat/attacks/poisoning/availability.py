"""Traitors who are there more often than others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator

from turncoat.validate import at_least, positive


@dataclass(frozen=True)
class Availability:
    """Draw ``num_sampled`` clients; those in ``ids`` at ``odds`` times the others' [1]_.

    Stands at sample: the server draws whom it finds, and the attacker sees to it that these are
    found. One after the other, without replacement, each by its odds among those left.

    Differs from the paper: there the traitors' availability sets in after round 75; here it holds
    throughout, and a coalition's ``acts`` says from when on they misbehave.

    Args:
        ids: Those of the members, by number.
        odds: Above 1 they are found more often than honest clients, below it less.

    .. [1] Tolpegin et al., ESORICS 2020, section 4.5 (malicious participant availability).
       https://arxiv.org/abs/2007.08432
    """

    num_sampled: int
    ids: tuple[int, ...]
    odds: float = 2.0

    def __post_init__(self) -> None:
        at_least(1, self, num_sampled=self.num_sampled)
        if not self.ids:
            raise ValueError("Availability: ids names nobody: give at least one client's number")
        at_least(0, self, **{f"ids[{i}]": number for i, number in enumerate(self.ids)})
        positive(self, odds=self.odds)

    def __call__(self, num_clients: int, *, rng: Generator) -> tuple[int, ...]:
        if max(*self.ids, self.num_sampled - 1) >= num_clients:
            raise ValueError(
                f"{self!r} draws {self.num_sampled} clients and names client {max(self.ids)}; "
                f"there are {num_clients}: lower num_sampled or ids"
            )
        odds = torch.ones(num_clients, dtype=torch.float64)
        odds[list(self.ids)] = self.odds
        # the largest of u ** (1 / odds) are such a draw [Efraimidis and Spirakis, 2006]
        keys = torch.rand(num_clients, generator=rng, dtype=torch.float64).log() / odds
        return tuple(sorted(keys.argsort(descending=True)[: self.num_sampled].tolist()))
