"""What clients find in their own records, and what is mended after training, on real digits.

Kinds: theorem (order does not matter; what is all alike is not suspected; spectral signatures drop
as many as they say), oracle (numpy's decomposition, autograd's gradients), golden (recall and
precision over three seeds), sabotage (an attacker who plants too much, or late, passes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from turncoat.activations import features, read_by
from turncoat.attacks.backdoor.planted import Backdoored
from turncoat.attacks.backdoor.triggers import PixelPattern
from turncoat.attacks.poisoning.label_flip import LabelFlip
from turncoat.coalition import Clients, Coalition
from turncoat.federation import Federation, Plain, WhiteBox
from turncoat.messages import Envelope
from turncoat.metrics.detection import Caught
from turncoat.privacy import Private, Unproven, guarantees
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import simulate
from turncoat.stage import Prepare, Verdict, call, gives
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.prepare.activation_clustering import ActivationClustering
from turncoat.stages.prepare.influence_filter import InfluenceFilter, influences
from turncoat.stages.prepare.loss_filter import LossFilter
from turncoat.stages.prepare.spectral_signatures import SpectralSignatures
from turncoat.stages.prepare.suspects import outlyingness, without
from turncoat.stages.release.fine_pruning import Channels, FinePruning
from turncoat.stages.release.neural_cleanse import NeuralCleanse, Triggers, reverse_triggers
from turncoat.stages.release.queries import Queries
from turncoat.stages.train.dpsgd import DPSGD
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Batch, Model, Task
from turncoat.tasks.bundled import digits
from turncoat.tasks.fetched import mnist
from turncoat.tasks.models import MLP, Architecture, ConvNet, LeNet5, ResNet
from turncoat.views import ModelView, QueryView

MNIST = Path(__file__).parents[1].parent / "shared" / "data" / "mnist"
SEEDS = (0, 1, 2)
LATER = Envelope(0, (0, 1, 2, 3), 5)  # a round in which filters work
SGD = LocalSGD(0.1, num_epochs=20, batch_size=20, momentum=0.5)
TRIGGER = PixelPattern(2)
NET, WIDE = MLP((64,)), ConvNet((16, 64))
torch.set_num_threads(1)


# What a client finds


@cache
def central(
    seed: int, share: float, net: Architecture = NET, target: int = 0
) -> tuple[Task, Tensor, Batch]:
    """Return a task, the model of one who trained on poisoned records, and these.

    The planted ones, which say ``target``, are the last.
    """
    task = digits(1, model=net)
    root = Randomness(seed)
    plants = Backdoored(trigger=TRIGGER, target=target, share=share)
    data = plants(task.clients[0], rng=root.at("supply"), envelope=LATER) if share else None
    data = data or task.clients[0]
    start = task.model.initial(root.at("begin"))
    return task, start + SGD(task.model, start, data, rng=root.at("train")).delta, data


def flags(stage: Prepare, data: Batch, task: Task, start: Tensor, round: int = 5) -> set[int]:
    """Return the positions that a stage flags, all of which it drops."""
    verdict = Verdict()
    kept = call(
        stage,
        data,
        rng=Randomness(1).at("prepare"),
        envelope=replace(LATER, round=round),
        model=task.model,
        start=start,
        public=task.public,
        verdict=verdict,
    )
    assert len(kept[1]) == len(kept[0]) == len(data[1]) - len(verdict.flagged)
    return verdict.flagged


def planted(task: Task, data: Batch) -> set[int]:
    return set(range(len(task.clients[0][1]), len(data[1])))


def in_class(flagged: set[int], data: Batch, label: int) -> set[int]:
    return {i for i in flagged if int(data[1][i]) == label}


CLUSTERING = ActivationClustering(reduction="pca", min_silhouette=0.3)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stage", [CLUSTERING, SpectralSignatures(0.15)], ids=["ac", "spectral"])
def test_the_representations_tell_the_planted_records_of_a_class(stage: Any, seed: int) -> None:
    task, params, data = central(seed, 0.02, WIDE)  # a sixth of the class
    bad = planted(task, data)
    found = in_class(flags(stage, data, task, params), data, 0)
    caught = Caught.of(found, bad, len(data[1]))
    assert caught.hits >= 0.8 * len(bad)
    assert caught.hits >= 0.5 * len(found)


def test_a_class_that_falls_in_two_by_itself_hides_what_is_planted() -> None:
    """The genuine ones of these are of two hands, further apart than any trigger puts them."""
    hits = 0
    for seed in SEEDS:
        task, params, data = central(seed, 0.02, WIDE, target=1)
        hits += len(flags(CLUSTERING, data, task, params) & planted(task, data))
    assert hits < 0.5 * len(SEEDS) * len(planted(task, data))


@pytest.mark.parametrize("seed", SEEDS)
def test_clustering_costs_a_clean_client_few_records(seed: int) -> None:
    task, params, data = central(seed, 0.0)
    assert len(flags(CLUSTERING, data, task, params)) < 0.12 * len(data[1])
    assert len(flags(ActivationClustering(), data, task, params)) < 0.12 * len(data[1])


def test_spectral_signatures_cost_as_much_as_they_say() -> None:
    task, params, data = central(0, 0.0)
    flagged = flags(SpectralSignatures(0.1), data, task, params)
    for label in range(10):
        num = int((data[1] == label).sum())
        assert len(in_class(flagged, data, label)) == int(0.15 * num)


@pytest.mark.parametrize("stage", [CLUSTERING, ActivationClustering()], ids=["pca", "ica"])
def test_who_plants_most_of_a_class_passes_for_genuine(stage: ActivationClustering) -> None:
    task, params, data = central(1, 0.15, WIDE)
    flagged = flags(stage, data, task, params)
    assert len(flagged & planted(task, data)) < 0.1 * len(planted(task, data))


@pytest.mark.parametrize(
    "stage", [LossFilter(ratio=1.0), InfluenceFilter()], ids=["loss", "tracin"]
)
def test_a_backdoor_that_is_learnt_already_is_no_longer_implausible(stage: Any) -> None:
    task, params, data = central(0, 0.1)
    flagged = flags(stage, data, task, params)
    assert len(flagged & planted(task, data)) < 0.1 * len(planted(task, data))


@cache
def federated(stage: Any, seed: int) -> tuple[Caught, Caught]:
    """Return what four clients' filters caught in the first of five rounds, and in all others.

    Three tenths of one client's labels lie.
    """
    task = digits(4)
    federation = Federation(
        train=LocalSGD(0.1, num_epochs=5, batch_size=20, momentum=0.5),
        channel=Plain(),
        aggregate=Mean(),
        prepare=stage,
    )
    supplied: Coalition[Any] = Coalition(members=Clients((1,)), supply=LabelFlip(share=0.3))
    run = simulate(federation, task, num_rounds=5, seed=seed, coalition=supplied)
    first, *others = [entry.records or Caught() for entry in run.log]
    return first, sum(others, Caught())


FILTERS = [LossFilter(ratio=1.0), InfluenceFilter(0.05), LossFilter(threshold=2.0)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("stage", "recall"),
    [(FILTERS[0], 0.8), (FILTERS[1], 0.6), (FILTERS[2], 0.35)],
    ids=["blind", "influence", "robust-z"],
)
def test_lying_labels_stand_out_to_the_model_of_all(stage: Any, recall: float, seed: int) -> None:
    first, later = federated(stage, seed)
    assert first.hits + first.false_alarms == 0  # the model has no opinion yet
    assert later.hits >= recall * (later.hits + later.misses)
    assert later.hits >= 0.4 * (later.hits + later.false_alarms)


@pytest.mark.parametrize("stage", FILTERS, ids=["blind", "influence", "robust-z"])
def test_filters_cost_honest_clients_few_records(stage: Any) -> None:
    task, params, data = central(2, 0.0)
    assert len(flags(stage, data, task, params)) < 0.08 * len(data[1])


def test_influence_needs_trusted_data_and_says_so() -> None:
    task, params, data = central(0, 0.0)
    with pytest.raises(ValueError, match="no public data"):
        flags(InfluenceFilter(), data, replace(task, public=None), params)


ALL = [CLUSTERING, SpectralSignatures(), *FILTERS]


@pytest.mark.parametrize("stage", ALL, ids=lambda s: type(s).__name__)
def test_the_order_of_the_records_does_not_matter(stage: Any) -> None:
    task, params, data = central(0, 0.02)
    order = torch.randperm(len(data[1]), generator=Randomness(4).at("order"))
    shuffled = flags(stage, (data[0][order], data[1][order]), task, params)
    flagged = flags(stage, data, task, params)
    assert {int(order[i]) for i in shuffled} == flagged
    assert flagged == flags(stage, data, task, params)


@pytest.mark.parametrize("stage", ALL, ids=lambda s: type(s).__name__)
def test_records_that_are_all_alike_are_kept_and_so_are_few_and_none(stage: Any) -> None:
    task, params, data = central(0, 0.02)
    alike = data[0][:1].expand(40, -1, -1, -1), data[1][:1].expand(40)
    assert not flags(stage, alike, task, params)
    assert not flags(stage, (data[0][:0], data[1][:0]), task, params)
    assert len(flags(stage, (data[0][:1], data[1][:1]), task, params)) == 0
    assert not flags(stage, data, task, params, round=0)


rows_of = st.integers(3, 30).flatmap(
    lambda n: st.integers(1, 6).flatmap(
        lambda d: st.lists(
            st.lists(st.integers(-9, 9), min_size=d, max_size=d), min_size=n, max_size=n
        )
    )
)


@settings(max_examples=25, deadline=None)
@given(rows_of, st.randoms(use_true_random=False))
def test_clusters_and_spectra_belong_to_a_set_of_rows(rows: list[list[int]], random: Any) -> None:
    points = torch.tensor(rows).float()
    order = list(range(len(rows)))
    random.shuffle(order)
    for stage in (
        SpectralSignatures(0.3),
        ActivationClustering(reduction="pca"),
        ActivationClustering(min_silhouette=None),
    ):
        judge: Callable[..., Tensor] = stage.suspects
        rest = () if isinstance(stage, SpectralSignatures) else (Randomness(0).at("k"),)
        again = () if isinstance(stage, SpectralSignatures) else (Randomness(0).at("k"),)
        found, shuffled = judge(points, *rest), judge(points[order], *again)
        assert sorted(map(tuple, points[found].tolist())) == sorted(
            map(tuple, points[order][shuffled].tolist())
        )
        assert not found.all()


def test_the_spectrum_is_that_of_numpy() -> None:
    rows = torch.randn(40, 7, generator=Randomness(0).at("rows"))
    centred = rows.double().numpy() - rows.double().numpy().mean(axis=0)
    along = (centred @ np.linalg.svd(centred)[2][0]) ** 2
    found = SpectralSignatures(0.2).suspects(rows).nonzero().flatten().tolist()
    assert set(found) == set(np.argsort(-along)[:12].tolist())


def test_nobody_learns_from_no_records() -> None:
    data, verdict = (torch.rand(4, 2), torch.arange(4)), Verdict()
    assert without(data, torch.ones(4, dtype=torch.bool), verdict) is data
    assert not verdict.flagged
    assert not outlyingness(torch.tensor([1.0, 1.0, 1.0, 9.0])).any()


def test_influence_is_a_product_of_gradients() -> None:
    """The gradients of the last layer as autograd has them, record by record."""
    task, params, data = central(0, 0.0, MLP((16,)))
    some, trusted = (data[0][:3], data[1][:3]), (data[0][10:30], data[1][10:30])
    last = slice(-170, None)  # 16 x 10 weights and 10 biases

    def gradient(batch: Batch, i: int) -> Tensor:
        return task.model.gradient(params, (batch[0][i : i + 1], batch[1][i : i + 1]))[last]

    known = torch.stack([gradient(trusted, j) for j in range(20)])
    known = known / known.norm(dim=1, keepdim=True)
    classes = set(trusted[1].tolist())
    given, usual = influences(task.model, params, some, trusted)
    for i, value in enumerate(given):
        products = known @ gradient(some, i)
        worst = min(float(products[trusted[1] == c].mean()) for c in classes)
        assert float(value) == pytest.approx(worst, rel=1e-3, abs=1e-6)
    assert len(given) == 3 and len(usual) == 20
    one = trusted[1] == trusted[1][0]  # of one class: what a record does to itself says nothing
    alike = trusted[0][one], trusted[1][one]
    units = known[one]
    for j, value in enumerate(influences(task.model, params, some, alike)[1]):
        products = units @ gradient(alike, j)
        products[j] = 0
        assert float(value) == pytest.approx(float(products.mean()), rel=1e-3, abs=1e-6)


def test_features_are_what_the_last_layer_reads() -> None:
    task, params, data = central(0, 0.0)
    seen = features(task.model, params, data[0])
    named = task.model.layout.split(params)
    weight, bias = list(named.values())[-2:]
    torch.testing.assert_close(seen @ weight.T + bias, task.model.logits(params, data[0]))
    assert not seen.requires_grad and not task.model.module._forward_pre_hooks
    blind = Model(lambda: nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten()))
    with pytest.raises(ValueError, match="no linear layer"):
        features(blind, blind.initial(Randomness(0).at("b")), data[0])


def test_no_epsilon_for_each_record_is_proven_behind_a_filter() -> None:
    """Who is dropped depends on the others, and the rate of drawing on how many are left."""
    federation = Federation(
        train=DPSGD(0.1, 1.0, 4, noise_multiplier=1.0), channel=Plain(), aggregate=Mean()
    )
    filtered = replace(federation, prepare=LossFilter(ratio=1.0))
    (proven,) = guarantees(federation, num_records=50, num_rounds=2, delta=1e-5)
    (unproven,) = guarantees(filtered, num_records=50, num_rounds=2, delta=1e-5)
    assert isinstance(proven, Private)
    assert isinstance(unproven, Unproven) and "chooses among the records" in unproven.reason


# What is mended after training


def success(task: Task, params: Tensor, target: int, trigger: PixelPattern = TRIGGER) -> float:
    inputs, labels = task.test
    marked = trigger(inputs[labels != target])
    return float((task.model.logits(params, marked).argmax(1) == target).float().mean())


def right(task: Task, params: Tensor) -> float:
    return float((task.model.logits(params, task.test[0]).argmax(1) == task.test[1]).float().mean())


def released(stage: Any, task: Task, params: Tensor) -> Tensor:
    view = stage(task.model, params, rng=Randomness(2).at("release"), public=task.public)
    assert isinstance(view, ModelView)
    return view.params


def test_fine_pruning_closes_badnets_on_mnist() -> None:
    if not MNIST.exists():
        pytest.skip("its data are not beside the clone: ../shared/data")
    task = mnist(1, per_client=6_000, test_size=1_000, public_size=300, data=MNIST)
    trigger, root = PixelPattern(3), Randomness(0)
    plants = Backdoored(trigger=trigger, target=0, share=0.1)
    data = plants(task.clients[0], rng=root.at("s"), envelope=LATER)
    start = task.model.initial(root.at("i"))
    sgd = LocalSGD(0.05, num_epochs=4, batch_size=20, momentum=0.5)
    hurt = start + sgd(task.model, start, data, rng=root.at("t")).delta
    mended = released(FinePruning(WhiteBox()), task, hurt)
    alone = released(FinePruning(WhiteBox(), tuning=None), task, hurt)
    assert success(task, hurt, 0, trigger) > 0.9
    assert success(task, mended, 0, trigger) <= 0.1
    assert right(task, mended) >= right(task, hurt) - 0.04
    assert success(task, alone, 0, trigger) > 0.5  # it lives in channels that are busy too


@pytest.mark.parametrize("net", [LeNet5(), MLP((16,)), ResNet(8, 8, 4)], ids=["conv", "mlp", "res"])
def test_a_pruned_channel_says_nothing(net: Architecture) -> None:
    task = digits(1, model=net)
    params = task.model.initial(Randomness(0).at("p"))
    channels = Channels.of(task.model)
    cut = channels.without(task.model, params, 1)
    read = read_by(channels.reader, task.model, cut, task.test[0][:9])
    weight = task.model.layout.split(cut)[f"{channels.reader}.weight"]
    by_channel = weight.view(len(weight), channels.num, -1)
    assert not by_channel[:, 1].any() and by_channel[:, 0].any()
    if not isinstance(net, ResNet):  # a short cut goes around the last convolution
        assert not read.reshape(9, channels.num, -1)[:, 1].any()
    assert torch.equal(params, task.model.initial(Randomness(0).at("p")))


def test_pruning_takes_the_dormant_first_and_stops_at_its_bound() -> None:
    task, params, _ = central(0, 0.0, WIDE)
    assert task.public is not None
    bound = 0.04
    cut = FinePruning(WhiteBox(), max_drop=bound).pruned(task.model, params, task.public)
    channels = Channels.of(task.model)
    before = channels.activity(task.model, params, task.public[0])
    dead = channels.activity(task.model, cut, task.public[0]) == 0
    assert dead.any() and not dead.all()
    assert before[dead].max() <= before[~dead].min()

    def judged(p: Tensor) -> float:
        return right(replace(task, test=task.public), p)  # type: ignore[arg-type]

    assert judged(cut) >= judged(params) - bound


def test_there_is_nothing_to_prune_in_a_regression() -> None:
    task = digits(1, model=MLP(()))
    with pytest.raises(ValueError, match="no channels to prune"):
        released(FinePruning(WhiteBox()), task, task.model.initial(Randomness(0).at("p")))


def test_mending_needs_clean_data_and_neural_cleanse_many_classes() -> None:
    task, params, _ = central(0, 0.0)
    for stage in (FinePruning(WhiteBox()), NeuralCleanse(WhiteBox())):
        with pytest.raises(ValueError, match="no public data"):
            released(stage, replace(task, public=None), params)
    with pytest.raises(ValueError, match=r"min_classes = 11 of them; there are 10"):
        released(NeuralCleanse(WhiteBox(), min_classes=11), task, params)


def test_a_mended_model_may_be_released_behind_queries() -> None:
    task, params, _ = central(0, 0.0)
    stage = FinePruning(Queries(labels_only=True))
    assert gives(stage) is QueryView and gives(FinePruning(WhiteBox())) is ModelView
    view = stage(task.model, params, rng=Randomness(0).at("r"), public=task.public)
    assert isinstance(view, QueryView) and len(torch.unique(view.scores(task.test[0]))) == 2


@pytest.mark.parametrize("seed", SEEDS)
def test_neural_cleanse_finds_the_target_and_unlearns_it(seed: int) -> None:
    task, params, _ = central(seed, 0.1, target=seed)
    assert task.public is not None
    found = reverse_triggers(task.model, params, task.public[0], rng=Randomness(0).at("n"))
    assert seed in found.flagged() and int(found.norms.argmin()) == seed
    taken = task.model.logits(params, found.stamped(task.public[0], seed)).argmax(dim=1)
    assert float((taken == seed).float().mean()) >= 0.99
    mended = released(NeuralCleanse(WhiteBox()), task, params)
    assert success(task, params, seed) > 0.9
    assert success(task, mended, seed) <= 0.5
    assert right(task, mended) >= right(task, params) - 0.04


@pytest.mark.parametrize("seed", SEEDS)
def test_no_class_of_a_clean_model_is_half_as_easy_as_the_median(seed: int) -> None:
    """The threshold of 2 flags a few all the same: classes are easy in ways of their own."""
    ratios = []
    for share in (0.0, 0.1):
        task, params, _ = central(seed, share, target=seed)
        assert task.public is not None
        norms = reverse_triggers(
            task.model, params, task.public[0], rng=Randomness(0).at("n")
        ).norms
        ratios.append(float(norms.min() / norms.quantile(0.5)))
    assert ratios[0] > 0.6 and ratios[1] < 0.5


def test_anomalies_are_those_of_the_paper() -> None:
    norms = torch.tensor([1.0, 9.0, 10.0, 10.0, 11.0, 12.0, 10.0, 30.0, 9.5, 10.5])
    blank = torch.zeros(10, 1, 2, 2)
    found = Triggers(blank, blank, norms)
    median = np.median(norms.numpy())
    deviations = np.abs(norms.numpy() - median)
    expected = deviations / (1.4826 * np.median(deviations))
    assert found.anomalies.numpy() == pytest.approx(expected, rel=1e-5)
    assert found.flagged() == (0,)  # the large one is an outlier, and no short cut
    assert Triggers(blank, blank, torch.ones(10)).flagged() == ()


def test_a_search_without_success_leaves_a_whole_mask() -> None:
    task, params, _ = central(0, 0.0)
    found = reverse_triggers(
        task.model, params, task.test[0][:20], rng=Randomness(0).at("n"), num_steps=1
    )
    assert found.norms.max() == 64.0 and found.flagged() == ()
