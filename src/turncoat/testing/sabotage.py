"""Private trainers that are subtly broken: whoever has an auditor can try it on them.

Each claims what `PlainDPSGD` or `DPFedAvg` would rightly claim with the same fields. All differ
from it in one line, all train well, and none would be noticed by its accuracy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import dp_accounting
import torch
from torch import Generator, Tensor
from torch.func import grad, vmap

from turncoat.messages import Clear, Update
from turncoat.privacy import Unit
from turncoat.randomness import Randomness
from turncoat.stage import Memory
from turncoat.stages.aggregate.dp_fedavg import DPFedAvg
from turncoat.task import Batch, Model
from turncoat.validate import at_least, fraction, positive


@dataclass(frozen=True)
class PlainDPSGD:
    """One step of private training as the pseudocode has it, and nothing wrong with it [1]_.

    Args:
        rate: With which each record is drawn.

    .. [1] Abadi et al., CCS 2016, algorithm 1. https://arxiv.org/abs/1607.00133
    """

    lr: float
    max_norm: float
    rate: float
    noise_multiplier: float
    unit = Unit.RECORD

    def __post_init__(self) -> None:
        positive(self, lr=self.lr, max_norm=self.max_norm)
        positive(self, noise_multiplier=self.noise_multiplier, rate=self.rate)
        fraction(self, rate=self.rate)

    def event(self, num_records: int) -> dp_accounting.DpEvent:
        """Return what a call costs, and what every broken one says that it costs."""
        step = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        return dp_accounting.PoissonSampledDpEvent(self.rate, step)

    def __call__(
        self,
        model: Model,
        start: Tensor,
        data: Batch,
        *,
        rng: Generator,
        memory: Memory[Tensor],
    ) -> Update:
        inputs, labels = data
        chosen = (torch.rand(len(labels), generator=rng) < self._rate).nonzero().flatten()
        rows = torch.zeros(0, len(start))
        if len(chosen):
            rows = _gradients(model, start, (inputs[chosen], labels[chosen]))
        expected = self.rate * len(labels)
        noise = self._noise(len(start), model, rng)
        total = self._released(rows, noise, expected, memory)
        return Update(total * (-self.lr / expected), 1.0)

    @property
    def _rate(self) -> float:
        return self.rate

    def _noise(self, size: int, model: Model, rng: Generator) -> Tensor:
        return torch.randn(size, generator=rng) * (self.noise_multiplier * self.max_norm)

    def _released(
        self, rows: Tensor, noise: Tensor, expected: float, memory: Memory[Tensor]
    ) -> Tensor:
        return _shortened(rows, self.max_norm).sum(dim=0) + noise


class NoiseOnHalf(PlainDPSGD):
    """The second half of the layers gets no noise: as where a list of parameters was forgotten."""

    def _noise(self, size: int, model: Model, rng: Generator) -> Tensor:
        noise = super()._noise(size, model, rng)
        slots = [slot for slot in model.layout.slots if slot.trainable]
        noise[slots[len(slots) // 2].start :] = 0
        return noise


class ClippedLate(PlainDPSGD):
    """The noisy sum is clipped, and no gradient before it."""

    def _released(
        self, rows: Tensor, noise: Tensor, expected: float, memory: Memory[Tensor]
    ) -> Tensor:
        return _shortened((rows.sum(dim=0) + noise)[None], self.max_norm)[0]


class ReusedNoise(PlainDPSGD):
    """Every step begins from the same seed, and so adds the same noise."""

    def _noise(self, size: int, model: Model, rng: Generator) -> Tensor:
        return super()._noise(size, model, Randomness(0).at("noise"))


@dataclass(frozen=True)
class WrongRate(PlainDPSGD):
    """Records are drawn at another rate than the accountant is told.

    Args:
        true_rate: With which they are drawn.
    """

    true_rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction(self, true_rate=self.true_rate)

    @property
    def _rate(self) -> float:
        return self.true_rate


class ClippedBatch(PlainDPSGD):
    """The mean gradient of the batch is clipped, not each example's; noise as though each were."""

    def _released(
        self, rows: Tensor, noise: Tensor, expected: float, memory: Memory[Tensor]
    ) -> Tensor:
        mean = rows.sum(dim=0) / expected
        return _shortened(mean[None], self.max_norm)[0] * expected + noise


class NeverCleared(PlainDPSGD):
    """What was accumulated is not cleared after a step: every step releases all sums so far."""

    def _released(
        self, rows: Tensor, noise: Tensor, expected: float, memory: Memory[Tensor]
    ) -> Tensor:
        total = _shortened(rows, self.max_norm).sum(dim=0)
        return memory.keep(memory.last(torch.zeros_like(total)) + total) + noise


@dataclass(frozen=True)
class DividedNoise(PlainDPSGD):
    """Each of the micro-batches of a step adds its part of the noise: as if deviations added up.

    Args:
        num_micro_batches: Whose gradients are accumulated for one step.
    """

    num_micro_batches: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, num_micro_batches=self.num_micro_batches)

    def _noise(self, size: int, model: Model, rng: Generator) -> Tensor:
        k = self.num_micro_batches
        parts = torch.randn(k, size, generator=rng).sum(dim=0)
        return parts * (self.noise_multiplier * self.max_norm / k)


@dataclass(frozen=True, kw_only=True)
class NoiseForAll(DPFedAvg):
    """The mean over the cohort gets noise that was scaled for the mean over all clients.

    Args:
        num_clients: All of them.
    """

    num_clients: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, num_clients=self.num_clients)

    def __call__(
        self, messages: Iterable[Clear], *, rng: Generator, model: Model, memory: Memory[float]
    ) -> Tensor:
        z = self.noise_multiplier * self.expected_cohort / self.num_clients
        rule = DPFedAvg(
            max_norm=self.max_norm, noise_multiplier=z, expected_cohort=self.expected_cohort
        )
        return rule(messages, rng=rng, model=model, memory=memory)


def _gradients(model: Model, params: Tensor, data: Batch) -> Tensor:
    """Return the gradient of each example. Shape: ``(examples, num_params)``."""

    def loss(here: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return model.loss(here, (x[None], y[None]))

    rows: Tensor = vmap(grad(loss), in_dims=(None, 0, 0))(params, *data)
    return rows


def _shortened(rows: Tensor, max_norm: float) -> Tensor:
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    factors: Tensor = (max_norm / norms.clamp(min=1e-12)).clamp(max=1.0)
    return rows * factors
