"""Adaptations of a model against inversion: options, and the study that tells what each is worth.

Kinds: oracle (the plain nets written out by hand; least squares), theorem (hypothesis: any shape
fits; options do what they say; the design of the study), contract (refusals), sabotage (effects
that were put in are found again).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from papers.adapted import (
    ADAPTED,
    FACTORS,
    Adaptations,
    Hardened,
    PrivateSmallRobust,
    Setting,
    fraction_of,
    main_effects,
    perturbed,
    shrunk,
)
from turncoat.attacks.inversion.gradient_inversion import GradientInversion
from turncoat.attacks.inversion.optimisers import SignedAdam
from turncoat.describe import describe, fingerprint
from turncoat.messages import Update
from turncoat.randomness import Randomness, ambient
from turncoat.stages.train.dpsgd import DPSGD
from turncoat.stages.train.local import FedSGD, LocalSGD
from turncoat.task import Batch, Model
from turncoat.tasks.bundled import digits
from turncoat.tasks.models import (
    MLP,
    Activation,
    Architecture,
    Built,
    ConvNet,
    LeNet5,
    Normalisation,
    Pooling,
)

RANDOM = Randomness(5)
KINDS = list(itertools.product(get_args(Pooling), get_args(Normalisation)))


def batch(shape: tuple[int, ...] = (1, 8, 8), size: int = 6) -> Batch:
    inputs = torch.rand(size, *shape, generator=RANDOM.at("inputs"))
    return inputs, torch.arange(size) % 3


def model_of(architecture: Architecture, shape: tuple[int, ...] = (1, 8, 8)) -> Model:
    return Model(Built(architecture, shape, 3))


def convolutional(activation: type[nn.Module]) -> nn.Sequential:
    """The default ConvNet on 8x8 images, as it was before there were options."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1), activation()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), activation()),
        *(nn.Flatten(), nn.Linear(128, 3)),
    )


def dense(activation: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), activation(), nn.Linear(64, 3))


def begun(net: nn.Sequential, begin: Callable[[Tensor], Any]) -> nn.Sequential:
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            begin(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return net


@pytest.mark.parametrize(
    ("name", "activation", "begin"),
    [
        ("relu", nn.ReLU, nn.init.kaiming_normal_),
        ("tanh", nn.Tanh, nn.init.xavier_uniform_),
        ("sigmoid", nn.Sigmoid, nn.init.xavier_uniform_),
    ],
)
def test_a_net_without_options_is_the_old_one_to_the_bit(
    name: Any, activation: type[nn.Module], begin: Callable[[Tensor], Any]
) -> None:
    data = batch()
    nets: list[tuple[Architecture, Callable[[type[nn.Module]], nn.Sequential]]] = [
        (ConvNet(activation=name), convolutional),
        (MLP(activation=name), dense),
    ]
    for net, by_hand in nets:
        with ambient(RANDOM.at("begin")):
            theirs = begun(by_hand(activation), begin)
        with ambient(RANDOM.at("begin")):
            mine = net((1, 8, 8), 3)
        assert repr(mine) == repr(theirs)
        assert torch.equal(mine(data[0]), theirs(data[0]))
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)


def test_an_option_at_its_default_does_not_change_what_a_net_is_called() -> None:
    assert describe(ConvNet()) == {
        "use": "turncoat.tasks.models:ConvNet",
        "widths": [16, 32],
        "strides": [2, 2],
        "activation": "relu",
    }
    assert set(describe(MLP())) == {"use", "hidden", "activation"}
    told = [ConvNet(), ConvNet(pooling="max"), ConvNet(dropout=0.5), ConvNet(normalisation="group")]
    assert len({fingerprint(net) for net in told}) == len(told)


@settings(max_examples=30, deadline=None)
@given(
    side=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    strides=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    kind=st.sampled_from(KINDS),
    activation=st.sampled_from(get_args(Activation)),
)
def test_any_adaptation_fits_images_of_any_shape(
    side: tuple[int, int], strides: list[int], kind: tuple[Any, Any], activation: Any
) -> None:
    widths = (4, 8, 4)[: len(strides)]
    net = ConvNet(widths, tuple(strides), activation, *kind, 2, 0.1)
    outputs = net((2, *side), 3).eval()(torch.rand(2, 2, *side))
    assert outputs.shape == (2, 3) and bool(outputs.isfinite().all())


def test_pooling_does_not_change_how_many_parameters_there_are() -> None:
    counts = {model_of(ConvNet(pooling=p)).layout.num_params for p in get_args(Pooling)}
    assert len(counts) == 1


def test_mean_pooling_takes_the_mean_and_max_pooling_the_largest() -> None:
    images = batch((1, 5, 5))[0]
    for name, reduce in (("mean", torch.mean), ("max", torch.amax)):
        net = ConvNet((4,), (2,), "tanh", name)((1, 5, 5), 3)  # type: ignore[arg-type]
        assert isinstance(net, nn.Sequential)
        seen = net[:2](images)
        pooled = net[:3](images)
        assert pooled.shape[-2:] == (3, 3)
        for row, column in itertools.product(range(3), repeat=2):
            square = seen[..., 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            expected = reduce(square, dim=(-2, -1))
            torch.testing.assert_close(pooled[..., row, column], expected)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "elu", "gelu", "silu", "softplus"])
def test_a_smooth_activation_has_slopes_left_and_right_of_zero(activation: Any) -> None:
    net = ConvNet((4,), (1,), activation)((1, 4, 4), 3)
    assert isinstance(net, nn.Sequential)
    x = torch.tensor([-0.5, -1e-3, 1e-3, 0.5], requires_grad=True)
    (slope,) = torch.autograd.grad(net[1](x).sum(), x)
    assert bool((slope != 0).all())
    assert abs(float(slope[2] - slope[1])) < 1e-2
    assert LeNet5(activation)((1, 8, 8), 3)(torch.rand(2, 1, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_adapted_net_has_the_second_derivatives_that_inversion_needs(kind: Any) -> None:
    model = model_of(ConvNet((4, 8), (2, 2), "silu", *kind))
    start, (inputs, labels) = model.initial(RANDOM.at("begin")), batch()
    images, leaf = inputs.requires_grad_(), start.requires_grad_()
    (grad,) = torch.autograd.grad(model.loss(leaf, (images, labels)), leaf, create_graph=True)
    (slope,) = torch.autograd.grad(grad.square().sum(), images)
    assert slope.abs().sum() > 0


@pytest.mark.parametrize("net", [ConvNet(dropout=0.5), MLP(dropout=0.5)], ids=["conv", "mlp"])
def test_dropout_is_drawn_in_training_only(net: Architecture) -> None:
    model, (inputs, labels) = model_of(net), batch()
    start = model.initial(RANDOM.at("begin"))
    assert torch.equal(model.logits(start, inputs), model.logits(start, inputs))
    losses = []
    for address in (0, 1, 0):
        with ambient(RANDOM.at("dropped", address)):
            losses.append(float(model.loss(start, (inputs, labels))))
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.parametrize("net", [ConvNet(), MLP()], ids=["conv", "mlp"])
def test_group_normalisation_keeps_records_apart_and_batch_normalisation_does_not(
    net: Any,
) -> None:
    inputs, _ = batch()
    for kind, apart in (("group", True), ("batch", False)):
        built = replace(net, normalisation=kind)((1, 8, 8), 3).train()
        together, alone = built(inputs)[:2], built(inputs[:2])
        assert torch.allclose(together, alone, atol=1e-5) is apart


def test_dp_trains_a_net_of_groups_and_refuses_one_of_batches() -> None:
    train = DPSGD(0.1, 1.0, 4, noise_multiplier=1.0, num_steps=2)
    for net in (ConvNet((4, 8), normalisation="group"), MLP((8,), normalisation="group")):
        model = model_of(net)
        update = train(model, model.initial(RANDOM.at("b")), batch(), rng=RANDOM.at("t"))
        assert bool(update.delta.isfinite().all())
    mixed = model_of(ConvNet((4, 8), normalisation="batch"))
    with pytest.raises(ValueError, match="mixes the examples of a batch"):
        train(mixed, mixed.initial(RANDOM.at("b")), batch(), rng=RANDOM.at("t"))


def test_every_adaptation_learns() -> None:
    inputs, labels = batch(size=24)
    data = (inputs + labels.float()[:, None, None, None], labels)
    train = LocalSGD(0.05, num_steps=40)
    options: list[dict[str, Any]] = [
        {},
        {"pooling": "mean"},
        {"pooling": "max"},
        {"normalisation": "group"},
        {"normalisation": "batch"},
        {"dropout": 0.2},
        {"activation": "gelu"},
        {"activation": "softplus"},
    ]
    for option in options:
        model = model_of(ConvNet((8, 8), **option))
        start = model.initial(RANDOM.at("begin"))
        update: Update = train(model, start, data, rng=RANDOM.at("train"))
        assert model.loss(start + update.delta, data) < 0.8 * model.loss(start, data), option


def test_adaptations_refuse_what_they_cannot_be() -> None:
    made: tuple[tuple[Callable[[], Any], str], ...] = (
        (lambda: ConvNet(pooling="median"), "pooling is 'median'"),  # type: ignore[arg-type]
        (lambda: ConvNet(normalisation="grup"), "did you mean 'group'"),  # type: ignore[arg-type]
        (lambda: ConvNet((6,), (1,), normalisation="group"), "num_groups must divide every width"),
        (lambda: MLP((6,), normalisation="group"), "num_groups must divide every width"),
        (lambda: ConvNet(num_groups=0), "num_groups must be at least 1"),
        (lambda: MLP(dropout=1.0), "dropout must be below 1"),
        (lambda: ConvNet(dropout=float("nan")), "dropout must be within"),
        (lambda: ConvNet(activation="swish"), "activation must be one of"),  # type: ignore[arg-type]
    )
    for make, said in made:
        with pytest.raises(ValueError, match=said):
            make()


# the factorial study


@pytest.mark.parametrize("num_factors", [1, 2, 4, 6, 8, 11, 16])
def test_no_main_effect_is_mixed_up_with_another_or_with_two_together(num_factors: int) -> None:
    design = fraction_of(num_factors)
    assert design.shape[1] == num_factors and set(design.flatten().tolist()) == {-1, 1}
    assert torch.equal(design.T @ design, len(design) * torch.eye(num_factors, dtype=torch.long))
    assert int(design.sum(dim=0).abs().sum()) == 0
    for a, b in itertools.combinations(range(num_factors), 2):
        assert int((design.T @ (design[:, a] * design[:, b])).abs().sum()) == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 11), st.integers(0, 99))
def test_effects_and_intervals_are_those_of_least_squares(num_factors: int, seed: int) -> None:
    design = fraction_of(num_factors)
    rng = torch.Generator().manual_seed(seed)
    values = torch.randn(len(design), generator=rng, dtype=torch.float64)
    matrix = np.column_stack([np.ones(len(design)), design.numpy()])
    slopes, *_ = np.linalg.lstsq(matrix, values.numpy(), rcond=None)
    found = main_effects(design, values)
    np.testing.assert_allclose([e.value for e in found], 2 * slopes[1:], atol=1e-9)
    free = len(design) - matrix.shape[1]
    if free > 0:
        left = values.numpy() - matrix @ slopes
        variance = left @ left / free * np.linalg.inv(matrix.T @ matrix)[1, 1]
        half = 2 * stats.t.ppf(0.975, free) * variance**0.5
        np.testing.assert_allclose([e.half for e in found], half, atol=1e-9)
    else:
        assert all(np.isnan(e.half) for e in found)


def test_effects_that_were_put_in_are_found_again_under_interactions_and_noise() -> None:
    design = fraction_of(8)
    noise = 0.05 * torch.randn(len(design), generator=RANDOM.at("noise"))
    values = 20 - 3 * design[:, 0] + design[:, 5] + 0.5 * design[:, 0] * design[:, 1] + noise
    found = main_effects(design, values)
    assert found[0].value == pytest.approx(-6, abs=0.2)
    assert found[5].value == pytest.approx(2, abs=0.2)
    for i in set(range(8)) - {0, 5}:
        assert abs(found[i].value) < found[i].half


@pytest.mark.parametrize("levels", list(itertools.product(range(2), repeat=2)), ids=str)
def test_every_level_of_the_study_makes_a_net(levels: tuple[int, int]) -> None:
    for (a, one), (b, other) in itertools.combinations(FACTORS.items(), 2):
        setting = replace(Setting(), **{a: one[levels[0]], b: other[levels[1]]})
        side = 28 // setting.shrink
        assert setting.net((1, side, side), 2)(torch.rand(2, 1, side, side)).shape == (2, 2)


def test_a_shrunk_task_is_the_same_one_with_smaller_images() -> None:
    task, setting = digits(2, per_client=4), Setting(shrink=2)
    small = shrunk(task, setting)
    assert small.sizes == task.sizes and small.test[0].shape[1:] == (1, 4, 4)
    assert float(small.test[0].mean()) == pytest.approx(float(task.test[0].mean()), abs=1e-5)
    assert small.model.logits(small.model.initial(RANDOM.at("b")), small.test[0]).shape[1] == 10
    assert shrunk(task, Setting()) is task


def test_the_study_reports_every_effect_on_every_measure() -> None:
    shipped, _ = ADAPTED
    assert len(FACTORS) >= 6
    study = Adaptations(
        digits,
        {"activation": ("tanh", "relu"), "batch_size": (1, 4), "is_trained": (False, True)},
        GradientInversion(optimiser=SignedAdam(20), together=True),
        num_epochs=2,
        num_victims=2,
        options={"num_clients": 2, "per_client": 8, "test_size": 40},
    )
    found = study(0)
    assert found["runs"] == "8 of 8 combinations of 3 factors"
    columns = {"PSNR (dB)", "PSNR over a blind guess (dB)", "SSIM", "identified"}
    columns |= {"membership AUC", "accuracy (points)"}
    for name, column in itertools.product(("activation", "batch size", "trained"), columns):
        lost = found[f"lost by adapting: {name} | {column}"]
        low, high = (
            found[f"lost by adapting, interval {end}: {name} | {column}"] for end in ("from", "to")
        )
        assert all(isinstance(x, float) for x in (low, lost, high))
        assert low <= lost <= high  # type: ignore[operator]
    assert found["lost by adapting: trained | membership AUC"] == pytest.approx(0, abs=1e-12)
    for expectation in shipped.expectations:
        named = expectation.figure.removeprefix("lost by adapting, interval from: ")
        factor, column = named.split(" | ")
        assert column in columns
        assert {factor.replace(" ", "_"), f"is_{factor.replace(' ', '_')}"} & set(FACTORS)


def test_perturbed_images_stay_near_and_are_harder() -> None:
    model, (inputs, labels) = model_of(ConvNet((4,), (2,), "tanh")), batch()
    start = model.initial(RANDOM.at("begin"))
    hard = perturbed(model, start, (inputs, labels), 0.1, 3)
    assert float((hard - inputs).abs().max()) <= 0.1 + 1e-6
    assert float(hard.min()) >= 0 and float(hard.max()) <= 1
    assert float(model.loss(start, (hard, labels))) > float(model.loss(start, (inputs, labels)))


def test_a_hardened_client_trains_on_what_its_model_gets_wrong() -> None:
    model, data = model_of(ConvNet((4,), (2,), "tanh")), batch()
    start, plain = model.initial(RANDOM.at("begin")), FedSGD(0.1)
    hard = perturbed(model, start, data, 0.1, 3), data[1]
    sent = Hardened(0.1, 3, plain)(model, start, data, rng=RANDOM.at("train"))
    assert torch.equal(sent.delta, plain(model, start, hard, rng=RANDOM.at("train")).delta)


def test_the_grid_has_all_eight_combinations_and_compression_saves_bytes() -> None:
    grid = PrivateSmallRobust(
        digits,
        LocalSGD(0.05, num_epochs=1, batch_size=8),
        DPSGD(
            lr=0.1,
            max_norm=1.0,
            expected_batch=8,
            target_epsilon=8.0,
            delta=1e-5,
            num_epochs=1,
        ),
        FedSGD(0.1),
        GradientInversion(optimiser=SignedAdam(10), num_images=1, together=True),
        bits=4,
        radius=0.05,
        num_rounds=1,
        num_victims=2,
        options={"num_clients": 2, "per_client": 16, "test_size": 40, "model": LeNet5("tanh")},
        victims_options={"test_size": 40, "model": LeNet5("tanh")},
    )
    found = grid(0)
    cells = [n for n in found if n.startswith("defences: ") and n.endswith("| MB a client sends")]
    assert len(cells) == 8
    sent = {n: float(found[n]) for n in cells}
    whole, small = (
        sent[f"defences: {w} | MB a client sends"] for w in ("privacy", "privacy + compression")
    )
    assert small < 0.2 * whole
