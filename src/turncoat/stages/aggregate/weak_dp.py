"""Clipping and a little noise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import Generator, Tensor

from turncoat.messages import Clear
from turncoat.stage import Aggregate, call
from turncoat.stages.aggregate.layers import noise
from turncoat.stages.aggregate.norm_bound import NormBound
from turncoat.task import Model
from turncoat.validate import at_least, positive


@dataclass(frozen=True)
class WeakDP:
    """Shorten every update, do as ``inner``, and add Gaussian noise to the step [1]_.

    Weak, for so little noise hides nobody: no privacy is claimed for it. Buffers of the model get
    no noise.

    Args:
        max_norm: The radius; the edge-case paper's is 2 [2]_.
        sigma: Standard deviation of the noise in each parameter of the step.

    .. [1] Sun et al., 2019, section 5. https://arxiv.org/abs/1911.07963
    .. [2] Wang et al., NeurIPS 2020, section 4. https://arxiv.org/abs/2007.05084
    """

    inner: Aggregate[Clear]
    _: KW_ONLY
    max_norm: float
    sigma: float = 0.025
    mixes_clients = False

    def __post_init__(self) -> None:
        positive(self, max_norm=self.max_norm)
        at_least(0, self, sigma=self.sigma)

    def __call__(
        self, messages: Iterable[Clear], *, rng: Generator, model: Model, **offers: Any
    ) -> Tensor:
        bound = NormBound(self.inner, max_norm=self.max_norm)
        step: Tensor = call(bound, messages, rng=rng, model=model, **offers)
        return step + noise(step, self.sigma, model, rng) if self.sigma else step
