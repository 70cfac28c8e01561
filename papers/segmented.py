"""Are slices rebuilt from a segmentation net's gradients, and what does preventing it cost?

``python -m papers.segmented FILE.png`` draws some victims of the first seed: the originals, and
what the server makes of them with the masks known, with the masks guessed, and under DP-SGD.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from papers.ledger import FIRST_SEED, Expectation, Experiment
from turncoat.attacks.inversion.optimisers import LBFGS
from turncoat.attacks.inversion.segmentation import InvertingSegmentation, NearestMasks
from turncoat.federation import Federation, Plain
from turncoat.messages import Update
from turncoat.metrics.images import psnr
from turncoat.metrics.intervals import of_mean
from turncoat.privacy import Private, guarantees
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import Watch, simulate
from turncoat.stage import Plan, Train
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.train.dpsgd import DPSGD
from turncoat.stages.train.local import FedSGD, LocalSGD
from turncoat.task import Task
from turncoat.tasks.segmentation import UNet, hippocampus, overlap
from turncoat.trial import Reconstruction
from turncoat.views import ServerView

_NUM_CLASSES = 3


@dataclass(frozen=True)
class RebuiltSlices:
    """A curious server attacks the first round of clients who hold one slice each.

    Intervals are over victims, Student's at 95 %; gains over the attacker's mean image are paired.

    Attributes:
        guesses: Attack once more with the masks unknown.
    """

    make: Callable[..., Task]
    train: FedSGD
    attack: InvertingSegmentation
    num_victims: int
    guesses: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int) -> dict[str, float | str]:
        task = self.task(seed)
        blind = _blind(task)
        known = _likeness(self.rebuilt(self.train, task, seed), task)
        figures = _over_victims("psnr_db", known) | _over_victims(
            "gain_over_mean_image_db", known - blind
        )
        if self.guesses:
            found = self.rebuilt(self.train, task, seed, masks_known=False)
            guessed = _likeness(found, task)
            figures |= _over_victims("psnr_with_masks_guessed_db", guessed)
            figures |= _over_victims("gain_with_masks_guessed_db", guessed - blind)
            figures |= {
                "dice_of_guessed_masks": _alike([g.labels for g in found], task),
                "dice_of_random_masks": _alike([task.population[1]] * len(found), task),
            }
        return {
            **figures,
            "psnr_of_mean_image_db": float(blind.mean()),
            "share_of_victims_above_mean_image": float((known > blind).double().mean()),
            "data": task.source,
        }

    def task(self, seed: int) -> Task:
        return self.make(self.num_victims, per_client=1, seed=seed, **self.options)

    def rebuilt(
        self,
        train: Train[Update],
        task: Task,
        seed: int,
        *,
        masks_known: bool = True,
        attack: InvertingSegmentation | None = None,
    ) -> tuple[Reconstruction, ...]:
        """Return what the server makes of the first round, client by client."""
        need = ServerView[Update]
        watch = [Watch(need, frozenset({0}))]
        run = simulate(_federation(train), task, num_rounds=1, seed=seed, watch=watch)
        (view,) = run.seen(need)
        masks = tuple(masks for _, masks in task.clients[: self.num_victims])
        return (attack or self.attack)(
            view,
            victims=tuple(range(self.num_victims)),
            masks=masks if masks_known else None,
            population=task.population,
            rng=Randomness(seed).at("attack"),
        )


@dataclass(frozen=True)
class PrivateSlices:
    """The same clients under DP-SGD, attacked by a server that knows of the noise; and its price.

    Twice: each client spends ε on its one slice, which is in every step of ``num_rounds``; and with
    the noise of the training whose Dice is given, in a step that drew the victim's slice alone, the
    worst that sampling can do to a client. ``rebuilding.attack``, which knows of no noise, attacks
    the first few victims once more.

    Attributes:
        attack: Of the server that knows of the noise.
        learning, private_learning: Of clients with many slices, ``num_learning_rounds`` long.
    """

    rebuilding: RebuiltSlices
    private: DPSGD
    attack: InvertingSegmentation
    num_rounds: int
    learning: LocalSGD
    private_learning: DPSGD
    num_learning_rounds: int
    num_unaware: int = 4
    learning_options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int) -> dict[str, float | str]:
        task = self.rebuilding.task(seed)
        learnt = self.rebuilding.make(seed=seed, **self.learning_options)
        own, least = self.noises(task, learnt)
        blind = _blind(task)
        noisy, exposed = (
            _likeness(self.rebuilding.rebuilt(train, task, seed, attack=self.attack), task)
            for train in (own, least)
        )
        few = replace(self.rebuilding, num_victims=self.num_unaware)
        unaware = _likeness(few.rebuilt(own, task, seed), task)
        dice, private_dice = (
            self._dice(train, learnt, seed) for train in (self.learning, self.private_learning)
        )
        return {
            **_over_victims("psnr_under_dp_db", noisy),
            **_over_victims("gain_over_mean_image_under_dp_db", noisy - blind),
            **_over_victims("gain_under_the_noise_of_learning_db", exposed - blind),
            "gain_under_dp_of_a_server_unaware_of_it_db": float(
                (unaware - blind[: self.num_unaware]).mean()
            ),
            "psnr_of_mean_image_db": float(blind.mean()),
            "epsilon_of_whole_training": self._epsilon(self.private, task, self.num_rounds),
            "noise_multiplier": own.noise_multiplier or 0.0,
            "dice_percent": 100 * dice,
            "dice_under_dp_percent": 100 * private_dice,
            "points_of_dice_lost": 100 * (dice - private_dice),
            "epsilon_of_learning": self._epsilon(
                self.private_learning, learnt, self.num_learning_rounds
            ),
            "noise_multiplier_of_learning": least.noise_multiplier or 0.0,
            "data": task.source,
        }

    def noises(self, task: Task, learnt: Task) -> tuple[DPSGD, DPSGD]:
        """Return the clients' DP-SGD with their own noise, and with that of the learning."""
        own = self.private.planned(Plan(self.num_rounds, task.sizes))
        fitted = self.private_learning.planned(Plan(self.num_learning_rounds, learnt.sizes))
        return own, replace(own, max_norm=fitted.max_norm, noise_multiplier=fitted.noise_multiplier)

    def _dice(self, train: Train[Update], task: Task, seed: int) -> float:
        run = simulate(_federation(train), task, num_rounds=self.num_learning_rounds, seed=seed)
        with torch.no_grad():
            scores = [
                task.metric(task.model.logits(run.state.params, inputs), masks)
                for inputs, masks in zip(
                    *(torch.split(part, 100) for part in task.test), strict=True
                )
            ]
        return float(torch.cat(scores).mean())

    def _epsilon(self, train: DPSGD, task: Task, num_rounds: int) -> float:
        """Return what the package derives for each slice, against the server; NaN for nothing."""
        stated = guarantees(
            _federation(train).planned(Plan(num_rounds, task.sizes)),
            num_records=min(task.sizes),
            num_rounds=num_rounds,
            delta=train.delta or 0.0,
        )
        held = [g for g in stated if isinstance(g, Private) and "server" in g.against]
        return max((g.epsilon for g in held), default=float("nan"))


def _federation(train: Train[Update]) -> Federation[Update, Update]:
    return Federation(train=train, channel=Plain(), aggregate=Mean())


def _likeness(found: Sequence[Reconstruction], task: Task) -> Tensor:
    """Return each victim's PSNR in dB. Shape: ``(victims,)``."""
    pairs = zip(found, task.clients, strict=False)
    return torch.cat([psnr(guess.inputs.clamp(0, 1), images) for guess, (images, _) in pairs])


def _blind(task: Task) -> Tensor:
    """Return what the attacker's mean image reaches. Shape: ``(victims,)``."""
    mean = task.population[0].mean(dim=0, keepdim=True)
    return torch.cat([psnr(mean, images) for images, _ in task.clients])


def _alike(said: Sequence[Tensor], task: Task) -> float:
    """Return the mean Dice of masks that were said of each victim."""
    scores = [
        overlap(masks, true.expand_as(masks), _NUM_CLASSES).mean()
        for masks, (_, true) in zip(said, task.clients, strict=True)
    ]
    return float(torch.stack(scores).mean())


def _over_victims(name: str, values: Tensor) -> dict[str, float]:
    low, high = of_mean(values)
    return {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}


_UNET = UNet(width=16, activation="silu")
_BIG = {"model": _UNET, "public_size": 600}
_ATTACK = InvertingSegmentation(optimiser=LBFGS(num_steps=10), labels=NearestMasks())
_SMOOTH = RebuiltSlices(hippocampus, FedSGD(lr=0.1), _ATTACK, num_victims=16, options=_BIG)
_AWARE = InvertingSegmentation(optimiser=LBFGS(num_steps=1), tv_weight=1.0)
_OURS = "The bounds are this project's own."
_SOURCE = (
    "Ziller et al., arXiv 2021, whose abstract says that a segmentation net was inverted and that "
    "DP prevents it; their figures are for CT of the liver, and are not compared. " + _OURS
)
_WHO = (
    "16 clients hold one slice of 64x64 pixels each; the attacker has 600 slices of other "
    "patients. Figures called low and high are the ends of a 95 % interval over the 16 victims of "
    "a seed. More than half of each slice is black, so that the attacker's mean image alone "
    "reaches 15 dB: gains are over it, victim by victim. "
)

_ROUGH = InvertingSegmentation(optimiser=LBFGS(num_steps=10))
_TRIED = (
    "Here an attack without second derivatives of the net is at a loss: tried on one slice of seed "
    "101, whose mean image has 15.2 dB, were L-BFGS (13.7 dB after 20 iterations, and no step "
    "after that), Adam on the logits (12.1), Adam on the pixels (10.7) and signed Adam with one "
    "cosine over all layers (7.3), of 160 iterations each with total variation of 1e-3 and 1e-2. "
    "That these searches fail is no proof that none succeeds."
)

SEGMENTED = (
    Experiment(
        "inversion-hippocampus",
        "Slices come back out of one gradient of a U-Net, with the masks known and without.",
        _SMOOTH,
        "U-Net, three levels, width 16 (118,659 parameters), GroupNorm, SiLU, at its random start; "
        "clients send one gradient a round (FedSGD), and the server attacks the first. "
        + _WHO
        + "The attack: cosine of each layer, total variation 1e-4, L-BFGS for 200 iterations from "
        "the mean image. Masks, where they are not known, are searched for together with the "
        "image, from that of the attacker's slice whose gradient is most like the one seen. Why "
        "SiLU: a search by gradients needs second derivatives, and a ReLU's are 0; with ReLU, "
        "the usual choice, this attack fails (the experiment inversion-hippocampus-relu), so that "
        "what is shown holds for smooth nets alone. Convolutions have biases: without them, "
        "group normalisation hides how bright the image is. Net and attack were found together, "
        "by some thirty trials with seeds 0 and 100 to 103.",
        _SOURCE,
        (
            Expectation("psnr_db_low", at_least=15),
            Expectation("gain_over_mean_image_db_low", above=0),
            Expectation("psnr_with_masks_guessed_db_low", at_least=15),
            Expectation("gain_with_masks_guessed_db_low", above=0),
        ),
        num_seeds=1,
    ),
    Experiment(
        "inversion-hippocampus-relu",
        "How far does a search come against the usual U-Net, with ReLU? Nothing is expected.",
        replace(
            _SMOOTH,
            attack=_ROUGH,
            guesses=False,
            options=_BIG | {"model": UNet(width=16)},
        ),
        "As inversion-hippocampus with ReLU for SiLU, masks known. " + _WHO + _TRIED,
        _SOURCE,
        (),
        num_seeds=1,
    ),
    Experiment(
        "inversion-hippocampus-under-dp",
        "At ε = 8 a slice comes back no better than the mean image; what does that cost in Dice?",
        PrivateSlices(
            _SMOOTH,
            DPSGD(
                lr=0.1,
                max_norm=1.0,
                expected_batch=1,
                target_epsilon=8.0,
                delta=1e-5,
                num_steps=1,
            ),
            _AWARE,
            num_rounds=20,
            learning=LocalSGD(lr=0.02, num_epochs=1, batch_size=16, momentum=0.9),
            private_learning=DPSGD(
                lr=0.15,
                max_norm=1.0,
                expected_batch=125,
                target_epsilon=8.0,
                delta=1e-5,
                num_epochs=1,
                momentum=0.9,
            ),
            num_learning_rounds=8,
            learning_options={"num_clients": 3, "model": UNet(width=8, activation="silu")},
        ),
        "The net, clients and first round of inversion-hippocampus, masks known. "
        + _WHO
        + "Each client clips its gradient to 1 and adds the noise that keeps ε = 8 at δ = 1e-5 "
        "over 20 rounds, its slice being in every step; once more, the noise of the learning "
        "below, in a step that drew the victim's slice alone. The server knows of the noise: "
        "20 iterations and total variation 1, the best for it of 1e-4, 0.1, 1 and 10 on a slice of "
        "seed 101. One who does not, and attacks as without defence, lands far "
        "below the mean image: it fits the noise. Learning: U-Net of width 8 (29,955 parameters), "
        "3 clients x about 830 slices, 8 rounds of one local epoch; without DP SGD at 0.02, batch "
        "16, momentum 0.9; with DP-SGD at 0.15, expected batch 125, momentum 0.9, ε = 8 and "
        "δ = 1e-5 over the whole training. Dice is that of 600 slices of other patients. The unit "
        "is a slice, not a patient, who has about 13. Neither training was tuned much (under DP, "
        "0.15 of 0.03, 0.1, 0.15 and 0.5, on seed 100): a tuned one may lose less.",
        _SOURCE,
        (
            Expectation("gain_over_mean_image_under_dp_db_high", at_most=1),
            Expectation("gain_under_the_noise_of_learning_db_high", at_most=1),
            Expectation("epsilon_of_whole_training", at_most=8),
            Expectation("epsilon_of_learning", at_most=8),
        ),
        num_seeds=1,
    ),
)


def draw(path: str, seed: int = FIRST_SEED, num_shown: int = 4) -> None:
    """Draw the first victims of a seed, and what came of them. The PSNR in dB is above each."""
    task = _SMOOTH.task(seed)
    few, under_dp = replace(_SMOOTH, num_victims=num_shown), SEGMENTED[2].measure
    assert isinstance(under_dp, PrivateSlices)
    noisy = under_dp.private.planned(Plan(under_dp.num_rounds, task.sizes))
    rows = {
        "mask known": few.rebuilt(few.train, task, seed),
        "mask guessed": few.rebuilt(few.train, task, seed, masks_known=False),
        "under DP, ε = 8": few.rebuilt(noisy, task, seed, attack=under_dp.attack),
    }
    mean = task.population[0].mean(dim=0, keepdim=True)
    shown = {
        "original": [images for images, _ in task.clients[:num_shown]],
        **{name: [guess.inputs for guess in found] for name, found in rows.items()},
        "mean image": [mean] * num_shown,
    }
    figure = Figure(figsize=(1.5 * num_shown + 1, 1.65 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), num_shown, squeeze=False)
    for axes, (name, pictures) in zip(grid, shown.items(), strict=True):
        axes[0].set_ylabel(name)
        for one, picture, original in zip(axes, pictures, shown["original"], strict=True):
            one.imshow(picture[0, 0].clamp(0, 1), cmap="gray", vmin=0, vmax=1)
            one.set(xticks=(), yticks=())
            if picture is not original:
                one.set_title(f"{float(psnr(picture.clamp(0, 1), original)):.1f} dB", fontsize=9)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    draw(sys.argv[1])
