"""A backdoor is a short cut to its class: look for the class that is too easily reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy

from turncoat.messages import Update
from turncoat.stage import Release, Train, call
from turncoat.stages.release.mending import trusted
from turncoat.stages.release.remaking import hand_out
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Batch, Model
from turncoat.validate import at_least, fraction, positive

V = TypeVar("V")

_TUNING = LocalSGD(0.01, num_epochs=10, batch_size=32, momentum=0.9)


@dataclass(frozen=True)
class Triggers:
    """The smallest trigger that was found for each class.

    Attributes:
        masks: How much of an input is replaced, between 0 and 1. Shape: ``(classes, ...)``.
        patterns: By what. Shape: ``(classes, ...)``, the shape of an input.
        norms: Sum of each mask; of a whole input, if no trigger was found. Shape: ``(classes,)``.
    """

    masks: Tensor
    patterns: Tensor
    norms: Tensor

    @property
    def anomalies(self) -> Tensor:
        """Return how many robust deviations each norm lies from the median. Shape: ``(classes,)``.

        A deviation is 1.4826 times the median distance from the median.
        """
        apart = (self.norms - self.norms.quantile(0.5)).abs()
        scale = 1.4826 * apart.quantile(0.5)
        return torch.where(apart > 0, apart / scale, 0.0)

    def flagged(self, threshold: float = 2.0) -> tuple[int, ...]:
        """Return the classes whose trigger is anomalously small."""
        small = self.norms < self.norms.quantile(0.5)
        found = (small & (self.anomalies > threshold)).nonzero().flatten()
        return tuple(found.tolist())

    def stamped(self, inputs: Tensor, label: int) -> Tensor:
        """Return the inputs with the trigger of a class. Shape: that of ``inputs``."""
        return _stamped(inputs, self.masks[label], self.patterns[label])


@dataclass(frozen=True)
class NeuralCleanse(Generic[V]):
    """Reverse-engineer a trigger for each class, unlearn the anomalous, release as ``inner`` [1]_.

    For each class the smallest mask and pattern are sought that take the public data there. A class
    whose mask is far smaller than the others' (``threshold``) is held for a backdoor's target: the
    model is then trained on public data of which a ``share`` carries the trigger that was found,
    under their right names. If nothing is flagged, the model stays as it is.

    It finds small triggers that work on all inputs. A trigger as large as an image, or of one
    source class alone, hides from it.

    Differs from the paper: mitigation by unlearning only, with numbers of ``tuning`` that are ours.
    ``reverse_triggers`` tells what differs in the search.

    Args:
        num_steps: Of the search for a trigger, at most.
        num_inputs: How many of the public data are searched with.
        min_classes: With fewer classes there is no telling what is anomalous.

    .. [1] Wang et al., S&P 2019, sections IV and VI. https://doi.org/10.1109/SP.2019.00031
    """

    inner: Release[V]
    threshold: float = 2.0
    share: float = 0.2
    tuning: Train[Update] = _TUNING
    num_steps: int = 1_000
    num_inputs: int = 100
    min_classes: int = 10

    def __post_init__(self) -> None:
        positive(self, threshold=self.threshold)
        fraction(self, share=self.share)
        at_least(1, self, num_steps=self.num_steps, num_inputs=self.num_inputs)
        at_least(3, self, min_classes=self.min_classes)

    def __call__(self, model: Model, params: Tensor, *, rng: Generator, public: Batch | None) -> V:
        return hand_out(self, model, params, rng=rng, public=public)

    def remade(
        self, model: Model, params: Tensor, *, rng: Generator, public: Batch | None
    ) -> Tensor:
        """Return the parameters of the mended model. Shape: ``(num_params,)``."""
        clean = trusted(self, public)
        self._check_classes(model, params, clean)
        order = torch.randperm(len(clean[1]), generator=rng)[: self.num_inputs]
        some = clean[0][order.to(clean[0].device)]
        found = reverse_triggers(model, params, some, rng=rng, num_steps=self.num_steps)
        flagged, mended = found.flagged(self.threshold), params
        if flagged:
            marked = self.marked(clean, found, flagged, rng)
            mended = params + call(self.tuning, model, params, marked, rng=rng).delta
        return mended

    def marked(
        self, clean: Batch, found: Triggers, flagged: tuple[int, ...], rng: Generator
    ) -> Batch:
        """Return the data with each flagged trigger in a share of them, rightly labelled."""
        inputs, labels = clean[0].clone(), clean[1]
        order = torch.randperm(len(labels), generator=rng).to(labels.device)
        num = min(round(self.share * len(labels)), len(labels) // len(flagged))
        for i, label in enumerate(flagged):
            chosen = order[i * num : (i + 1) * num]
            inputs[chosen] = found.stamped(inputs[chosen], label)
        return inputs, labels

    def _check_classes(self, model: Model, params: Tensor, clean: Batch) -> None:
        with torch.no_grad():
            num_classes = model.logits(params, clean[0][:1]).shape[1]
        if num_classes < self.min_classes:
            raise ValueError(
                f"NeuralCleanse compares the classes with their median, and needs min_classes = "
                f"{self.min_classes} of them; there are {num_classes}: take another release, such "
                "as FinePruning"
            )


def reverse_triggers(
    model: Model,
    params: Tensor,
    inputs: Tensor,
    *,
    rng: Generator,
    num_steps: int = 1_000,
    lr: float = 0.1,
    cost: float = 1e-3,
    multiplier: float = 2.0,
    success: float = 0.99,
    patience: int = 5,
) -> Triggers:
    """Return the smallest trigger for each class: of least ``cross-entropy + cost * |mask|_1``.

    The cost is 0 until the trigger has worked on a share ``success`` of the inputs for ``patience``
    steps. It is then ``cost``, and grows by ``multiplier`` after so many steps in which it works,
    and shrinks by ``multiplier ** 1.5`` after so many in which it does not. A class is finished
    when its cost has gone both ways and its best mask has not become smaller for ``5 * patience``
    steps. The optimiser is Adam with the betas (0.5, 0.9) of the authors' code.

    Differs from the paper: all classes at once; a step takes all ``inputs``, and is not one pass
    through batches of them.

    Args:
        inputs: Clean ones, of any class; the range of their values is that of the pattern. Shape:
            ``(n, channels, height, width)``, with one mask for all channels, or ``(n, features)``.
    """
    with torch.no_grad():
        num = model.logits(params, inputs[:1]).shape[1]
    shape = inputs.shape[1:]
    area = (1, *shape[1:]) if len(shape) == 3 else shape
    low, high = inputs.min(), inputs.max()
    frozen = params.detach()

    def drawn(size: tuple[int, ...]) -> Tensor:
        uniform = torch.rand(num, *size, generator=rng).clamp(1e-3, 1 - 1e-3)
        return uniform.logit().div(2).to(inputs)  # tanh / 2 + 1/2 is the sigmoid of twice as much

    raw = [drawn(tuple(area)), drawn(tuple(shape))]
    first, second = ([torch.zeros_like(r) for r in raw] for _ in range(2))
    masks, patterns = torch.ones_like(raw[0]), torch.zeros_like(raw[1])
    whole = float(masks[0].numel())
    norms = torch.full((num,), whole, device=inputs.device)
    schedules = [_Schedule(cost, multiplier, patience) for _ in range(num)]
    for step in range(1, num_steps + 1):
        live = [c for c, s in enumerate(schedules) if not s.finished]
        if not live:
            break
        leaves = [r[live].requires_grad_() for r in raw]
        mask, pattern = _squashed(leaves[0], 0.0, 1.0), _squashed(leaves[1], low, high)
        with torch.enable_grad():
            stamped = torch.cat([_stamped(inputs, *t) for t in zip(mask, pattern, strict=True)])
            outputs = model.logits(frozen, stamped).reshape(len(live), len(inputs), num)
            aims = torch.tensor(live, device=inputs.device)[:, None].expand(-1, len(inputs))
            sizes = mask.flatten(1).sum(dim=1)
            costs = torch.tensor([schedules[c].cost for c in live], device=inputs.device)
            entropy = cross_entropy(outputs.flatten(0, 1), aims.flatten(), reduction="sum")
            total = entropy / len(inputs) + (costs * sizes).sum()
            slopes = torch.autograd.grad(total, leaves)
        rates = (outputs.detach().argmax(dim=2) == aims).float().mean(dim=1)
        works, reached = (rates >= success).tolist(), sizes.tolist()
        for i, c in enumerate(live):
            if works[i] and reached[i] < float(norms[c]):
                norms[c] = reached[i]
                masks[c], patterns[c] = mask[i].detach(), pattern[i].detach()
            schedules[c].tell(works[i], float(norms[c]), found=float(norms[c]) < whole)
        for r, m, v, slope in zip(raw, first, second, slopes, strict=True):
            m[live] = 0.5 * m[live] + 0.5 * slope
            v[live] = 0.9 * v[live] + 0.1 * slope.square()
            level = (v[live] / (1 - 0.9**step)).sqrt() + 1e-7
            r[live] -= lr * m[live] / (1 - 0.5**step) / level
    return Triggers(masks, patterns, norms)


class _Schedule:
    """The price of one class's mask, and when its search is finished."""

    def __init__(self, first: float, multiplier: float, patience: int) -> None:
        self.cost, self.finished = 0.0, False
        self._first, self._multiplier, self._patience = first, multiplier, patience
        self._worked = self._failed = self._stalled = 0
        self._raised = self._lowered = False
        self._best = float("inf")

    def tell(self, works: bool, best: float, *, found: bool) -> None:
        """Take in whether the trigger of this step works, and the smallest that ever did."""
        self._stalled = self._stalled + 1 if found and best >= self._best else 0
        self._best = best
        if self._raised and self._lowered and self._stalled >= 5 * self._patience:
            self.finished = True
            return
        self._worked, self._failed = (self._worked + 1, 0) if works else (0, self._failed + 1)
        if self._worked >= self._patience:
            self._worked = 0
            self._raised |= self.cost > 0
            self.cost = self.cost * self._multiplier or self._first
        elif self._failed >= self._patience:
            self._failed = 0
            self._lowered |= self.cost > 0
            self.cost /= self._multiplier**1.5


def _squashed(raw: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    return low + (high - low) * (raw.tanh() / 2 + 0.5)


def _stamped(inputs: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    return (1 - mask) * inputs + mask * pattern
