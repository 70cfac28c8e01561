"""Short names for configs. No part is imported before it is used, nor is torch."""

from __future__ import annotations

_STAGES = "turncoat.stages"
_ATTACKS = "turncoat.attacks"
_BUNDLED = "turncoat.tasks.bundled"
_FETCHED = "turncoat.tasks.fetched"

PARTS: dict[str, dict[str, str]] = {
    "attack": {
        "inverting-gradients": f"{_ATTACKS}.inversion.inverting_gradients:InvertingGradients",
        "inverting-aggregate": f"{_ATTACKS}.inversion.inverting_gradients:InvertingAggregate",
        "loss-threshold": f"{_ATTACKS}.membership.loss_threshold:LossThreshold",
        "lira": f"{_ATTACKS}.membership.lira:LiRA",
        "label-flip": f"{_ATTACKS}.poisoning.label_flip:LabelFlip",
        "sign-flip": f"{_ATTACKS}.poisoning.sign_flip:SignFlip",
        "alie": f"{_ATTACKS}.poisoning.alie:ALIE",
        "model-replacement": f"{_ATTACKS}.backdoor.model_replacement:ModelReplacement",
    },
    "stage": {
        "local-sgd": f"{_STAGES}.train.local:LocalSGD",
        "fed-sgd": f"{_STAGES}.train.local:FedSGD",
        "clipped": f"{_STAGES}.train.local:Clipped",
        "dp-sgd": f"{_STAGES}.train.dpsgd:DPSGD",
        "plain": "turncoat.federation:Plain",
        "secure-aggregation": f"{_STAGES}.channel.secure_aggregation:SecureAggregation",
        "mean": f"{_STAGES}.aggregate.mean:Mean",
        "median": f"{_STAGES}.aggregate.coordinatewise:Median",
        "trimmed-mean": f"{_STAGES}.aggregate.coordinatewise:TrimmedMean",
        "krum": f"{_STAGES}.aggregate.krum:Krum",
        "multi-krum": f"{_STAGES}.aggregate.krum:MultiKrum",
        "geometric-median": f"{_STAGES}.aggregate.geometric_median:GeometricMedian",
        "norm-bound": f"{_STAGES}.aggregate.norm_bound:NormBound",
        "server-sgd": f"{_STAGES}.aggregate.optimisers:ServerSGD",
        "server-momentum": f"{_STAGES}.aggregate.optimisers:ServerMomentum",
        "server-adam": f"{_STAGES}.aggregate.optimisers:ServerAdam",
        "everyone": "turncoat.federation:Everyone",
        "fixed-sample": "turncoat.federation:FixedSample",
        "fraction-sample": "turncoat.federation:FractionSample",
        "poisson-sample": "turncoat.federation:PoissonSample",
        "white-box": "turncoat.federation:WhiteBox",
        "queries": f"{_STAGES}.release.queries:Queries",
    },
    "task": {
        "digits": f"{_BUNDLED}:digits",
        "breast-cancer": f"{_BUNDLED}:breast_cancer",
        "faces": f"{_BUNDLED}:faces",
        "mnist": f"{_FETCHED}:mnist",
        "fashion-mnist": f"{_FETCHED}:fashion_mnist",
        "cifar10": f"{_FETCHED}:cifar10",
        "pneumoniamnist": f"{_FETCHED}:pneumoniamnist",
        "mednist": f"{_FETCHED}:mednist",
        "heart-disease": f"{_FETCHED}:heart_disease",
        "hub": "turncoat.tasks.images:from_hub",
        "parquet": "turncoat.tasks.images:from_parquet",
        "npz": "turncoat.tasks.images:from_npz",
        "csv": "turncoat.tasks.tables:from_csv",
    },
    "partition": {
        "iid": "turncoat.tasks.partitions:IID",
        "dirichlet": "turncoat.tasks.partitions:Dirichlet",
        "class-shards": "turncoat.tasks.partitions:ClassShards",
        "by-column": "turncoat.tasks.partitions:ByColumn",
        "unequal-sizes": "turncoat.tasks.partitions:UnequalSizes",
    },
    "model": {
        "mlp": "turncoat.tasks.models:MLP",
        "lenet5": "turncoat.tasks.models:LeNet5",
        "convnet": "turncoat.tasks.models:ConvNet",
        "resnet": "turncoat.tasks.models:ResNet",
    },
    "game": {
        "membership": "turncoat.games.membership:Membership",
        "reconstruct": "turncoat.games.reconstruction:Reconstruct",
    },
    "outcome": {
        "accuracy-lost": "turncoat.games.outcomes:AccuracyLost",
        "backdoor-success": "turncoat.games.outcomes:BackdoorSuccess",
        "targeted-error": "turncoat.games.outcomes:TargetedError",
    },
    "trigger": {
        "pixel-pattern": f"{_ATTACKS}.backdoor.triggers:PixelPattern",
    },
    "members": {
        "clients": "turncoat.coalition:Clients",
        "pool": "turncoat.coalition:Pool",
    },
    "schedule": {
        "always": "turncoat.coalition:Always",
        "once": "turncoat.coalition:Once",
        "every": "turncoat.coalition:Every",
        "from": "turncoat.coalition:From",
    },
}
