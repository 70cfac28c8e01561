"""What the foundation has to show on real data: ``python -m papers.foundation``.

Recipes were found by trial runs with other seeds than those of the table. Where one was changed
after the table had been seen, the first is kept beside the second, and judged alike.
"""

from __future__ import annotations

import sys

from papers.centralised import FedAvgVersusCentral
from papers.closed_forms import LargestZ, TwoAccountants
from papers.inverted import SingleImages
from papers.ledger import Expectation, Experiment, main
from papers.overfitted import LiRAVersusLoss
from papers.replaced import OneShotBackdoor
from turncoat.attacks.backdoor.model_replacement import ModelReplacement
from turncoat.attacks.backdoor.triggers import PixelPattern
from turncoat.attacks.inversion.gradient_inversion import InvertingGradients
from turncoat.attacks.membership.lira import LiRA
from turncoat.stages.train.dpsgd import DPSGD
from turncoat.stages.train.local import FedSGD, LocalSGD
from turncoat.tasks.bundled import digits
from turncoat.tasks.fetched import mnist, pneumoniamnist
from turncoat.tasks.models import MLP, LeNet5

_OURS = "The bound is this project's own; no published figure is claimed."
_SAME = (
    "The central run is the same task with one client who holds all the data, the same optimiser "
    "and the same number of example-gradients."
)
_WITHIN = Expectation("points_below_central", at_least=-2, at_most=2)


def _hospitals(name: str, lr: float, num_averaged: int, why: str) -> Experiment:
    return Experiment(
        name,
        "FedAvg over 3 hospitals of PneumoniaMNIST comes within 2 points of central training.",
        FedAvgVersusCentral(
            pneumoniamnist,
            num_rounds=40,
            train=LocalSGD(lr=lr, num_epochs=1, batch_size=32, momentum=0.5),
            num_averaged=num_averaged,
        ),
        "LeNet-5 (ReLU), 3 clients who share 4,608 chest X-rays, iid, all in each of 40 rounds; "
        f"one local epoch of SGD at {lr}, batch 32, momentum 0.5; 624 test images. The accuracy "
        "of either run swings by some points from round to round: both are averaged over the last "
        f"{num_averaged} rounds. {why} {_SAME}",
        f"McMahan et al., AISTATS 2017, is the algorithm. {_OURS}",
        (_WITHIN,),
    )


_FEDAVG = (
    Experiment(
        "fedavg-mnist",
        "FedAvg over 20 clients of 600 MNIST images comes within 2 points of central training.",
        FedAvgVersusCentral(
            mnist,
            num_rounds=20,
            train=LocalSGD(lr=0.1, num_epochs=1, batch_size=16, momentum=0.5),
            options={"num_clients": 20, "per_client": 600},
        ),
        "LeNet-5 (ReLU, 61,706 parameters), 20 clients x 600 images, iid, all in each of 20 "
        "rounds; one local epoch of SGD at 0.1, batch 16, momentum 0.5; 10,000 test images. "
        + _SAME,
        f"McMahan et al., AISTATS 2017, is the algorithm. {_OURS} That both are well trained is "
        "asked for too.",
        (
            _WITHIN,
            Expectation("federated_accuracy_percent", above=95),
            Expectation("central_accuracy_percent", above=95),
        ),
    ),
    _hospitals(
        "fedavg-pneumoniamnist-first",
        0.05,
        10,
        "This is the recipe that was stated first.",
    ),
    _hospitals(
        "fedavg-pneumoniamnist",
        0.02,
        20,
        "This recipe was chosen after the interval of the first had been seen to reach beyond the "
        "bound, by trials with seeds 100 to 102: of 0.02 and of 0.05 with weight decay, of 20 and "
        "40 rounds, and of windows of 5, 10 and 20, its difference varied least.",
    ),
    Experiment(
        "fedavg-digits",
        "FedAvg over 10 clients of 90 small digits comes within 2 points of central training.",
        FedAvgVersusCentral(
            digits,
            num_rounds=60,
            train=LocalSGD(lr=0.1, num_epochs=1, batch_size=16, momentum=0.5),
        ),
        "LeNet-5 scaled to 8x8 (ReLU, 42,794 parameters), 10 clients x 90 images, iid, all in each "
        "of 60 rounds; one local epoch of SGD at 0.1, batch 16, momentum 0.5; 797 test images. "
        + _SAME,
        f"McMahan et al., AISTATS 2017, is the algorithm. {_OURS}",
        (_WITHIN,),
    ),
)

_BACKDOOR = Experiment(
    "model-replacement-mnist",
    "One client in one round plants a backdoor under Mean, and fails behind NormBound.",
    OneShotBackdoor(
        mnist,
        train=LocalSGD(lr=0.1, num_epochs=1, batch_size=16, momentum=0.5),
        attack=ModelReplacement(
            trigger=PixelPattern(3),
            target=0,
            inner=LocalSGD(lr=0.05, num_epochs=5, batch_size=16, momentum=0.5),
        ),
        num_clean=15,
        ratio=2.0,
        options={"num_clients": 20, "per_client": 600},
    ),
    "LeNet-5 on MNIST, 20 clients x 600 images, iid; after 15 clean rounds (one local epoch of SGD "
    "at 0.1, batch 16, momentum 0.5) client 0 trains 5 epochs at 0.05 on its images and on half as "
    "many with a white square of 3x3 pixels in the corner, labelled 0, and sends 20 times the "
    "change, once. NormBound clips at twice the cohort's median norm. Success: triggered test "
    "images not of class 0 that are taken for 0. Everything is beside the unattacked run of the "
    "same rule, after the same round.",
    "Bagdasaryan et al., AISTATS 2020: a single-shot attack on CIFAR-10 and text. " + _OURS,
    (
        Expectation("accuracy_before_percent", above=95),
        Expectation("success_against_mean", at_least=0.9),
        Expectation("rise_behind_norm_bound", at_most=0.05),
        Expectation("accuracy_lost_behind_norm_bound_points", at_least=-2, at_most=2),
    ),
)


def _inversion(name: str, shown: str, measure: SingleImages) -> Experiment:
    return Experiment(
        name,
        f"Single images of {shown} come back out of one gradient, and do not under DP-SGD.",
        measure,
        "LeNet-5 with tanh at its random start; 4 clients a seed hold one image each and send one "
        "gradient a round (FedSGD); the server attacks the first of 20 rounds: cosine, signed "
        "Adam, 500 iterations, total variation 1e-4, labels read off the gradient. Under DP-SGD "
        "each clips its gradient to 1 and adds the noise that keeps ε = 8 at δ = 1e-5 over all 20 "
        "rounds, sampling rate 1. The mean image is that of the public images. Where the gain is "
        "below 0 dB the attack fits noise, and the mean image would be the better guess.",
        "Geiping et al., NeurIPS 2020. Their figures, which we only recall (about 18 dB for LeNet "
        f"on CIFAR-10), are for another data set. {_OURS}",
        (
            Expectation("gain_over_mean_image_db", at_least=5),
            Expectation("gain_over_mean_image_under_dp_db", at_most=1),
            Expectation("epsilon_of_whole_training", at_most=8),
        ),
    )


_ONE_GRADIENT = FedSGD(lr=0.1)
_PRIVATE = DPSGD(
    lr=0.1, max_norm=1.0, expected_batch=1, target_epsilon=8.0, delta=1e-5, num_steps=1
)
_INVERTING = InvertingGradients(num_steps=500, tv_weight=1e-4)
_SMOOTH = {"model": LeNet5("tanh")}
_INVERSION = (
    _inversion(
        "inversion-pneumoniamnist",
        "PneumoniaMNIST (28x28)",
        SingleImages(pneumoniamnist, _ONE_GRADIENT, _PRIVATE, _INVERTING, 20, 4, _SMOOTH),
    ),
    _inversion(
        "inversion-mnist",
        "MNIST (28x28)",
        SingleImages(mnist, _ONE_GRADIENT, _PRIVATE, _INVERTING, 20, 4, _SMOOTH),
    ),
)

_MEMBERSHIP = Experiment(
    "lira-mnist",
    "LiRA with 32 shadow models beats the loss threshold on an overfitted model.",
    LiRAVersusLoss(
        mnist,
        train=LocalSGD(lr=0.1, num_epochs=5, batch_size=32, momentum=0.8),
        num_rounds=12,
        attack=LiRA(num_shadows=32, variance="fixed"),
        options={"num_clients": 2, "train_size": 1000, "model": MLP((128,))},
    ),
    "An MLP with 128 hidden units on 1,000 MNIST images, 2 clients x 500, 12 rounds of 5 local "
    "epochs of SGD at 0.1, batch 32, momentum 0.8: training accuracy 1. Candidates: the 1,000 and "
    "as many test images. Online LiRA, fixed variance, one query; 32 shadow models, each on a "
    "random half of the candidates. The true-positive rate is that of the best threshold whose "
    "false-positive rate is at most 1 %; records that tie are flagged together, or not at all. In "
    "float32 many a loss is rounded to 0, which ties: the same order without rounding is compared "
    "too. Intervals are over the differences seed by seed.",
    "Carlini et al., S&P 2022. The README of their code reports, for CIFAR-10 and 16 models, a "
    "true-positive rate at 0.1 % of 5.93 % against 0.09 % of the loss (read there): another data "
    f"set, net and rate. {_OURS}",
    (
        Expectation("tpr_lira_minus_loss", above=0),
        Expectation("tpr_lira_minus_unrounded_loss", above=0),
        Expectation("training_accuracy", at_least=1),
    ),
)

_CLOSED = (
    Experiment(
        "alie-z",
        "ALIE's z follows from the numbers of clients and of members.",
        LargestZ(((50, 10), (50, 24))),
        "The quantile of (n - m - s) / (n - m), with s = floor(n / 2 + 1) - m.",
        "Baruch et al., NeurIPS 2019, section 3.2; recomputed from the formula to four digits. "
        "A public reimplementation uses the distribution in place of its quantile (0.7257).",
        (
            Expectation("z_of_50_with_10", at_least=0.25325, at_most=0.25335),
            Expectation("z_of_50_with_24", at_least=1.42605, at_most=1.42615),
        ),
        num_seeds=1,
    ),
    Experiment(
        "two-accountants",
        "Opacus' PRV accountant and dp-accounting's PLD agree on the ε of DP-SGD.",
        TwoAccountants(
            (
                (1.1, 256 / 60_000, 14_063),
                (1.0, 0.01, 1_000),
                (0.8, 0.02, 200),
                (2.0, 0.05, 2_000),
            ),
            delta=1e-5,
        ),
        "Poisson-sampled Gaussian mechanisms, four trainings, δ = 1e-5, both with their defaults.",
        "Two independent libraries. " + _OURS,
        (Expectation("largest_difference_percent", at_most=2),),
        num_seeds=1,
    ),
)

EXPERIMENTS = (*_FEDAVG, _BACKDOOR, _MEMBERSHIP, *_INVERSION, *_CLOSED)


if __name__ == "__main__":
    from papers.foundation import EXPERIMENTS as SAME  # by the name that workers know it by

    sys.exit(main("foundation", SAME, sys.argv[1:]))
