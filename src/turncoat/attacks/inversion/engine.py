"""Gradient inversion in parts: how far, what else is known, where from, what moves, and how.

A guess is put through the shared model once an iteration; its gradient is compared with the one
that was seen, and the slope of that comparison moves the guess. Everything else is a part::

    objective(g(x), g*) + Σ prior(x)        over x = space.decode(variable), labels by a rule
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor
from torch.func import vmap

from turncoat.attacks.inversion.convolutions import Held, Winograd
from turncoat.attacks.inversion.gradients import Plain, Together, Way
from turncoat.attacks.inversion.objectives import Apart, Scattered, flat
from turncoat.attacks.inversion.roles import (
    Clue,
    LabelRule,
    Objective,
    Optimiser,
    Prior,
    Seen,
    Space,
    Start,
)
from turncoat.drafts import Drafts
from turncoat.randomness import ambient
from turncoat.stage import asks, call, code_of
from turncoat.task import Learner
from turncoat.trial import Reconstruction
from turncoat.validate import at_least, positive

__all__ = [
    "CannotCompile",
    "Clue",
    "LabelRule",
    "Objective",
    "Optimiser",
    "Pixels",
    "Prior",
    "Recipe",
    "Seen",
    "Space",
    "Start",
    "Unrolled",
    "invert",
    "invert_all",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Pixels:
    """The guess is the image itself, kept within [0, 1]."""

    def encode(self, start: Tensor) -> Tensor:
        return start.clone()

    def decode(self, variable: Tensor) -> Tensor:
        return variable

    def clamp_(self, variable: Tensor) -> None:
        variable.clamp_(0, 1)


@dataclass(frozen=True)
class Unrolled:
    """The client's local training, repeated on the guess so that it can be differentiated [1]_.

    The guess's update is compared with the client's, in units of ``lr``: also of one step, whose
    length then means something.

    Differs from the paper: the loss of a batch is its mean, as clients here train. A client
    shuffles and the attacker cannot know how: the guess's batches follow one another unshuffled,
    the same in each epoch.

    Args:
        lr: Step size of the client.
        batch_size: Images in a step; None for all of them.

    .. [1] Geiping et al., NeurIPS 2020, section 6. https://arxiv.org/abs/2003.14053
    """

    lr: float
    num_epochs: int = 1
    batch_size: int | None = None

    def __post_init__(self) -> None:
        positive(self, lr=self.lr)
        at_least(1, self, num_epochs=self.num_epochs, batch_size=self.batch_size)

    def batches(self, num_images: int) -> list[slice]:
        """Return which images each step is made with."""
        size = min(self.batch_size or num_images, num_images)
        one = [slice(i, min(i + size, num_images)) for i in range(0, num_images, size)]
        return one * self.num_epochs


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All the parts of an inversion.

    Args:
        unrolled: The client's training; None takes its update for one gradient of unknown length.
        num_restarts: Fresh starts, of which the smallest objective wins, priors left out.
        patience: Iterations without progress after which the step size is cut, and in the end the
            search given up; None never stops early.
        together: Move all restarts, and all victims of one state, in one batch of work: faster
            for small nets, at the memory of all. The last bits then depend on the company.
        compile: Compile the whole iteration first, for long jobs.
    """

    objective: Objective
    optimiser: Optimiser
    start: Start
    labels: LabelRule
    priors: tuple[Prior, ...] = ()
    space: Space = Pixels()
    unrolled: Unrolled | None = None
    num_restarts: int = 1
    patience: int | None = None
    together: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        at_least(1, self, num_restarts=self.num_restarts, patience=self.patience)
        if getattr(self.objective, "needs_scale", False) and self.unrolled is None:
            raise ValueError(
                f"{self.objective!r} compares lengths, and no step size is known: say the "
                "client's, as unrolled=Unrolled(lr=0.1), or take Cosine()"
            )
        if self.together and getattr(self.optimiser, "one_at_a_time", False):
            raise ValueError(f"{self.optimiser!r} moves one guess at a time: leave together out")


class CannotCompile(RuntimeError):
    """An iteration could not be compiled: by what it is made of, or for want of a compiler."""


def invert(clue: Clue, recipe: Recipe, *, rng: Generator) -> Reconstruction:
    """Return the images and labels that best explain an update."""
    return invert_all((clue,), recipe, rng=rng)[0]


def invert_all(
    clues: Sequence[Clue], recipe: Recipe, *, rng: Generator, drafts: Drafts | None = None
) -> tuple[Reconstruction, ...]:
    """Return what best explains each of several updates; what they share is made once.

    Args:
        drafts: Where each is kept as soon as it is done, and read if it is; all that move together
            are done together.
    """
    found: list[Reconstruction] = []
    for alike in _alike(clues):
        if any(hasattr(part, "prepared") for part in _parts(recipe)):
            for clue in alike:
                done = drafts.get(len(found), rng) if drafts else None
                if done is None:
                    done = _found(_prepared(recipe, clue, rng), clue, rng)
                    if drafts:
                        drafts.put(len(found), done, rng)
                found.append(done)
        else:
            found += _Search(recipe, alike)(rng, drafts, len(found))
    return tuple(found)


def _alike(clues: Sequence[Clue]) -> Iterator[tuple[Clue, ...]]:
    """Yield stretches of clues that differ in their update alone."""
    rest = list(clues)
    while rest:
        first, size = rest[0], 1
        while size < len(rest) and (
            rest[size].model is first.model
            and rest[size].before is first.before
            and rest[size].shape == first.shape
        ):
            size += 1
        yield tuple(rest[:size])
        del rest[:size]


def _parts(recipe: Recipe) -> tuple[Any, ...]:
    return (recipe.objective, recipe.start, recipe.space, *recipe.priors)


def _prepared(recipe: Recipe, clue: Clue, rng: Generator) -> Recipe:
    """Return the recipe with each part that wants to see the clue first fitted to it."""
    labels = call(recipe.labels, clue, rng=rng)
    labels = labels.argmax(dim=1) if labels.is_floating_point() else labels

    def fitted(part: T) -> T:
        made: T = part.prepared(clue, labels, rng) if hasattr(part, "prepared") else part
        return made

    return replace(
        recipe,
        objective=fitted(recipe.objective),
        start=fitted(recipe.start),
        space=fitted(recipe.space),
        priors=tuple(map(fitted, recipe.priors)),
    )


def _found(recipe: Recipe, clue: Clue, rng: Generator) -> Reconstruction:
    """Search in the recipe's space; then, if that says so, go on in pixels from there."""
    (found,) = _Search(recipe, (clue,))(rng)
    onwards = getattr(recipe.space, "onwards", None)
    hold = onwards(found.inputs) if onwards else None
    if hold is None:
        return found
    further = replace(
        recipe,
        start=_There(found.inputs),
        labels=_There(found.labels),
        priors=(*recipe.priors, hold),
        space=Pixels(),
        num_restarts=1,
    )
    return _Search(further, (clue,))(rng)[0]


@dataclass(frozen=True, eq=False)
class _There:
    """A start, or a rule for labels, that says what was found before."""

    found: Tensor

    def __call__(self, *args: Any, **offers: Any) -> Tensor:
        return self.found


@dataclass(frozen=True, slots=True)
class _Guess:
    """One start of one clue: what is moved, and what it is compared with."""

    clue: int
    variable: Tensor
    labels: Tensor
    target: tuple[Tensor, ...]


class _Search:
    """All restarts of clues that share a state. It borrows the model's module."""

    def __init__(self, recipe: Recipe, clues: tuple[Clue, ...]) -> None:
        self.recipe, self.clues = recipe, clues
        self.clue = clues[0]
        self.joint = False
        asked = {name for prior in recipe.priors for name in asks(code_of(prior))[0]}
        self.watch = bool(asked & {"activations", "layers"})
        self.step: Callable[..., tuple[Tensor, ...]] | None = None
        self.guessed: tuple[Tensor, ...] = ()  # by a step to compile: how its gradients lie

    def __call__(
        self, rng: Generator, drafts: Drafts | None = None, first: int = 0
    ) -> list[Reconstruction]:
        """Return one for each clue, of which the first has the number ``first`` in the drafts."""
        recipe, model = self.recipe, self.clue.model
        rules = [call(recipe.labels, c, rng=rng) for c in self.clues]
        self.joint = rules[0].is_floating_point()
        best: list[tuple[float, Reconstruction] | None] = [None] * len(self.clues)
        learner = model.learner(self.clue.before)  # the module then holds ``before``
        try:
            with ambient(rng):
                if recipe.together:
                    everyone = [
                        g for i in range(len(rules)) for g in self._guesses(i, rules[i], rng)
                    ]
                    self._keep_best(best, everyone, learner)
                    return [b[1] for b in best if b is not None]
                for i, rule in enumerate(rules):
                    if drafts and (done := drafts.get(first + i, rng)):
                        best[i] = 0.0, done
                        continue
                    for guess in self._guesses(i, rule, rng):
                        self._keep_best(best, [guess], learner)
                    if drafts and (held := best[i]):
                        drafts.put(first + i, held[1], rng)
        finally:
            learner.finish()
        return [b[1] for b in best if b is not None]

    def _keep_best(
        self,
        best: list[tuple[float, Reconstruction] | None],
        guesses: Sequence[_Guess],
        learner: Learner,
    ) -> None:
        for guess, cost, made in zip(guesses, *self._moved(guesses, learner), strict=True):
            held = best[guess.clue]
            if held is None or cost < held[0]:
                best[guess.clue] = cost, made

    def _guesses(self, place: int, labels: Tensor, rng: Generator) -> Iterator[_Guess]:
        recipe, clue = self.recipe, self.clues[place]
        target = clue.gradient
        if recipe.unrolled is not None:
            whole = flat(target) / recipe.unrolled.lr
            target = Apart.of(whole, [t.shape for t in target])
        known = labels.argmax(dim=1) if self.joint else labels
        for restart in range(recipe.num_restarts):
            if self.joint and restart:
                labels = call(recipe.labels, clue, rng=rng)
            start = call(
                recipe.start, clue.shape, rng=rng, labels=known, population=clue.population
            )
            with torch.no_grad():
                variable = recipe.space.encode(start.to(clue.before.device)).detach()
            yield _Guess(place, variable, labels, target)

    def _moved(
        self, guesses: Sequence[_Guess], learner: Learner
    ) -> tuple[list[float], list[Reconstruction]]:
        """Return what the guesses come to, and their objectives; several are moved at once."""
        several = len(guesses) > 1

        def stacked(tensors: Iterable[Tensor]) -> Tensor:
            held = list(tensors)
            return torch.stack(held) if several else held[0]

        variable = stacked(g.variable for g in guesses)
        labels = stacked(g.labels for g in guesses)
        target = guesses[0].target
        if several:  # a plain tuple, which vmap can look into
            target = tuple(map(stacked, zip(*(g.target for g in guesses), strict=True)))
        variables = (variable, labels) if self.joint else (variable,)
        if self.step is None:
            self.step = self._first_step(learner, several, variable, labels, target)
        if self.guessed:
            target = tuple(Scattered.like(self.guessed, target))
        step, last = self.step, torch.empty(0)

        def slope() -> Tensor:
            nonlocal last
            last, total, *slopes = step(variable, labels, target)
            for moved, along in zip(variables, slopes, strict=True):
                moved.grad = along
            return total

        def clamp() -> None:
            with torch.no_grad():
                self.recipe.space.clamp_(variable)

        self.recipe.optimiser(variables, slope, clamp=clamp, patience=self.recipe.patience)
        clamp()
        with torch.no_grad():
            images = [self.recipe.space.decode(v) for v in (variable if several else (variable,))]
        said = labels if several else labels[None]
        said = said.argmax(dim=2) if self.joint else said
        made = [Reconstruction(i.detach(), y) for i, y in zip(images, said, strict=True)]
        return last.reshape(-1).tolist(), made

    def _first_step(
        self,
        learner: Learner,
        several: bool,
        variable: Tensor,
        labels: Tensor,
        target: tuple[Tensor, ...],
    ) -> Callable[..., tuple[Tensor, ...]]:
        """Return the iteration, compiled if it shall be; of several guesses at once, or of one."""
        model, compiling = self.clue.model, self.recipe.compile
        if several:
            step = partial(self._step, Together(learner, model), True)
            return _compiled(step, variable, labels, target) if compiling else step
        way = Plain(learner, model, Winograd() if compiling else Held())
        step = partial(self._step, way, False)
        if not compiling:
            return step
        guessed, _, _ = self._guessed(way, variable, labels)
        self.guessed = tuple(g.detach() for g in guessed)
        way.lay(self.guessed)

        def scattered(
            variable: Tensor, labels: Tensor, target: tuple[Tensor, ...]
        ) -> tuple[Tensor, ...]:
            return step(variable, labels, Scattered(target))

        return _compiled(scattered, variable, labels, tuple(Scattered.like(guessed, target)))

    def _step(
        self, way: Way, several: bool, variable: Tensor, labels: Tensor, target: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Return objectives, costs, and the slopes of what is moved."""
        variable = variable.detach().requires_grad_()
        if self.joint:
            labels = labels.detach().requires_grad_()
        variables = (variable, labels) if self.joint else (variable,)
        cost: Callable[..., tuple[Tensor, Tensor]] = partial(self._cost, way)
        cost = vmap(cost, randomness="different") if several else cost
        objective, total = cost(variable, labels, target)
        if not total.requires_grad:  # nothing pulls at the guess
            return objective, total, *map(torch.zeros_like, variables)
        slopes = torch.autograd.grad(total.sum(), variables, materialize_grads=True)
        return objective.detach(), total.detach(), *slopes

    def _cost(
        self, way: Way, variable: Tensor, labels: Tensor, target: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        recipe, clue = self.recipe, self.clue
        guessed, images, layers = self._guessed(way, variable, labels)
        objective = recipe.objective(guessed, target)
        offers = {
            "labels": labels.argmax(dim=1) if self.joint else labels,
            "model": clue.model,
            "before": clue.before,
            "population": clue.population,
            "activations": tuple(s.gave for s in layers),
            "layers": layers,
        }
        total = objective
        for prior in recipe.priors:
            total = total + call(prior, images, **offers)
        return objective, total

    def _guessed(
        self, way: Way, variable: Tensor, labels: Tensor
    ) -> tuple[Sequence[Tensor], Tensor, tuple[Seen, ...]]:
        """Return the gradient of a guess, its images, and what each layer did if watched."""
        images = self.recipe.space.decode(variable)
        soft = labels.softmax(dim=1) if self.joint else labels
        guessed, layers = self._gradient(way, images, soft)
        return guessed, images, layers

    def _gradient(
        self, way: Way, images: Tensor, labels: Tensor
    ) -> tuple[Sequence[Tensor], tuple[Seen, ...]]:
        """Return the guess's gradient, or its update in units of the step size."""
        unrolled, watch = self.recipe.unrolled, self.watch
        batches = unrolled.batches(len(images)) if unrolled else [slice(None)]
        if len(batches) == 1:
            return way(None, images, labels, watch)
        assert unrolled is not None
        layers: tuple[Seen, ...] = ()
        whole = batches[0] == slice(0, len(images))
        if watch and not whole:
            layers = way.layers(images)
        moved: list[Tensor] = []
        for number, chosen in enumerate(batches):
            watched = watch and whole and not number
            slopes, seen = way(
                [-unrolled.lr * m for m in moved] or None, images[chosen], labels[chosen], watched
            )
            layers = seen if watched else layers
            moved = [m + g for m, g in zip(moved, slopes, strict=True)] if moved else list(slopes)
        return moved, layers


def _compiled(
    step: Callable[..., tuple[Tensor, ...]], *example: Any
) -> Callable[..., tuple[Tensor, ...]]:
    """Return the iteration as one compiled graph; both derivatives are traced into it."""
    from torch.fx.experimental.proxy_tensor import make_fx

    try:
        with warnings.catch_warnings(action="ignore"):  # of the compiler's own, on its first import
            step(*example)  # makes the kernels, of which the trace then holds the values
            traced = make_fx(step)(*example)
            made: Callable[..., tuple[Tensor, ...]] = torch.compile(traced, fullgraph=True)
            made(*example)
    except Exception as error:
        said = str(error).strip().split("\n")[0]
        raise CannotCompile(
            f"this inversion cannot be compiled ({type(error).__name__}: {said}): a C++ compiler "
            "must be at hand, and no part may look at values; else leave compile = false"
        ) from error
    return made
