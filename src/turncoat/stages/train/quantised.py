"""Quantisation: each number leaves the client as one of few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from turncoat.messages import Update
from turncoat.stage import Train, call
from turncoat.stages.train.compressed import Compressed
from turncoat.task import Batch, Model
from turncoat.validate import at_least

_MOST_BITS = 16


@dataclass(frozen=True)
class Quantised:
    """Train as ``inner`` does, then round each change to one of ``2**bits - 1`` even levels [1]_.

    The levels of a tensor lie between its largest change and minus that, with zero among them; a
    number goes to the level above or below at random, so that it is right in the mean. Two bits are
    TernGrad [2]_. One bit is the sign, times the tensor's mean size [3]_: not right in the mean.

    No formal guarantee. Running statistics are sent as they are.

    Differs from the paper: levels are relative to the largest entry, as in [2]_, where [1]_ takes
    the length; the change of a whole round is rounded; the sign's error is not kept for the next.

    Args:
        bits: Of each number, 1 to 16; 8 is int8.
        stochastic: False rounds to the nearest level: less noise, but small changes are lost.

    .. [1] Alistarh et al., NeurIPS 2017, section 3.1. https://arxiv.org/abs/1610.02132
    .. [2] Wen et al., NeurIPS 2017, eq. (3). https://arxiv.org/abs/1705.07878
    .. [3] Karimireddy et al., ICML 2019, section 4. https://arxiv.org/abs/1901.09847
    """

    bits: int
    inner: Train[Update]
    stochastic: bool = True
    mixes_clients = False

    def __post_init__(self) -> None:
        at_least(1, self, bits=self.bits)
        if self.bits > _MOST_BITS:
            raise ValueError(f"Quantised: bits must be at most {_MOST_BITS}; it is {self.bits}")

    def __call__(
        self, model: Model, start: Tensor, data: Batch, *, rng: Generator, **offers: Any
    ) -> Update:
        payload: Update = call(self.inner, model, start, data, rng=rng, **offers)
        sent = payload.delta.clone()
        slots = [s for s in model.layout.slots if s.trainable]
        for slot in slots:
            sent[slot.start : slot.stop] = self._rounded(sent[slot.start : slot.stop], rng)
        coded = model.layout.num_trainable
        return Compressed(sent, payload.weight, self.bits, coded, num_scales=len(slots))

    def _rounded(self, values: Tensor, rng: Generator) -> Tensor:
        if self.bits == 1:
            signs: Tensor = values.sign() * values.abs().mean()
            return signs
        num_levels = 2 ** (self.bits - 1) - 1
        step = values.abs().max() / num_levels
        if not step > 0:
            return torch.zeros_like(values)
        places = (values / step).clamp(-num_levels, num_levels)
        if self.stochastic:
            draws = torch.rand(values.shape, generator=rng).to(values.device)
            levels = (places + draws).floor().clamp(-num_levels, num_levels)
        else:
            levels = places.round()
        rounded: Tensor = levels * step
        return rounded
