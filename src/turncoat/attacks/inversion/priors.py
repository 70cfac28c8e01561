"""What the attacker holds images to be like, beside what the gradient says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from turncoat.attacks.inversion.adversarial_start import own_images
from turncoat.attacks.inversion.engine import Clue, Seen
from turncoat.describe import ADDED
from turncoat.randomness import ambient
from turncoat.task import Model
from turncoat.validate import at_least, one_of


@dataclass(frozen=True)
class TotalVariation:
    """Neighbouring pixels are alike: ``weight`` times their mean difference, across plus down [1]_.

    .. [1] Rudin et al., Physica D 1992. https://doi.org/10.1016/0167-2789(92)90242-F
    """

    weight: float = 1e-4

    def __post_init__(self) -> None:
        at_least(0, self, weight=self.weight)

    def __call__(self, images: Tensor) -> Tensor:
        across, down = images.diff(dim=-1), images.diff(dim=-2)
        return self.weight * (across.abs().mean() + down.abs().mean())


@dataclass(frozen=True)
class PixelNorm:
    """Pixels are near the mean of the attacker's: ``weight`` times their mean square distance [1]_.

    Differs from the paper: a mean over pixels, not the norm of an image; the paper normalises its
    images, so that their mean is 0.

    .. [1] Yin et al., CVPR 2020, eq. (3). https://arxiv.org/abs/1912.08795
    """

    weight: float = 1e-3

    def __post_init__(self) -> None:
        at_least(0, self, weight=self.weight)

    def prepared(self, clue: Clue, labels: Tensor, rng: Generator) -> Near:
        """Return the prior that holds the mean of each channel."""
        axes = (0, *range(2, clue.population[0].ndim))
        return Near(self.weight, clue.population[0].mean(dim=axes, keepdim=True))

    def __call__(self, images: Tensor) -> Tensor:
        """Without ``prepared``, around 0."""
        return self.weight * images.square().mean()


@dataclass(frozen=True)
class BatchNormStatistics:
    """What enters each batch normalisation has the mean and variance that it keeps [1]_ [2]_.

    The sum over these layers of ``|mean - kept mean| + |variance - kept variance|``. A client that
    sends its running statistics gives away more: after one step they are known averages of the
    global ones and of its batch's own, for which ``"update"`` solves them.

    Args:
        read: Whose statistics: those of the shared ``"model"``, or those of the victim's batch, out
            of its ``"update"``, which must be of one step.

    .. [1] Yin et al., CVPR 2020, eq. (4). https://arxiv.org/abs/1912.08795
    .. [2] Yin et al., CVPR 2021, eq. (10). https://arxiv.org/abs/2104.07586
    """

    weight: float = 1e-3
    read: Literal["model", "update"] = "model"

    def __post_init__(self) -> None:
        at_least(0, self, weight=self.weight)
        one_of(Literal["model", "update"], self, read=self.read)

    def prepared(self, clue: Clue, labels: Tensor, rng: Generator) -> _Statistics:
        """Return the prior that holds the statistics of each layer that keeps some."""
        before = clue.model.layout.split(clue.before)
        after = clue.model.layout.split(clue.before + clue.delta)
        kept: dict[str, tuple[Tensor, Tensor]] = {}
        for name, module in clue.model.module.named_modules():
            if not isinstance(module, _BatchNorm) or not module.track_running_stats:
                continue
            slots = [f"{name}.{which}".lstrip(".") for which in ("running_mean", "running_var")]
            mean, variance = (before[slot] for slot in slots)
            if self.read == "update":
                if not module.momentum:
                    raise ValueError(
                        f"BatchNormStatistics: {name} has the momentum {module.momentum}, out of "
                        "which no batch can be solved: give read='model'"
                    )
                last_mean, last_variance = (after[slot] for slot in slots)
                mean = mean + (last_mean - mean) / module.momentum
                variance = (variance + (last_variance - variance) / module.momentum).clamp(min=0)
            kept[name] = mean, variance
        if not kept:
            raise ValueError(
                f"BatchNormStatistics: {clue.model.build!r} keeps no running statistics: leave "
                "this prior out"
            )
        return _Statistics(self.weight, kept)

    def __call__(self, images: Tensor) -> Tensor:
        raise RuntimeError("BatchNormStatistics works once it is prepared: call prepared() first")


@dataclass(frozen=True)
class StylePrior:
    """Images have the style of the attacker's own of their class: an adversarial prior [1]_.

    The style at a layer of the shared model is its Gram matrix [2]_: ``F F' / (c h w)`` of the
    ``c`` maps of a guess. The distance is ``|G - G*|² / |G*|²``, averaged over layers and guesses,
    where ``G*`` is the mean over the attacker's images.

    Differs from the paper: layers count alike, whatever the size of their maps. Its weights are not
    known to us: this one was chosen after a few trials.

    Args:
        layers: Places among the leaf layers' outputs, in the order of computation; None for all
            that are maps.
        num_references: Own images to take the style from, for each guess; None for all of the
            class. A class that the attacker has none of takes any.

    .. [1] Usynin et al., ACM TOPS 2023. https://arxiv.org/abs/2203.00481
    .. [2] Gatys et al., CVPR 2016, eq. (3). https://doi.org/10.1109/CVPR.2016.265
    """

    weight: float = 1e-2
    layers: tuple[int, ...] | None = None
    num_references: int | None = None

    def __post_init__(self) -> None:
        at_least(0, self, weight=self.weight)
        at_least(1, self, num_references=self.num_references)
        if self.layers is not None:
            _check_layers(self, self.layers)

    def prepared(self, clue: Clue, labels: Tensor, rng: Generator) -> _Alike:
        """Return the prior that holds the style of the attacker's images."""
        return _alike(self, _gram, self.layers, clue, labels, rng)

    def __call__(self, images: Tensor) -> Tensor:
        raise RuntimeError("StylePrior works once it is prepared: call prepared() first")


@dataclass(frozen=True)
class FeaturePrior:
    """Images have the features of the attacker's own of their class: an adversarial prior [1]_.

    The distance is ``|f - f*|² / |f*|²`` of what some layers of the shared model put out, averaged
    over layers and guesses, where ``f*`` is the mean over the attacker's images.

    What images of all classes share is most of that. ``distinctive`` leaves it to the gradient, and
    holds the guess to what tells its class from the others: with ``o*`` the mean over all of the
    attacker's images of other classes and ``d = f* - o*``, the distance is
    ``((f - f*)·d / |d|²)²``, which is 0 at ``f*`` and 1 at ``o*``.

    Differs from the paper: layers count alike, whatever their size. Which layers and weights it
    takes is not known to us: these were chosen after a few trials. ``distinctive`` is ours.

    Args:
        layers: Places among the leaf layers' outputs, in the order of computation: -2 is what
            the last layer reads.
        num_references: As in ``StylePrior``.
        distinctive: Compare along what distinguishes the class alone. A class that the attacker has
            none of, or nothing but, is left free.

    .. [1] Usynin et al., ACM TOPS 2023. https://arxiv.org/abs/2203.00481
    """

    weight: float = 1e-2
    layers: tuple[int, ...] = (-2,)
    num_references: int | None = None
    distinctive: bool = field(default=False, metadata=ADDED)

    def __post_init__(self) -> None:
        at_least(0, self, weight=self.weight)
        at_least(1, self, num_references=self.num_references)
        _check_layers(self, self.layers)

    def prepared(self, clue: Clue, labels: Tensor, rng: Generator) -> _Alike | _Told:
        """Return the prior that holds the features of the attacker's images."""
        if self.distinctive:
            return _told(self, clue, labels, rng)
        return _alike(self, _same, self.layers, clue, labels, rng)

    def __call__(self, images: Tensor) -> Tensor:
        raise RuntimeError("FeaturePrior works once it is prepared: call prepared() first")


@dataclass(frozen=True, eq=False)
class Near:
    """Images are near some: ``weight`` times their mean square distance from ``centre``."""

    weight: float
    centre: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        return self.weight * (images - self.centre).square().mean()


@dataclass(frozen=True, eq=False)
class _Statistics:
    weight: float
    kept: dict[str, tuple[Tensor, Tensor]] = field(repr=False)  # mean and variance, by layer

    def __call__(self, images: Tensor, *, layers: Sequence[Seen]) -> Tensor:
        total = images.new_zeros(())
        for layer in layers:
            if layer.name in self.kept:
                mean, variance = self.kept[layer.name]
                rows = layer.read.movedim(1, 0).flatten(1)
                unbiased = rows.var(dim=1, correction=min(1, rows.shape[1] - 1))
                total = total + (rows.mean(dim=1) - mean).norm() + (unbiased - variance).norm()
        return self.weight * total


@dataclass(frozen=True, eq=False)
class _Alike:
    """What layers show of each guess is near what they show of its references."""

    weight: float
    shown: Callable[[Tensor], Tensor]
    layers: tuple[int, ...]
    references: tuple[Tensor, ...] = field(repr=False)

    def __call__(self, images: Tensor, *, activations: Sequence[Tensor]) -> Tensor:
        total = images.new_zeros(())
        for place, reference in zip(self.layers, self.references, strict=True):
            apart = (self.shown(activations[place]) - reference).square().flatten(1).sum(dim=1)
            size = reference.square().flatten(1).sum(dim=1).clamp(min=1e-12)
            total = total + (apart / size).mean()
        return self.weight * total / len(self.layers)


@dataclass(frozen=True, eq=False)
class _Told:
    """Along what tells each guess's class from the others, layers show what its references do."""

    weight: float
    layers: tuple[int, ...]
    references: tuple[Tensor, ...] = field(repr=False)
    directions: tuple[Tensor, ...] = field(repr=False)

    def __call__(self, images: Tensor, *, activations: Sequence[Tensor]) -> Tensor:
        total = images.new_zeros(())
        for place, near, way in zip(self.layers, self.references, self.directions, strict=True):
            along = ((activations[place] - near) * way).flatten(1).sum(dim=1)
            size = way.square().flatten(1).sum(dim=1).clamp(min=1e-12)
            total = total + (along / size).square().mean()
        return self.weight * total / len(self.layers)


def _check_layers(owner: StylePrior | FeaturePrior, layers: tuple[int, ...]) -> None:
    if not layers or not all(isinstance(place, int) for place in layers):
        raise ValueError(
            f"{type(owner).__name__}: layers must be whole numbers, one at least, as (-2,); they "
            f"are {layers}"
        )


def _alike(
    prior: StylePrior | FeaturePrior,
    shown: Callable[[Tensor], Tensor],
    layers: tuple[int, ...] | None,
    clue: Clue,
    labels: Tensor,
    rng: Generator,
) -> _Alike:
    """Return the distance from what the attacker's own images of each label show."""
    chosen = own_images(clue.population, labels, prior.num_references, rng)
    used = torch.tensor(sorted(set(torch.cat(chosen).tolist())))
    own = clue.population[0][used.to(chosen[0].device)]
    outputs = _activations(clue.model, clue.before, own, rng)
    if layers is None:
        layers = tuple(i for i, out in enumerate(outputs) if out.ndim > 2)
    _check_places(prior, layers, clue.model, len(outputs))
    places = [torch.searchsorted(used, c.cpu()) for c in chosen]
    references = tuple(_means(shown(outputs[layer]), places) for layer in layers)
    return _Alike(prior.weight, shown, layers, references)


def _told(prior: FeaturePrior, clue: Clue, labels: Tensor, rng: Generator) -> _Told:
    """Return the distance along what tells the attacker's own images of each label from others."""
    images, held = clue.population
    chosen = own_images(clue.population, labels, prior.num_references, rng)
    others = [
        other if 0 < len(other) < len(held) else own  # nothing to be told from: no direction
        for own, c in zip(chosen, labels.tolist(), strict=True)
        for other in [(held != c).nonzero().flatten()]
    ]
    outputs = _activations(clue.model, clue.before, images, rng)
    _check_places(prior, prior.layers, clue.model, len(outputs))
    references, directions = [], []
    for layer in prior.layers:
        near = _means(outputs[layer], chosen)
        away = _means(outputs[layer], others)
        references.append(near)
        directions.append(near - away)
    return _Told(prior.weight, prior.layers, tuple(references), tuple(directions))


def _check_places(
    prior: StylePrior | FeaturePrior, layers: tuple[int, ...], model: Model, num_layers: int
) -> None:
    name = type(prior).__name__
    if not layers:
        raise ValueError(f"{name}: {model.build!r} has no layer of maps: give layers")
    for place in layers:
        if not -num_layers <= place < num_layers:
            raise ValueError(
                f"{name}: layers has {place}, and the model has {num_layers} leaf layers: name "
                f"places from {-num_layers} to {num_layers - 1}"
            )


def _means(traits: Tensor, places: Sequence[Tensor]) -> Tensor:
    """Return the mean of the rows at each of several lists of places."""
    return torch.stack([traits[p.to(traits.device)].mean(dim=0) for p in places])


def _gram(maps: Tensor) -> Tensor:
    """Return the Gram matrix of each example's maps. Shape: ``(n, c, c)``."""
    rows = maps.flatten(2)
    return rows @ rows.mT / rows[0].numel()


def _same(outputs: Tensor) -> Tensor:
    return outputs


def _activations(model: Model, params: Tensor, images: Tensor, rng: Generator) -> list[Tensor]:
    """Return what each leaf layer gives in training mode, in the order of computation."""
    gave: list[Tensor] = []

    def note(module: nn.Module, read: Any, out: Tensor) -> None:
        gave.append(out)

    leaves = [m for m in model.module.modules() if not any(True for _ in m.children())]
    hooks = [leaf.register_forward_hook(note) for leaf in leaves]
    try:
        with torch.no_grad(), ambient(rng):
            named = model.layout.split(params)
            functional_call(model.module.train(), named, (images,), strict=False)
    finally:
        for hook in hooks:
            hook.remove()
    return gave
