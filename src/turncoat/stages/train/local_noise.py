"""Noise that each client adds before it sends: no server has to be trusted with anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import dp_accounting
import torch
from torch import Generator, Tensor

from turncoat.messages import Update
from turncoat.privacy import Unit
from turncoat.stage import Train, call
from turncoat.stages.aggregate.layers import num_parameters
from turncoat.task import Batch, Model
from turncoat.validate import at_least, positive


@dataclass(frozen=True)
class LocalNoise:
    """Train as ``inner`` does, shorten the update, add all the noise oneself: the local model [1]_.

    Formal guarantee: each round is a Gaussian mechanism over one client's whole update. Neighbours
    differ in one client, whose records count, or do not: its update then is 0. Who takes part is
    public, and so nothing is gained from sampling clients. For any two updates, rather than one and
    0, the multiplier counts half. It holds against everyone, the server included; what others do
    with their own noise is all one. In the mean of n clients the noise is the square root of n
    times that of a server which adds it once: that is its price.

    Differs from the paper: Gaussian noise on vectors, with a delta. An update that is not finite
    counts as 0; buffers of the model are not moved; every client weighs the same; noise is float32,
    which the theorem's real numbers are not.

    Args:
        max_norm: What each update is shortened to: C.
        noise_multiplier: Standard deviation of each client's noise, in units of ``max_norm``.

    .. [1] Kasiviswanathan et al., SIAM J. Comput. 2011, section 2. https://arxiv.org/abs/0803.0924
    """

    max_norm: float
    noise_multiplier: float
    inner: Train[Update]
    unit = Unit.CLIENT
    mixes_clients = False
    amplified = False  # the noise comes and goes with its client

    def __post_init__(self) -> None:
        positive(self, max_norm=self.max_norm)
        at_least(0, self, noise_multiplier=self.noise_multiplier)

    def event(self, num_records: int) -> dp_accounting.DpEvent:
        """Return what one round costs a client, however many records it holds."""
        return gaussian(self.noise_multiplier)

    def __call__(
        self, model: Model, start: Tensor, data: Batch, *, rng: Generator, **offers: Any
    ) -> Update:
        payload: Update = call(self.inner, model, start, data, rng=rng, **offers)
        std = self.noise_multiplier * self.max_norm
        sent = noised(payload.delta.double(), self.max_norm, std, model, rng)
        return Update(sent.to(start), 1.0)


def gaussian(noise_multiplier: float) -> dp_accounting.DpEvent:
    """Return the event of Gaussian noise in units of the sensitivity; with none, nothing holds."""
    if not noise_multiplier:
        return dp_accounting.NonPrivateDpEvent()
    return dp_accounting.GaussianDpEvent(noise_multiplier)


def noised(delta: Tensor, max_norm: float, std: float, model: Model, rng: Generator) -> Tensor:
    """Return an update shortened to ``max_norm``, with noise on its parameters, 0 on buffers.

    Shape and type: those of ``delta``.
    """
    size = num_parameters(model, delta)
    sent = torch.zeros_like(delta)
    norm = torch.linalg.vector_norm(delta[:size])
    if bool(norm.isfinite()):
        sent[:size] = delta[:size] * min(1.0, max_norm / max(float(norm), 1e-12))
    noise = torch.randn(size, generator=rng, dtype=torch.float64)
    sent[:size] += (std * noise).to(sent)
    return sent
