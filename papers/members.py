"""Who was in the data? Attacks with shadow models against thresholds, and what updates add.

``python -m papers.members --figure docs/membership.png`` draws the curves, from what
``python -m papers.inference`` measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from papers.candidates import CURVE, LOSS, ShadowedAttacks, adult, lira, rmia
from papers.inferred import adult as people
from papers.leaking import Leaking
from papers.ledger import HERE, Expectation, Experiment
from turncoat.report.palette import LIGHT, MARKERS
from turncoat.stages.train.local import LocalSGD
from turncoat.tasks.fetched import cifar10, heart_disease, mnist
from turncoat.tasks.models import MLP, ConvNet
from turncoat.tasks.partitions import IID

_OURS = "Bounds are this project's own."
_CITED = (
    "Carlini et al., S&P 2022: LiRA with a fixed variance is the better one below 64 shadow models "
    "or so. The README of their code reports, for CIFAR-10 and 16 models, a true-positive rate at "
    "0.1 % of 5.93 % with it, 1.69 % without, and 0.09 % of the loss (read there). Zarifzadeh et "
    "al., ICML 2024: RMIA is ahead with few. Their nets and sizes are far larger. " + _OURS
)
_HOW = (
    " Two clients, as FedAvg. Candidates: all training records and as many of the test set; users "
    "of the released model attack. Shadow models are trained once for all attacks, 34 of them in "
    "pairs: of each pair one has a random half of the candidates, the other the rest; each has a "
    "start, batches and a seed of its own. Whoever has 32 has those of 16 pairs; whoever has fewer "
    "plays several times, with up to {} groups of them that share no model. What is said is the "
    "mean over these groups and over {} targets of a seed: the federation's own model, and shadow "
    "models in its place, against all pairs but their own. LiRA asks once for each record; RMIA "
    "fits its offline correction by attacking two of its own shadows. The loss is compared as the "
    "confidence that it is a function of, which does not round. A true-positive rate is that of "
    "the best threshold whose false-positive rate is at most what is said. Intervals are over the "
    "differences seed by seed."
)


def _experiment(
    name: str, shown: str, measure: ShadowedAttacks, recipe: str, *more: Expectation
) -> Experiment:
    return Experiment(
        f"members-{name}",
        f"{shown}: LiRA with 32 shadow models beats the loss, a fixed variance beats one for each "
        "record up to 16 of them, and with 2 RMIA beats LiRA.",
        measure,
        recipe + _HOW.format(measure.num_groups, measure.num_targets),
        _CITED,
        (
            Expectation("tpr_lira_minus_loss", above=0),
            Expectation("auc_lira_minus_loss", above=0),
            *(
                Expectation(f"tpr_fixed_minus_per_example_with_{n}", above=0)
                for n in measure.few
                if n > 2
            ),
            Expectation("tpr_rmia_minus_lira_online_with_2", above=0),
            Expectation("tpr_rmia_minus_lira_offline_with_2", above=0),
            Expectation("auc_rmia_minus_lira_online_with_2", above=0),
            Expectation("auc_rmia_minus_lira_offline_with_2", above=0),
            *more,
        ),
    )


SHADOWED = (
    _experiment(
        "cifar10",
        "CIFAR-10",
        ShadowedAttacks(
            cifar10,
            LocalSGD(0.1, num_epochs=5, batch_size=20, momentum=0.8),
            num_rounds=4,
            num_targets=35,
            num_groups=16,
            options={
                "num_clients": 2,
                "train_size": 1000,
                "test_size": 1000,
                "public_size": 500,
                "model": ConvNet((16,), (4,)),
            },
        ),
        "A very small net (one 3x3 convolution of 16 channels and stride 4, one dense layer) on a "
        "small part of CIFAR-10: 1,000 images; 4 rounds of 5 local epochs of SGD at 0.1, batch 20, "
        "momentum 0.8.",
    ),
    _experiment(
        "mnist",
        "MNIST",
        ShadowedAttacks(
            mnist,
            LocalSGD(0.2, num_epochs=2, batch_size=100, momentum=0.8),
            num_rounds=4,
            num_targets=2,
            options={
                "num_clients": 2,
                "train_size": 10_000,
                "test_size": 10_000,
                "public_size": 2000,
                "model": MLP((64,)),
            },
        ),
        "An MLP with 64 hidden units on 10,000 images of MNIST, so that there are 10,000 "
        "non-members; 4 rounds of 2 local epochs of SGD at 0.2, batch 100, momentum 0.8.",
        Expectation("tpr_at_01_lira_minus_loss", above=0),
    ),
    _experiment(
        "adult",
        "Adult",
        ShadowedAttacks(
            adult,
            LocalSGD(0.1, num_epochs=8, batch_size=20, momentum=0.9),
            num_rounds=4,
            num_targets=16,
            options={
                "num_clients": 2,
                "train_size": 1000,
                "test_size": 1000,
                "public_size": 1000,
                "model": MLP((128,)),
            },
        ),
        "An MLP with 128 hidden units on 1,000 people of Adult, without the sampling weight; 4 "
        "rounds of 8 local epochs of SGD at 0.1, batch 20, momentum 0.9. With 16 shadow models a "
        "variance for each record is ahead here, for records differ in it much, and not a few of "
        "them: on seed 0 the eighth of the records of which models are surest has confidences of "
        "27 (as logarithms of odds), which vary by 22 between models that knew a record and by 23 "
        "between those that did not; where members are told apart, the least sure eighth, it is 2 "
        "and 5. Steps of such length drive plain cases there. The hundredth of the records that "
        "varies most has 6 % of the sum. One variance for both kinds of models, or medians for "
        "means, were no better (seeds 0 and 1). members-adult-steady has shorter steps.",
    ),
    _experiment(
        "heart-disease",
        "Heart disease",
        ShadowedAttacks(
            heart_disease,
            LocalSGD(0.1, num_epochs=10, batch_size=20, momentum=0.9),
            num_rounds=5,
            options={
                "num_clients": 2,
                "partition": IID(),
                "test_size": 400,
                "public_size": 120,
                "model": MLP((64,)),
            },
        ),
        "An MLP with 64 hidden units on 400 patients of UCI heart disease, their hospitals mixed; "
        "5 rounds of 10 local epochs of SGD at 0.1, batch 20, momentum 0.9. One per cent of 400 "
        "non-members is 4: the rates of one target are coarse.",
    ),
)

STEADY = _experiment(
    "adult-steady",
    "Adult, trained by shorter steps",
    ShadowedAttacks(
        people,
        LocalSGD(0.02, num_epochs=12, batch_size=20, momentum=0.9),
        num_rounds=4,
        num_targets=24,
        options={
            "drop": ("fnlwgt", "capital-gain", "capital-loss", "marital-status", "relationship"),
            "num_clients": 2,
            "train_size": 1000,
            "test_size": 1000,
            "public_size": 1000,
            "model": MLP((128,)),
        },
    ),
    "As members-adult, by steps a fifth as long, 12 local epochs, and without columns that make "
    "few people unlike all others (capital gain and loss, up to 15 standard deviations away) or "
    "most of them plain cases (marital status, relationship); all are split at random. On seed 0 "
    "the confidences of the surest eighth are 8 then, and vary by 2.7; of the least sure, by 0.8 "
    "and 1.3. This form was chosen to be one in which records vary more alike, as a variance in "
    "common supposes: of six that were looked at on seed 0, four of them on seed 1 too, the one in "
    "which it was furthest ahead, with 16 shadow models, on the worse of the two seeds. What "
    "members-adult shows is no less true: where records differ more, a variance in common is "
    "behind.",
)


def _leaking(name: str, shown: str, measure: Leaking, recipe: str) -> Experiment:
    return Experiment(
        f"leaking-{name}",
        f"{shown}: a client's updates tell more of its records than the global model, and all "
        "others together, who subtract theirs from the sum, see as much as the server.",
        measure,
        recipe + " Candidates: the records of client 0 and as many of the test set. The server "
        "reads updates by alignment, gradient norm and confidence, in standard deviations of the "
        "public records, averaged over all rounds but the last; participants read the steps of the "
        "global model in the same way, alone or without what the coalition itself sent. Beside "
        "it: the confidence averaged over the global models, and the loss of the last.",
        "Nasr et al., S&P 2019, find the server ahead of the participants; their attack learns "
        "from known members. That a sum without all but one is that one is algebra. " + _OURS,
        (
            Expectation("auc_updates_minus_last_model", above=0),
            Expectation("auc_updates_minus_models", above=0),
            Expectation("auc_updates_minus_steps", above=0),
            Expectation("auc_all_but_one_and_update_differ_by", at_most=1e-3),
        ),
    )


LEAKING = (
    _leaking(
        "mnist",
        "MNIST",
        Leaking(
            mnist,
            LocalSGD(0.1, num_epochs=3, batch_size=20, momentum=0.5),
            num_rounds=6,
            num_clients=6,
            options={
                "per_client": 200,
                "test_size": 400,
                "public_size": 300,
                "model": MLP((32,)),
            },
        ),
        "An MLP with 32 hidden units; 6 clients hold 200 images of MNIST each; 6 rounds of 3 local "
        "epochs of SGD at 0.1, batch 20, momentum 0.5.",
    ),
    _leaking(
        "adult",
        "Adult",
        Leaking(
            adult,
            LocalSGD(0.1, num_epochs=5, batch_size=20, momentum=0.8),
            num_rounds=6,
            num_clients=6,
            options={
                "per_client": 200,
                "test_size": 400,
                "public_size": 300,
                "model": MLP((64,)),
            },
        ),
        "An MLP with 64 hidden units; 6 clients hold 200 people of Adult each; 6 rounds of 5 local "
        "epochs of SGD at 0.1, batch 20, momentum 0.8.",
    ),
)
MEMBERS = (*SHADOWED, STEADY, *LEAKING)

_SHOWN = {  # what is drawn, by its number of shadow models, and its hue
    (lira(True, "fixed"), 32): 1,
    (lira(True, "per-example"), 32): 7,
    (rmia(True), 32): 3,
    (rmia(True), 2): 4,
    (lira(True, "fixed"), 2): 2,
    (LOSS, 0): 0,
}


def draw(experiments: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw the curves of all data sets, log over log, each as far left as ten false alarms go."""
    canvas = Figure(figsize=(8.2, 7.4), layout="constrained")
    for axes, e in zip(canvas.subplots(2, 2).flatten(), SHADOWED, strict=True):
        _curves(axes, e.claim.partition(":")[0], experiments[e.name])
    lines = canvas.axes[0].get_legend_handles_labels()
    canvas.legend(*lines, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    canvas.savefig(path, dpi=110, metadata={"Software": None})


def _curves(axes: Axes, title: str, figures: Mapping[str, Any]) -> None:
    for i, ((row, num_shadows), hue) in enumerate(_SHOWN.items()):
        head = f"{CURVE}, {num_shadows} shadows: {row} | "
        points = {float(n.removeprefix(head)): f for n, f in figures.items() if n.startswith(head)}
        rates, found = list(points), list(points.values())
        floor = min(rates) / 3  # a rate of 0 has no place on a logarithmic axis
        values, low, high = (
            [max(f[end], floor) for f in found] for end in ("value", "low", "high")
        )
        label = f"{row}, {num_shadows} shadows" if num_shadows else row
        look: Any = {"color": LIGHT.series[hue], "marker": MARKERS[i], "markersize": 4}
        axes.plot(rates, values, label=label, linewidth=1.4, **look)
        axes.fill_between(rates, low, high, color=LIGHT.series[hue], alpha=0.15, linewidth=0)
    axes.plot(rates, rates, ":", color=LIGHT.muted, linewidth=1.2, label="chance")
    axes.set_xscale("log")
    axes.set_yscale("log")
    seeds = {len(f["values"]) for f in found}
    axes.set_title(f"{title}, {max(seeds)} {'seeds' if max(seeds) > 1 else 'seed'}", fontsize=10)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("false-positive rate")
    axes.set_ylabel("true-positive rate")
    axes.grid(color=LIGHT.line, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def main(arguments: Sequence[str]) -> int:
    """Draw the figure, from the ledger that has the experiments."""
    parser = argparse.ArgumentParser(prog="python -m papers.members")
    parser.add_argument("--figure", type=Path, required=True, help="what to draw")
    parser.add_argument("--ledger", type=Path, default=HERE / "inference.json")
    asked = parser.parse_args(arguments)
    known = json.loads(asked.ledger.read_text("utf-8"))["experiments"]
    figures = {e["name"]: e["figures"] for e in known if e["figures"]}
    for e in SHADOWED:
        if e.name not in figures:
            parser.error(f"{asked.ledger.name} has no figures of {e.name!r}: run the ledger first")
    draw(figures, asked.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
