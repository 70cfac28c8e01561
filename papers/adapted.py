"""What is each adaptation of a model worth against inversion and membership, and what does it cost?

A factorial study: each factor has a level that is easy on the attacker and one that should not be,
and a fraction of all combinations tells the effect of every one of them. Beside it a grid:
differential privacy, compression and adversarial training, each with and without the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from math import prod, sqrt
from typing import Any

import torch
from scipy import stats
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d, cross_entropy

from papers.ledger import Expectation, Experiment
from turncoat.attacks.inversion.engine import Unrolled
from turncoat.attacks.inversion.gradient_inversion import GradientInversion
from turncoat.attacks.inversion.optimisers import SignedAdam
from turncoat.attacks.inversion.priors import TotalVariation
from turncoat.attacks.inversion.segmentation import MeanImage
from turncoat.attacks.membership.loss_threshold import LossThreshold
from turncoat.federation import Federation, FromModel, Plain
from turncoat.games.membership import Membership
from turncoat.games.reconstruction import Reconstruct, Records
from turncoat.messages import Update
from turncoat.randomness import Randomness, ambient
from turncoat.runtimes.simulate import Watch, simulate
from turncoat.stage import Plan, Train, call
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.train.dpsgd import DPSGD
from turncoat.stages.train.local import FedSGD, LocalSGD
from turncoat.stages.train.quantised import Quantised
from turncoat.task import Batch, Model, Task
from turncoat.tasks.fetched import pneumoniamnist
from turncoat.tasks.models import Activation, Built, ConvNet, Normalisation, Pooling
from turncoat.trial import Measurement
from turncoat.validate import at_least
from turncoat.views import ModelView, ServerView

_LOST = "lost by adapting"


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
                found[f"{_LOST}: {shown} | {column}"] = -effect.value
                found[f"{_LOST}, interval from: {shown} | {column}"] = -effect.value - effect.half
                found[f"{_LOST}, interval to: {shown} | {column}"] = -effect.value + effect.half
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
    "width": (8, 4),
    "depth": (2, 3),
    "normalisation": ("none", "group"),
    "dropout": (0.0, 0.3),
    "batch_size": (1, 4),
    "num_local_steps": (1, 3),
    "shrink": (1, 2),
    "is_trained": (False, True),
    "is_pretrained": (False, True),
}


@dataclass(frozen=True)
class Hardened:
    """Train as ``inner`` does, on images perturbed against the model that was received [1]_.

    Projected gradient ascent within ``radius``, in the largest pixel. A record's perturbation
    depends on itself and on the received state alone, so what ``inner`` guarantees for records
    still holds.

    Differs from the paper: images are perturbed once a round, not once a step; from the image
    itself, not from a random point.

    .. [1] Madry et al., ICLR 2018, eq. (2.1). https://arxiv.org/abs/1706.06083
    """

    radius: float
    num_steps: int
    inner: Train[Update]
    mixes_clients = False

    def __call__(self, model: Model, start: Tensor, data: Batch, **offers: Any) -> Update:
        hard = perturbed(model, start, data, self.radius, self.num_steps)
        sent: Update = call(self.inner, model, start, (hard, data[1]), **offers)
        return sent


def perturbed(model: Model, params: Tensor, data: Batch, radius: float, num_steps: int) -> Tensor:
    """Return images within ``radius`` on which the model is wrong. Shape: as the inputs."""
    inputs, labels = data
    low, high = (inputs - radius).clamp(0, 1), (inputs + radius).clamp(0, 1)
    found, step = inputs, 2.5 * radius / num_steps
    for _ in range(num_steps):
        leaf = found.detach().requires_grad_()
        loss = cross_entropy(model.logits(params, leaf), labels, reduction="sum")
        (slope,) = torch.autograd.grad(loss, leaf)
        found = torch.minimum(torch.maximum(found + step * slope.sign(), low), high)
    return found.detach()


@dataclass(frozen=True)
class PrivateSmallRobust:
    """Differential privacy, compression and adversarial training: all eight combinations.

    Each is learnt by the same clients from the same start. The inversion is of the first update
    of ``num_victims`` clients with one image each, who do in one step what the learning clients do:
    under privacy with the same clipping and the noise of learning, and the victim drawn for sure.

    Attributes:
        learning, private: Without and with privacy; ``attacked`` is the victims' step without.
    """

    make: Callable[..., Task]
    learning: LocalSGD
    private: DPSGD
    attacked: FedSGD
    attack: GradientInversion
    bits: int
    radius: float
    num_rounds: int
    num_victims: int
    num_steps: int = 3
    num_steps_of_test: int = 10
    options: Mapping[str, Any] = field(default_factory=dict)
    victims_options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int) -> dict[str, float | str]:
        task = self.make(seed=seed, **self.options)
        few = self.make(self.num_victims, per_client=1, seed=seed, **self.victims_options)
        fitted = self.private.planned(Plan(self.num_rounds, task.sizes))
        fixed = replace(
            self.private,
            noise_multiplier=fitted.noise_multiplier,
            target_epsilon=None,
            delta=None,
        )
        one = replace(fixed, lr=self.attacked.lr, expected_batch=1, num_steps=1, num_epochs=None)
        found: dict[str, float | str] = {}
        gains: dict[tuple[bool, ...], float] = {}
        for private, small, robust in product((False, True), repeat=3):
            words = [w for w, on in zip(_DEFENCES, (private, small, robust), strict=True) if on]
            row = " + ".join(words) or "none"
            learnt, megabytes = self._learnt(
                self._train(fixed if private else self.learning, small, robust), task, seed
            )
            view = ModelView(task.model, learnt)
            inputs, labels = task.test
            hard = perturbed(task.model, learnt, task.test, self.radius, self.num_steps_of_test)
            marked = self._inverted(
                self._train(one if private else self.attacked, small, robust), few, seed
            )
            gain = marked.value - marked.baseline
            gains[private, small, robust] = gain
            for column, value in (
                ("accuracy (%)", 100 * float(task.metric(view.scores(inputs), labels).mean())),
                ("under attack (%)", 100 * float(task.metric(view.scores(hard), labels).mean())),
                ("PSNR (dB)", marked.value),
                ("from", marked.low),
                ("to", marked.high),
                ("PSNR over a blind guess (dB)", gain),
                ("MB a client sends", megabytes),
            ):
                found[f"defences: {row} | {column}"] = value
        found["most_gain_over_a_blind_guess_under_privacy_db"] = max(
            gain for (private, *_), gain in gains.items() if private
        )
        found["noise_multiplier"] = fitted.noise_multiplier or 0.0
        return found | {"data": task.source}

    def _train(self, inner: Train[Update], small: bool, robust: bool) -> Train[Update]:
        made = Hardened(self.radius, self.num_steps, inner) if robust else inner
        return Quantised(self.bits, made) if small else made

    def _learnt(self, train: Train[Update], task: Task, seed: int) -> tuple[Tensor, float]:
        """Return the last state, and how many megabytes a client sent in all."""
        federation = Federation(train=train, channel=Plain(), aggregate=Mean())
        run = simulate(federation, task, num_rounds=self.num_rounds, seed=seed)
        return run.state.params, sum(played.bytes_up for played in run.log) / 1e6

    def _inverted(self, train: Train[Update], task: Task, seed: int) -> Measurement:
        """Return the PSNR that the attack reaches on the first round."""
        federation = Federation(train=train, channel=Plain(), aggregate=Mean())
        watch = [Watch(ServerView[Update])]
        run = simulate(federation, task, num_rounds=1, seed=seed, watch=watch)
        (view,) = run.seen(ServerView[Update])
        randomness = Randomness(seed)
        guess = self.attack(
            view, victims=view.senders, population=task.population, rng=randomness.at("attack")
        )
        truth = Records(tuple(task.clients), task.population)
        return Reconstruct().mark(guess, truth, rng=randomness.at("mark")).headline


_SMOOTH = ConvNet((8, 16), (2, 2), "tanh", "mean")
_DEFENCES = ("privacy", "compression", "adversarial training")
_GAIN = "PSNR over a blind guess (dB)"


def _costs_the_attacker(factor: str, column: str) -> Expectation:
    return Expectation(f"{_LOST}, interval from: {factor} | {column}", at_least=0)


ADAPTED = (
    Experiment(
        "adaptations",
        "Choices of the model and of its training make inversion and membership inference harder, "
        "without noise; each has its price.",
        Adaptations(
            pneumoniamnist,
            FACTORS,
            GradientInversion(
                optimiser=SignedAdam(150, lr=0.05),
                priors=(TotalVariation(1e-2),),
                start=MeanImage(),
                together=True,
            ),
            num_epochs=12,
            options={"num_clients": 4, "per_client": 60, "public_size": 200, "test_size": 300},
        ),
        "PneumoniaMNIST, 4 clients x 60 images, ConvNet; 32 of the 2,048 combinations of 11 "
        "factors at two levels, a design of resolution IV: "
        + "; ".join(
            f"{name.removeprefix('is_').replace('_', ' ')} {easy} or {adapted}"
            for name, (easy, adapted) in FACTORS.items()
        )
        + ". Of each: 12 epochs of FedAvg, the accuracy on 300 test images, the AUC of the loss "
        "threshold on the released model, and the inversion of one batch of each client (cosine, "
        "TV 1e-2, 150 signed Adam steps from the mean image, local steps unrolled). What is lost "
        "is the mean over combinations without the adaptation less that with it: of PSNR it is "
        "what the adaptation is worth, of accuracy what it costs. One seed; intervals are over "
        "combinations, what main effects do not explain being noise.",
        "Usynin et al., PoPETs 2022(1), 274-290: the abstract was read, its tables were not. The "
        "signs asked for are those that the papers after it take for granted; sizes are ours.",
        (
            _costs_the_attacker("batch size", _GAIN),
            _costs_the_attacker("trained", _GAIN),
            _costs_the_attacker("num local steps", _GAIN),
            _costs_the_attacker("activation", _GAIN),
            _costs_the_attacker("pooling", _GAIN),
            _costs_the_attacker("pretrained", "membership AUC"),
        ),
        num_seeds=1,
    ),
    Experiment(
        "private-small-robust",
        "Differential privacy, compression and adversarial training together: what each is worth "
        "and costs beside the others.",
        PrivateSmallRobust(
            pneumoniamnist,
            LocalSGD(lr=0.05, num_epochs=1, batch_size=32, momentum=0.9),
            DPSGD(
                lr=0.5,
                max_norm=1.0,
                expected_batch=125,
                target_epsilon=8.0,
                delta=1e-5,
                num_epochs=1,
                momentum=0.9,
            ),
            FedSGD(lr=0.1),
            GradientInversion(
                optimiser=SignedAdam(200, lr=0.05),
                priors=(TotalVariation(1e-2),),
                start=MeanImage(),
                num_images=1,
                together=True,
            ),
            bits=4,
            radius=4 / 255,
            num_rounds=8,
            num_victims=16,
            options={"num_clients": 3, "per_client": 1_000, "model": _SMOOTH},
            victims_options={"public_size": 200, "model": _SMOOTH},
        ),
        "PneumoniaMNIST, 3 clients x 1,000 X-rays, ConvNet of 8 and 16 maps with tanh, 8 rounds. "
        "Privacy: DP-SGD, norm 1, expected batch 125, ε = 8 at δ = 1e-5 for each record over all "
        "rounds. Compression: each number of the update in 4 bits, rounded at random. Adversarial "
        "training: the client's images are perturbed against the received model, 3 steps within "
        "4/255. Under attack: 624 test images, 10 steps within 4/255, white box. Inversion: the "
        "first update of 16 clients with one image each, which under privacy drew that image and "
        "got the noise of learning; cosine, TV 1e-2, 200 steps from the mean image, not adapted "
        "to any of the defences; the original is the unperturbed image. Recipes were not tuned "
        "cell by cell. One seed; from and to are the interval over the 16 victims.",
        "Usynin et al., arXiv 2022, Can collaborative learning be private, robust and scalable?, "
        "is the idea; we have read no figure of it. Bounds are this project's own.",
        (
            Expectation("most_gain_over_a_blind_guess_under_privacy_db", at_most=1),
            Expectation(f"defences: none | {_GAIN}", above=3),
            Expectation("defences: none | accuracy (%)", at_least=75),  # more than a class alone
        ),
        num_seeds=1,
    ),
)
