"""Inversion of a segmentation net: the image behind a gradient, and its mask if need be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Generator, Tensor
from torch.nn.functional import one_hot

from turncoat.attacks.inversion.engine import Clue, LabelRule, Objective, Optimiser, invert
from turncoat.attacks.inversion.gradient_inversion import GradientInversion, clue_of
from turncoat.attacks.inversion.objectives import flat
from turncoat.attacks.inversion.optimisers import LBFGS
from turncoat.attacks.inversion.priors import TotalVariation
from turncoat.messages import Update
from turncoat.task import Batch
from turncoat.trial import Reconstruction
from turncoat.validate import at_least
from turncoat.views import ServerView


@dataclass(frozen=True)
class LayerCosine:
    """``1 - cos(g(x), g*)`` of each layer on its own, and the mean of these.

    One cosine over all layers is ruled by the few with the longest gradients: in a U-Net the last,
    which know little of the image. A layer is a weight with the vectors that follow it, as its bias
    and its normalisation: how long these are beside each other tells how bright the image is. Blind
    to the step size. A layer whose gradient is 0 tells nothing and is left out.
    """

    def __call__(self, guessed: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
        begins = [i for i, t in enumerate(target) if t.ndim > 1 or not i] + [len(target)]
        far = [self._apart(guessed[i:j], target[i:j]) for i, j in pairwise(begins)]
        return torch.stack(far).mean()

    def _apart(self, guessed: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
        a, b = flat(guessed), flat(target)
        there = (b.abs().sum() > 0).to(a.dtype)
        cosine: Tensor = a.dot(b) / (a.norm() * b.norm()).clamp(min=1e-12)
        return there * (1 - cosine)


@dataclass(frozen=True)
class MeanImage:
    """Begin at the mean of the attacker's images, whatever is known of labels: no luck needed."""

    def __call__(self, shape: tuple[int, ...], *, population: Batch) -> Tensor:
        return population[0].mean(dim=0).expand(shape).clone()


@dataclass(frozen=True)
class Squashed:
    """Pixels as the sigmoid of what is moved: within [0, 1] all the way, for L-BFGS.

    Args:
        margin: How far from black and white a guess begins at least, where the sigmoid is flat.
    """

    margin: float = 0.02

    def __post_init__(self) -> None:
        if not 0 < self.margin < 0.5:
            raise ValueError(f"Squashed: margin must be within 0 and 0.5; it is {self.margin}")

    def encode(self, start: Tensor) -> Tensor:
        return start.clamp(self.margin, 1 - self.margin).logit()

    def decode(self, variable: Tensor) -> Tensor:
        return variable.sigmoid()

    def clamp_(self, variable: Tensor) -> None:
        """Leave it as it is: the sigmoid keeps its own bounds."""


@dataclass(frozen=True)
class JointMasks:
    """Soft masks that are searched for together with the images: DLG [1]_, pixel by pixel.

    They begin at how often each class is at each place in the attacker's own masks.

    Differs from the paper: labels are masks, and begin at what is known of such, not at noise.

    Args:
        doubt: Added to the share of each class, so that none is ruled out.

    .. [1] Zhu et al., NeurIPS 2019, algorithm 1. https://arxiv.org/abs/1906.08935
    """

    doubt: float = 0.05

    def __post_init__(self) -> None:
        at_least(1e-6, self, doubt=self.doubt)

    def __call__(self, clue: Clue) -> Tensor:
        with torch.no_grad():
            one = clue.model.logits(clue.before, clue.population[0][:1])
        shares = one_hot(clue.population[1], one.shape[1]).movedim(-1, 1).float().mean(dim=0)
        start = (shares + self.doubt).log().to(one)
        return start.expand(clue.num_images, *start.shape).clone()


@dataclass(frozen=True)
class NearestMasks:
    """Soft masks that are searched for from the mask of the attacker's own that fits best.

    Each of the attacker's records is put through the shared model on its own; the one whose
    gradient is most like the update lends its mask. Where the shares of ``JointMasks`` lead the
    search astray, a mask that is mostly right does not. All images of an update begin at the same.

    Args:
        doubt: Added to each class of each pixel, so that none is ruled out.
        objective: Says how like two gradients are.
    """

    doubt: float = 0.05
    objective: Objective = field(default_factory=LayerCosine)

    def __post_init__(self) -> None:
        at_least(1e-6, self, doubt=self.doubt)

    def __call__(self, clue: Clue) -> Tensor:
        return self.together((clue,))[0]

    def together(self, clues: Sequence[Clue]) -> tuple[Tensor, ...]:
        """Return the masks of clues of one state and population: one pass for all of them."""
        model, before, (images, masks) = clues[0].model, clues[0].before, clues[0].population
        if masks.ndim == 1:
            raise ValueError(
                "NearestMasks looks among the attacker's masks, but its records have one class an "
                "image: choose a task of segmentation, or other labels"
            )
        if not all(torch.equal(c.before, before) for c in clues):
            raise ValueError("NearestMasks: the updates are of several states; take one at a time")
        targets = [c.gradient for c in clues]
        far = torch.empty(len(clues), len(images))
        for i in range(len(images)):
            own = model.gradient(before, (images[i : i + 1], masks[i : i + 1]))
            guessed = replace(clues[0], delta=-own).gradient
            for row, target in zip(far, targets, strict=True):
                row[i] = self.objective(guessed, target)
        with torch.no_grad():
            one = model.logits(before, images[:1])
        nearest = one_hot(masks[far.argmin(dim=1).to(masks.device)], one.shape[1])
        starts = (nearest.movedim(-1, 1).float() + self.doubt).log().to(one)
        return tuple(s.repeat(c.num_images, 1, 1, 1) for s, c in zip(starts, clues, strict=True))


@dataclass(frozen=True, eq=False)
class GivenMasks:
    """Masks that are known beforehand. Shape: ``(n, height, width)``."""

    masks: Tensor = field(repr=False)

    def __call__(self, clue: Clue) -> Tensor:
        if len(self.masks) < clue.num_images:
            raise ValueError(
                f"GivenMasks: {len(self.masks)} masks are known of {clue.num_images} images: "
                "lower num_images"
            )
        return self.masks[: clue.num_images].to(clue.before.device)


@dataclass(frozen=True, eq=False)
class _Begun:
    """Logits of masks to begin at."""

    logits: Tensor = field(repr=False)

    def __call__(self, clue: Clue) -> Tensor:
        return self.logits.clone()


@dataclass(frozen=True, kw_only=True)
class InvertingSegmentation:
    """Rebuild the images that a segmentation net was trained on; that it can be done is of [1]_.

    Matches the direction of each layer's gradient from the mean of the attacker's images on, by
    L-BFGS on the logits of the pixels, with a little total variation. Masks that the game grants
    are used; without, they are searched for together with the images. For smooth nets: against
    a ReLU it fails.

    Differs from the paper, which inverts as Geiping et al. [2]_: objective, optimiser, start, and
    that masks need not be known.

    Args:
        tv_weight: Of the total variation.
        labels: Where the search for the masks begins, if they are not granted: ``NearestMasks``
            costs a gradient for each of the attacker's records, ``JointMasks`` goes astray more.
        num_images: Images to guess for each victim; None for as many examples as it claims,
            at most 16.

    .. [1] Ziller et al., arXiv 2021. https://arxiv.org/abs/2107.02586
    .. [2] Geiping et al., NeurIPS 2020. https://arxiv.org/abs/2003.14053
    """

    optimiser: Optimiser = field(default_factory=lambda: LBFGS(num_steps=15))
    tv_weight: float = 1e-4
    labels: LabelRule = field(default_factory=NearestMasks)
    num_images: int | None = None

    def __post_init__(self) -> None:
        at_least(0, self, tv_weight=self.tv_weight)
        at_least(1, self, num_images=self.num_images)

    @property
    def spelt_out(self) -> GradientInversion:
        """The same in its parts, masks being searched for."""
        return GradientInversion(
            objective=LayerCosine(),
            priors=(TotalVariation(self.tv_weight),),
            optimiser=self.optimiser,
            start=MeanImage(),
            labels=self.labels,
            space=Squashed(),
            num_images=self.num_images,
        )

    @property
    def prior_only(self) -> GradientInversion:
        """The same, deaf to the gradient."""
        return self.spelt_out.prior_only

    def __call__(
        self,
        view: ServerView[Update],
        *,
        victims: tuple[int, ...],
        masks: tuple[Tensor, ...] | None,
        population: Batch,
        rng: Generator,
    ) -> tuple[Reconstruction, ...]:
        recipe = self.spelt_out.recipe
        clues = [clue_of(view, v, population, self.num_images) for v in victims]
        rules: Sequence[LabelRule] = [recipe.labels] * len(clues)
        if masks is not None:
            rules = [GivenMasks(m) for m in masks]
        elif isinstance(recipe.labels, NearestMasks) and clues:
            rules = [_Begun(m) for m in recipe.labels.together(clues)]
        return tuple(
            invert(clue, replace(recipe, labels=rule), rng=rng)
            for clue, rule in zip(clues, rules, strict=True)
        )
