"""Attributes by what a model holds: its gradients, and its neurons."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.func import grad, vmap

from turncoat.activations import features
from turncoat.attacks.attribute.queries import Prior, answers_by_value, of_label, prior_of
from turncoat.games.attributes import Hidden, features_of, forest
from turncoat.task import Batch
from turncoat.trial import Attributes
from turncoat.validate import at_least, one_of
from turncoat.views import ModelView

_CHUNK = 256  # records whose gradients are held at once


@dataclass(frozen=True)
class GradientNorm:
    """The value under which the record's gradient is shortest, times its prior [1]_ [2]_.

    Training ends where the gradients of its records are short, so that a record with the wrong
    value stands out: ``Pr[v] * exp(-|g(x_v, y)| / m)``, ``m`` being the mean norm over the
    attacker's own records.

    Differs from the paper: what tells members there chooses among the values here.

    Args:
        prior: As in ``YeomAttribute``.

    .. [1] Nasr et al., S&P 2019 (gradients of members).
       https://arxiv.org/abs/1812.00910
    .. [2] Yeom et al., CSF 2018 (attributes by membership).
       https://arxiv.org/abs/1709.01604
    """

    prior: Prior = "imputed"

    def __post_init__(self) -> None:
        one_of(Prior, self, prior=self.prior)

    def __call__(
        self,
        view: ModelView,
        *,
        rows: Tensor,
        labels: Tensor,
        hidden: Hidden,
        population: Batch,
        rng: Generator,
    ) -> Attributes:
        usual = norms(view, *population).mean().clamp(min=1e-12)
        filled = (hidden.filled(rows, v) for v in range(len(hidden.values)))
        lengths = torch.stack([norms(view, inputs, labels) for inputs in filled], dim=1)
        prior = prior_of(self.prior, rows, labels, hidden, population, rng)
        return Attributes(prior * (-lengths / usual).exp())


@dataclass(frozen=True)
class NeuronOutput:
    """What a forest makes of the record and of the neurons that know the attribute [1]_.

    On its own records the attacker finds, for each value, the neurons of the last hidden layer
    whose output goes most with whether it is the true one; a forest then reads these, the answers
    and all else that is known. For a linear model the inputs are its neurons.

    Differs from the paper: of one layer; a forest where the paper averages and then joins the
    average with imputation.

    Args:
        num_neurons: How many for each value.

    .. [1] Jayaraman and Evans, CCS 2022. https://arxiv.org/abs/2209.01292
    """

    num_neurons: int = 10

    def __post_init__(self) -> None:
        at_least(1, self, num_neurons=self.num_neurons)

    def __call__(
        self,
        view: ModelView,
        *,
        rows: Tensor,
        labels: Tensor,
        hidden: Hidden,
        population: Batch,
        rng: Generator,
    ) -> Attributes:
        def outputs(inputs: Tensor) -> list[Tensor]:
            filled = (hidden.filled(inputs, v) for v in range(len(hidden.values)))
            return [features(view.model, view.params, x).double().cpu() for x in filled]

        def known(data: Batch, by_value: list[Tensor]) -> Tensor:
            answers = of_label(answers_by_value(view, data[0], hidden), data[1]).clamp(min=-20)
            picked = [held[:, chosen] for held, chosen in zip(by_value, best, strict=True)]
            told = features_of(data[0].cpu(), data[1].cpu(), hidden)
            return torch.cat([told, answers, *picked], dim=1)

        held, own = hidden.read(population[0]), outputs(population[0])
        best = [
            correlation(neurons, held == v).abs().argsort(descending=True, stable=True)
            for v, neurons in enumerate(own)
        ]
        best = [order[: self.num_neurons] for order in best]
        model = forest(rng).fit(known(population, own).numpy(), held.numpy())
        scores = torch.zeros(len(rows), len(hidden.values), dtype=torch.float64)
        probs = model.predict_proba(known((rows, labels), outputs(rows)).numpy())
        scores[:, torch.from_numpy(model.classes_)] = torch.from_numpy(probs)
        return Attributes(scores)


def norms(view: ModelView, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return the length of each record's gradient. Shape: ``(records,)``, float64."""
    model, end = view.model, view.model.layout.num_trainable
    rest = view.params[end:]

    def loss(trained: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return model.criterion(model.logits(torch.cat([trained, rest]), x[None]), y[None])

    lengths = vmap(lambda x, y: torch.linalg.vector_norm(grad(loss)(view.params[:end], x, y)))
    chunks = zip(torch.split(inputs, _CHUNK), torch.split(labels, _CHUNK), strict=True)
    return torch.cat([lengths(x, y).detach() for x, y in chunks]).double().cpu()


def correlation(neurons: Tensor, is_true: Tensor) -> Tensor:
    """Return how each neuron goes with a fact; 0 for one that never changes."""
    centred, fact = neurons - neurons.mean(dim=0), is_true.double() - is_true.double().mean()
    spread = torch.linalg.vector_norm(centred, dim=0) * torch.linalg.vector_norm(fact)
    return torch.where(spread > 1e-12, fact @ centred / spread.clamp(min=1e-12), 0.0)
