"""What the attacker knows of images beforehand: priors, its own images, and a learned space.

Kinds: theorem (slopes by finite differences, a prior is least at what it was made from); oracle
(batch statistics solved out of an update are the batch's); sabotage (a weight of 0, images of the
wrong class, a model without what is read).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from turncoat.attacks.inversion.adversarial_start import AdversarialStart, own_images
from turncoat.attacks.inversion.engine import Clue, Prior, Recipe, Seen, invert
from turncoat.attacks.inversion.labels import Given
from turncoat.attacks.inversion.learned import Decoded, Learned
from turncoat.attacks.inversion.objectives import Cosine, Silent
from turncoat.attacks.inversion.optimisers import LBFGS, Adam, SignedAdam
from turncoat.attacks.inversion.priors import (
    BatchNormStatistics,
    FeaturePrior,
    PixelNorm,
    StylePrior,
    TotalVariation,
)
from turncoat.attacks.inversion.segmentation import MeanImage
from turncoat.attacks.inversion.starts import Uniform
from turncoat.metrics.images import psnr
from turncoat.randomness import Randomness
from turncoat.stage import asks, call, code_of
from turncoat.stages.train.local import FedSGD
from turncoat.task import Batch, Model, Task
from turncoat.tasks.bundled import digits
from turncoat.tasks.models import MLP, Built, ConvNet, LeNet5

RANDOM = Randomness(0)
SMOOTH = Model(Built(ConvNet((4, 6), (2, 2), "tanh", normalisation="batch"), (1, 8, 8), 10))
PRIORS = (
    TotalVariation(1.0),
    PixelNorm(1.0),
    BatchNormStatistics(1.0),
    BatchNormStatistics(1.0, "update"),
    StylePrior(1.0),
    StylePrior(1.0, layers=(0, 3), num_references=2),
    FeaturePrior(1.0),
    FeaturePrior(1.0, layers=(0, -1), num_references=1),
    FeaturePrior(1.0, layers=(0, -2), num_references=2, distinctive=True),
)


@cache
def numbers() -> Task:
    return digits(4, model=LeNet5("tanh"), public_size=200)


def clue_of(
    model: Model, data: Batch, population: Batch | None = None, *, noise: float = 0.0
) -> Clue:
    """Return the update of one step on ``data``; ``noise`` is in lengths of the gradient."""
    start = model.initial(RANDOM.at("start"))
    delta = FedSGD(0.1)(model, start, data, rng=RANDOM.at("train")).delta
    drawn = torch.randn(delta.shape, generator=RANDOM.at("noise"))
    delta = delta + noise * delta.norm() / drawn.norm() * drawn
    return Clue(model, start, delta, len(data[1]), population or numbers().population)


def victim(num_images: int, client: int = 0) -> Batch:
    inputs, labels = numbers().clients[client]
    return inputs[:num_images], labels[:num_images]


def prepared(prior: Any, clue: Clue, labels: Tensor) -> Prior:
    made: Prior = prior
    if hasattr(prior, "prepared"):
        made = prior.prepared(clue, labels, RANDOM.at("prepared"))
    return made


def value(prior: Prior, model: Model, params: Tensor, images: Tensor) -> Tensor:
    """Return a prior at some images, by a pass of the model in their own precision."""
    net = deepcopy(model.module).train().requires_grad_(False).to(images.dtype)
    net.load_state_dict(
        {k: v.to(images.dtype) for k, v in model.layout.split(params).items()}, strict=False
    )
    layers: list[Seen] = []
    for name, module in net.named_modules():
        if not list(module.children()):

            def note(_: nn.Module, read: Any, gave: Tensor, name: str = name) -> None:
                layers.append(Seen(name, read[0], gave))

            module.register_forward_hook(note)
    net(images)
    offers = {"layers": tuple(layers), "activations": tuple(s.gave for s in layers)}
    scalar: Tensor = call(prior, images, **offers)
    return scalar


@pytest.mark.parametrize("prior", PRIORS, ids=repr)
def test_the_slope_of_a_prior_is_what_finite_differences_say(prior: Prior) -> None:
    data = victim(3)
    clue = clue_of(SMOOTH, data)
    ready = prepared(prior, clue, data[1])
    images = torch.rand(data[0].shape, generator=RANDOM.at("x"), dtype=torch.float64)
    images.requires_grad_()
    (slope,) = torch.autograd.grad(value(ready, SMOOTH, clue.before, images), images)
    along = torch.randn(images.shape, generator=RANDOM.at("along"), dtype=torch.float64)
    step = 1e-6
    ends = [value(ready, SMOOTH, clue.before, (images + s * along).detach()) for s in (step, -step)]
    found, due = (slope * along).sum(), (ends[0] - ends[1]) / (2 * step)
    assert float(slope.abs().max()) > 0
    assert float(found) == pytest.approx(float(due), rel=1e-4)


@pytest.mark.parametrize("prior", PRIORS, ids=repr)
def test_a_prior_is_multiplied_by_its_weight(prior: Any) -> None:
    data = victim(2)
    clue = clue_of(SMOOTH, data)
    one, three, none = (
        value(
            prepared(replace(prior, weight=w), clue, data[1]), SMOOTH, clue.before, data[0].double()
        )
        for w in (1.0, 3.0, 0.0)
    )
    assert float(three) == pytest.approx(3 * float(one), rel=1e-6)
    assert float(none) == 0.0


@pytest.mark.parametrize("prior", [StylePrior(1.0), FeaturePrior(1.0)], ids=repr)
def test_an_adversarial_prior_is_zero_at_the_attackers_own_images(prior: Prior) -> None:
    inputs, labels = numbers().population
    rows = torch.stack([(labels == c).nonzero()[0, 0] for c in (2, 5, 7)])
    own = inputs[rows], labels[rows]
    model = numbers().model
    clue = clue_of(model, victim(3), own)
    ready = prepared(prior, clue, own[1])
    there = float(value(ready, model, clue.before, own[0]))
    elsewhere = float(value(ready, model, clue.before, own[0].roll(1, dims=0)))
    assert there < 1e-9 < 1e-3 < elsewhere


def test_a_distinctive_prior_is_0_at_its_class_1_at_the_others_and_blind_across() -> None:
    """Of the first convolution, whose features of a mean image are the mean of features."""
    inputs, held = numbers().population
    labels = torch.tensor([3, 8])
    clue, model = clue_of(numbers().model, victim(2)), numbers().model
    ready = prepared(FeaturePrior(1.0, layers=(0,), distinctive=True), clue, labels)
    own = torch.stack([inputs[held == c].mean(dim=0) for c in labels])
    others = torch.stack([inputs[held != c].mean(dim=0) for c in labels])
    at = [float(value(ready, model, clue.before, x)) for x in (own, (own + others) / 2, others)]
    assert at == pytest.approx([0.0, 0.25, 1.0], abs=1e-4)

    def along(images: Tensor) -> Tensor:
        return value(ready, model, clue.before, images.double())

    middle = ((own + others) / 2).double().requires_grad_()
    (slope,) = torch.autograd.grad(along(middle), middle)
    way = torch.randn(own.shape, generator=RANDOM.at("x"), dtype=torch.float64)
    steepest = slope.flatten(1) / slope.flatten(1).norm(dim=1, keepdim=True)
    across = way.flatten(1) - (way.flatten(1) * steepest).sum(1, keepdim=True) * steepest
    moved = along(middle.detach() + across.reshape(own.shape))
    assert float(moved) == pytest.approx(0.25, abs=1e-4)


def test_a_class_with_nothing_to_be_told_from_is_left_free() -> None:
    inputs, held = numbers().population
    threes = inputs[held == 3], held[held == 3]
    for population, label in ((threes, 3), (threes, 8)):
        clue = clue_of(numbers().model, victim(1), population)
        ready = prepared(FeaturePrior(1.0, distinctive=True), clue, torch.tensor([label]))
        assert float(value(ready, numbers().model, clue.before, inputs[:1])) == 0.0


def test_what_distinguishes_a_class_helps_by_itself_and_harms_if_it_is_anothers() -> None:
    """From the mean of all images, which is of no class, and without a gradient."""
    own = numbers().population
    wrong = own[0], (own[1] + 1) % 10
    prior = FeaturePrior(1.0, layers=(0,), distinctive=True)
    gains: dict[str, list[float]] = {"right": [], "wrong": []}
    for client in range(4):
        data = victim(4, client)
        none = psnr(own[0].mean(dim=0).expand_as(data[0]), data[0])
        for name, population in (("right", own), ("wrong", wrong)):
            recipe = Recipe(
                objective=Silent(),
                optimiser=LBFGS(2),
                start=MeanImage(),
                labels=Given(tuple(data[1].tolist())),
                priors=(prior,),
            )
            clue = clue_of(numbers().model, data, population)
            images = invert(clue, recipe, rng=RANDOM.at("invert")).inputs
            gains[name].append(float((psnr(images, data[0]) - none).mean()))
    assert max(gains["wrong"]) < 0 < min(gains["right"])


def test_pixels_are_pulled_to_the_mean_of_the_population() -> None:
    clue = clue_of(SMOOTH, victim(1))
    ready = prepared(PixelNorm(1.0), clue, torch.tensor([0]))
    mean = clue.population[0].mean()
    assert float(call(ready, torch.full((1, 1, 8, 8), float(mean)))) < 1e-10
    assert float(call(ready, torch.zeros(1, 1, 8, 8))) == pytest.approx(float(mean) ** 2)


def test_statistics_solved_out_of_an_update_are_those_of_the_victims_batch() -> None:
    data, other = victim(6), victim(6, client=1)
    clue = clue_of(SMOOTH, data)
    exact = prepared(BatchNormStatistics(1.0, "update"), clue, data[1])
    shared = prepared(BatchNormStatistics(1.0), clue, data[1])
    at = [float(value(exact, SMOOTH, clue.before, x)) for x in (data[0], other[0])]
    assert at[0] < 1e-4 * at[1]
    assert float(value(shared, SMOOTH, clue.before, data[0])) > 100 * at[0]


def test_the_models_statistics_are_least_at_what_they_were_taken_from() -> None:
    inputs, _ = numbers().population
    model, start = SMOOTH, SMOOTH.initial(RANDOM.at("start"))
    learner = model.learner(start)
    for _ in range(100):  # running means come near those of the population
        with torch.no_grad():
            learner.outputs(inputs)
    trained = learner.finish()  # before anybody else borrows the module
    clue = replace(clue_of(model, victim(2)), before=trained)
    ready = prepared(BatchNormStatistics(1.0), clue, torch.tensor([0, 1]))
    there, noise = (
        float(value(ready, model, clue.before, x))
        for x in (inputs, torch.rand(inputs.shape, generator=RANDOM.at("x")))
    )
    assert there < 0.02 * noise


def test_a_prior_alone_moves_the_guess_and_one_of_weight_0_leaves_it_where_it_is() -> None:
    data = victim(2)
    clue = clue_of(SMOOTH, data)

    def moved(prior: Prior) -> Tensor:
        recipe = Recipe(
            objective=Silent(),
            optimiser=Adam(3),
            start=Uniform(),
            labels=Given(tuple(data[1].tolist())),
            priors=(prior,),
        )
        return invert(clue, recipe, rng=RANDOM.at("invert")).inputs

    for prior in PRIORS:
        still = moved(replace(prior, weight=0.0))
        assert float((moved(prior) - still).abs().mean()) > 0.05, prior


def test_priors_and_learned_spaces_work_on_several_restarts_at_once() -> None:
    data = victim(2)
    clue = clue_of(numbers().model, data)
    recipe = Recipe(
        objective=Cosine(),
        optimiser=Adam(3, 0.01),
        start=AdversarialStart(),
        labels=Given(tuple(data[1].tolist())),
        priors=(StylePrior(), FeaturePrior(), PixelNorm()),
        space=Learned(num_latents=4, num_steps=3),
        num_restarts=3,
    )
    one, several = (
        invert(clue, replace(recipe, together=t), rng=RANDOM.at("invert")).inputs
        for t in (False, True)
    )
    assert torch.allclose(one, several, atol=1e-3)


def test_the_wrong_class_helps_less_than_the_right_one() -> None:
    own = numbers().population
    wrong = own[0], (own[1] + 1) % 10
    gains = []
    for client in range(4):
        data = victim(2, client)

        def likeness(population: Batch, data: Batch = data) -> float:
            recipe = Recipe(
                objective=Cosine(),
                optimiser=SignedAdam(20, 0.01),
                start=AdversarialStart(None),
                labels=Given(tuple(data[1].tolist())),
                priors=(StylePrior(), FeaturePrior()),
            )
            clue = clue_of(numbers().model, data, population, noise=3.0)
            found = invert(clue, recipe, rng=RANDOM.at("invert"))
            return float(psnr(found.inputs, data[0]).mean())

        gains.append(likeness(own) - likeness(wrong))
    assert min(gains) > 0 and sum(gains) / len(gains) > 1


def test_a_learned_space_beats_pixels_where_the_update_is_noisy_and_not_where_it_is_exact() -> None:
    gains = {}
    for noise in (0.0, 30.0):
        found = {}
        for name, more in (
            ("pixels", {"priors": (TotalVariation(1e-2),)}),
            ("learned", {"space": Learned(num_steps=120)}),
        ):
            values = []
            for client in range(3):
                data = victim(1, client)
                recipe = Recipe(
                    objective=Cosine(),
                    optimiser=SignedAdam(50),
                    start=Uniform(),
                    labels=Given(tuple(data[1].tolist())),
                    **more,
                )
                clue = clue_of(numbers().model, data, noise=noise)
                images = invert(clue, recipe, rng=RANDOM.at("invert", client)).inputs
                values.append(float(psnr(images, data[0])))
            found[name] = sum(values) / len(values)
        gains[noise] = found["learned"] - found["pixels"]
    assert gains[30.0] > 0 > gains[0.0]


def test_a_second_search_is_held_to_what_the_latents_found_or_nearer_to_the_update() -> None:
    data = victim(1)
    clue = clue_of(numbers().model, data)

    def found(pull: float | None) -> Tensor:
        recipe = Recipe(
            objective=Cosine(),
            optimiser=Adam(30, 0.02),
            start=Uniform(),
            labels=Given(tuple(data[1].tolist())),
            space=Learned(num_latents=4, num_steps=40, pull=pull),
        )
        return invert(clue, recipe, rng=RANDOM.at("invert")).inputs

    def apart(images: Tensor) -> float:
        """From the update, by the cosine of the gradient."""
        made = clue_of(numbers().model, (images, data[1])).delta
        return float(1 - torch.cosine_similarity(made, clue.delta, dim=0))

    alone, held, free = found(None), found(1e4), found(0.0)
    assert float((held - alone).abs().mean()) < 0.01 < 0.05 < float((free - alone).abs().mean())
    assert apart(free) < 0.5 * apart(alone)


def test_a_second_search_beats_latents_alone_and_pixels_alone_under_some_noise() -> None:
    """Noise ten times as long as the gradient."""
    space = Learned(num_steps=120).trained(numbers().population, RANDOM.at("learn"))
    ways: dict[str, dict[str, Any]] = {
        "pixels": {"priors": (TotalVariation(1e-2),), "optimiser": SignedAdam(100)},
        "latents": {"space": space},
        "both": {"space": replace(space, pull=0.1)},
    }
    found = dict.fromkeys(ways, 0.0)
    for client in range(4):
        data = victim(1, client)
        clue = clue_of(numbers().model, data, noise=10.0)
        recipe = Recipe(
            objective=Cosine(),
            optimiser=SignedAdam(50),
            start=Uniform(),
            labels=Given(tuple(data[1].tolist())),
        )
        for name, more in ways.items():
            images = invert(clue, replace(recipe, **more), rng=RANDOM.at("invert", client)).inputs
            found[name] += float(psnr(images, data[0])) / 4
    assert found["both"] > max(found["pixels"], found["latents"]) + 0.5


def test_guesses_begin_at_the_attackers_own_images_of_their_class() -> None:
    own = numbers().population
    labels = torch.tensor([3, 3, 8])
    start = AdversarialStart()((3, 1, 8, 8), rng=RANDOM.at("s"), labels=labels, population=own)
    for image, label in zip(start, labels.tolist(), strict=True):
        places = (own[0] == image).flatten(1).all(dim=1).nonzero().flatten()
        assert label in own[1][places].tolist()
    assert not torch.equal(start[0], start[1])


def test_the_mean_of_a_class_is_one_start_for_all_its_guesses() -> None:
    own = numbers().population
    labels = torch.tensor([3, 3])
    start = AdversarialStart(None)((2, 1, 8, 8), rng=RANDOM.at("s"), labels=labels, population=own)
    assert torch.allclose(start[0], own[0][own[1] == 3].mean(dim=0), atol=1e-6)
    assert torch.allclose(start[0], start[1], atol=1e-6)


def test_a_class_the_attacker_lacks_begins_at_any_image_and_few_images_are_used_again() -> None:
    own = torch.rand(2, 1, 2, 2), torch.tensor([0, 0])
    chosen = own_images(own, torch.tensor([1, 0, 0, 0]), 1, RANDOM.at("s"))
    assert [len(c) for c in chosen] == [1, 1, 1, 1]
    assert {int(c) for c in chosen[1:]} == {0, 1}
    with pytest.raises(ValueError, match="population is empty"):
        own_images((own[0][:0], own[1][:0]), torch.tensor([1]), 1, RANDOM.at("s"))


def space_of(how: Learned, population: Batch, labels: Tensor) -> Decoded:
    model = Model(Built(MLP((2,)), tuple(population[0].shape[1:]), 10))
    start = model.initial(RANDOM.at("start"))
    return how.prepared(
        Clue(model, start, torch.ones_like(start), len(labels), population),
        labels,
        RANDOM.at("learn"),
    )


@cache
def learned_digits() -> Decoded:
    return space_of(Learned(num_steps=200), numbers().population, numbers().test[1][:100])


def test_a_learned_space_holds_images_it_was_not_trained_on_better_than_their_mean() -> None:
    held_out = numbers().test[0][:100]
    space = learned_digits()
    shown = space.decode(space.encode(held_out))
    mean = numbers().population[0].mean(dim=0, keepdim=True).expand_as(held_out)
    gain = psnr(shown.detach(), held_out).mean() - psnr(mean, held_out).mean()
    assert float(gain) > 2
    assert float(shown.min()) >= 0 and float(shown.max()) <= 1


def test_a_learned_space_forbids_what_is_no_digit() -> None:
    space = learned_digits()
    noise = torch.rand(100, 1, 8, 8, generator=RANDOM.at("noise")).round()
    digit, other = (
        float((space.decode(space.encode(x)) - x).square().mean())
        for x in (numbers().test[0][:100], noise)
    )
    assert digit < 0.3 * other


def test_latents_are_kept_within_their_bound_and_lead_back_to_the_image() -> None:
    space = learned_digits()
    latents = torch.full((100, 32), 9.0).requires_grad_()
    slope = torch.autograd.grad(space.decode(latents).sum(), latents)[0]
    assert bool(slope.isfinite().all())
    space.clamp_(latents)
    assert float(latents.detach().max()) == 3.0
    assert all(not p.requires_grad for p in space.net.parameters())


@pytest.mark.parametrize("shape", [(3, 7, 9), (1, 25, 25), (1, 1, 1)])
def test_a_learned_space_fits_images_of_any_size(shape: tuple[int, ...]) -> None:
    images = torch.rand(4, *shape, generator=RANDOM.at("x"))
    space = space_of(Learned(num_latents=2, num_steps=2), (images, torch.arange(4)), torch.ones(2))
    latents = space.encode(images[:2])
    assert latents.shape == (2, 2)
    assert space.decode(latents).shape == (2, *shape)


def test_masks_for_labels_are_left_out_of_a_learned_space() -> None:
    images = torch.rand(4, 1, 8, 8, generator=RANDOM.at("x"))
    masks = images[:, 0].round().long()
    space = space_of(Learned(num_latents=2, num_steps=2), (images, masks), masks[:3])
    assert space.decode(space.encode(images[:3])).shape == (3, 1, 8, 8)


def test_a_model_trained_once_is_the_one_that_each_clue_would_train() -> None:
    how, own = Learned(num_latents=2, num_steps=2), numbers().population
    once = how.trained(own, RANDOM.at("learn"))
    for labels in (torch.tensor([1, 4]), torch.tensor([7])):
        clue = clue_of(numbers().model, victim(len(labels)))
        each = space_of(how, own, labels)
        latents = torch.ones(len(labels), 2)
        same = once.prepared(clue, labels, RANDOM.at("never used"))
        assert torch.equal(same.decode(latents), each.decode(latents))


def test_the_same_rng_learns_the_same_space_whatever_the_world_drew() -> None:
    spaces: list[Decoded] = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        how = Learned(num_latents=2, num_steps=2)
        spaces.append(space_of(how, numbers().population, torch.tensor([1])))
    latents = torch.ones(1, 2)
    assert torch.equal(*(s.decode(latents) for s in spaces))


def refused(prior: Any, model: Model) -> None:
    data = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    clue = clue_of(model, data)
    prior.prepared(clue, data[1], RANDOM.at("prepared"))


def test_what_a_prior_cannot_read_is_said_before_the_search() -> None:
    plain = Model(Built(MLP((4,)), (1, 8, 8), 10))
    with pytest.raises(ValueError, match="keeps no running statistics"):
        refused(BatchNormStatistics(), plain)
    with pytest.raises(ValueError, match="has no layer of maps"):
        refused(StylePrior(), plain)
    with pytest.raises(ValueError, match="places from -4 to 3"):
        refused(FeaturePrior(layers=(4,)), plain)
    with pytest.raises(ValueError, match="has inputs of shape"):
        space_of(Learned(), (torch.rand(4, 3), torch.arange(4)), torch.tensor([0]))


@pytest.mark.parametrize(
    "use",
    [
        BatchNormStatistics(),
        StylePrior(),
        FeaturePrior(),
        Learned().encode,
        Learned().decode,
        Learned().clamp_,
    ],
)
def test_a_part_that_was_not_prepared_says_so(use: Any) -> None:
    with pytest.raises(RuntimeError, match="once it is prepared"):
        use(torch.rand(1, 1, 8, 8))


def test_a_prior_asks_for_the_pass_that_makes_the_gradient_only_if_it_reads_it() -> None:
    data = victim(1)
    clue = clue_of(SMOOTH, data)
    asked: Sequence[frozenset[str]] = [
        asks(code_of(prepared(p, clue, data[1])))[0] for p in (PixelNorm(), StylePrior())
    ]
    assert "activations" not in asked[0] and "activations" in asked[1]
