"""Poisoned labels: the traitor trains honestly on data that lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from turncoat.attacks.backdoor.planted import spread
from turncoat.task import Batch, Model
from turncoat.validate import at_least, fraction


@dataclass(frozen=True)
class LabelFlip:
    """Call records of one class another [1]_. Worn at prepare, or at supply.

    The paper's other knobs are the coalition's and the server's: how many lie is ``members``, when
    they do is ``acts``, and how often they are found is ``Availability`` at sample.

    Args:
        source: The class whose labels lie, or None for all.
        target: What they say: one class, ``"next"`` (the one after, cyclically) or ``"random"``
            (any other class, drawn anew each round).
        share: The part of such records that is touched.
        anew: Whether these are drawn anew each round; if not they are the same ones throughout.

    .. [1] Tolpegin et al., ESORICS 2020. https://arxiv.org/abs/2007.08432
    """

    source: int | None = None
    target: int | Literal["next", "random"] = "next"
    share: float = 1.0
    anew: bool = True

    def __post_init__(self) -> None:
        at_least(0, self, source=self.source)
        fraction(self, share=self.share)
        if isinstance(self.target, str):
            if self.target not in ("next", "random"):
                raise ValueError(
                    f"LabelFlip: target must be a class, 'next' or 'random'; it is {self.target!r}"
                )
        else:
            at_least(0, self, target=self.target)
            if self.target == self.source:
                raise ValueError(f"{self!r} calls class {self.source} by its own name: choose two")

    def __call__(self, data: Batch, *, model: Model, start: Tensor, rng: Generator) -> Batch:
        inputs, labels = data
        if not len(labels):
            return data
        with torch.no_grad():
            num_classes = model.logits(start, inputs[:1]).shape[1]
        for name, label in (("source", self.source), ("target", self.target)):
            if isinstance(label, int) and label >= num_classes:
                raise ValueError(
                    f"{self!r}: {name} is no class; there are {num_classes}, 0 to {num_classes - 1}"
                )
        touched = (torch.rand(len(labels), generator=rng) < self.share).to(labels.device)
        steps = torch.randint(1, num_classes, (len(labels),), generator=rng).to(labels.device)
        able = torch.ones_like(touched) if self.source is None else labels == self.source
        if self.anew:
            touched &= able
        else:
            where = able.nonzero().flatten()
            touched = torch.zeros_like(able)
            touched[spread(where, round(self.share * len(where)))] = True
        if isinstance(self.target, int):
            lies = torch.full_like(labels, self.target)
        else:
            lies = (labels + (1 if self.target == "next" else steps)) % num_classes
        return inputs, labels.where(~touched, lies)
