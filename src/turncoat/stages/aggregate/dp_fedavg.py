"""Averaging with client-level differential privacy, at a server that is trusted with updates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import exp, isfinite, sqrt

import dp_accounting
import torch
from torch import Generator, Tensor

from turncoat.messages import Clear
from turncoat.privacy import Unit
from turncoat.stage import Memory
from turncoat.stages.aggregate.layers import num_parameters
from turncoat.task import Model
from turncoat.validate import at_least, fraction, positive


@dataclass(frozen=True, kw_only=True)
class DPFedAvg:
    """Shorten whole updates, add them up, add Gaussian noise, divide by the expected cohort [1]_.

    Formal guarantee: each round is a Gaussian mechanism over clients, amplified where they are
    sampled by Poisson; neighbours differ by one client, with all of its records. It holds against
    users and clients, who see global models, and not against the server, which sees updates.

    With a ``quantile`` the bound follows the norms [2]_: each client adds one bit, whether it was
    below, and some of the noise is for the share of these. Both together cost what
    ``noise_multiplier`` says.

    Differs from the paper: every client weighs the same, so that the sum's sensitivity is the
    bound; a message that is not finite counts as 0; buffers of the model are not moved, as nothing
    bounds them. A round that the runtime gives up for want of clients tells that it had none.

    Args:
        max_norm: What each update is shortened to; with a ``quantile``, in the first round.
        noise_multiplier: Standard deviation of the noise on the sum, in units of the bound.
        expected_cohort: What the sum is divided by, whoever came: rate times clients. That all come
            is a public fact, that few came is not.
        per_layer: Whether each of L tensors is shortened to ``max_norm / sqrt(L)``, or the whole.
        quantile: Of the clients' norms, where the bound shall go; the paper's is 0.5.
        bound_lr: How fast: the paper's is 0.2.
        bits_noise: Standard deviation of the noise on the count of bits; a twentieth of the cohort
            where not given.

    .. [1] McMahan et al., ICLR 2018, algorithm 1. https://arxiv.org/abs/1710.06963
    .. [2] Andrew et al., NeurIPS 2021, algorithm 1. https://arxiv.org/abs/1905.03871
    """

    max_norm: float
    noise_multiplier: float
    expected_cohort: float
    per_layer: bool = False
    quantile: float | None = None
    bound_lr: float = 0.2
    bits_noise: float | None = None
    unit = Unit.CLIENT
    mixes_clients = False

    def __post_init__(self) -> None:
        positive(self, max_norm=self.max_norm, expected_cohort=self.expected_cohort)
        positive(self, bound_lr=self.bound_lr, bits_noise=self.bits_noise)
        at_least(0, self, noise_multiplier=self.noise_multiplier)
        if self.quantile is not None:
            fraction(self, quantile=self.quantile)
            _ = self.update_noise

    @property
    def update_noise(self) -> float:
        """Return the multiplier of the noise on updates: what the bits leave of the budget.

        Raises:
            ValueError: If the bits take all of it.
        """
        z = self.noise_multiplier
        if self.quantile is None or z == 0:
            return z
        left = z**-2 - (2 * self._bits_noise) ** -2
        if left <= 0:
            raise ValueError(
                f"DPFedAvg: bits_noise {self._bits_noise:g} alone costs more than noise_multiplier "
                f"{z:g} allows: give a bits_noise above {z / 2:g}, or a smaller multiplier"
            )
        return 1 / sqrt(left)

    @property
    def _bits_noise(self) -> float:
        return self.expected_cohort / 20 if self.bits_noise is None else self.bits_noise

    def event(self, num_records: int) -> dp_accounting.DpEvent:
        """Return what one round costs a client, however many records it holds."""
        if not self.noise_multiplier:
            return dp_accounting.NonPrivateDpEvent()
        return dp_accounting.GaussianDpEvent(self.noise_multiplier)

    def __call__(
        self, messages: Iterable[Clear], *, rng: Generator, model: Model, memory: Memory[float]
    ) -> Tensor:
        bound = self.max_norm if self.quantile is None else memory.last(self.max_norm)
        total, below = self._total(messages, model, bound)
        size = num_parameters(model, total)
        noise = torch.randn(size, generator=rng) * (self.update_noise * bound)
        if self.quantile is not None:
            memory.keep(self._moved(bound, below, rng))
        total[:size] += noise.to(total)
        total[size:] = 0
        return total.div_(self.expected_cohort).float()

    def _total(self, messages: Iterable[Clear], model: Model, bound: float) -> tuple[Tensor, int]:
        """Return the sum of the shortened updates, in float64, and how many were short enough."""
        total, below = torch.empty(0), 0
        for message in messages:
            delta = message.delta.double()
            if not len(total):
                total = torch.zeros_like(delta)
            size = num_parameters(model, delta)
            norm = float(delta[:size].norm())
            if not isfinite(norm):
                continue
            below += norm <= bound
            if self.per_layer:
                _shorten_layers(delta[:size], model, bound)
            else:
                delta[:size] *= min(1.0, bound / max(norm, 1e-12))
            total += delta
        if not len(total):  # nobody came: noise is released all the same
            total = torch.zeros(model.layout.num_params, dtype=torch.float64)
        return total, below

    def _moved(self, bound: float, below: int, rng: Generator) -> float:
        """Return the next round's bound: it moves geometrically towards the quantile."""
        drawn = float(torch.randn(1, generator=rng)) if self.noise_multiplier else 0.0
        cohort = self.expected_cohort
        centred = below - cohort / 2 + drawn * self._bits_noise  # a bit's sensitivity is a half
        share = centred / cohort + 0.5
        return bound * exp(-self.bound_lr * (share - (self.quantile or 0.0)))


def _shorten_layers(delta: Tensor, model: Model, bound: float) -> None:
    """Shorten each tensor of an update in place, all to one length whose squares add up."""
    slots = [slice(s.start, s.stop) for s in model.layout.slots if s.trainable]
    parts = slots if len(delta) == model.layout.num_trainable else [slice(0, len(delta))]
    each = bound / sqrt(len(parts))
    for where in parts:
        norm = float(delta[where].norm())
        delta[where] *= min(1.0, each / max(norm, 1e-12))
