"""Noise in shares under secure aggregation: nobody sees an update, and the sum has noise enough."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import dp_accounting
from torch import Generator

from turncoat.messages import Clear, Envelope, Update
from turncoat.privacy import Unit
from turncoat.stage import Channel, IncompatibleStages, call, gives
from turncoat.stages.channel.secure_aggregation import Masked, SumIncomplete
from turncoat.stages.train.local_noise import gaussian, noised
from turncoat.task import Model
from turncoat.validate import at_least, positive

_STEPS = 256  # of the grid that a share's deviation must span, for rounding to be no matter


@dataclass(frozen=True)
class DistributedNoise:
    """Shorten the update, add a share of the noise, and let ``inner`` mask it [1]_ [2]_.

    A share has ``1 / num_shares`` of the variance; the sum of so many has all of it.

    Formal guarantee: each round is a Gaussian mechanism over clients, whose noise is the least that
    can be in the sum: ``min_survivors`` shares, without those of ``num_silent`` members of a
    coalition who leave theirs out, or tell the server. Neighbours differ in one client, whose
    records count, or do not: its update then is 0. Who takes part is public, and so nothing is
    gained from sampling clients. It holds against the server too, as far as the masks hold, and
    against that coalition. Each client knows its own share: with no silent member it is not stated
    against clients. A round with fewer survivors is not summed.

    Differs from the papers: shares are Gaussian and the channel rounds them, so that their sum is
    Gaussian but for the grid. A share must span 256 steps of it, so that delta is that of the
    Gaussian but for less than a thousandth of it: computed for one coordinate, and no theorem.
    Every client weighs the same; an update that is not finite counts as 0; buffers of the model are
    not moved. That members shorten their updates is taken on trust, and matters to nobody's
    privacy but their own.

    Args:
        max_norm: What each update is shortened to: C.
        noise_multiplier: Standard deviation of ``num_shares`` shares together, in units of C.
        num_shares: Of how many clients each adds a share, as a rule the cohort.
        min_survivors: Without so many the round is given up; None for ``num_shares``, so that
            nobody may drop out. The channel's ``recovers_from`` may ask for more.
        num_silent: Of those who survive, so many may leave out their noise, or tell it.

    .. [1] Dwork et al., EUROCRYPT 2006, section 3. https://doi.org/10.1007/11761679_29
    .. [2] Kairouz, Liu and Steinke, ICML 2021, algorithm 1. https://arxiv.org/abs/2102.06387
    """

    max_norm: float
    noise_multiplier: float
    num_shares: int
    inner: Channel[Update, Masked]
    min_survivors: int | None = None
    num_silent: int = 0
    unit = Unit.CLIENT
    mixes_clients = False
    amplified = False  # its share comes and goes with a client

    def __post_init__(self) -> None:
        positive(self, max_norm=self.max_norm)
        at_least(0, self, noise_multiplier=self.noise_multiplier, num_silent=self.num_silent)
        at_least(1, self, num_shares=self.num_shares, min_survivors=self.min_survivors)
        if self._survivors <= self.num_silent:
            raise ValueError(
                f"DistributedNoise: of {self._survivors} survivors (min_survivors, or num_shares) "
                f"num_silent = {self.num_silent} may leave the sum without noise: raise the first "
                "or lower the second"
            )
        sent = gives(self.inner, Update)
        if isinstance(sent, type) and issubclass(sent, Clear):
            raise IncompatibleStages(
                f"the inner channel {self.inner!r} shows each update, and with it a share of the "
                "noise is too little: put a masked one inside (secure-aggregation), or have each "
                "client add all of it (local-noise)"
            )
        step = getattr(self.inner, "precision", 0.0)
        if 0 < self._std < _STEPS * step:
            raise ValueError(
                f"DistributedNoise: noise_multiplier {self.noise_multiplier:g} makes a share of "
                f"deviation {self._std:.3g}, and the channel rounds to {step:.3g}: make its "
                f"precision {self._std / _STEPS:.2g} or less"
            )

    @property
    def _survivors(self) -> int:
        return self.num_shares if self.min_survivors is None else self.min_survivors

    @property
    def _std(self) -> float:
        return self.noise_multiplier * self.max_norm / sqrt(self.num_shares)

    @property
    def least_multiplier(self) -> float:
        """Return the noise that is in every sum, whoever drops out and whoever is silent."""
        return self.noise_multiplier * sqrt((self._survivors - self.num_silent) / self.num_shares)

    @property
    def noise_known_to(self) -> frozenset[str]:
        """Return the seats that could take more noise from the sum than was allowed for."""
        return frozenset() if self.num_silent else frozenset({"client"})

    def event(self, num_records: int) -> dp_accounting.DpEvent:
        """Return what one round costs a client at most, however many records it holds."""
        return gaussian(self.least_multiplier)

    def __call__(
        self, payload: Update, *, rng: Generator, envelope: Envelope, model: Model, **offers: Any
    ) -> Masked:
        if len(envelope.cohort) < self._survivors:
            raise SumIncomplete(
                f"{self!r} promises the noise of {self._survivors} clients; {len(envelope.cohort)} "
                "are left: lower min_survivors, which costs epsilon, or sample more clients"
            )
        delta = noised(payload.delta.double(), self.max_norm, self._std, model, rng)
        dressed = replace(payload, delta=delta, weight=1.0)
        message: Masked = call(
            self.inner, dressed, rng=rng, envelope=envelope, model=model, **offers
        )
        return message
