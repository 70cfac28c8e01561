"""What a client can rebuild of the others: its own update is no secret to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from torch import Generator, Tensor

from turncoat.attacks.inversion.gradient_inversion import AggregateInversion
from turncoat.messages import Update
from turncoat.task import Batch
from turncoat.trial import Reconstruction
from turncoat.validate import at_least
from turncoat.views import AggregateView, ClientView


@dataclass(frozen=True, kw_only=True)
class ClientInversion:
    """Take one's own update out of the step of the global model, and invert what is left [1]_.

    A client that takes part in two rounds running has the global model before and after the first:
    their difference is the mean of all updates, of which it sent one. Between two clients what is
    left is the other's update to the last bits, whatever hides the single ones from the server;
    with more, their mean. Wants a server that takes the mean, and clients of equal weight.

    Args:
        cohort: How many clients the mean is of, itself included.
        inner: What inverts the mean of the others.

    .. [1] Melis et al., IEEE S&P 2019, section 4. https://arxiv.org/abs/1805.04049
    """

    cohort: int = 2
    inner: AggregateInversion = field(default_factory=AggregateInversion)

    def __post_init__(self) -> None:
        at_least(2, self, cohort=self.cohort)

    @property
    def prior_only(self) -> ClientInversion:
        """The same, deaf to the updates."""
        return replace(self, inner=self.inner.prior_only)

    def __call__(
        self,
        view: Sequence[ClientView[Update]],
        *,
        victims: tuple[int, ...],
        population: Batch,
        rng: Generator,
    ) -> tuple[Reconstruction, ...]:
        seen = sorted(view, key=lambda v: v.round)
        first, then = next(
            (p for p in pairwise(seen) if p[1].round == p[0].round + 1), (None, None)
        )
        if first is None or then is None:
            raise ValueError(
                f"a client that was in rounds {[v.round for v in seen]} never saw the model before "
                "and after one: let it take part in two rounds running"
            )
        after = first.before + self._others(first, then.before)
        others = AggregateView[Update](first.round, first.model, first.before, after)
        return self.inner(others, victims=victims, population=population, rng=rng)

    def _others(self, view: ClientView[Update], after: Tensor) -> Tensor:
        whole = (after - view.before) * self.cohort
        return (whole - view.mine.delta) / (self.cohort - 1)
