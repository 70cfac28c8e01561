"""What acting adds to watching, and known members to the loss: the recipes."""

from __future__ import annotations

from papers.active import Active
from papers.ledger import Expectation, Experiment
from turncoat.attacks.membership.active import GradientAscent
from turncoat.stages.train.local import LocalSGD
from turncoat.tasks.fetched import mnist
from turncoat.tasks.models import MLP

ACTIVE = (
    Experiment(
        "active-mnist",
        "Raising the loss of records, or isolating their client, tells more of them than watching; "
        "a net that knows some members tells more of others than the loss does.",
        Active(
            mnist,
            LocalSGD(0.05, num_epochs=5, batch_size=10, momentum=0.5),
            num_rounds=10,
            first=5,
            num_clients=4,
            num_candidates=200,
            num_known=200,
            ascent=GradientAscent(lr=0.1, num_steps=5),
            options={
                "per_client": 200,
                "test_size": 400,
                "public_size": 200,
                "model": MLP((32,)),
            },
        ),
        "MNIST, 4 clients of 200 images, an MLP of 32 units, 10 rounds of 5 local epochs; client 0 "
        "is asked about, 100 of its records and 100 held-out ones. Server and participant act from "
        "round 5 on, and all attacks but the net and the loss read rounds 5 to 9; passive is the "
        "better of the two passive readings, with and without the contrast to other clients. The "
        "net reads all rounds, and knows of 200 other records if they are members; the loss "
        "is that of the last model. The participant is one of 2 clients, and passive is the same "
        "reading without ascent.",
        "The order is that of Nasr, Shokri and Houmansadr, S&P 2019, of whom no figure was read.",
        (
            Expectation("auc_server_ascent_minus_passive", above=0),
            Expectation("auc_isolation_minus_passive", above=0),
            Expectation("auc_participant_ascent_minus_passive", above=0),
            Expectation("auc_net_minus_loss", above=0),
        ),
    ),
)
