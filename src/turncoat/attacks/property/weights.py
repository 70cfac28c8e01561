"""Properties by parameters: a classifier of classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from sklearn.linear_model import LogisticRegression
from torch import Generator, Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from turncoat.attacks.property.losses import of_either
from turncoat.describe import ADDED
from turncoat.params import Layout
from turncoat.randomness import ambient
from turncoat.task import Batch
from turncoat.trial import Leanings
from turncoat.validate import at_least, one_of
from turncoat.views import ModelView, Suspects, Worlds

Order = Literal["sets", "paths", "sorted", "flat"]
_STRENGTH = 10.0  # C of logistic regression, if rows were of length 1
Layer = tuple[
    Tensor, Tensor
]  # weights (models, nodes, nodes before, each), others (models, nodes, k)


@dataclass(frozen=True)
class MetaClassifier:
    """Learn from the parameters of own models which kind of data a model was trained on [1]_ [2]_.

    Hidden neurons can change places without changing what a net computes, so that their order says
    nothing. ``"sets"`` reads each layer as a set: one small net reads every neuron, its weights
    gathered by what was read of the neurons that they come from, and the sum over neurons counts.
    ``"paths"`` multiplies weights along all paths from an input to an output, and counts a path
    as often as the attacker's own records pass it: their sum is the mean slope of the output.
    ``"sorted"`` puts the neurons of each layer into the order of the sum of their weights, and
    ``"flat"`` takes them as they are; these three then take logistic regression. For a linear model
    the other three are one. What is added to all outputs alike changes no answer, and is taken out
    of the last layer, but with ``"flat"``.

    Differs from the paper: the nets are linear and rectified parts side by side, and a neuron's
    weights are gathered by what is read of the neurons before it, so that nothing depends on their
    order; neurons are averaged. ``"paths"`` is not in it, and takes records of one's own.

    Args:
        num_shadows: Federations to play, half on either kind of data; the paper has hundreds.
        order: What is made of the order of neurons.
        width: What is read of a neuron: so many numbers, twice.
        num_steps: Steps of Adam over all shadow models at once.
        weight_decay: Of the nets.
        num_records: Of the attacker's own, for ``"paths"``; all there are, if there are fewer.

    .. [1] Ateniese et al., IJSN 2015 (the meta-classifier). https://arxiv.org/abs/1306.4447
    .. [2] Ganju et al., CCS 2018 (sorted neurons, sets). https://doi.org/10.1145/3243734.3243834
    """

    num_shadows: int = 64
    order: Order = "sets"
    width: int = 8
    num_steps: int = 200
    weight_decay: float = 0.01
    num_records: int = field(default=1_000, metadata=ADDED)

    def __post_init__(self) -> None:
        at_least(2, self, num_shadows=self.num_shadows)
        at_least(1, self, width=self.width, num_steps=self.num_steps)
        at_least(1, self, num_records=self.num_records)
        at_least(0, self, weight_decay=self.weight_decay)
        one_of(Order, self, order=self.order)

    def __call__(
        self,
        view: Suspects[ModelView],
        *,
        population: Batch,
        shadows: Worlds[ModelView] | None,
        rng: Generator,
    ) -> Leanings:
        known = of_either(self, shadows)
        layout = view.views[0].model.layout
        ours, theirs = (
            torch.stack([v.params.cpu() for v in views]) for views in (known.views, view.views)
        )
        second = known.second.cpu()
        if self.order == "flat":
            return Leanings(regressed(ours, second, theirs))
        if self.order == "paths":
            order = torch.randperm(len(population[1]), generator=rng)[: self.num_records]
            records = population[0][order.to(population[0].device)]
            ours, theirs = (slopes(views, records) for views in (known.views, view.views))
            return Leanings(regressed(ours, second, theirs))
        layers, asked = layers_of(self, layout, ours), layers_of(self, layout, theirs)
        if self.order == "sorted" or len(layers) == 1:
            return Leanings(regressed(in_order(layers), second, in_order(asked)))
        return Leanings(self._as_sets(layers, second, asked, rng))

    def _as_sets(
        self, layers: list[Layer], second: Tensor, asked: list[Layer], rng: Generator
    ) -> Tensor:
        layers, asked = _scaled(layers, layers), _scaled(layers, asked)
        with ambient(rng):
            reader = _Sets([(w.shape[1:], k.shape[2]) for w, k in layers], self.width)
        optimiser = torch.optim.AdamW(reader.parameters(), lr=0.01, weight_decay=self.weight_decay)
        target = second.float()
        for _ in range(self.num_steps):
            optimiser.zero_grad()
            torch.autograd.backward(binary_cross_entropy_with_logits(reader(layers), target))
            optimiser.step()
        with torch.no_grad():
            scores: Tensor = reader.eval()(asked)
        return scores.double()


class _Sets(nn.Module):
    """Reads each hidden layer as a set of neurons, and the outputs one by one."""

    def __init__(self, shapes: list[tuple[torch.Size, int]], width: int) -> None:
        super().__init__()
        self.readers, size = nn.ModuleList(), 0
        for i, ((nodes, before, each), num_others) in enumerate(shapes):
            seen = before * each if i == 0 else 2 * width * each
            self.readers.append(nn.Linear(seen + num_others, 2 * width))
            size += 2 * width * (nodes if i == len(shapes) - 1 else 1)
        self.norm = nn.BatchNorm1d(size)
        self.last = nn.Linear(size, 1)

    def forward(self, layers: list[Layer]) -> Tensor:
        told, before = [], torch.empty(0)
        for i, (reader, (weights, others)) in enumerate(zip(self.readers, layers, strict=True)):
            if i:
                weights = torch.einsum("mobe,mbd->moed", weights, before)
            read = reader(torch.cat([weights.flatten(2), others], dim=2))
            linear, bent = read.chunk(2, dim=2)
            before = torch.cat([linear, bent.relu()], dim=2)
            told.append(before.flatten(1) if i == len(layers) - 1 else before.mean(dim=1))
        out: Tensor = self.last(self.norm(torch.cat(told, dim=1))).squeeze(1)
        return out


def regressed(known: Tensor, second: Tensor, asked: Tensor) -> Tensor:
    """Return the odds of the second kind by logistic regression, as logarithms.

    Args:
        known: One row for each own federation, and ``asked`` one for each suspect.
        second: Which of them are of the second kind.
    """
    known, asked = known.double().flatten(1), asked.double().flatten(1)
    centre, scale = known.mean(dim=0), known.std(dim=0)
    scale[scale < 1e-12] = torch.inf  # says nothing
    model = LogisticRegression(C=_STRENGTH / known.shape[1], max_iter=1_000)
    model.fit(((known - centre) / scale).numpy(), second.numpy())
    return torch.from_numpy(model.decision_function(((asked - centre) / scale).numpy()))


def layers_of(attack: object, layout: Layout, params: Tensor) -> list[Layer]:
    """Return what each layer holds of models that are chains of linear layers and convolutions.

    Args:
        params: Shape: ``(models, num_params)``.

    Returns:
        For each layer its weights, shape ``(models, nodes, nodes before, each)``, and what else
        belongs to its nodes, as biases: ``(models, nodes, k)``. Of the last layer, the distance to
        the mean of all outputs.

    Raises:
        ValueError: If a layer does not follow from the one before.
    """
    layers: list[Layer] = []
    for s in layout.slots:
        tensor = params[:, s.start : s.stop].reshape(len(params), *s.shape)
        if len(s.shape) == 1 and layers and s.shape[0] == layers[-1][0].shape[1]:
            weights, others = layers[-1]
            layers[-1] = weights, torch.cat([others, tensor[:, :, None]], dim=2)
            continue
        if len(s.shape) < 2 or (layers and s.shape[1] % layers[-1][0].shape[1]):
            raise ValueError(
                f"{attack!r} reads chains of linear layers and convolutions; {s.name!r} of shape "
                f"{s.shape} is in none: choose order = 'flat'"
            )
        before = layers[-1][0].shape[1] if layers else s.shape[1]
        weights = tensor.flatten(2).reshape(len(params), s.shape[0], before, -1)
        layers.append((weights, torch.empty(len(params), s.shape[0], 0)))
    weights, others = layers.pop()
    return [
        *layers,
        (weights - weights.mean(dim=1, keepdim=True), others - others.mean(dim=1, keepdim=True)),
    ]


def in_order(layers: list[Layer]) -> Tensor:
    """Return models whose hidden neurons rise by the sum of their weights: one row each."""
    parts, order = [], None
    for i, (weights, others) in enumerate(layers):
        if order is not None:
            index = order[:, None, :, None].expand(-1, weights.shape[1], -1, weights.shape[3])
            weights = weights.gather(2, index)
        if i < len(layers) - 1:
            order = weights.sum(dim=(2, 3)).argsort(dim=1, stable=True)
            weights = weights.gather(1, order[:, :, None, None].expand_as(weights))
            others = others.gather(1, order[:, :, None].expand_as(others))
        parts += [weights.flatten(1), others.flatten(1)]
    return torch.cat(parts, dim=1)


def slopes(views: Sequence[ModelView], records: Tensor) -> Tensor:
    """Return how each model's outputs rise with each input, and what they are, in the mean.

    Over the records, and with the mean over the outputs taken out. Of a net of linear and rectified
    layers a slope is the sum over paths of the product of their weights, each path counted for the
    share of the records that pass all its neurons.

    Returns:
        Shape: ``(models, outputs * (numbers of a record + 1))``.
    """

    def read(view: ModelView) -> Tensor:
        leaf = records.detach().clone().requires_grad_()
        outputs = view.model.logits(view.params, leaf)
        means = (outputs - outputs.mean(dim=1, keepdim=True)).mean(dim=0)
        each = [torch.autograd.grad(m, leaf, retain_graph=True)[0].sum(dim=0) for m in means]
        return torch.cat([torch.stack(each).flatten(), means.detach()]).cpu()

    return torch.stack([read(view) for view in views])


def _scaled(known: list[Layer], layers: list[Layer]) -> list[Layer]:
    """Return layers in deviations of the known ones, the same for all neurons of a hidden layer."""
    scaled = []
    for i, ((known_weights, known_others), (weights, others)) in enumerate(
        zip(known, layers, strict=True)
    ):
        axes = (
            (0, 1) if i == 0 else (0, 1, 2)
        )  # inputs have their places; what neurons give has not
        spread = known_weights.std(dim=axes, keepdim=True).clamp(min=1e-6)
        mean = known_others.mean(dim=(0, 1), keepdim=True)
        width = known_others.std(dim=(0, 1), keepdim=True).clamp(min=1e-6)
        scaled.append((weights / spread, (others - mean) / width))
    return scaled
