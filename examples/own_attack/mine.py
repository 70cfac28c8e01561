"""A task and an attack of one's own: all that Turncoat needs to know of either is in this file."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_wine

from turncoat.task import Batch, Task
from turncoat.tasks.models import MLP
from turncoat.tasks.partitions import IID
from turncoat.tasks.pool import Pool, Split, federate
from turncoat.trial import Memberships
from turncoat.validate import positive
from turncoat.views import ModelView, QueryView


def make_task(num_clients: int = 4, per_client: int = 15, seed: int = 0) -> Task:
    """Return 178 wines of three growers, told apart by 13 chemical figures; 89 are for tests."""
    wine = load_wine()
    features, growers = torch.from_numpy(wine.data).float(), torch.from_numpy(wine.target).long()
    pool = Pool(
        "wine",
        train=(features, growers),
        test=None,
        classes=tuple(str(name) for name in wine.target_names),
        continuous=torch.ones(features.shape[1], dtype=torch.bool),
        source="Wine, UCI, in scikit-learn's copy; CC BY 4.0",
    )
    split = Split(
        num_clients,
        IID(),
        per_client=per_client,
        train_size=None,
        test_size=89,
        public_size=20,
        seed=seed,
    )
    return federate(pool, split, MLP(hidden=(64,)))


@dataclass(frozen=True)
class Margin:
    """A record was trained on if its class is far ahead of the next. No paper: mine.

    Args:
        cap: A lead beyond which one is as sure as can be, in nats.
    """

    cap: float = 20.0

    def __post_init__(self) -> None:
        positive(self, cap=self.cap)

    def __call__(self, view: ModelView | QueryView, *, candidates: Batch) -> Memberships:
        inputs, labels = candidates
        scores = view.scores(inputs)
        mine = scores.gather(1, labels[:, None]).squeeze(1)
        others = scores.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
        return Memberships((mine - others).clamp(max=self.cap))
