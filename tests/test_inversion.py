"""The engine of gradient inversion and its parts, on digits of 8x8 pixels and nets without kinks.

Kinds: contract, theorem (hypothesis), oracle (a plain loop; the client's own training), sabotage
(take away what the attack feeds on: it falls to its baseline).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from turncoat.attacks.inversion import convolutions, engine
from turncoat.attacks.inversion.convolutions import Held, Winograd
from turncoat.attacks.inversion.engine import (
    CannotCompile,
    Clue,
    Recipe,
    Seen,
    Unrolled,
    invert,
    invert_all,
)
from turncoat.attacks.inversion.gradient_inversion import (
    DLG,
    IDLG,
    AggregateInversion,
    GradientInversion,
    InvertingAggregate,
    InvertingGradients,
)
from turncoat.attacks.inversion.labels import BiasCorrected, Counts, Given, Joint, LowestEntry
from turncoat.attacks.inversion.objectives import L1, L2, Apart, Cosine
from turncoat.attacks.inversion.optimisers import LBFGS, Adam, SignedAdam
from turncoat.attacks.inversion.priors import TotalVariation
from turncoat.attacks.inversion.starts import Constant, Gaussian, Uniform
from turncoat.config import load
from turncoat.messages import Update
from turncoat.metrics.images import match, psnr
from turncoat.parts import PARTS
from turncoat.randomness import Randomness, ambient
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Batch, Model
from turncoat.views import AggregateView, ServerView

RANDOM = Randomness(5)
torch.set_num_threads(1)


@cache
def digits() -> Batch:
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=RANDOM.at("digits"))
    images = torch.tensor(bunch.images)[:, None].float() / 16
    return images[order], torch.tensor(bunch.target)[order]


def smooth() -> nn.Module:
    """A small LeNet for 8x8 images, without kinks."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 84), nn.Tanh(), nn.Linear(84, 10)),
    )


def dense() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def unbiased() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10, bias=False))


def normed() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.2)),
        *(nn.Flatten(), nn.Linear(144, 10)),
    )


@cache
def shared(build: Callable[[], nn.Module]) -> tuple[Model, Tensor]:
    model = Model(build)
    return model, model.initial(RANDOM.at("begin"))


ONE_STEP = LocalSGD(0.1)


def clue(
    size: int = 1,
    *,
    build: Callable[[], nn.Module] = smooth,
    train: LocalSGD = ONE_STEP,
    first: int = 0,
    data: Batch | None = None,
) -> Clue:
    """Return the update of one client with ``size`` digits."""
    model, start = shared(build)
    batch = data or (digits()[0][first : first + size], digits()[1][first : first + size])
    with ambient(RANDOM.at("dropout")):
        update = train(model, start, batch, rng=RANDOM.at("train"))
    population = (digits()[0][600:], digits()[1][600:])
    return Clue(model, start, update.delta, size, population)


def view(*clues: Clue) -> ServerView[Update]:
    senders = tuple(range(len(clues)))
    messages = tuple(Update(c.delta, float(c.num_images)) for c in clues)
    return ServerView(0, clues[0].model, senders, messages, sent=(clues[0].before,) * len(clues))


def recipe(**parts: Any) -> Recipe:
    whole: dict[str, Any] = {
        "objective": Cosine(),
        "optimiser": SignedAdam(200),
        "start": Uniform(),
        "labels": Counts(),
        "priors": (TotalVariation(1e-5),),
    }
    return Recipe(**(whole | parts))


def rng() -> Generator:
    return RANDOM.at("attack")


def likeness(images: Tensor, size: int = 1, first: int = 0) -> float:
    """Return the mean PSNR beside the digits, in the best order."""
    originals = digits()[0][first : first + size]
    rows, columns = match(images, originals)
    return float(psnr(images[rows], originals[columns]).mean())


def blind(size: int = 1, first: int = 0) -> float:
    return likeness(digits()[0][600:].mean(dim=0, keepdim=True).expand(size, -1, -1, -1), size)


# parts that look, and do nothing else


@dataclass(frozen=True)
class At:
    """A start at the truth."""

    images: Tensor = field(repr=False)

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        return self.images


@dataclass(frozen=True)
class Still:
    """An optimiser that only takes the cost down."""

    costs: list[float] = field(default_factory=list)
    slopes: list[Tensor] = field(default_factory=list)

    def __call__(
        self,
        variables: Sequence[Tensor],
        slope: Callable[[], Tensor],
        *,
        clamp: Callable[[], None],
        patience: int | None,
    ) -> None:
        self.costs.append(float(slope().sum()))
        self.slopes.extend(v.grad for v in variables if v.grad is not None)


@dataclass(frozen=True)
class Curious:
    """A prior that wants to know everything, and weighs nothing."""

    layers: list[tuple[Seen, ...]] = field(default_factory=list)

    def __call__(
        self, images: Tensor, *, activations: Sequence[Tensor], layers: tuple[Seen, ...]
    ) -> Tensor:
        assert [id(a) for a in activations] == [id(s.gave) for s in layers]
        self.layers.append(layers)
        return activations[0].sum() * 0


# the loop


def test_a_plain_loop_gives_the_same_bits() -> None:
    found = clue(2)
    attack = InvertingGradients(num_steps=40, num_images=2)
    (guess,) = attack(view(found), victims=(0,), population=found.population, rng=rng())

    net = smooth()
    for p, value in zip(
        net.parameters(), found.model.layout.split(found.before).values(), strict=True
    ):
        p.data = value.clone()
    weights, target = list(net.parameters()), -found.delta
    images = torch.rand((2, 1, 8, 8), generator=rng()).requires_grad_()
    adam = torch.optim.Adam([images], lr=0.1)
    for step in range(40):
        loss = nn.functional.cross_entropy(net(images), guess.labels)
        slopes = torch.autograd.grad(loss, weights, create_graph=True)
        flat = torch.cat([s.flatten() for s in slopes])
        cosine = flat.dot(target) / (flat.norm() * target.norm())
        wobble = images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()
        images.grad = torch.autograd.grad(1 - cosine + 1e-4 * wobble, images)[0].sign()
        adam.param_groups[0]["lr"] = 0.1 * 0.1 ** sum(step >= c for c in (15, 25, 35))
        adam.step()
        images.data.clamp_(0, 1)
    assert torch.equal(guess.inputs, images.detach())


@pytest.mark.parametrize("objective", [Cosine(), L2(), L1()], ids=repr)
@pytest.mark.parametrize(
    ("train", "unrolled"),
    [
        (LocalSGD(0.1), Unrolled(0.1)),
        (LocalSGD(0.1, num_epochs=4), Unrolled(0.1, 4)),
        (LocalSGD(0.3, num_epochs=2, batch_size=3), Unrolled(0.3, 2, 3)),
    ],
    ids=["one step", "four epochs", "batches that are all"],
)
def test_the_truth_costs_nothing(objective: Any, train: LocalSGD, unrolled: Unrolled) -> None:
    found, still = clue(3, train=train), Still()
    images, labels = digits()[0][:3], tuple(digits()[1][:3].tolist())
    parts = {"start": At(images), "labels": Given(labels), "optimiser": still, "priors": ()}
    invert(found, recipe(objective=objective, unrolled=unrolled, **parts), rng=rng())
    invert(
        found,
        recipe(objective=objective, unrolled=unrolled, **parts | {"start": Uniform()}),
        rng=rng(),
    )
    assert still.costs[0] < 1e-3 * still.costs[1] and still.costs[1] > 1e-3


def test_batches_are_unrolled_one_after_another() -> None:
    """Twice two images a step: the oracle is two steps by hand, in the guess's order."""
    model = Model(smooth)
    start = model.initial(RANDOM.at("begin"))
    images, labels = digits()[0][:4], digits()[1][:4]
    here = start
    for chosen in (slice(0, 2), slice(2, 4)):
        here = here - 0.2 * model.gradient(here, (images[chosen], labels[chosen]))
    still = Still()
    found = Clue(model, start, here - start, 4, digits())
    parts = {"start": At(images), "labels": Given(tuple(labels.tolist())), "optimiser": still}
    for batch_size in (2, None):
        unrolled = Unrolled(0.2, batch_size=batch_size)
        invert(found, recipe(objective=L2(), priors=(), unrolled=unrolled, **parts), rng=rng())
    assert still.costs[0] < 1e-9 < 1e-4 < still.costs[1]


def test_several_local_steps_are_inverted_once_they_are_unrolled() -> None:
    found = clue(train=LocalSGD(0.1, num_epochs=5), build=dense)
    brief = recipe(optimiser=SignedAdam(100))
    one = invert(found, brief, rng=rng())
    five = invert(found, replace(brief, unrolled=Unrolled(0.1, 5)), rng=rng())
    single = invert(clue(build=dense), brief, rng=rng())
    assert likeness(five.inputs) > likeness(one.inputs) + 10
    assert likeness(five.inputs) > likeness(single.inputs) - 3


def test_guesses_that_are_moved_together_go_where_they_go_alone() -> None:
    clues = [clue(2, first=2 * i) for i in range(3)]
    alone = recipe(optimiser=Adam(4), num_restarts=2)
    apart = invert_all(clues, alone, rng=rng())
    together = invert_all(clues, replace(alone, together=True), rng=rng())
    for one, other in zip(apart, together, strict=True):
        assert torch.equal(one.labels, other.labels)
        assert torch.allclose(one.inputs, other.inputs, atol=2e-3)


@pytest.mark.parametrize("unrolled", [None, Unrolled(0.1, 2, 1)], ids=["one step", "unrolled"])
@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_nets_with_running_statistics_and_dropout_are_given_back_as_they_were(
    together: bool, unrolled: Unrolled | None
) -> None:
    found = clue(2, build=normed)
    whole = recipe(
        optimiser=SignedAdam(3), num_restarts=2, together=together, unrolled=unrolled,
        priors=(TotalVariation(), Curious()),
    )  # fmt: skip
    once, twice = invert(found, whole, rng=rng()), invert(found, whole, rng=rng())
    assert torch.equal(once.inputs, twice.inputs)
    assert torch.equal(clue(2, build=normed).delta, found.delta)
    assert all(p.grad is None and p.is_leaf for p in found.model.module.parameters())


def test_what_layers_did_is_seen_without_another_pass() -> None:
    found, curious, passes = clue(2), Curious(), []
    found.model.module.register_forward_hook(lambda *_: passes.append(1))
    whole = recipe(optimiser=SignedAdam(5), priors=(curious,), labels=LowestEntry())
    invert(found, whole, rng=rng())
    assert len(passes) == 5 == len(curious.layers)
    names = [s.name for s in curious.layers[0]]
    assert names == [
        n for n, m in found.model.module.named_modules() if not list(m.children()) and n
    ]
    assert curious.layers[0][0].gave.shape == (2, 6, 8, 8)


def test_restarts_are_judged_by_the_objective_without_the_priors() -> None:
    still = Still()
    starts = iter([digits()[0][:1] * 0, digits()[0][:1], digits()[0][5:6]])

    @dataclass(frozen=True)
    class Turns:
        def __call__(self, shape: tuple[int, ...]) -> Tensor:
            return next(starts)

    whole = recipe(start=Turns(), optimiser=still, num_restarts=3, priors=(TotalVariation(100.0),))
    assert torch.equal(invert(clue(), whole, rng=rng()).inputs, digits()[0][:1])


def test_a_plateau_cuts_the_step_and_at_last_ends_the_search() -> None:
    count = []

    @dataclass(frozen=True)
    class Counted:
        def __call__(self, images: Tensor) -> Tensor:
            count.append(1)
            return images.sum() * 0

    whole = recipe(priors=(Counted(),), optimiser=SignedAdam(2_000), patience=10)
    found = invert(clue(build=dense), whole, rng=rng())
    assert len(count) < 600
    assert likeness(found.inputs) > blind() + 10


def test_with_few_iterations_a_cosine_comes_further_than_cuts() -> None:
    found, costs, likenesses = clue(1), [], []
    for optimiser in (SignedAdam(100), SignedAdam(100, decay="cosine")):
        guess = invert(found, recipe(optimiser=optimiser), rng=rng())
        mine = found.model.gradient(found.before, (guess.inputs, guess.labels))
        costs.append(1 - float(torch.cosine_similarity(mine, -found.delta, dim=0)))
        likenesses.append(likeness(guess.inputs))
    assert costs[1] < costs[0]
    assert likenesses[1] > likenesses[0] + 3


def test_an_update_in_other_units_is_the_same_to_the_cosine() -> None:
    found = clue()
    again = replace(found, delta=found.delta * 2.0**-7)
    brief = recipe(optimiser=SignedAdam(10))
    one, other = invert(found, brief, rng=rng()), invert(again, brief, rng=rng())
    assert torch.equal(one.inputs, other.inputs)


def test_an_objective_that_compares_lengths_wants_to_know_the_step() -> None:
    with pytest.raises(ValueError, match=r"unrolled=Unrolled\(lr=0.1\)"):
        recipe(objective=L2())
    with pytest.raises(ValueError, match="compares lengths"):
        GradientInversion(objective=L1())
    with pytest.raises(ValueError, match=r"LBFGS.* moves one guess at a time"):
        recipe(optimiser=LBFGS(), together=True)


# labels


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 500), st.floats(1e-3, 1e3), st.sampled_from([smooth, unbiased]))
def test_the_label_of_one_image_is_read_off_whatever_the_step(
    which: int, lr: float, build: Callable[[], nn.Module]
) -> None:
    found = clue(first=which, build=build, train=LocalSGD(lr))
    for rule in (LowestEntry(), Counts(), BiasCorrected(), Counts("rows")):
        if build is smooth and rule == Counts("rows"):
            continue  # what its last layer reads may be negative
        assert rule(found).tolist() == digits()[1][which : which + 1].tolist()


@pytest.mark.parametrize("rule", [Counts(), BiasCorrected()], ids=repr)
def test_the_labels_of_batches_are_counted(rule: Any) -> None:
    right = 0
    for i in range(20):
        said = rule(clue(8, first=8 * i)).tolist()
        meant = digits()[1][8 * i : 8 * i + 8].tolist()
        right += sum(min(said.count(c), meant.count(c)) for c in set(meant))
    assert right >= 0.9 * 160


def test_a_batch_of_one_class_is_told() -> None:
    inputs, labels = digits()
    sevens = inputs[labels == 7][:4], labels[labels == 7][:4]
    found = clue(4, data=sevens)
    assert Counts()(found).tolist() == BiasCorrected()(found).tolist() == [7] * 4


def test_labels_that_are_given_are_taken() -> None:
    assert Given((3, 1))(clue(5)).tolist() == [3, 1, 3, 1, 3]


# presets


def test_l_bfgs_rebuilds_what_a_smooth_net_saw_and_dlg_finds_the_label_too() -> None:
    found = clue()
    for attack in (DLG(local_lr=0.1, num_steps=8), IDLG(local_lr=0.1, num_steps=8)):
        (guess,) = attack(view(found), victims=(0,), population=found.population, rng=rng())
        assert guess.labels.tolist() == digits()[1][:1].tolist()
        assert likeness(guess.inputs) > 30


def test_a_gradient_of_noise_gives_no_image() -> None:
    found = clue()
    noise = torch.randn(found.delta.shape, generator=RANDOM.at("noise"))
    noisy = replace(found, delta=noise * found.delta.norm() / noise.norm())
    for attack in (IDLG(local_lr=0.1, num_steps=3), GradientInversion(optimiser=SignedAdam(60))):
        (guess,) = attack(view(noisy), victims=(0,), population=found.population, rng=rng())
        assert likeness(guess.inputs) < blind() + 1


def test_without_the_gradient_only_start_and_priors_are_left() -> None:
    one, other = clue(), clue(first=9)
    attack = GradientInversion(optimiser=SignedAdam(5), labels=Given((0,))).prior_only
    asked: dict[str, Any] = {"victims": (0,), "population": one.population}
    (a,), (b,) = (attack(view(c), **asked, rng=rng()) for c in (one, other))
    assert torch.equal(a.inputs, b.inputs)
    bare = replace(attack, priors=())
    (c,) = bare(view(one), **asked, rng=rng())
    assert torch.equal(c.inputs, torch.rand((1, 1, 8, 8), generator=rng()))
    assert InvertingGradients(num_steps=5).prior_only.optimiser == SignedAdam(5)
    assert InvertingAggregate(num_steps=5).prior_only.optimiser == SignedAdam(5)


def test_the_aggregate_of_several_is_one_gradient_of_all_their_images() -> None:
    clues = [clue(first=i) for i in range(2)]
    step = (clues[0].delta + clues[1].delta) / 2
    seen = AggregateView[Update](0, clues[0].model, clues[0].before, clues[0].before + step)
    attack = AggregateInversion(num_images=2, optimiser=SignedAdam(150), priors=())
    asked: dict[str, Any] = {"victims": (0, 1), "population": clues[0].population}
    found = attack(seen, **asked, rng=rng())
    assert found[0] is found[1] and likeness(found[0].inputs, 2) > blind(2) + 8


def test_the_scale_of_an_aggregate_is_undone() -> None:
    found, still = clue(), Still()
    seen = AggregateView[Update](0, found.model, found.before, found.before + found.delta / 4)
    truth = At(digits()[0][:1])
    attack = AggregateInversion(
        objective=L2(),
        unrolled=Unrolled(0.1),
        optimiser=still,
        start=truth,
        priors=(),
        num_clients=4,
    )
    for one in (attack, replace(attack, num_clients=1)):
        one(seen, victims=(0,), population=found.population, rng=rng())
    assert still.costs[0] < 1e-4 < 1 < still.costs[1]


# odd inputs


def test_an_update_with_nan_or_of_another_layout_is_refused() -> None:
    found = clue()
    spoilt = found.delta.clone()
    spoilt[3] = float("nan")
    with pytest.raises(ValueError, match="delta holds NaN or infinity: there is nothing to match"):
        replace(found, delta=spoilt)
    with pytest.raises(ValueError, match=r"delta has shape \(3,\); \(\d+,\) is due"):
        replace(found, delta=torch.zeros(3))


def test_an_update_of_zeros_and_a_constant_image_do_no_harm() -> None:
    brief = recipe(optimiser=SignedAdam(5), start=Gaussian())
    for odd in (
        replace(clue(), delta=torch.zeros_like(clue().delta)),
        clue(data=(torch.zeros(1, 1, 8, 8), torch.tensor([4]))),
    ):
        assert bool(invert(odd, brief, rng=rng()).inputs.isfinite().all())


def test_l_bfgs_keeps_the_last_finite_guess() -> None:
    found = clue()

    @dataclass(frozen=True)
    class Cliff:
        def __call__(self, images: Tensor) -> Tensor:
            return images.sum() * float("nan")

    whole = recipe(optimiser=LBFGS(2), priors=(Cliff(),), start=Constant(0.25))
    assert torch.equal(invert(found, whole, rng=rng()).inputs, torch.full((1, 1, 8, 8), 0.25))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 1.0]))
def test_the_slope_of_one_guess_by_hand_is_that_of_several_bit_by_bit(
    seed: int, scale: float
) -> None:
    rng = torch.Generator().manual_seed(seed)
    shapes = [(40_000, 2), (3,), (2, 5, 5)]
    seen = Apart.of(torch.randn(80_053, generator=rng), shapes)

    def slopes(target: tuple[Tensor, ...]) -> list[Tensor]:
        found = [scale * torch.ones(shape).requires_grad_() for shape in shapes]
        guess = [f * t.roll(1) for f, t in zip(found, seen, strict=True)]
        cost = Cosine()(guess, target)
        return [cost, *torch.autograd.grad(3 * cost, guess)]

    assert all(map(torch.equal, slopes(seen), slopes(tuple(seen))))


# compiling


def test_the_iteration_is_traced_into_one_graph_that_any_victim_can_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traced = []

    def compiled(graph: Any, **_: Any) -> Any:
        traced.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", compiled)
    clues = [clue(2, build=dense, first=2 * i) for i in range(2)]
    ways: list[dict[str, Any]] = [
        {"labels": Joint()},
        {"together": True},
        {"unrolled": Unrolled(0.1, 2, 1)},
    ]
    for more in ways:
        eager = recipe(optimiser=Adam(4), **more)
        found = invert_all(clues, replace(eager, compile=True), rng=rng())
        for one, other in zip(found, invert_all(clues, eager, rng=rng()), strict=True):
            assert torch.allclose(one.inputs, other.inputs, atol=2e-3)
    assert len(traced) == 3


@pytest.mark.parametrize("size", [16, 17])
def test_convolutions_by_tiles_have_the_derivatives_of_the_usual_ones(size: int) -> None:
    seed = torch.Generator().manual_seed(0)
    images = torch.rand((2, 32, size, 20), generator=seed).requires_grad_()
    weight = torch.randn((33, 32, 3, 3), generator=seed).requires_grad_()

    def slopes() -> list[Tensor]:
        out = nn.functional.conv2d(images, weight, None, (1, 1), (1, 1), (1, 1), 1)
        (by_weight,) = torch.autograd.grad(out.tanh().mean(), weight, create_graph=True)
        return [out, by_weight, *torch.autograd.grad(by_weight.square().sum(), images)]

    usual = slopes()
    with Winograd():
        tiled = slopes()
    assert not torch.equal(usual[0], tiled[0])
    for one, other in zip(usual, tiled, strict=True):
        assert float((one - other).detach().abs().max()) < 1e-4 * float(one.detach().abs().max())


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(7, 12),
    stride=st.integers(1, 3),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    wide=st.booleans(),
    biased=st.booleans(),
)
def test_convolutions_of_held_weights_have_the_derivatives_of_the_usual_ones_bit_by_bit(
    size: int,
    stride: int,
    padding: tuple[int, int],
    dilation: int,
    groups: int,
    wide: bool,
    biased: bool,
) -> None:
    seed = torch.Generator().manual_seed(size)
    channels = 128 if wide else 4  # wide ones have kernels of their own
    images = torch.rand((1 + wide, channels, size, size + 1), generator=seed).requires_grad_()
    with ambient(seed):
        layer = nn.Conv2d(channels, 8, 3, stride, padding, dilation, groups, biased)

    def slopes() -> list[Tensor]:
        before = images.sin()
        out = layer(layer.weight.new_ones(()) * before)
        found = torch.autograd.grad(out.tanh().mean(), [*layer.parameters()], create_graph=True)
        cost = torch.stack([(f.square() * f).sum() for f in found]).sum() + out.square().mean()
        return [out, *found, *torch.autograd.grad(cost, images)]

    usual = slopes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolutions, "_MANY", 0)
        with Held() as mode:
            held = slopes()
    assert mode.found
    assert all(map(torch.equal, usual, held))


def test_nobody_works_out_the_slope_of_held_weights_on_the_way_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forward; images and weights; their three slopes; images: seven, where autograd has eight.

    The first layer has five: nobody asks for its images' slope in the recorded pass.
    """
    monkeypatch.setattr(convolutions, "_MANY", 0)
    images = torch.rand((2, 8, 9, 9)).requires_grad_()
    weights = [nn.Parameter(torch.randn((8, 8, 3, 3))) for _ in range(2)]

    def num_convolutions() -> float:
        with FlopCounterMode(display=False) as counter:
            out = images
            for w in weights:
                out = nn.functional.conv2d(out, w, None, (1, 1), (1, 1), (1, 1), 1).tanh()
            found = torch.autograd.grad(out.sum(), weights, create_graph=True)
            torch.autograd.grad(torch.stack([f.square().sum() for f in found]).sum(), images)
        return float(counter.get_total_flops() / (2 * 2 * 81 * 9 * 8 * 8))

    assert num_convolutions() == 5 + 8
    with Held():
        assert num_convolutions() == 5 + 7


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(CannotCompile, match=r"RuntimeError: no C\+\+ compiler\): .* compile = fal"):
        invert(clue(build=dense), recipe(compile=True), rng=rng())
    assert engine.CannotCompile is CannotCompile


# config


BASE = """
[task]
use = "digits"
num_clients = 4
model = { use = "mlp", hidden = [8] }

[federation]
train = { use = "local-sgd", lr = 0.1 }
channel = "plain"
aggregate = "mean"
"""


def attack_of(text: str, folder: Path) -> Any:
    path = folder / "audit.toml"
    path.write_text(BASE + text)
    (entry,) = load(path).entries.values()
    return getattr(entry.trial, "attack", None)


def test_every_part_can_be_named_in_a_file(tmp_path: Path) -> None:
    made = attack_of(
        """
[attack.inversion]
use = "gradient-inversion"
objective = "l2"
priors = [{ use = "total-variation", weight = 1e-3 }]
optimiser = { use = "adam", num_steps = 50, lr = 0.05 }
start = { use = "gaussian-start", std = 0.1 }
labels = "bias-corrected"
space = "pixels"
unrolled = { use = "local-steps", lr = 0.1, num_epochs = 2 }
num_restarts = 2
together = true
""",
        tmp_path,
    )
    assert made == GradientInversion(
        objective=L2(),
        priors=(TotalVariation(1e-3),),
        optimiser=Adam(50, 0.05),
        start=Gaussian(std=0.1),
        labels=BiasCorrected(),
        unrolled=Unrolled(0.1, 2),
        num_restarts=2,
        together=True,
    )


def test_the_page_of_inversion_tells_what_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "inversion.md").read_text(encoding="utf-8")
    for fragment in re.findall(r"^```toml\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL):
        assert isinstance(attack_of(fragment, tmp_path), GradientInversion)
    for code in re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL):
        made: dict[str, Any] = {}
        exec(code, made)
        assert isinstance(made["attack"], GradientInversion)
    kinds = ("objective", "optimiser", "start", "labels", "space", "prior", "unrolled")
    named = {name for kind in kinds for name in PARTS[kind]}
    assert not {name for name in named if f"`{name}`" not in page}
