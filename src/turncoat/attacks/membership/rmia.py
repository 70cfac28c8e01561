"""Membership by comparison with others: is the record likelier than strangers, given its rarity?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from turncoat.attacks.membership.references import shares_below, without_record
from turncoat.task import Batch
from turncoat.trial import Memberships
from turncoat.validate import at_least, positive
from turncoat.views import ModelView, QueryView, Shadows


@dataclass(frozen=True)
class RMIA:
    """Ask of how many strangers ``z`` the record ``x`` is likelier under the target [1]_.

    With ``r(x) = p(x) / P(x)``, where ``P`` is the mean of ``p`` over models that saw ``x`` or did
    not, the score is the share of the population with ``r(x) / r(z) >= gamma``. Offline only models
    without ``x`` are known, and ``P(x)`` is ``((1 + a) p_out(x) + (1 - a)) / 2``. Of ``z``, which
    nobody trained on, ``P`` is always that of models without it.

    How much better models with a record know it, ``a`` says. Unless it is given, the first two
    shadow models are attacked in the target's place, with the others, and the ``a`` of 0, 0.1, ...,
    1 counts that tells their members best from the population, by area.

    Differs from the paper: shares that tie are told apart by how much ``r(x)`` is, which changes
    the order of none that do not.

    Args:
        num_shadows: Models to train, each on a random half of the candidates.
        online: Whether models that trained on the record count too.
        gamma: How much likelier.
        a: In [0, 1], for those who do not want it fitted; the paper's for CIFAR-10 is 0.3. Offline
            only.

    .. [1] Zarifzadeh et al., ICML 2024, eq. (4) and (10). https://arxiv.org/abs/2312.03262
    """

    num_shadows: int = 2
    online: bool = False
    gamma: float = 1.0
    a: float | None = None

    def __post_init__(self) -> None:
        at_least(2, self, num_shadows=self.num_shadows)
        positive(self, gamma=self.gamma)
        if self.a is not None and not 0 <= self.a <= 1:
            raise ValueError(f"RMIA: a must lie in [0, 1]; it is {self.a!r}")

    def __call__(
        self,
        view: ModelView | QueryView,
        *,
        candidates: Batch,
        population: Batch,
        shadows: Shadows | None,
    ) -> Memberships:
        _, outside = without_record(shadows, candidates, self)
        assert shadows is not None  # or ``without_record`` has said so
        knows = torch.stack([_probability(s, candidates) for s in shadows.models])
        strangers = torch.stack([_probability(s, population) for s in shadows.models])
        a = _fitted(knows, outside, strangers) if self.a is None else self.a
        everyone = torch.ones_like(strangers) > 0
        x = _probability(view, candidates) / self._usual(knows, outside, a)
        z = _probability(view, population) / self._usual(strangers, everyone, a)
        ordered = (z * self.gamma).sort().values
        above = torch.searchsorted(ordered, x, right=True).double() / len(ordered)
        return Memberships(above + x / (1 + x) / len(ordered) / 2)

    def _usual(self, probs: Tensor, outside: Tensor, a: float) -> Tensor:
        """Return ``P`` of each record. Shape: ``(records,)``."""
        out = _mean(probs, outside)
        offline = _offline(out, a)
        if self.online:
            inside = ~outside
            both = (out + _mean(probs, inside)) / 2
            return torch.where(inside.any(dim=0), both, offline).clamp(min=1e-30)
        return offline.clamp(min=1e-30)


def _offline(out: Tensor, a: float) -> Tensor:
    return ((1 + a) * out + (1 - a)) / 2


def _fitted(knows: Tensor, outside: Tensor, strangers: Tensor) -> float:
    """Return the ``a`` by which shadows in the target's place are attacked best; 0 if none."""
    reached = torch.zeros(11, dtype=torch.float64)
    for target in range(2):
        others = torch.arange(len(knows)) != target
        members = ~outside[target] & outside[others].any(dim=0)
        if not members.any():
            continue
        usual = _mean(knows[others], outside[others])[members]
        usual_z = strangers[others].mean(dim=0)
        for i in range(11):
            x = knows[target, members] / _offline(usual, i / 10).clamp(min=1e-30)
            z = strangers[target] / _offline(usual_z, i / 10).clamp(min=1e-30)
            reached[i] += shares_below(x, z).mean()
    return int(reached.argmax()) / 10


def _mean(probs: Tensor, among: Tensor) -> Tensor:
    """Return the mean of each column over ``among``; over all where there are none."""
    count = among.sum(dim=0)
    mean = probs.where(among, 0).sum(dim=0) / count.clamp(min=1)
    return torch.where(count > 0, mean, probs.mean(dim=0))


def _probability(view: ModelView | QueryView, data: Batch) -> Tensor:
    """Return ``p_y`` of each record. Shape: ``(records,)``, float64."""
    inputs, labels = data
    return view.scores(inputs).double().gather(1, labels[:, None]).squeeze(1).exp()
