"""What an inversion works on, and what its parts have to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from turncoat.attacks.inversion.objectives import Apart
from turncoat.task import Batch, Model
from turncoat.validate import at_least


@dataclass(frozen=True, slots=True)
class Clue:
    """What one inversion works on.

    Attributes:
        before: The state that the victim got. Shape: ``(num_params,)``.
        delta: Its update: a step of descent, or several. Shape: ``(num_params,)``.
        num_images: How many images are behind it.
        population: What anybody knows such data to look like.
    """

    model: Model = field(repr=False)
    before: Tensor = field(repr=False)
    delta: Tensor = field(repr=False)
    num_images: int
    population: Batch = field(repr=False)

    def __post_init__(self) -> None:
        refuse_unusable("Clue", self.model, before=self.before, delta=self.delta)
        at_least(1, self, num_images=self.num_images)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the guess, images first."""
        return (self.num_images, *self.population[0].shape[1:])

    @property
    def gradient(self) -> tuple[Tensor, ...]:
        """``-delta``, one tensor for each trainable parameter, in the layout's order.

        They lie one after another in one vector, without the buffers.
        """
        slots = [s for s in self.model.layout.slots if s.trainable and self._moves(s.name)]
        whole = torch.cat([-self.delta[s.start : s.stop] for s in slots])
        return Apart.of(whole, [s.shape for s in slots])

    def _moves(self, name: str) -> bool:
        moves: bool = self.model.tensors[name].requires_grad
        return moves


@dataclass(frozen=True, slots=True)
class Seen:
    """What one leaf layer read and gave at the guess, with its graph."""

    name: str
    read: Tensor = field(repr=False)
    gave: Tensor = field(repr=False)


def refuse_unusable(asker: str, model: Model, **vectors: Tensor) -> None:
    """Refuse vectors that are not of the model's layout, or not finite."""
    due = (model.layout.num_params,)
    for name, vector in vectors.items():
        if tuple(vector.shape) != due:
            raise ValueError(
                f"{asker}: {name} has shape {tuple(vector.shape)}; {due} is due: it is of another "
                "model, so attack it with that one"
            )
        if not bool(vector.isfinite().all()):
            raise ValueError(
                f"{asker}: {name} holds NaN or infinity: there is nothing to match; choose another "
                "victim or round"
            )


class Objective(Protocol):
    """How far the guess's gradient is from the one seen: a scalar.

    One tensor for each trainable parameter on either side. One that compares lengths, and so needs
    to know the client's step size, says ``needs_scale = True``.
    """

    def __call__(self, guessed: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor: ...


class Prior(Protocol):
    """What images are held to be like: a scalar, multiplied by the prior's own ``weight``.

    Offered: labels (n,), model, before, population; activations (what every leaf layer of the
    shared model gave at the images, in order) and layers (the same as ``Seen``, with what it read),
    from the pass that makes the gradient. A prior with ``prepared(clue, labels, rng) -> Prior`` is
    asked once, before the loop, for the one to use: so are objectives, starts and spaces.
    """

    def __call__(self, images: Tensor, *args: Any, **asks: Any) -> Tensor: ...


class Start(Protocol):
    """Where a guess begins: pixels in [0, 1]. Offered: rng, labels, population."""

    def __call__(self, shape: tuple[int, ...], *args: Any, **asks: Any) -> Tensor: ...


class Space(Protocol):
    """What is moved, and the images it stands for. Of several guesses, the first axis is theirs.

    One that was ``prepared`` may say ``onwards(images) -> Prior | None``: the search then goes on
    in pixels from the images that it found, and takes that prior along.
    """

    def encode(self, start: Tensor, /) -> Tensor: ...

    def decode(self, variable: Tensor, /) -> Tensor: ...

    def clamp_(self, variable: Tensor, /) -> None: ...


class Optimiser(Protocol):
    """Moves variables in place to where the cost is least.

    ``slope()`` fills the ``grad`` of each variable and returns the cost, of one guess or of several
    that are moved at once; ``clamp()`` brings the variables back to where they may be. One that
    cannot move several says ``one_at_a_time = True``.
    """

    def __call__(
        self,
        variables: Sequence[Tensor],
        slope: Callable[[], Tensor],
        *,
        clamp: Callable[[], None],
        patience: int | None,
    ) -> None: ...


class LabelRule(Protocol):
    """The labels behind a clue. Shape: ``(n,)``. Offered: rng.

    A rule that returns floats gives the logits of soft labels, ``(n, classes)``, which are moved
    along with the images.
    """

    def __call__(self, clue: Clue, *args: Any, **asks: Any) -> Tensor: ...
