"""What is each adaptation of a model worth against inversion and membership, and what does it cost?

A factorial study: each factor has a level that is easy on the attacker and one that should not be,
and a fraction of all combinations tells the effect of every one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import prod, sqrt
from typing import Any

import torch
from scipy import stats
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d

from papers.ledger import Expectation, Experiment
from turncoat.attacks.inversion.engine import Unrolled
from turncoat.attacks.inversion.gradient_inversion import GradientInversion
from turncoat.attacks.inversion.optimisers import SignedAdam
from turncoat.attacks.inversion.priors import TotalVariation
from turncoat.attacks.membership.loss_threshold import LossThreshold
from turncoat.federation import Federation, FromModel, Plain
from turncoat.games.membership import Membership
from turncoat.games.reconstruction import Reconstruct, Records
from turncoat.randomness import Randomness, ambient
from turncoat.runtimes.simulate import simulate
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Batch, Model, Task
from turncoat.tasks.fetched import pneumoniamnist
from turncoat.tasks.models import Activation, Built, ConvNet, Normalisation, Pooling
from turncoat.validate import at_least
from turncoat.views import ModelView, ServerView


@dataclass(frozen=True)
class Setting:
    """One way to learn together: a net, how it is trained, and when it is attacked.

    Args:
        width: Channels of the first convolution; each further one has twice as many.
        depth: Convolutions; the first two halve the image.
        batch_size: Of training, and of the update that is attacked.
        num_local_steps: Steps on the same batch in that update, and epochs between two rounds.
        shrink: How much smaller the images are made, a side.
        is_trained: Whether the attacked update is one of the end of training, not of its start.
        is_pretrained: Whether training starts from a model of the public images.
    """

    activation: Activation = "tanh"
    pooling: Pooling = "mean"
    width: int = 8
    depth: int = 2
    normalisation: Normalisation = "none"
    dropout: float = 0.0
    batch_size: int = 1
    num_local_steps: int = 1
    shrink: int = 1
    is_trained: bool = False
    is_pretrained: bool = False

    @property
    def net(self) -> ConvNet:
        widths = tuple(self.width << i for i in range(self.depth))
        strides = tuple(2 if i < 2 else 1 for i in range(self.depth))
        return ConvNet(
            widths,
            strides,
            self.activation,
            self.pooling,
            self.normalisation,
            dropout=self.dropout,
        )


@dataclass(frozen=True)
class Pretrained:
    """Begin with a model that was trained on the public data."""

    train: LocalSGD

    def __call__(self, task: Task, *, rng: Generator) -> Tensor:
        start = task.model.initial(rng)
        with ambient(rng):
            return start + self.train(task.model, start, task.population, rng=rng).delta


@dataclass(frozen=True)
class Adaptations:
    """The main effect of each factor on what attackers reach and on what the model is worth.

    Every combination of the design is learnt by a federation of the same clients, its released
    model is asked who was in it, and the update of each of the first clients, on one batch of its
    own images, is inverted by a server who knows all of the setting: it repeats the client's steps.
    All combinations of one seed share their data and their draws.

    Args:
        factors: Of some fields of ``Setting``, the easy level and the adapted one.
        lr: For one example in a batch; it grows in proportion to the batch, up to ``max_lr``.
        num_epochs: In all: there are fewer rounds where each has more.
    """

    make: Callable[..., Task]
    factors: Mapping[str, tuple[Any, Any]]
    attack: GradientInversion
    lr: float = 0.01
    max_lr: float = 0.1
    num_epochs: int = 16
    num_victims: int = 4
    base: Setting = Setting()
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int) -> dict[str, float | str]:
        design = fraction_of(len(self.factors))
        names = list(self.factors)
        runs = []
        for signs in design.tolist():
            levels = {n: self.factors[n][s > 0] for n, s in zip(names, signs, strict=True)}
            runs.append(self.measured(replace(self.base, **levels), seed))
        found: dict[str, float | str] = {}
        for column in runs[0]:
            values = torch.tensor([run[column] for run in runs], dtype=torch.float64)
            found[f"mean of all settings: all | {column}"] = float(values.mean())
            found[f"mean of all settings: least | {column}"] = float(values.min())
            found[f"mean of all settings: most | {column}"] = float(values.max())
            for name, effect in zip(names, main_effects(design, values), strict=True):
                shown = name.removeprefix("is_").replace("_", " ")
                found[f"effect of adapting: {shown} | {column}"] = effect.value
                found[f"half of its interval within a seed: {shown} | {column}"] = effect.half
        found["runs"] = f"{len(design)} of {2 ** len(names)} combinations of {len(names)} factors"
        return found

    def measured(self, setting: Setting, seed: int) -> dict[str, float]:
        """Return what attackers reach, and what the model is worth, in one setting."""
        task = shrunk(self.make(seed=seed, model=setting.net, **self.options), setting)
        randomness = Randomness(seed)
        lr = min(self.max_lr, self.lr * setting.batch_size)
        epochs = setting.num_local_steps
        train = LocalSGD(lr, num_epochs=epochs, batch_size=setting.batch_size)
        rounds = max(1, self.num_epochs // epochs)
        federation = Federation(
            train=train,
            channel=Plain(),
            aggregate=Mean(),
            begin=Pretrained(replace(train, num_epochs=self.num_epochs))
            if setting.is_pretrained
            else FromModel(),
        )
        begun = federation.begin(task, rng=randomness.at("begin"))
        learnt = simulate(federation, task, num_rounds=rounds, seed=seed).state.params
        view = ModelView(task.model, learnt)
        inverted = self._inverted(task, learnt if setting.is_trained else begun, lr, setting, seed)
        game = Membership(2 * min(len(task.test[1]), sum(task.sizes)))
        question, truth = game.pose(
            task,
            took_part=frozenset(range(len(task.clients))),
            cohort=tuple(range(len(task.clients))),
            rng=randomness.at("pose"),
        )
        scores = LossThreshold()(view, candidates=question.candidates)
        auc = game.mark(scores, truth, rng=randomness.at("mark")).headline
        right = task.metric(view.scores(task.test[0]), task.test[1])
        return {
            **inverted,
            "membership AUC": auc.value,
            "accuracy (points)": 100 * float(right.mean()),
        }

    def _inverted(
        self, task: Task, start: Tensor, lr: float, setting: Setting, seed: int
    ) -> dict[str, float]:
        """Return the marks of the inversion of one batch of each victim."""
        randomness, size = Randomness(seed), setting.batch_size
        clients = range(min(self.num_victims, len(task.clients)))
        held: list[Batch] = [(x[:size], y[:size]) for x, y in (task.clients[c] for c in clients)]
        step = LocalSGD(lr, num_steps=setting.num_local_steps)
        messages = []
        for c, data in zip(clients, held, strict=True):
            with ambient(randomness.at("ambient", c)):
                messages.append(step(task.model, start, data, rng=randomness.at("train", c)))
        senders = tuple(clients)
        view = ServerView(
            0, task.model, senders, tuple(messages), sent=tuple(start for _ in senders)
        )
        repeated = Unrolled(lr, setting.num_local_steps) if setting.num_local_steps > 1 else None
        guess = replace(self.attack, unrolled=repeated)(
            view, victims=senders, population=task.population, rng=randomness.at("attack")
        )
        truth = Records(tuple(held), task.population)
        marked = Reconstruct().mark(guess, truth, rng=randomness.at("mark"))
        others = {m.name: m.value for m in marked.others}
        return {
            "PSNR (dB)": marked.headline.value,
            "PSNR over a blind guess (dB)": marked.headline.value - marked.headline.baseline,
            "SSIM": others["ssim"],
            "identified": others["identified"],
        }


@dataclass(frozen=True, slots=True)
class Effect:
    """How much a figure changes from a factor's easy level to its adapted one.

    Attributes:
        half: Half the width of its 95 % interval; NaN where no run is left to tell.
    """

    value: float
    half: float


def fraction_of(num_factors: int) -> Tensor:
    """Return a two-level design of resolution IV [1]_. Shape: ``(runs, factors)``, -1 or 1.

    Its columns are the products of an odd number of independent ones, so no main effect is mixed
    up with the effect of two factors together.

    >>> fraction_of(8).shape, fraction_of(11).shape
    (torch.Size([16, 8]), torch.Size([32, 11]))

    .. [1] Box, Hunter and Hunter, Statistics for Experimenters, 2005, chapter 6.
    """
    at_least(1, "fraction_of", num_factors=num_factors)
    num_free = 1
    while 2 ** (num_free - 1) < num_factors:
        num_free += 1
    rows = torch.arange(2**num_free)
    free = [1 - 2 * ((rows >> i) & 1) for i in range(num_free)]
    words = [w for size in range(1, num_free + 1, 2) for w in combinations(free, size)]
    return torch.stack([prod(word[1:], start=word[0]) for word in words[:num_factors]], dim=1)


def main_effects(design: Tensor, values: Tensor) -> Sequence[Effect]:
    """Return the effect of each factor; what they do not explain together is the noise.

    So interactions count as noise: they make the intervals wider, never too narrow.

    Args:
        design: Shape: ``(runs, factors)``; its columns are orthogonal, and each sums to 0.
        values: Shape: ``(runs,)``.
    """
    runs, factors = design.shape
    signs, wanted = design.double(), values.double()
    slopes = signs.T @ (wanted - wanted.mean()) / runs
    left = wanted - wanted.mean() - signs @ slopes
    free = runs - factors - 1
    half = float("nan")
    if free > 0:
        error = sqrt(float(left.square().sum()) / free / runs)
        half = 2 * float(stats.t.ppf(0.975, free)) * error
    return [Effect(2 * float(slope), half) for slope in slopes]


def shrunk(task: Task, setting: Setting) -> Task:
    """Return the task with smaller images, and a net for these."""
    if setting.shrink == 1:
        return task

    def smaller(data: Batch) -> Batch:
        return avg_pool2d(data[0], setting.shrink), data[1]

    test = smaller(task.test)
    shape, num_classes = tuple(test[0].shape[1:]), len(task.classes)
    return replace(
        task,
        model=Model(Built(setting.net, shape, num_classes)),
        clients=tuple(smaller(data) for data in task.clients),
        test=test,
        public=None if task.public is None else smaller(task.public),
    )


FACTORS: Mapping[str, tuple[Any, Any]] = {
    "activation": ("tanh", "relu"),
    "pooling": ("mean", "max"),
    "width": (16, 4),
    "depth": (2, 3),
    "normalisation": ("none", "group"),
    "dropout": (0.0, 0.3),
    "batch_size": (1, 8),
    "num_local_steps": (1, 4),
    "shrink": (1, 2),
    "is_trained": (False, True),
    "is_pretrained": (False, True),
}


def _lowers(factor: str, column: str) -> Expectation:
    return Expectation(f"effect of adapting: {factor} | {column}", at_most=0)


EXPERIMENTS = (
    Experiment(
        "adaptations",
        "Choices of the model and of its training make inversion and membership inference harder, "
        "without noise; each has its price.",
        Adaptations(
            pneumoniamnist,
            FACTORS,
            GradientInversion(
                optimiser=SignedAdam(400), priors=(TotalVariation(1e-3),), together=True
            ),
            options={"num_clients": 4, "per_client": 60, "public_size": 200, "test_size": 300},
        ),
        "PneumoniaMNIST, 4 clients x 60 images, ConvNet; 32 of the 2,048 combinations of 11 "
        "factors at two levels, a design of resolution IV. Of each: 16 epochs of FedAvg, the "
        "accuracy on 300 test images, the AUC of the loss threshold on the released model, and the "
        "inversion of one batch of each client (cosine, TV 1e-3, 400 signed Adam steps, local "
        "steps unrolled). An effect is the mean over combinations with the adaptation less that "
        "without; intervals in the table are over seeds.",
        "Usynin et al., PoPETs 2022(1), 274-290: the abstract was read, its tables were not. The "
        "signs asked for are those that the papers after it take for granted; sizes are ours.",
        (
            _lowers("batch size", "PSNR over a blind guess (dB)"),
            _lowers("trained", "PSNR over a blind guess (dB)"),
            _lowers("num local steps", "PSNR over a blind guess (dB)"),
            _lowers("activation", "PSNR over a blind guess (dB)"),
            _lowers("pooling", "PSNR over a blind guess (dB)"),
            _lowers("pretrained", "membership AUC"),
        ),
    ),
)
