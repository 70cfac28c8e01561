"""A backdoor in the coordinates that honest clients leave alone, so that it lasts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from turncoat.attacks.backdoor.planted import Poison, joined
from turncoat.attacks.backdoor.steering import SteeredLearner, train_steered
from turncoat.messages import Envelope, Update
from turncoat.stage import Memory, Train
from turncoat.task import Batch, Model
from turncoat.validate import fraction, nearest, positive

_PROXIES = ("update", "gradient")


@dataclass(frozen=True, kw_only=True)
class Neurotoxin:
    """Train on poisoned data in the ``ratio`` of coordinates that the honest move least [1]_.

    Worn at train. The coordinates are those where the last change of the global model was smallest
    in magnitude; the attacker's gradient is projected on them.

    Differs from the paper: momentum and weight decay of the inner training are kept within the
    coordinates too, so that nothing else moves at all; where no last change is known (the first
    round in which it acts) its own clean gradient stands in, as the authors' code always has it.
    That code trains its baseline with a smaller step, which alone would make it less durable:
    compare at the same ``inner``.

    Args:
        ratio: Of coordinates that are touched: 1 - k, with the paper's k in top-k.
        proxy: What the honest move: ``"update"``, the last change seen; or ``"gradient"``.
        boost: How much longer the update is made at the end.

    .. [1] Zhang et al., ICML 2022, algorithm 1. https://arxiv.org/abs/2206.10341
    """

    poison: Poison
    inner: Train[Update]
    ratio: float = 0.95
    proxy: Literal["update", "gradient"] = "update"
    boost: float = 1.0

    def __post_init__(self) -> None:
        fraction(self, ratio=self.ratio)
        positive(self, boost=self.boost)
        if self.proxy not in _PROXIES:
            raise ValueError(
                f"Neurotoxin: there is no proxy {self.proxy!r}; {nearest(self.proxy, _PROXIES)}"
            )

    def __call__(
        self,
        model: Model,
        start: Tensor,
        data: Batch,
        *,
        rng: Generator,
        envelope: Envelope,
        memory: Memory[Tensor | None],
        **offers: Any,
    ) -> Update:
        parts = self.poison.parts(
            data, rng=rng, envelope=envelope, model=model, start=start, public=offers.get("public")
        )
        seen = memory.last(None)
        memory.keep(start.detach().clone())
        honest = None if seen is None or self.proxy == "gradient" else start - seen
        if honest is None or not bool(honest.any()):
            honest = model.gradient(start, parts[0])
        free = quietest(honest[: model.layout.num_trainable], self.ratio)
        trained = train_steered(
            self,
            self.inner,
            model,
            start,
            joined(*parts),
            partial(_Masked, owner=self, free=free),
            rng=rng,
            envelope=envelope,
            memory=memory.inner,
            **offers,
        )
        return replace(trained, delta=trained.delta * self.boost, weight=float(len(data[1])))


def quietest(change: Tensor, ratio: float) -> Tensor:
    """Return which coordinates are the ``ratio`` of smallest magnitude. Shape: as given, bool."""
    free = torch.zeros_like(change, dtype=torch.bool)
    count = round(ratio * change.numel())
    free[change.abs().argsort(stable=True)[:count]] = True
    return free


class _Masked(SteeredLearner):
    """Moves nothing but the free coordinates."""

    def __init__(self, model: Model, start: Tensor, *, owner: Neurotoxin, free: Tensor) -> None:
        super().__init__(model, start, owner=owner)
        self._begin, self._free = self.trainable.clone(), free

    def backward(self, data: Batch) -> Tensor:
        with torch.no_grad():
            self.trainable.copy_(self.trainable.where(self._free, self._begin))
        loss = super().backward(data)
        self.grad.mul_(self._free)
        return loss

    def finish(self) -> Tensor:
        with torch.no_grad():
            self.trainable.copy_(self.trainable.where(self._free, self._begin))
        return super().finish()
