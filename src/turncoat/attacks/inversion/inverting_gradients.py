"""Gradient inversion: from the update of a client back to the examples it trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from turncoat.messages import Update
from turncoat.randomness import ambient
from turncoat.task import Batch, Model
from turncoat.trial import Reconstruction
from turncoat.validate import at_least, positive
from turncoat.views import AggregateView, ServerView

MAX_IMAGES = 16  # of one victim, where the attack is not told how many


@dataclass(frozen=True, kw_only=True)
class InvertingGradients:
    """Match the direction of each victim's update by moving the pixels of a guess [1]_.

    Minimises ``1 - cos(g(x), g*) + tv_weight * TV(x)`` over images ``x`` in ``[0, 1]``: one cosine
    over all layers together, and Adam on the sign of the gradient, its step cut to a tenth at 3/8,
    5/8 and 7/8 of the way. Labels are read off the gradient of the last bias first (iDLG [2]_ for
    one example; counts for more).

    Differs from the paper: starts from uniform, not Gaussian, pixels. An update of several local
    steps is taken for one gradient, where the paper unrolls the steps: the seat does not see the
    client's recipe. Buffers stay out of the cosine.

    Args:
        num_steps: Iterations for each restart; the paper takes 4,800 and more.
        num_restarts: Fresh starts, of which the smallest cosine cost wins.
        num_images: Images to guess for each victim; None for as many examples as it claims,
            at most 16.

    .. [1] Geiping et al., NeurIPS 2020, eq. (4). https://arxiv.org/abs/2003.14053
    .. [2] Zhao et al., arXiv 2020. https://arxiv.org/abs/2001.02610
    """

    num_steps: int = 1_000
    lr: float = 0.1
    tv_weight: float = 1e-4
    num_restarts: int = 1
    num_images: int | None = None

    def __post_init__(self) -> None:
        at_least(1, self, num_steps=self.num_steps, num_restarts=self.num_restarts)
        at_least(1, self, num_images=self.num_images)
        at_least(0, self, tv_weight=self.tv_weight)
        positive(self, lr=self.lr)

    def __call__(
        self,
        view: ServerView[Update],
        *,
        victims: tuple[int, ...],
        population: Batch,
        rng: Generator,
    ) -> tuple[Reconstruction, ...]:
        found = []
        for victim in victims:
            if victim not in view.senders:
                raise ValueError(
                    f"client {victim} sent nothing in round {view.round}: choose a victim among "
                    f"{', '.join(map(str, view.senders))}"
                )
            place = view.senders.index(victim)
            message = view.messages[place]
            claimed = min(MAX_IMAGES, max(1, round(message.weight)))
            found.append(
                _inverted(
                    view.model,
                    view.sent[place],
                    message.delta,
                    population,
                    num_images=self.num_images or claimed,
                    num_steps=self.num_steps,
                    lr=self.lr,
                    tv_weight=self.tv_weight,
                    num_restarts=self.num_restarts,
                    rng=rng,
                )
            )
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class InvertingAggregate:
    """Take the step of the global model for the victim's own update, and invert that [1]_.

    All that ``InvertingGradients`` can do where it sees no single update. Right in a cohort of one;
    with more clients the others' updates are noise to it, and every victim gets the same guess.

    Differs from the paper: as ``InvertingGradients``.

    .. [1] Geiping et al., NeurIPS 2020, eq. (4). https://arxiv.org/abs/2003.14053
    """

    num_steps: int = 1_000
    lr: float = 0.1
    tv_weight: float = 1e-4
    num_restarts: int = 1
    num_images: int = 1

    def __post_init__(self) -> None:
        at_least(1, self, num_steps=self.num_steps, num_restarts=self.num_restarts)
        at_least(1, self, num_images=self.num_images)
        at_least(0, self, tv_weight=self.tv_weight)
        positive(self, lr=self.lr)

    def __call__(
        self,
        view: AggregateView[Update],
        *,
        victims: tuple[int, ...],
        population: Batch,
        rng: Generator,
    ) -> tuple[Reconstruction, ...]:
        found = _inverted(
            view.model,
            view.before,
            view.after - view.before,
            population,
            num_images=self.num_images,
            num_steps=self.num_steps,
            lr=self.lr,
            tv_weight=self.tv_weight,
            num_restarts=self.num_restarts,
            rng=rng,
        )
        return (found,) * len(victims)


def _inverted(
    model: Model,
    before: Tensor,
    delta: Tensor,
    population: Batch,
    *,
    num_images: int,
    num_steps: int,
    lr: float,
    tv_weight: float,
    num_restarts: int,
    rng: Generator,
) -> Reconstruction:
    """Return the best of the restarts. A step of descent points against the gradient."""
    labels = labels_of(model, before, -delta, population, num_images)
    leaves = {n: p for n, p in model.module.named_parameters() if p.requires_grad}
    target = torch.cat([-delta[s.start : s.stop] for s in model.layout.slots if s.name in leaves])
    shape = (num_images, *population[0].shape[1:])
    best, best_cost = torch.empty(0), float("inf")
    learner = model.learner(before)  # the module then holds ``before``, and nothing is re-bound
    try:
        with ambient(rng):
            for _ in range(num_restarts):
                guess = torch.rand(shape, generator=rng).to(before.device).requires_grad_()
                optimiser = torch.optim.Adam([guess], lr=lr)
                for step in range(num_steps):
                    loss = model.criterion(learner.outputs(guess), labels)
                    grads = torch.autograd.grad(
                        loss, list(leaves.values()), create_graph=True, materialize_grads=True
                    )
                    cost = 1 - _cosine(torch.cat([g.flatten() for g in grads]), target)
                    (slope,) = torch.autograd.grad(cost + tv_weight * total_variation(guess), guess)
                    guess.grad = slope.sign_()
                    optimiser.param_groups[0]["lr"] = lr * 0.1 ** _cuts(step, num_steps)
                    optimiser.step()
                    with torch.no_grad():
                        guess.clamp_(0, 1)
                final = float(cost.detach())  # of the last step but one: saves an evaluation
                if final < best_cost or not best.numel():
                    best, best_cost = guess.detach(), final
    finally:
        learner.finish()
    return Reconstruction(best, labels)


def labels_of(
    model: Model, before: Tensor, gradient: Tensor, population: Batch, num_images: int
) -> Tensor:
    """Return the labels behind a gradient of mean cross-entropy. Shape: ``(num_images,)``.

    The last bias has ``g_c = mean(p_c) - count_c / n``. For one example only its own class is
    negative: exact [1]_. For more, ``mean(p_c)`` is taken from the population. The step size is
    not known, so the scale is set by the class that was pushed down most: it is held to be absent.
    A last layer without bias gives its rows' sums instead, right if what it reads is not negative.

    .. [1] Zhao et al., arXiv 2020. https://arxiv.org/abs/2001.02610
    """
    slots = [s for s in model.layout.slots if s.trainable]
    last = gradient[slots[-1].start : slots[-1].stop].reshape(slots[-1].shape)
    pushed = last if last.ndim == 1 else last.flatten(1).sum(dim=1)
    if num_images == 1:
        return pushed.argmin().reshape(1)
    with torch.no_grad():
        prior = model.logits(before, population[0][:1_000]).softmax(dim=1).mean(dim=0)
    prior = prior.clamp(min=1e-6)
    scale = (pushed / prior).max()
    shares = (prior - pushed / scale).clamp(min=0) if scale > 0 else prior
    return _apportioned(shares, num_images)


def _apportioned(shares: Tensor, num_images: int) -> Tensor:
    """Return classes in numbers proportional to ``shares``, by largest remainders."""
    due = shares / shares.sum() * num_images
    counts = due.floor().long()
    rest = (due - counts).argsort(descending=True, stable=True)[: num_images - int(counts.sum())]
    counts[rest] += 1
    return torch.arange(len(shares), device=shares.device).repeat_interleave(counts)


def total_variation(images: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbours, across plus down."""
    return images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    cosine: Tensor = a.dot(b) / (a.norm() * b.norm()).clamp(min=1e-12)
    return cosine


def _cuts(step: int, num_steps: int) -> int:
    """Return how often the step size has been cut to a tenth."""
    return sum(step >= num_steps * eighths / 8 for eighths in (3, 5, 7))
