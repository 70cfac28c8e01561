"""Clipping and noise at the server of a Flower app: what the theorem asks for, and no less."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import exp
from typing import ClassVar

import dp_accounting
import torch
from dp_accounting.pld import PLDAccountant
from flwr.app import Message, MetricRecord
from flwr.common import FitRes, Parameters, Scalar
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy as LegacyStrategy
from flwr.serverapp.strategy import Strategy
from torch import Generator, Tensor

from turncoat.flower.replies import (
    Frame,
    Incidents,
    Received,
    kind_of,
    most_common,
    sound,
    weighted_by,
)
from turncoat.flower.robust import Robust, RobustLegacy
from turncoat.flower.wrapping import (
    S,
    Treated,
    Treatment,
    Wrapping,
    WrappingLegacy,
    refuse_strategy,
)
from turncoat.privacy import Private, Unit, Unproven
from turncoat.randomness import Randomness
from turncoat.stage import IncompatibleStages
from turncoat.validate import at_least, fraction, positive

_BLIND = frozenset({"client", "user"})  # the seats that see released models only


@dataclass(frozen=True)
class Fixed:
    """Shorten every update to ``max_norm`` at most [1]_.

    .. [1] McMahan et al., ICLR 2018, section 3. https://arxiv.org/abs/1710.06963
    """

    max_norm: float

    def __post_init__(self) -> None:
        positive(self, max_norm=self.max_norm)


@dataclass(frozen=True)
class Adaptive:
    """Let the clipping norm follow a quantile of the updates' norms [1]_.

    ``C <- C exp(-lr (b - quantile))``, where ``b`` is the noisy fraction of the cohort whose norm
    is *at most* ``C`` (Flower feeds the fraction above ``C`` to the same formula: its ``C`` runs
    away from the quantile, to 0 or to infinity).

    Args:
        initial: The first clipping norm.
        quantile: The fraction of updates to be left as they are: gamma.
        lr: Of the geometric steps.
        count_stddev: Of the noise on the count of those below: sigma_b. None for one twentieth of
            the expected cohort where there is noise at all, else 0.

    .. [1] Andrew et al., NeurIPS 2021, algorithm 1. https://arxiv.org/abs/1905.03871
    """

    initial: float = 0.1
    quantile: float = 0.5
    lr: float = 0.2
    count_stddev: float | None = None

    def __post_init__(self) -> None:
        positive(self, initial=self.initial, lr=self.lr)
        fraction(self, quantile=self.quantile)
        at_least(0, self, count_stddev=self.count_stddev)

    def moved(self, norm: float, below: float) -> float:
        """Return the next clipping norm, given the fraction of norms that are at most ``norm``.

        >>> round(Adaptive().moved(1.0, below=1.0), 4)  # all fit: shrink
        0.9048
        """
        return norm * exp(-self.lr * (below - self.quantile))


class _Noisy(Treatment[S]):
    """Puts one noisy mean of clipped updates in the place of all replies."""

    reads_claims: ClassVar[bool] = False

    def __init__(
        self,
        strategy: S,
        clipping: Fixed | Adaptive,
        *,
        noise_multiplier: float,
        expected_clients: int,
        keeps_metrics: bool = False,
        seed: int | None = None,
    ) -> None:
        refuse_strategy(self, strategy)
        if isinstance(strategy, Robust | RobustLegacy):
            raise ValueError(
                f"{type(self).__name__} around {strategy!r}: it hands on one noisy mean, among "
                "which no rule can choose; leave one of the two out"
            )
        at_least(0, self, noise_multiplier=noise_multiplier)
        at_least(1, self, expected_clients=expected_clients)
        self.strategy = strategy
        self.clipping = clipping
        self.noise_multiplier = noise_multiplier
        self.expected_clients = expected_clients
        self.keeps_metrics = keeps_metrics
        self.clip_norm = clipping.max_norm if isinstance(clipping, Fixed) else clipping.initial
        self.incidents = Incidents()
        self.num_releases = 0
        self.update_noise, self.count_stddev = noise_split(
            clipping, noise_multiplier, expected_clients
        )
        self._is_seeded = seed is not None
        self._randomness = Randomness(secrets.randbits(256) if seed is None else seed)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({type(self.strategy).__name__}, {self.clipping!r}, "
            f"noise_multiplier={self.noise_multiplier}, expected_clients={self.expected_clients})"
        )

    def guarantee(self, delta: float, num_rounds: int | None = None) -> Private | Unproven:
        """Return what ``num_rounds`` rounds cost each client; None for those released so far."""
        rounds = self.num_releases if num_rounds is None else num_rounds
        if not self.noise_multiplier:
            return Unproven(Unit.CLIENT, "noise_multiplier is 0: updates are clipped, no more")
        if self.keeps_metrics:
            return Unproven(Unit.CLIENT, "training metrics are passed on without noise")
        if self._is_seeded:
            return Unproven(Unit.CLIENT, "the noise is seeded: who knows the seed can subtract it")
        if not rounds:
            return Private(Unit.CLIENT, 0.0, delta, _BLIND)
        each = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        whole = dp_accounting.SelfComposedDpEvent(each, rounds)
        epsilon = PLDAccountant().compose(whole).get_epsilon(delta)
        return Private(Unit.CLIENT, epsilon, delta, _BLIND)

    def _expect(self, round: int, num_messages: int) -> None:
        if num_messages != self.expected_clients:
            self.incidents.note(
                round,
                None,
                f"{num_messages} nodes are asked, and the mean is still a sum over "
                f"{self.expected_clients}: set expected_clients to what the strategy samples",
            )

    def _treat(self, received: Sequence[Received], frame: Frame, round: int) -> Treated:
        kept = sound(  # each is judged alone: a majority of kinds would let one decide for others
            [replace(each, weight=1.0, kind=None) for each in received],
            frame,
            round=round,
            incidents=self.incidents,
            max_weight_ratio=1.0,
        )
        rng = self._randomness.at("noise", self.num_releases)  # rounds may be counted anew
        mean = self._noisy_mean([each.update.delta for each in kept], len(frame.vector), rng)
        return Treated(frame.moved(mean, {}))

    def _noisy_mean(self, deltas: Sequence[Tensor], size: int, rng: Generator) -> Tensor:
        """Return the step, and move the norm on. Shape: ``(size,)``, float64."""
        norm, total = self.clip_norm, torch.zeros(size, dtype=torch.float64)
        num_below = 0
        for delta in deltas:
            wide = delta.double()
            length = float(torch.linalg.vector_norm(wide))
            num_below += length <= norm
            total.add_(wide, alpha=min(1.0, norm / length) if length else 1.0)
        if self.update_noise:
            noise = torch.randn(size, generator=rng, dtype=torch.float64)
            total.add_(noise, alpha=self.update_noise * norm)
        if isinstance(self.clipping, Adaptive):
            noise = torch.randn((), generator=rng, dtype=torch.float64) * self.count_stddev
            centred = num_below - len(deltas) / 2  # of one client's bit: a half either way
            below = 0.5 + (centred + float(noise)) / self.expected_clients
            self.clip_norm = self.clipping.moved(norm, below)
        self.num_releases += 1
        return total / self.expected_clients


class DPFedAvg(_Noisy[Strategy], Wrapping):
    """Clip each node's update, sum, add noise, divide by a constant; then go on as ``strategy``.

    Formal guarantee: each round is one Gaussian mechanism of ``noise_multiplier``, the adaptive
    norm's count included, and rounds compose, for neighbours that differ by all data of one
    client, present or absent. Against those who see only the global models: clients and users, not
    the server, which reads every update. Nothing is gained from sampling nodes: Flower's sampling
    is no Poisson sampling. What a node reports as metrics is no part of the mechanism: of the
    training metrics nothing is passed on unless ``keeps_metrics``, which voids the guarantee;
    of evaluation, all is, so set ``fraction_evaluate=0`` if it runs on private data.

    All updates count alike; the divisor does not depend on who answered; an update is subtracted
    and its norm taken in float64; integer arrays stay as they were; a reply that is no update
    (an error, NaN, another shape) counts as absent. ``strategy`` is handed the noisy mean as one
    reply, with no metric but a weight of 1: its server optimiser is post-processing.

    Differs from the papers: noise is float64, which the theorem's real numbers are not; the noise
    comes from the system's entropy, not from Flower's global NumPy generator.

    Attributes:
        clip_norm: The current norm.
        incidents: What was left out or missing, and why; also logged as warnings.

    Args:
        strategy: Any Flower strategy of the Message API that is no DP wrapper.
        clipping: `Fixed` or `Adaptive`.
        noise_multiplier: Standard deviation in units of the norm: z. 0 only clips.
        expected_clients: The constant divisor: how many nodes are asked each round.
        keeps_metrics: Whether training metrics are passed on, averaged and without noise.
        seed: For tests only: who knows it can take the noise off again.

    .. [1] McMahan et al., ICLR 2018, algorithm 1. https://arxiv.org/abs/1710.06963
    .. [2] Andrew et al., NeurIPS 2021, theorem 1. https://arxiv.org/abs/1905.03871
    """

    def _passed_on(
        self, metrics: MetricRecord | None, replies: Sequence[Message]
    ) -> MetricRecord | None:
        if not self.keeps_metrics:
            return metrics  # of the one reply, which has none
        average = getattr(self.strategy, "train_metrics_aggr_fn", None)
        key, contents = weighted_by(self.strategy), [reply.content for reply in replies]
        usual = most_common(map(kind_of, contents))
        alike = [content for content in contents if kind_of(content) == usual]
        if average is None or key is None or (key, -1) not in (usual or ()):
            return None
        found: MetricRecord = average(alike, key)
        return found


class DPFedAvgLegacy(_Noisy[LegacyStrategy], WrappingLegacy):
    """`DPFedAvg` for strategies of ``flwr.server.strategy``: of ``client_fn`` and such apps.

    Formal guarantee: as of `DPFedAvg`. Under ``SecAggPlusWorkflow`` every result arrives as the
    same aggregate, of which nothing bounds one client's part: the run stops with that reason.

    The wrapped strategy's ``fit_metrics_aggregation_fn`` is not called, unless ``keeps_metrics``:
    then with what the nodes sent.

    Args: as of `DPFedAvg`.
    """

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Hand the wrapped strategy the noisy mean as the one result."""
        if len(results) > 1 and len({id(result.parameters) for _, result in results}) == 1:
            raise IncompatibleStages(  # told by the object, not by its numbers, which are private
                f"{self!r} must clip each client's update, but all {len(results)} are one object, "
                "which is what Flower's secure aggregation leaves: its ε would not hold; take the "
                "secure aggregation off, or clip at the nodes"
            )
        return super().aggregate_fit(server_round, results, failures)

    def _aggregate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        with _deaf_to_metrics(self.strategy):
            return self.strategy.aggregate_fit(server_round, results, [])  # they count as absent

    def _passed_on(
        self, metrics: dict[str, Scalar], results: Sequence[tuple[ClientProxy, FitRes]]
    ) -> dict[str, Scalar]:
        average = getattr(self.strategy, "fit_metrics_aggregation_fn", None)
        if not self.keeps_metrics or average is None or not results:
            return metrics
        found: dict[str, Scalar] = average([(r.num_examples, r.metrics) for _, r in results])
        return found


@contextmanager
def _deaf_to_metrics(strategy: LegacyStrategy) -> Iterator[None]:
    """Let a strategy average no metrics meanwhile: the one result that it is handed has none."""
    average = getattr(strategy, "fit_metrics_aggregation_fn", None)
    if average is None:
        yield
        return
    strategy.fit_metrics_aggregation_fn = None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        strategy.fit_metrics_aggregation_fn = average  # type: ignore[attr-defined]


def noise_split(
    clipping: Fixed | Adaptive, noise_multiplier: float, expected_clients: int
) -> tuple[float, float]:
    """Return the noise on the updates (in units of the norm) and on the count.

    Together they cost what one Gaussian mechanism of ``noise_multiplier`` costs:
    ``z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2)``.

    >>> z, b = noise_split(Adaptive(), 1.0, 100)
    >>> round(z, 4), b
    (1.005, 5.0)
    """
    if isinstance(clipping, Fixed):
        return noise_multiplier, 0.0
    stddev = clipping.count_stddev
    if stddev is None:
        stddev = expected_clients / 20 if noise_multiplier else 0.0
    if not noise_multiplier:
        return 0.0, stddev
    if 2 * stddev <= noise_multiplier:
        raise ValueError(
            f"DPFedAvg: noise_multiplier {noise_multiplier} needs a count_stddev above "
            f"{noise_multiplier / 2}; it is {stddev} for {expected_clients} expected_clients: name "
            "a larger one in Adaptive(count_stddev=...)"
        )
    return float((noise_multiplier**-2 - (2 * stddev) ** -2) ** -0.5), stddev
