"""What ε costs, by the number of clients and by records, and what is left to an attacker.

``python -m papers.noised`` measures. ``python -m papers.noised --figure docs/client-privacy.png``
and ``--figure docs/record-privacy.png`` draw what was measured, and write its tables into
docs/privacy.md.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from papers.epsilons import ClientCurves, RecordCurves, said
from papers.ledger import HERE, Expectation, Experiment, main
from turncoat.attacks.membership.lira import LiRA
from turncoat.record import write_text
from turncoat.report.palette import LIGHT, MARKERS
from turncoat.stages.train.dpsgd import DPSGD
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Task
from turncoat.tasks.bundled import digits
from turncoat.tasks.fetched import mnist, pneumoniamnist
from turncoat.tasks.models import MLP

_EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0, inf)
_DELTA = 1e-5
_CLIENTS = (50, 200, 1_000)
_OURS = "Bounds are this project's own; no published figure is claimed."


def _records(
    make: Callable[..., Task],
    hidden: int,
    train: DPSGD,
    free: LocalSGD,
    num_epochs: int,
    num_candidates: int,
    num_canaries: int,
    num_guesses: int,
    options: Mapping[str, Any],
) -> Experiment:
    name = make.__name__
    members = num_candidates // 2
    return Experiment(
        f"epsilon-{name}",
        "What an attack reaches lies below what f-DP allows, and what an audit proves below ε.",
        RecordCurves(
            make,
            train,
            free,
            num_epochs,
            LiRA(4),
            num_candidates,
            num_canaries,
            num_guesses,
            _EPSILONS,
            _DELTA,
            {"model": MLP(hidden=(hidden,)), **options},
        ),
        f"{members:,} members and as many non-members of {name}, one net with {hidden} hidden "
        f"units; DP-SGD at {train.lr:g}, clip {train.max_norm:g}, batch {train.expected_batch}, "
        f"{num_epochs} epochs, δ = 1e-5; at ε = ∞ plain SGD ({free.num_epochs} epochs). LiRA has 4 "
        f"shadows with the same noise. The audit: one more run with {num_canaries} mislabelled "
        f"canaries and {2 * num_guesses} guesses from the last model, at 95 %: it sees no step, so "
        "that a lower limit of 0 is no proof of anything. Limits of a TPR are Clopper and "
        "Pearson's for one seed. Small nets and few seeds, for time.",
        "Steinke et al., NeurIPS 2023, for the audit; Dong, Roth and Su, JRSS-B 2022, for the "
        f"limit. {_OURS}",
        (
            Expectation("least_points_from_the_lower_limit_of_the_tpr_to_the_bound", at_least=0),
            Expectation("least_of_claimed_minus_audited_epsilon", at_least=0),
            Expectation("points_of_tpr_that_ε_of_1_takes_from_lira", above=0),
        ),
        num_seeds=3,
    )


NOISED = (
    Experiment(
        "epsilon-clients-mnist",
        "Client-level privacy costs less, the more clients share the noise.",
        ClientCurves(
            mnist,
            LocalSGD(lr=0.5, num_steps=3, batch_size=20),
            _CLIENTS,
            _EPSILONS,
            _DELTA,
            max_norm=1.0,
            num_rounds=6,
            compared=(2.0, 4.0),
            options={"train_size": 20_000, "model": MLP(hidden=())},
        ),
        "20,000 images of MNIST, shared by 50, 200 or 1,000 clients, iid (the total is fixed); "
        "multinomial regression, 7,850 parameters; 6 rounds in which all take part, 3 local "
        "steps of SGD at 0.5 on 20 images; updates shortened to 1, noise once on the sum; "
        "δ = 1e-5. ε is for one client with all its records, against users and other clients, and "
        "not against the server. A small net and few rounds, for time: neither was tuned to an ε.",
        "McMahan et al., ICLR 2018, is the algorithm; claim 4 of a talk by Usynin, direction fixed "
        f"before the first run. {_OURS}",
        tuple(
            Expectation(f"points gained from {few} to {many} clients, {said(e)}", above=0)
            for e in (2.0, 4.0)
            for few, many in pairwise(_CLIENTS)
        )
        + tuple(
            Expectation(
                f"points that the worst class loses beyond the mean, {said(2.0)}, {n} clients",
                above=0,
            )
            for n in _CLIENTS
        ),
    ),
    _records(
        digits,
        32,
        DPSGD(lr=1.0, max_norm=1.0, expected_batch=100, noise_multiplier=0.0),
        LocalSGD(lr=0.1, num_epochs=60, batch_size=25, momentum=0.9),
        num_epochs=30,
        num_candidates=1_500,
        num_canaries=250,
        num_guesses=25,
        options={"test_size": 797},
    ),
    _records(
        mnist,
        16,
        DPSGD(lr=0.5, max_norm=1.0, expected_batch=100, noise_multiplier=0.0),
        LocalSGD(lr=0.1, num_epochs=30, batch_size=50, momentum=0.9),
        num_epochs=15,
        num_candidates=2_000,
        num_canaries=300,
        num_guesses=30,
        options={"train_size": 4_000},
    ),
    _records(
        pneumoniamnist,
        16,
        DPSGD(lr=0.5, max_norm=1.0, expected_batch=100, noise_multiplier=0.0),
        LocalSGD(lr=0.01, num_epochs=80, batch_size=10, momentum=0.9),
        num_epochs=20,
        num_candidates=2_000,
        num_canaries=300,
        num_guesses=30,
        options={},
    ),
)


if __name__ == "__main__":
    from papers.noised import NOISED as SAME  # by the name that workers know it by

    sys.exit(main("noised", SAME, sys.argv[1:]))
