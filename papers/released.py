"""What is handed out instead of a model that has seen private records."""

from __future__ import annotations

from papers.ledger import Expectation, Experiment
from papers.taught import Releases
from turncoat.attacks.membership.lira import LiRA
from turncoat.federation import WhiteBox
from turncoat.stages.aggregate.gnmax import GNMax
from turncoat.stages.release.student import Distilled, Student
from turncoat.stages.train.local import LocalSGD
from turncoat.tasks.fetched import mnist
from turncoat.tasks.models import MLP

_STUDYING = LocalSGD(0.05, num_epochs=60, batch_size=32, momentum=0.9)
_TAKEN = (
    "AUC that distilled takes from LiRA",
    "AUC that PATE takes from LiRA",
    "AUC that distilled takes from loss threshold",
    "AUC that PATE takes from loss threshold",
)

RELEASED = (
    Experiment(
        "released-mnist",
        "A student of noisy votes, or of soft answers, tells less of who was in the data than the "
        "model that saw them.",
        Releases(
            mnist,
            LocalSGD(0.1, num_epochs=20, batch_size=50, momentum=0.9),
            LocalSGD(0.1, num_epochs=20, batch_size=10),
            Distilled(WhiteBox(), temperature=4.0, share=0.8, tuning=_STUDYING),
            Student(WhiteBox(), tuning=_STUDYING),
            GNMax(sigma=20.0, num_queries=250),
            num_teachers=100,
            num_candidates=12_000,
            attack=LiRA(6),
            delta=1e-5,
            options={
                "train_size": 6_000,
                "test_size": 6_000,
                "public_size": 1_000,
                "model": MLP(hidden=(64,)),
            },
        ),
        "6,000 members and as many non-members of MNIST, a net with 64 hidden units, 20 epochs; "
        "1,000 public images, whose labels are not used. Distilled: temperature 4, the 800 surest. "
        "PATE: 100 teachers with 60 images each, one answer to each of 250 public images, noise of "
        "20 votes, data-independent ε at δ = 1e-5 for each client. LiRA has 6 shadow models, each "
        "distilled or taught as the target was; the accuracy is that on non-members. Small nets, "
        "few teachers and few shadows, for time; tried out on seed 5.",
        "Papernot et al., ICLR 2018, and Shejwalkar and Houmansadr, AAAI 2021, are the algorithms. "
        "Bounds are this project's own; no published figure is claimed: the former's 98 % at "
        "ε = 2 has 250 teachers with 60,000 images, a GAN, and an ε that looks at the votes.",
        (
            *(Expectation(figure, above=0) for figure in _TAKEN),
            Expectation("accuracy, percent: PATE", at_least=60),
        ),
    ),
)
