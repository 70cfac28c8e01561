"""A learning rate for each coordinate: backwards where too few agree on the sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turncoat.columns import by_columns
from turncoat.messages import Clear, with_rows
from turncoat.stage import Aggregate, call
from turncoat.stages.aggregate.coordinatewise import refuse_fewer
from turncoat.stages.aggregate.geometry import sound_rows
from turncoat.stages.aggregate.layers import num_parameters
from turncoat.task import Model
from turncoat.validate import at_least


@dataclass(frozen=True)
class RobustLR:
    """Do as ``inner``, but backwards in each coordinate whose signs sum to too little [1]_.

    It bounds no length: put ``NormBound`` around it. Buffers of the model are not turned. A message
    that is not finite, or ten thousand times as long as the median, counts as 0.

    Args:
        threshold: The least absolute sum of signs at which a coordinate moves on: theta; more than
            the number of traitors, less than that of honest clients minus theirs.

    .. [1] Ozdayi et al., AAAI 2021, section 4. https://arxiv.org/abs/2007.03767
    """

    threshold: int
    inner: Aggregate[Clear]

    def __post_init__(self) -> None:
        at_least(1, self, threshold=self.threshold)

    def check_cohort(self, num_messages: int) -> None:
        """Refuse a round of too few."""
        refuse_fewer(self, num_messages, self.threshold, "theta", "lower threshold")

    def __call__(self, messages: Sequence[Clear], *, model: Model, **offers: Any) -> Tensor:
        self.check_cohort(len(messages))
        matrix = sound_rows(messages)
        step: Tensor = call(self.inner, with_rows(messages, matrix), model=model, **offers)
        size = num_parameters(model, step)
        votes = by_columns(lambda where: matrix[:, where].sign().sum(dim=0).abs(), size)
        agreed = torch.cat(list(votes))[:size] >= self.threshold
        turned = torch.where(agreed, step[:size], -step[:size])
        return torch.cat([turned, step[size:]])
