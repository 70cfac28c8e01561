"""Backdoors by data alone: records that teach the attacker's answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from turncoat.attacks.backdoor.edge_cases import Edge
from turncoat.attacks.backdoor.triggers import Trigger, worn_by
from turncoat.messages import Envelope
from turncoat.task import Batch, Model
from turncoat.validate import at_least, fraction


class Poison(Protocol):
    """A data attack that tells what it plants: also worn at prepare, or at supply."""

    @property
    def target(self) -> int: ...

    def parts(
        self,
        data: Batch,
        *,
        rng: Generator,
        envelope: Envelope,
        model: Model,
        start: Tensor,
        public: Batch | None,
    ) -> tuple[Batch, Batch]:
        """Return the records that stay honest, and those that are planted."""
        ...


@dataclass(frozen=True, kw_only=True)
class Backdoored:
    """Put the trigger into a ``share`` of the records, and call them ``target`` [1]_.

    Worn at prepare, or at supply. Records of the target class are left alone. Of a trigger that is
    split among clients each puts in its own part [2]_.

    Args:
        share: Triggered records per own record: the p of BadNets.
        adds: Whether they join the clean ones, as in the paper, or take the place of those that
            they were made of, so that the client has as many records as before.
        anew: Whether they are drawn anew each round. If not they are the same ones throughout, so
            that ``share`` is what is poisoned in all, and not in one round.

    .. [1] Gu et al., arXiv 2017 (BadNets), section 4. https://arxiv.org/abs/1708.06733
    .. [2] Xie et al., ICLR 2020 (DBA), section 3. https://openreview.net/forum?id=rkgyS0VFvr
    """

    trigger: Trigger
    target: int
    share: float = 0.1
    adds: bool = True
    anew: bool = False

    def __post_init__(self) -> None:
        at_least(0, self, target=self.target)
        fraction(self, share=self.share)

    def __call__(self, data: Batch, *, rng: Generator, envelope: Envelope) -> Batch:
        return joined(*self.parts(data, rng=rng, envelope=envelope))

    def parts(
        self, data: Batch, *, rng: Generator, envelope: Envelope, **offers: object
    ) -> tuple[Batch, Batch]:
        """Return the clean records, and the triggered ones."""
        inputs, labels = data
        able, count = (labels != self.target).nonzero().flatten(), round(self.share * len(labels))
        chosen = drawn(able, count, rng) if self.anew else spread(able, count)
        trigger = worn_by(self.trigger, envelope.sender)
        planted = trigger(inputs[chosen]), torch.full_like(labels[chosen], self.target)
        return data if self.adds else without(data, chosen), planted


@dataclass(frozen=True, kw_only=True)
class CleanLabel:
    """Put the trigger into records of the target class alone: no label lies [1]_.

    Worn at prepare, or at supply. With an ``epsilon`` the records are first made hard to tell
    without the trigger, by projected gradient ascent on the loss, so that training leans on it.

    Differs from the paper: the ascent is against the global model of the moment, not against one
    trained beforehand for robustness; it starts at the record.

    Args:
        share: Of the client's records of the target class, the same ones each round; they are
            replaced.
        epsilon: How far a pixel may go, in the units of the inputs; 0 for the trigger alone.
        num_steps: Of the ascent, each ``2.5 * epsilon / num_steps`` long. Pixels stay within the
            range of the client's data.

    .. [1] Turner et al., arXiv 2019, sections 3 and 4. https://arxiv.org/abs/1912.02771
    """

    trigger: Trigger
    target: int
    share: float = 0.5
    epsilon: float = 0.0
    num_steps: int = 10

    def __post_init__(self) -> None:
        at_least(0, self, target=self.target, epsilon=self.epsilon)
        fraction(self, share=self.share)
        at_least(1, self, num_steps=self.num_steps)

    def __call__(self, data: Batch, *, envelope: Envelope, model: Model, start: Tensor) -> Batch:
        return joined(*self.parts(data, envelope=envelope, model=model, start=start))

    def parts(
        self, data: Batch, *, envelope: Envelope, model: Model, start: Tensor, **offers: object
    ) -> tuple[Batch, Batch]:
        """Return the records left alone, and those with the trigger."""
        inputs, labels = data
        able = (labels == self.target).nonzero().flatten()
        chosen = spread(able, round(self.share * len(able)))
        hard = self.perturbed(model, start, (inputs[chosen], labels[chosen]), within=inputs)
        trigger = worn_by(self.trigger, envelope.sender)
        return without(data, chosen), (trigger(hard), labels[chosen])

    def perturbed(self, model: Model, start: Tensor, data: Batch, *, within: Tensor) -> Tensor:
        """Return inputs at most ``epsilon`` away, whose loss is higher."""
        inputs, labels = data
        if not self.epsilon or not len(labels):
            return inputs
        low, high, step = within.min(), within.max(), 2.5 * self.epsilon / self.num_steps
        there = inputs
        for _ in range(self.num_steps):
            leaf = there.detach().requires_grad_()
            with torch.enable_grad():
                loss = model.criterion(model.logits(start.detach(), leaf), labels)
                (slope,) = torch.autograd.grad(loss, leaf)
            there = there + step * slope.sign()
            there = there.clamp(inputs - self.epsilon, inputs + self.epsilon).clamp(low, high)
        return there


@dataclass(frozen=True, kw_only=True)
class EdgeCase:
    """Call records that hardly occur ``target``, and leave all others as they are [1]_.

    Worn at prepare, or at supply. The client's own edge cases lie; they are repeated until there
    is a ``share`` of them. No input is changed, neither now nor when the backdoor is used.

    Args:
        edge: Which records, or where they come from.
        share: Lying records per other record.
        from_public: Whether they are the edge cases of the public data, and not the client's own.

    .. [1] Wang et al., NeurIPS 2020, section 3. https://arxiv.org/abs/2007.05084
    """

    edge: Edge
    target: int
    share: float = 0.2
    from_public: bool = False

    def __post_init__(self) -> None:
        at_least(0, self, target=self.target)
        fraction(self, share=self.share)

    def __call__(self, data: Batch, *, rng: Generator, public: Batch | None) -> Batch:
        return joined(*self.parts(data, rng=rng, public=public))

    def parts(
        self, data: Batch, *, rng: Generator, public: Batch | None, **offers: object
    ) -> tuple[Batch, Batch]:
        """Return the other records, and the edge cases under their new name."""
        if self.from_public and public is None:
            raise ValueError(f"{self!r} needs public data, and the task has none: leave it out")
        inputs, rest = self.edge(public if self.from_public and public is not None else data)
        rest = data if self.from_public else rest
        count = round(self.share * len(rest[1])) if len(inputs) else 0
        order = torch.randperm(len(inputs), generator=rng)
        again = order.repeat(-(-count // max(len(order), 1)))[:count].to(inputs.device)
        labels = torch.full((count,), self.target, dtype=data[1].dtype, device=data[1].device)
        return rest, (inputs[again], labels)


@dataclass(frozen=True, kw_only=True)
class Relabelled:
    """Call the first ``num_records`` of the client's records of one class another [1]_.

    Worn at prepare, or at supply. The attacker wants these very records misjudged and nothing
    else: targeted poisoning. ``TargetConfidence`` judges it, on the same records.

    Args:
        source: The class that they are of.
        copies: How often each is repeated.

    .. [1] Bhagoji et al., ICML 2019, section 3.1. https://arxiv.org/abs/1811.12470
    """

    source: int
    target: int
    num_records: int = 1
    copies: int = 1

    def __post_init__(self) -> None:
        at_least(0, self, source=self.source, target=self.target)
        at_least(1, self, num_records=self.num_records, copies=self.copies)
        if self.source == self.target:
            raise ValueError(f"{self!r}: source and target are one class; choose two")

    def __call__(self, data: Batch) -> Batch:
        return joined(*self.parts(data))

    def parts(self, data: Batch, **offers: object) -> tuple[Batch, Batch]:
        """Return the other records, and these under their new name."""
        inputs, labels = data
        chosen = (labels == self.source).nonzero().flatten()[: self.num_records]
        planted = inputs[chosen].repeat(self.copies, *[1] * (inputs.ndim - 1))
        wrong = torch.full((len(planted),), self.target, dtype=labels.dtype, device=labels.device)
        return without(data, chosen), (planted, wrong)


def drawn(able: Tensor, count: int, rng: Generator) -> Tensor:
    """Return so many of some positions at random, or all if there are no more."""
    order = torch.randperm(len(able), generator=rng).to(able.device)
    return able[order[:count]]


def spread(able: Tensor, count: int) -> Tensor:
    """Return so many of some positions at even distances, or all if there are no more."""
    count = min(count, len(able))
    return able[torch.arange(count, device=able.device) * len(able) // max(count, 1)]


def without(data: Batch, chosen: Tensor) -> Batch:
    """Return the records at all other positions."""
    kept = torch.ones(len(data[1]), dtype=torch.bool, device=data[1].device)
    kept[chosen] = False
    return data[0][kept], data[1][kept]


def joined(first: Batch, second: Batch) -> Batch:
    return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])
