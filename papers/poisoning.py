"""What poisoning and backdoors do on real data, and what stops it: `python -m papers.poisoning`.

Nets, rounds and clients are smaller than the papers', so that the whole takes an hour or two on
two cores: orders and signs are asked for, and no published figure is claimed. Recipes were found by
trial runs with other seeds than those of the table.
"""

from __future__ import annotations

import sys

from papers.blind import BlindlyPlanted
from papers.courses import Aim, BackdoorCourse
from papers.flipped import SourceClassUnderFlips
from papers.grids import AccuracyGrid
from papers.ledger import Expectation, Experiment, main
from papers.neighbours import AmongPeers
from papers.shares import Flipped, Patched, Planted, PoisonedShare
from papers.stealthy import TargetedPoisoning
from turncoat.attacks.backdoor.alternating_minimisation import (
    AlternatingMinimisation,
    ExplicitBoosting,
)
from turncoat.attacks.backdoor.blind import BlindBackdoor
from turncoat.attacks.backdoor.model_replacement import ModelReplacement
from turncoat.attacks.backdoor.planted import Backdoored, Relabelled
from turncoat.attacks.backdoor.projected import PGDBackdoor
from turncoat.attacks.backdoor.triggers import DistributedPattern, PixelPattern
from turncoat.attacks.poisoning.alie import ALIE
from turncoat.attacks.poisoning.fang import FangKrum, FangTrimmedMean
from turncoat.attacks.poisoning.min_max import MinMax, MinSum
from turncoat.attacks.poisoning.sign_flip import SignFlip
from turncoat.attacks.poisoning.tailored import Tailored
from turncoat.coalition import Clients, Coalition, Forge, From, Once
from turncoat.federation import FixedSample
from turncoat.games.outcomes import BackdoorSuccess, TargetedError
from turncoat.graphs import Complete, RandomRegular, Ring, StarOfStars
from turncoat.messages import Clear, Update
from turncoat.stage import Aggregate
from turncoat.stages.aggregate.bulyan import Bulyan
from turncoat.stages.aggregate.coordinatewise import Median, TrimmedMean
from turncoat.stages.aggregate.dnc import DnC
from turncoat.stages.aggregate.flame import FLAME
from turncoat.stages.aggregate.krum import Krum, MultiKrum
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.aggregate.norm_bound import NormBound
from turncoat.stages.aggregate.optimisers import ServerMomentum
from turncoat.stages.aggregate.sparsefed import SparseFed
from turncoat.stages.aggregate.update_analysis import UpdatePCA
from turncoat.stages.train.local import LocalSGD
from turncoat.tasks.fetched import cifar10, mnist
from turncoat.tasks.models import MLP, ConvNet
from turncoat.tasks.partitions import Dirichlet

_SMALL = MLP((64,))
_PATCH = PixelPattern(3)
_OURS = "The bound is this project's own; no published figure is claimed."


def _rules(num_byzantine: int, momentum: float = 0.0) -> dict[str, Aggregate[Clear]]:
    f = num_byzantine
    rules: dict[str, Aggregate[Clear]] = {
        "Median": Median(),
        "TrimmedMean": TrimmedMean(f),
        "Krum": Krum(f),
        "MultiKrum": MultiKrum(f),
        "Bulyan": Bulyan(f),
        "DnC": DnC(f),
    }
    if not momentum:
        return rules
    return {name: ServerMomentum(momentum, inner=rule) for name, rule in rules.items()}


def _coalitions(num_members: int) -> dict[str, Coalition[Update]]:
    forges: dict[str, Forge[Update]] = {
        "LIE": ALIE(),
        "Fang (trimmed mean)": FangTrimmedMean(),
        "Fang (Krum)": FangKrum(),
        "tailored": Tailored(),
        "Min-Max": MinMax(),
        "Min-Sum": MinSum(),
    }
    members = Clients(tuple(range(num_members)))
    return {
        f"{name}, updates {'known' if known else 'unknown'}": Coalition(
            members=members, forge=forge, knows_honest=known
        )
        for known in (True, False)
        for name, forge in forges.items()
    }


_NDSS = (
    "Shejwalkar and Houmansadr, NDSS 2021, has this order for CIFAR-10 in the notebooks that were "
    f"read: tailored, Min-Max and Min-Sum cost more than LIE. {_OURS}"
)
_GAINS = {
    "tailored_minus_lie_points": ("tailored, updates known", "LIE, updates known"),
    "min_max_minus_lie_points": ("Min-Max, updates known", "LIE, updates known"),
}


def _ordered(*rules: str) -> tuple[Expectation, ...]:
    return tuple(Expectation(f"{title}, {rule}", above=0) for rule in rules for title in _GAINS)


_ORDERS = (
    Experiment(
        "ndss-mnist",
        "Attacks that are tuned to a rule, or to the spread of updates, cost more than LIE.",
        AccuracyGrid(
            mnist,
            LocalSGD(0.5, num_steps=1, batch_size=32),
            _rules(10),
            _coalitions(10),
            num_rounds=40,
            gains=_GAINS,
            options={"num_clients": 50, "per_client": 200, "model": _SMALL},
        ),
        "MLP with 64 hidden units, 50 clients x 200 images, iid, 10 of them malicious; FedSGD: one "
        "step on 32 images at 0.5, 40 rounds; accuracy is the mean of the last 5.",
        _NDSS,
        _ordered("Median", "TrimmedMean"),
    ),
    Experiment(
        "ndss-cifar10",
        "The same order on CIFAR-10.",
        AccuracyGrid(
            cifar10,
            LocalSGD(0.05, num_steps=1, batch_size=32),
            _rules(5, momentum=0.9),
            _coalitions(5),
            num_rounds=60,
            gains=_GAINS,
            options={"num_clients": 25, "per_client": 400, "model": ConvNet((16, 32))},
        ),
        "Two convolutions, 25 clients x 400 images, iid, 5 of them malicious; FedSGD: one step on "
        "32 images at 0.05, server momentum 0.9, 60 rounds. CIFAR-10, JPEG re-encoding, where the "
        "local copy is one.",
        _NDSS,
        _ordered("Median", "TrimmedMean"),
        num_seeds=1,
    ),
)

_SHARES = (0.02, 0.04, 0.1, 0.2, 0.3, 0.4, 0.5)
_FLIPS = Experiment(
    "tolpegin-mnist",
    "Flipped labels cost the source class recall, more with more malicious clients, and the other "
    "classes next to none; the rows of the last layer tell who flips.",
    SourceClassUnderFlips(
        mnist,
        LocalSGD(0.05, num_epochs=2, batch_size=16),
        source=4,
        target=9,
        shares=_SHARES,
        analysis=UpdatePCA(Mean(), source=4, first_round=10, window=20, min_silhouette=0.3),
        num_sampled=10,
        num_rounds=40,
        options={"num_clients": 50, "per_client": 120, "model": _SMALL},
    ),
    "MLP with 64 hidden units, 50 clients x 120 images, iid, 10 a round, 40 rounds, two local "
    "epochs at 0.05, batch 16; 4 is called 9. Flags are counted from round 20 on.",
    "Tolpegin et al., ESORICS 2020, has a plot and no rule; the decision rule is ours (2-means, "
    f"the group of fewer clients if its silhouette is 0.3). {_OURS}",
    (
        Expectation("points_of_source_recall_lost_at_40_percent", at_least=20),
        Expectation("points of recall lost: 40 % malicious | all other classes", at_most=5),
        Expectation("flagged clients, settled rounds: 10 % malicious | f1", at_least=0.9),
        Expectation("flagged clients, settled rounds: 40 % malicious | f1", at_least=0.9),
    ),
)

_ONE_RECORD = Relabelled(source=5, target=7)
_LOCAL = LocalSGD(0.1, num_epochs=5, batch_size=32)
_STEALTH = Experiment(
    "bhagoji-mnist",
    "Alternating minimisation has one record misjudged and passes both checks on its way; plain "
    "boosting is there at once, and is seen by both.",
    TargetedPoisoning(
        mnist,
        _LOCAL,
        AlternatingMinimisation(
            poison=_ONE_RECORD,
            inner=_LOCAL,
            lr=0.01,
            num_stealth_steps=1,
            rho=0.5,
            stop_loss=0.05,
            max_spread=1.8,
        ),
        ExplicitBoosting(poison=_ONE_RECORD, inner=_LOCAL),
        source=5,
        target=7,
        first=4,
        num_rounds=124,
        options={"num_clients": 10, "per_client": 200, "model": _SMALL},
    ),
    "MLP with 64 hidden units, 10 clients x 200 images, iid; client 0 attacks from round 4 to 123. "
    "What it sends stays within 1.8 times the spread that it expects of honest updates: the factor "
    "and the rounds were chosen by trials with seeds 0 to 2 (a factor of 1.6 had been seen with "
    "seeds 10 and 13 too; without the bound, over 60 rounds, the distance check was passed in 0.87 "
    "of the rounds, 0.77 to 0.97, with a confidence of 0.93, 0.81 to 1.04). "
    "A check is passed where its gap exceeds the largest of an honest client in that round by no "
    "more than 0.15; an attack has won where the new global model's confidence in the attacker's "
    "class is 0.9. Plain boosting goes quiet once it has won: so the rounds until then are asked "
    "about, and those of all are told besides.",
    "Bhagoji et al., ICML 2019, leaves the thresholds open; these are ours.",
    (
        Expectation("alternating_target_confidence", at_least=0.9),
        Expectation("alternating_rounds_until_it_has_won_that_pass_accuracy_check", at_least=0.9),
        Expectation("alternating_rounds_until_it_has_won_that_pass_distance_check", at_least=0.8),
        Expectation("explicit_boosting_target_confidence", at_least=0.9),
        Expectation(
            "explicit_boosting_rounds_until_it_has_won_that_pass_distance_check", at_most=0.3
        ),
        Expectation(
            "explicit_boosting_rounds_until_it_has_won_that_pass_accuracy_check", at_most=0.3
        ),
    ),
)


def _dba(split: bool) -> Coalition[Update]:
    share = 0.5 if split else 0.125  # four times the pixels in a quarter of the records
    poison = Backdoored(trigger=DistributedPattern(split=split), target=2, share=share)
    return Coalition(members=Clients((0, 1, 2, 3)), acts=From(10), prepare=poison)


_COURSES = (
    Experiment(
        "courses-mnist",
        "Model replacement takes the mean in one round, distributed triggers in some; clipping "
        "stops the first and slows the second, FLAME stops both.",
        BackdoorCourse(
            mnist,
            LocalSGD(0.1, num_epochs=2, batch_size=32),
            {
                "mean": Mean(),
                "norm bound": NormBound(Mean(), ratio=1.0),
                "FLAME": FLAME(),
                "SparseFed": SparseFed(fraction_kept=0.01, max_norm=1.0),
            },
            {
                "model replacement": Aim(
                    Coalition(
                        members=Clients((0,)),
                        acts=Once(10),
                        train=ModelReplacement(
                            trigger=_PATCH,
                            target=0,
                            inner=LocalSGD(0.05, num_epochs=5, batch_size=32),
                        ),
                    ),
                    _PATCH,
                    0,
                ),
                "DBA": Aim(_dba(split=True), DistributedPattern(), 2),
                "one trigger, as many pixels": Aim(_dba(split=False), DistributedPattern(), 2),
            },
            num_clean=10,
            num_rounds=16,
            watched=(1, 2, 4, 8, 12, 16),
            options={
                "num_clients": 20,
                "per_client": 200,
                "model": _SMALL,
                "partition": Dirichlet(0.5),
            },
        ),
        "MLP with 64 hidden units, 20 clients x 200 images, Dirichlet(0.5); 10 honest rounds under "
        "the mean, then 16 under each rule. Replacement: client 0 in the first of them, boost 20. "
        "DBA: clients 0 to 3 in all of them, each with its quarter of the trigger on half as many "
        "records as it has; or each with the whole trigger on an eighth.",
        f"Bagdasaryan et al., AISTATS 2020, and Xie et al., ICLR 2020, are the attacks. {_OURS}",
        (
            Expectation("attack success rate, model replacement: round 1 | mean", at_least=0.9),
            Expectation("attack success rate, model replacement: round 1 | FLAME", at_most=0.05),
            Expectation("attack success rate, DBA: round 16 | mean", at_least=0.9),
            Expectation("attack success rate, DBA: round 16 | FLAME", at_most=0.05),
        ),
    ),
    Experiment(
        "sparsefed-mnist",
        "SparseFed halves what clipping alone leaves of a backdoor, at no more than 3 points.",
        BackdoorCourse(
            mnist,
            LocalSGD(0.1, num_epochs=2, batch_size=32),
            {"clipping alone": NormBound(Mean(), max_norm=1.0)}
            | {
                f"top {100 * k:g} %": SparseFed(fraction_kept=k, max_norm=1.0)
                for k in (0.2, 0.05, 0.02, 0.01, 0.005, 0.002)
            },
            {
                "PGD by 2 of 100": Aim(
                    Coalition(
                        members=Clients((0, 1)),
                        train=PGDBackdoor(
                            poison=Backdoored(trigger=PixelPattern(5), target=0, share=0.5),
                            inner=LocalSGD(0.1, num_epochs=10, batch_size=32),
                            radius=1.0,
                            every=5,
                            boost=5.0,
                        ),
                    ),
                    PixelPattern(5),
                    0,
                )
            },
            num_clean=0,
            num_rounds=80,
            watched=(20, 40, 60, 80),
            compared={
                f"success at {100 * k:g} % by success of clipping alone": (
                    f"top {100 * k:g} %",
                    "clipping alone",
                )
                for k in (0.01, 0.005, 0.002)
            },
            sample=FixedSample(20),
            whole=True,
            options={"num_clients": 100, "per_client": 100, "model": _SMALL},
        ),
        "MLP with 64 hidden units, 100 clients x 100 images, iid, 20 a round, 80 rounds; updates "
        "cut to 1. Two clients project into that ball and boost five times; trigger of 5x5 pixels.",
        "Panda et al., AISTATS 2022, abstract: sparsification on top of clipping. The bound is "
        "this project's own.",
        (
            Expectation(
                "success at 0.5 % by success of clipping alone, PGD by 2 of 100", at_most=0.5
            ),
        ),
    ),
)

_CODE = Experiment(
    "blind-mnist",
    "Code from a supplier plants a backdoor in honest training, and nearly no accuracy is lost.",
    BlindlyPlanted(
        mnist,
        LocalSGD(0.1, num_epochs=1, batch_size=32, momentum=0.5),
        BlindBackdoor(trigger=_PATCH, target=0),
        num_rounds=15,
        options={"num_clients": 10, "per_client": 600},
    ),
    "LeNet-5 (ReLU), 10 clients x 600 images, iid, all with the supplier's code; 15 rounds of one "
    "local epoch at 0.1, batch 32, momentum 0.5; losses weighed by MGDA, normalised by loss+.",
    f"Bagdasaryan and Shmatikov, USENIX Security 2021, is the attack. {_OURS}",
    (
        Expectation("attack_success_rate", at_least=0.99),
        Expectation("points_of_accuracy_lost", at_most=0.5),
    ),
)

_PLANTS = {
    "patch": Planted(Patched(_PATCH, 0), BackdoorSuccess(_PATCH, 0)),
    "label flip 1 to 7": Planted(Flipped(1, 7), TargetedError(1, 7)),
}
_TWO_PERCENT = (
    "The claim that 2 % of the data is enough (Usynin's talk) is asked about, not assumed: a "
    "supplier poisons the records, in the place of clean ones. 100 stands for: more than the "
    "largest share tried."
)
_AMOUNTS = (
    Experiment(
        "share-central-mnist",
        "Two per cent of the records are enough for a patch where one party trains, and not for "
        "a label flip.",
        PoisonedShare(
            mnist,
            LocalSGD(0.05, num_epochs=1, batch_size=32),
            _PLANTS,
            shares=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1),
            num_rounds=10,
            whole_clients=False,
            options={"num_clients": 1, "per_client": 5_000, "model": _SMALL},
        ),
        "MLP with 64 hidden units, 5,000 images at one party, 10 epochs at 0.05, batch 32.",
        _TWO_PERCENT,
        (
            Expectation("percent_for_50_percent_success, patch", at_most=2),
            Expectation("percent_for_50_percent_success, label flip 1 to 7", above=2),
        ),
    ),
    Experiment(
        "share-federated-mnist",
        "In a federation the poisoned records of so many clients are averaged away: it takes more.",
        PoisonedShare(
            mnist,
            LocalSGD(0.1, num_epochs=2, batch_size=32),
            _PLANTS,
            shares=(0.02, 0.05, 0.1, 0.2, 0.4),
            num_rounds=15,
            whole_clients=True,
            options={"num_clients": 50, "per_client": 100, "model": _SMALL},
        ),
        "MLP with 64 hidden units, 50 clients x 100 images, iid, 15 rounds of two local epochs at "
        "0.1, batch 32; all records of so many clients are poisoned, and nothing is boosted.",
        _TWO_PERCENT,
        (Expectation("percent_for_50_percent_success, patch", above=2),),
    ),
)

_PEERS = Experiment(
    "peers-mnist",
    "Among peers damage falls with the distance from the attacker, unless everyone hears everyone.",
    AmongPeers(
        mnist,
        LocalSGD(0.1, num_epochs=1, batch_size=20),
        {
            "ring": Ring(),
            "random regular, 4": RandomRegular(4),
            "star of stars": StarOfStars(),
            "complete": Complete(),
        },
        {"mean": Mean(), "median": Median()},
        Aim(
            Coalition(
                members=Clients((0,)),
                train=ModelReplacement(
                    trigger=_PATCH, target=0, inner=LocalSGD(0.1, num_epochs=3, batch_size=20)
                ),
            ),
            _PATCH,
            0,
        ),
        Coalition(members=Clients((0,)), forge=SignFlip(3.0)),
        num_rounds=10,
        options={"num_clients": 16, "per_client": 100, "model": _SMALL},
    ),
    "MLP with 64 hidden units, 16 nodes x 100 images, iid, 10 rounds of one local epoch at 0.1, "
    "batch 20. Node 0 replaces the model of its neighbourhood, or flips its update three times.",
    f"No paper's figure. {_OURS}",
    (
        Expectation(
            "backdoor success by distance from the attacker: ring, mean | 1 step", at_least=0.5
        ),
        Expectation(
            "backdoor success by distance from the attacker: ring, mean | 3 steps or more",
            at_most=0.1,
        ),
        Expectation(
            "backdoor success by distance from the attacker: complete, median | 1 step",
            at_most=0.1,
        ),
    ),
)

_ALL = (_FLIPS, _STEALTH, *_COURSES, _CODE, *_AMOUNTS, _PEERS, *_ORDERS)
EXPERIMENTS = _ALL


if __name__ == "__main__":
    sys.exit(main("poisoning", EXPERIMENTS, sys.argv[1:]))
