"""Local training with example-level differential privacy."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from math import exp, log
from typing import Any

import dp_accounting
import torch
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import brentq
from torch import Generator, Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from turncoat.messages import Update
from turncoat.privacy import Unit, loose
from turncoat.stage import Plan
from turncoat.stages.train.book_keeping import clipped_sum
from turncoat.task import Batch, Model
from turncoat.validate import at_least, exactly_one, fraction, positive

_ORDERS = (*range(2, 33), 64, 128, 256, 512)  # of Rényi's divergence; whole ones are quick
_TOLERANCE = 1e-3  # of the logarithm of the noise multiplier


class LooseDelta(UserWarning):
    """A δ at which an ε says little."""


@dataclass(frozen=True)
class DPSGD:
    """Clip each example's gradient, add Gaussian noise, step [1]_; see ``book_keeping`` for how.

    Formal guarantee: one round is ``num_steps`` Poisson-sampled Gaussian mechanisms, and rounds
    compose, for neighbours that differ by one example added or removed. Nothing is gained from
    sampling clients. How many examples a client has is taken as public, as the sampling rate
    follows from it. The criterion must be a mean over examples, and is checked for it.

    Differs from the paper: sums are divided by the expected batch, so that the denominator says
    nothing of who was drawn; ``momentum`` works on the noisy gradients, which costs no privacy;
    noise is float32, which the theorem's real numbers are not.

    Args:
        max_norm: What each example's gradient is shortened to: C.
        expected_batch: The expected number of examples in a step; also the weight sent, whatever
            the client holds.
        noise_multiplier: The noise's standard deviation in units of ``max_norm``.
        target_epsilon: Instead: what the whole training may cost the smallest client, at
            ``delta``. The plan of the training then settles the noise.
        num_steps: Steps a round; or
        num_epochs: as many as draw each example so often in expectation, at a rate of one over
            the steps of an epoch. One epoch where neither is given.

    .. [1] Abadi et al., CCS 2016, algorithm 1. https://arxiv.org/abs/1607.00133
    """

    lr: float
    max_norm: float
    expected_batch: int
    noise_multiplier: float | None = None
    target_epsilon: float | None = None
    delta: float | None = None
    num_steps: int | None = None
    num_epochs: int | None = None
    momentum: float = 0.0
    unit = Unit.RECORD

    def __post_init__(self) -> None:
        positive(self, lr=self.lr, max_norm=self.max_norm, target_epsilon=self.target_epsilon)
        at_least(1, self, expected_batch=self.expected_batch)
        at_least(1, self, num_steps=self.num_steps, num_epochs=self.num_epochs)
        at_least(0, self, noise_multiplier=self.noise_multiplier)
        if self.noise_multiplier == 0 and self.target_epsilon is not None:
            raise ValueError(
                f"DPSGD: without noise ε is infinite, and not {self.target_epsilon:g}: leave out "
                "noise_multiplier, and the target settles it, or leave out target_epsilon"
            )
        exactly_one(
            self, noise_multiplier=self.noise_multiplier, target_epsilon=self.target_epsilon
        )
        if (self.target_epsilon is None) != (self.delta is None):
            raise ValueError("DPSGD: target_epsilon and delta belong together; give both or none")
        if self.delta is not None and not 0 < self.delta < 1:
            raise ValueError(f"DPSGD: delta must be between 0 and 1; it is {self.delta}")
        if self.num_steps is not None and self.num_epochs is not None:
            raise ValueError("DPSGD: give num_steps or num_epochs, not both")
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"DPSGD: momentum must be at least 0 and below 1; it is {self.momentum}"
            )

    def __call__(self, model: Model, start: Tensor, data: Batch, *, rng: Generator) -> Update:
        sigma = self._sigma()
        inputs, labels = data
        rate, num_steps = self.schedule(len(labels))
        expected = max(rate * len(labels), 1.0)
        refuse_coupled_examples(model)
        if len(labels) > 1:
            _refuse_coupled_loss(model, start, data)
        learner, frozen = model.learner(start), _frozen(model)
        here, velocity = learner.trainable, torch.zeros_like(learner.trainable)
        for _ in range(num_steps):
            draw = torch.rand(len(labels), generator=rng, dtype=torch.float64) < rate
            noise = torch.randn(here.shape, generator=rng).to(here.device)
            chosen = draw.nonzero().flatten().to(inputs.device)
            total = clipped_sum(model, learner, (inputs[chosen], labels[chosen]), self.max_norm)
            total.add_(noise, alpha=sigma * self.max_norm)
            for where in frozen:
                total[where] = 0
            velocity.mul_(self.momentum).add_(total, alpha=1 / expected)
            with torch.no_grad():
                here.add_(velocity, alpha=-self.lr)
        return Update(learner.finish().sub_(start), float(self.expected_batch))

    def schedule(self, num_records: int) -> tuple[float, int]:
        """Return at what rate examples are drawn, and how many steps a round has."""
        if self.num_steps is not None:
            return min(1.0, self.expected_batch / max(num_records, 1)), self.num_steps
        an_epoch = max(1, -(-num_records // self.expected_batch))
        return 1 / an_epoch, an_epoch * (self.num_epochs or 1)

    def event(self, num_records: int) -> dp_accounting.DpEvent:
        """Return what one round costs a client with so many records; with more it costs less."""
        return _event(self._sigma(), *self.schedule(num_records))

    def planned(self, plan: Plan) -> DPSGD:
        """Return it with the least noise that keeps the target for the smallest client.

        Raises:
            ValueError: If the model has a layer for which there is no guarantee.
        """
        if plan.model is not None:
            refuse_coupled_examples(plan.model)
        if self.target_epsilon is None or self.delta is None:
            return self
        if doubt := loose(self.delta, sum(plan.sizes), self.unit):
            warnings.warn(f"DPSGD: {doubt}", LooseDelta, stacklevel=2)
        smallest = min((size for size in plan.sizes if size), default=1)
        rate, num_steps = self.schedule(smallest)
        sigma = noise_for(self.target_epsilon, self.delta, rate, num_steps * plan.num_rounds)
        return replace(self, noise_multiplier=sigma, target_epsilon=None, delta=None)

    def _sigma(self) -> float:
        if self.noise_multiplier is None:
            raise ValueError(
                f"{self!r} has a target and no noise yet: fit it to the training first, by "
                "federation.planned(Plan(num_rounds, sizes))"
            )
        return self.noise_multiplier


@lru_cache(maxsize=256)
def noise_for(epsilon: float, delta: float, rate: float, num_steps: int) -> float:
    """Return the least noise multiplier, to about 1 %, that spends no more than ``epsilon``.

    By privacy loss distributions, rounded to the safe side; the bound of Rényi, loose but quick,
    is where the search begins.

    Raises:
        ValueError: If ``epsilon`` is not above 0, or ``delta`` not between 0 and 1.
    """
    positive("noise_for", epsilon=epsilon, delta=delta)
    fraction("noise_for", delta=delta, rate=rate)
    at_least(1, "noise_for", num_steps=num_steps)
    interval = min(1e-2, 5e-4 * epsilon)

    def spent(sigma: float, accountant: Any) -> float:
        cost: float = accountant.compose(_event(sigma, rate, num_steps)).get_epsilon(delta)
        return cost

    def excess(log_sigma: float) -> float:
        accountant = PLDAccountant(value_discretization_interval=interval)
        return log(min(max(spent(exp(log_sigma), accountant) / epsilon, 1e-9), 1e9))

    sigma = 1.0
    while spent(sigma, RdpAccountant(_ORDERS)) > epsilon:
        sigma *= 1.5
    high = log(sigma)
    while excess(high) > 0:
        high += 0.4
    low = high - 0.4
    while excess(low) <= 0:
        high, low = low, low - 0.4
    root: float = brentq(excess, low, high, xtol=_TOLERANCE)
    return exp(root + _TOLERANCE)  # the root is no further off, and more noise costs less


def _frozen(model: Model) -> list[slice]:
    """Return where the parameters lie that do not train, and take no noise either."""
    still = {n for n, p in model.module.named_parameters() if not p.requires_grad}
    return [slice(s.start, s.stop) for s in model.layout.slots if s.name in still]


def refuse_coupled_examples(model: Model) -> None:
    """Refuse layers that mix the examples of a batch, or remember them outside the parameters."""
    for name, layer in model.module.named_modules():
        if isinstance(layer, _BatchNorm) or any(True for _ in layer.buffers(recurse=False)):
            kind = type(layer).__name__
            why = (
                "mixes the examples of a batch" if isinstance(layer, _BatchNorm) else "has buffers"
            )
            raise ValueError(
                f"DPSGD has no guarantee for layer {name!r} ({kind}): it {why}, which no clipping "
                "of gradients bounds; use a model without, such as one with GroupNorm"
            )


def _refuse_coupled_loss(model: Model, start: Tensor, data: Batch) -> None:
    """Refuse a criterion that is no mean over examples: per-example gradients are not its parts."""
    few = torch.linspace(0, len(data[1]) - 1, min(8, len(data[1]))).long().to(data[1].device)
    with torch.no_grad():
        labels, outputs = data[1][few], model.logits(start, data[0][few])
        whole = model.criterion(outputs, labels)
        parts = torch.stack(
            [model.criterion(outputs[i : i + 1], labels[i : i + 1]) for i in range(len(few))]
        )
    if not torch.allclose(whole, parts.mean(), rtol=1e-3, atol=1e-5, equal_nan=True):
        raise ValueError(
            f"DPSGD has no guarantee for {model.criterion!r}: its value for several examples is "
            "not the mean of its values for each; use a criterion that averages over examples"
        )


def _event(sigma: float, rate: float, num_steps: int) -> dp_accounting.DpEvent:
    if not sigma:
        return dp_accounting.NonPrivateDpEvent()
    step = dp_accounting.GaussianDpEvent(sigma)
    if rate < 1:
        step = dp_accounting.PoissonSampledDpEvent(rate, step)
    return dp_accounting.SelfComposedDpEvent(step, num_steps)
