"""Misfits that mypy finds as they are written: each ignore is needed, or mypy complains of it.

Not a test for pytest: under ``warn_unused_ignores`` the check is that ``mypy`` is silent here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from turncoat.federation import Federation, Plain
from turncoat.messages import Clear, Logits, Update
from turncoat.stages.aggregate.coordinatewise import Median, TrimmedMean
from turncoat.stages.aggregate.geometric_median import GeometricMedian
from turncoat.stages.aggregate.krum import Krum, MultiKrum
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.aggregate.norm_bound import NormBound
from turncoat.stages.aggregate.optimisers import ServerAdam, ServerMomentum, ServerSGD
from turncoat.stages.channel.secure_aggregation import Masked, SecureAggregation
from turncoat.stages.train.dpsgd import DPSGD
from turncoat.stages.train.local import Clipped, FedSGD, LocalSGD

SGD = LocalSGD(0.1)
MASKS = SecureAggregation()

clear: Federation[Update, Update] = Federation(train=SGD, channel=Plain(), aggregate=Krum(1))
private: Federation[Update, Masked] = Federation(
    train=DPSGD(0.1, 1.0, 32, noise_multiplier=1.0), channel=MASKS, aggregate=Mean()
)
hidden: Federation[Update, Masked] = Federation(
    train=Clipped(1.0, FedSGD(0.1)),
    channel=MASKS,
    aggregate=ServerAdam(0.1, ServerMomentum(0.9, ServerSGD(1.0, Mean()))),
)
nested: Federation[Update, Update] = Federation(
    train=SGD, channel=Plain(), aggregate=ServerMomentum(0.9, NormBound(Median(), ratio=2.0))
)


@dataclass(frozen=True)
class OfLogits:
    """A rule for distillation, which no federation of updates has a place for."""

    def __call__(self, messages: Sequence[Logits]) -> Tensor:
        return messages[0].delta


@dataclass(frozen=True)
class Unmasked:
    """A channel that reads what another has masked already."""

    def __call__(self, payload: Masked) -> Clear:
        return Clear(payload.open(), payload.weight)


def misfits() -> None:
    Federation(train=SGD, channel=MASKS, aggregate=Krum(1))  # type: ignore[misc]
    Federation(train=SGD, channel=MASKS, aggregate=MultiKrum(1))  # type: ignore[misc]
    Federation(train=SGD, channel=MASKS, aggregate=Median())  # type: ignore[misc]
    Federation(train=SGD, channel=MASKS, aggregate=TrimmedMean(1))  # type: ignore[misc]
    Federation(train=SGD, channel=MASKS, aggregate=GeometricMedian())  # type: ignore[misc]
    Federation(  # type: ignore[misc]
        train=SGD, channel=MASKS, aggregate=NormBound(Mean(), max_norm=1.0)
    )
    Federation(  # type: ignore[misc]
        train=Clipped(1.0, SGD), channel=MASKS, aggregate=ServerMomentum(0.9, Krum(1))
    )
    Federation(train=SGD, channel=Plain(), aggregate=OfLogits())  # type: ignore[misc]
    Federation(train=SGD, channel=Unmasked(), aggregate=Mean())  # type: ignore[misc]
    NormBound(OfLogits(), max_norm=1.0)  # type: ignore[arg-type]
