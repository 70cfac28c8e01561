"""From the update of a client back to the examples it trained on."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from torch import Generator

from turncoat.attacks.inversion.engine import (
    Clue,
    LabelRule,
    Objective,
    Optimiser,
    Pixels,
    Prior,
    Recipe,
    Space,
    Start,
    Unrolled,
    invert,
    invert_all,
)
from turncoat.attacks.inversion.labels import Counts, Joint, LowestEntry
from turncoat.attacks.inversion.objectives import L2, Cosine, Silent
from turncoat.attacks.inversion.optimisers import LBFGS, SignedAdam
from turncoat.attacks.inversion.priors import TotalVariation
from turncoat.attacks.inversion.roles import refuse_unusable
from turncoat.attacks.inversion.starts import Gaussian, Uniform
from turncoat.drafts import Drafts
from turncoat.messages import Update
from turncoat.task import Batch
from turncoat.trial import Reconstruction
from turncoat.validate import at_least, positive
from turncoat.views import AggregateView, ServerView

MAX_IMAGES = 16  # of one victim, where the attack is not told how many


@dataclass(frozen=True, kw_only=True)
class GradientInversion:
    """Move a guess until its gradient is the victim's: every part of it can be chosen [1]_.

    Minimises ``objective(g(x), g*) + Σ prior(x)`` from ``start`` in ``space`` by ``optimiser``,
    labels by a rule. The defaults are those of ``InvertingGradients``.

    Args:
        unrolled: The client's local training, repeated on the guess; None takes its update for one
            gradient, of unknown length.
        num_restarts: Fresh starts, of which the smallest objective wins.
        num_images: Images to guess for each victim; None for as many examples as it claims,
            at most 16.
        patience: Iterations without progress before the step is cut, and at last the search ends.
        together: Move all restarts and victims of one state in one batch of work.
        compile: Compile the iteration first, for long jobs.

    .. [1] Geiping et al., NeurIPS 2020, eq. (4). https://arxiv.org/abs/2003.14053
    """

    objective: Objective = field(default_factory=Cosine)
    priors: tuple[Prior, ...] = (TotalVariation(),)
    optimiser: Optimiser = field(default_factory=SignedAdam)
    start: Start = field(default_factory=Uniform)
    labels: LabelRule = field(default_factory=Counts)
    space: Space = field(default_factory=Pixels)
    unrolled: Unrolled | None = None
    num_restarts: int = 1
    num_images: int | None = None
    patience: int | None = None
    together: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        at_least(1, self, num_images=self.num_images)
        _ = self.recipe

    @property
    def recipe(self) -> Recipe:
        """Its parts, for the engine."""
        return Recipe(**{f.name: getattr(self, f.name) for f in fields(Recipe)})

    @property
    def prior_only(self) -> GradientInversion:
        """The same, deaf to the gradient: what start and priors are worth on their own."""
        return replace(self, objective=Silent())

    def __call__(
        self,
        view: ServerView[Update],
        *,
        victims: tuple[int, ...],
        population: Batch,
        rng: Generator,
        drafts: Drafts | None = None,
    ) -> tuple[Reconstruction, ...]:
        clues = [clue_of(view, v, population, self.num_images) for v in victims]
        return invert_all(clues, self.recipe, rng=rng, drafts=drafts)


@dataclass(frozen=True, kw_only=True)
class AggregateInversion:
    """Take the step of the global model for an update, and invert that [1]_.

    All that ``GradientInversion`` can do where it sees no single update. Two readings of a cohort
    of n: the step is one gradient of all their images together (``num_images`` counts them all), or
    it is the victim's update, n times too short, and the others' are noise (``num_clients=n``).
    Every victim gets the same guess.

    Args:
        num_images: Images to guess.
        num_clients: What the step is multiplied by. Blind to it: ``Cosine`` of one local step.
        objective, priors, optimiser, start, labels, space, unrolled, num_restarts, patience,
            together, compile: As of ``GradientInversion``.

    .. [1] Geiping et al., NeurIPS 2020, eq. (4). https://arxiv.org/abs/2003.14053
    """

    objective: Objective = field(default_factory=Cosine)
    priors: tuple[Prior, ...] = (TotalVariation(),)
    optimiser: Optimiser = field(default_factory=SignedAdam)
    start: Start = field(default_factory=Uniform)
    labels: LabelRule = field(default_factory=Counts)
    space: Space = field(default_factory=Pixels)
    unrolled: Unrolled | None = None
    num_restarts: int = 1
    num_images: int = 1
    num_clients: int = 1
    patience: int | None = None
    together: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        at_least(1, self, num_images=self.num_images, num_clients=self.num_clients)
        _ = self.recipe

    @property
    def recipe(self) -> Recipe:
        """Its parts, for the engine."""
        return Recipe(**{f.name: getattr(self, f.name) for f in fields(Recipe)})

    @property
    def prior_only(self) -> AggregateInversion:
        """The same, deaf to the gradient: what start and priors are worth on their own."""
        return replace(self, objective=Silent())

    def __call__(
        self,
        view: AggregateView[Update],
        *,
        victims: tuple[int, ...],
        population: Batch,
        rng: Generator,
    ) -> tuple[Reconstruction, ...]:
        refuse_unusable("the aggregate", view.model, before=view.before, after=view.after)
        step = view.after - view.before
        step = step if self.num_clients == 1 else step * self.num_clients
        clue = Clue(view.model, view.before, step, self.num_images, population)
        return (invert(clue, self.recipe, rng=rng),) * len(victims)


@dataclass(frozen=True, kw_only=True)
class InvertingGradients:
    """Match the direction of each victim's update by moving the pixels of a guess [1]_.

    Minimises ``1 - cos(g(x), g*) + tv_weight * TV(x)`` over images ``x`` in ``[0, 1]``: one cosine
    over all layers together, and Adam on the sign of the gradient, its step cut to a tenth at 3/8,
    5/8 and 7/8 of the way. Labels are read off the gradient of the last bias first (iDLG [2]_ for
    one example; counts for more).

    Differs from the paper: starts from uniform, not Gaussian, pixels. An update of several local
    steps is taken for one gradient; ``GradientInversion(unrolled=...)`` repeats the steps. Buffers
    stay out of the cosine.

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

    @property
    def spelt_out(self) -> GradientInversion:
        """The same in its parts."""
        return GradientInversion(
            priors=(TotalVariation(self.tv_weight),),
            optimiser=SignedAdam(self.num_steps, self.lr),
            num_restarts=self.num_restarts,
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
        population: Batch,
        rng: Generator,
        drafts: Drafts | None = None,
    ) -> tuple[Reconstruction, ...]:
        return self.spelt_out(view, victims=victims, population=population, rng=rng, drafts=drafts)


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

    @property
    def spelt_out(self) -> AggregateInversion:
        """The same in its parts."""
        return AggregateInversion(
            priors=(TotalVariation(self.tv_weight),),
            optimiser=SignedAdam(self.num_steps, self.lr),
            num_restarts=self.num_restarts,
            num_images=self.num_images,
        )

    @property
    def prior_only(self) -> AggregateInversion:
        """The same, deaf to the gradient."""
        return self.spelt_out.prior_only

    def __call__(
        self,
        view: AggregateView[Update],
        *,
        victims: tuple[int, ...],
        population: Batch,
        rng: Generator,
    ) -> tuple[Reconstruction, ...]:
        return self.spelt_out(view, victims=victims, population=population, rng=rng)


@dataclass(frozen=True, kw_only=True)
class DLG:
    """Match each victim's gradient in squared length by L-BFGS, labels searched for as well [1]_.

    For smooth nets. Many starts lead nowhere: the smallest distance of ``num_restarts`` wins.

    Differs from the paper: a Wolfe line search in place of the full step, as in later work; pixels
    begin normal around grey, and are cut off at 0 and 1 in the end; the client's step size is told,
    where the paper's attacker gets its gradient.

    Args:
        local_lr: Step size of the client, which its server usually sets.
        num_steps: Outer steps of L-BFGS, of up to 20 iterations each.
        num_images: Images to guess for each victim; None for as many examples as it claims,
            at most 16.

    .. [1] Zhu et al., NeurIPS 2019, algorithm 1. https://arxiv.org/abs/1906.08935
    """

    local_lr: float
    num_steps: int = 300
    num_restarts: int = 1
    num_images: int | None = None

    def __post_init__(self) -> None:
        _check_dlg(self)

    @property
    def spelt_out(self) -> GradientInversion:
        """The same in its parts."""
        return _dlg(self, Joint())

    def __call__(
        self,
        view: ServerView[Update],
        *,
        victims: tuple[int, ...],
        population: Batch,
        rng: Generator,
        drafts: Drafts | None = None,
    ) -> tuple[Reconstruction, ...]:
        return self.spelt_out(view, victims=victims, population=population, rng=rng, drafts=drafts)


@dataclass(frozen=True, kw_only=True)
class IDLG:
    """DLG with the labels read off the gradient first, for one example without fail [1]_.

    Differs from the paper: as ``DLG``.

    Args:
        local_lr: Step size of the client, which its server usually sets.
        num_steps: Outer steps of L-BFGS, of up to 20 iterations each.
        num_images: Images to guess for each victim; None for as many examples as it claims,
            at most 16.

    .. [1] Zhao et al., arXiv 2020. https://arxiv.org/abs/2001.02610
    """

    local_lr: float
    num_steps: int = 300
    num_restarts: int = 1
    num_images: int | None = None

    def __post_init__(self) -> None:
        _check_dlg(self)

    @property
    def spelt_out(self) -> GradientInversion:
        """The same in its parts."""
        return _dlg(self, LowestEntry())

    def __call__(
        self,
        view: ServerView[Update],
        *,
        victims: tuple[int, ...],
        population: Batch,
        rng: Generator,
        drafts: Drafts | None = None,
    ) -> tuple[Reconstruction, ...]:
        return self.spelt_out(view, victims=victims, population=population, rng=rng, drafts=drafts)


def clue_of(
    view: ServerView[Update], victim: int, population: Batch, num_images: int | None
) -> Clue:
    """Return what a server knows of one client: of as many images as it claims, at most 16.

    Raises:
        ValueError: If the client sent nothing in this round.
    """
    if victim not in view.senders:
        raise ValueError(
            f"client {victim} sent nothing in round {view.round}: choose a victim among "
            f"{', '.join(map(str, view.senders))}"
        )
    place = view.senders.index(victim)
    message = view.messages[place]
    claimed = min(MAX_IMAGES, max(1, round(message.weight)))
    return Clue(view.model, view.sent[place], message.delta, num_images or claimed, population)


def _check_dlg(attack: DLG | IDLG) -> None:
    at_least(1, attack, num_steps=attack.num_steps, num_restarts=attack.num_restarts)
    at_least(1, attack, num_images=attack.num_images)
    positive(attack, local_lr=attack.local_lr)


def _dlg(attack: DLG | IDLG, labels: LabelRule) -> GradientInversion:
    return GradientInversion(
        objective=L2(),
        priors=(),
        optimiser=LBFGS(attack.num_steps),
        start=Gaussian(),
        labels=labels,
        unrolled=Unrolled(attack.local_lr),
        num_restarts=attack.num_restarts,
        num_images=attack.num_images,
    )
