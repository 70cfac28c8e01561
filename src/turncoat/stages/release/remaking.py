"""Handing out another model in the place of the one that was trained."""

from __future__ import annotations

from typing import Protocol, TypeVar

from torch import Generator, Tensor

from turncoat.stage import Release, V_co, call
from turncoat.task import Batch, Model

V = TypeVar("V")


class Remaker(Protocol[V_co]):
    """A release that makes another model of the trained one, and has ``inner`` hand that out."""

    @property
    def inner(self) -> Release[V_co]: ...

    def remade(
        self, model: Model, params: Tensor, *, rng: Generator, public: Batch | None
    ) -> Tensor:
        """Return the parameters of the other model. Shape: ``(num_params,)``."""
        ...


def hand_out(
    stage: Remaker[V], model: Model, params: Tensor, *, rng: Generator, public: Batch | None
) -> V:
    """Return what ``inner`` shows of the remade model; the remaking draws from ``rng`` first."""
    other = stage.remade(model, params, rng=rng, public=public)
    released: V = call(stage.inner, model, other, rng=rng, public=public)
    return released
