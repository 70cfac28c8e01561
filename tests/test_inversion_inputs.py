"""What an inversion is given: bad updates are refused, odd batches get an honest answer.

Kinds: contract (every preset, on each input), golden (an equal image is 100 dB, not infinite).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from turncoat.attacks.inversion.adversarial_start import AdversarialStart
from turncoat.attacks.inversion.analytic import SPEAR, LinearLayer
from turncoat.attacks.inversion.gradient_inversion import (
    DLG,
    IDLG,
    AggregateInversion,
    GradientInversion,
    InvertingAggregate,
    InvertingGradients,
)
from turncoat.attacks.inversion.labels import BiasCorrected, LowestEntry
from turncoat.attacks.inversion.learned import Learned
from turncoat.attacks.inversion.malicious import (
    ClassFishing,
    Fishing,
    ModelInconsistency,
    RobbingTheFed,
)
from turncoat.attacks.inversion.optimisers import LBFGS, Adam, SignedAdam
from turncoat.attacks.inversion.priors import FeaturePrior, StylePrior, TotalVariation
from turncoat.attacks.inversion.segmentation import InvertingSegmentation
from turncoat.attacks.inversion.tabular import TabLeak
from turncoat.games.reconstruction import Reconstruct, Records
from turncoat.messages import Envelope
from turncoat.metrics.images import feature_distance, mse, psnr, ssim
from turncoat.randomness import Randomness
from turncoat.stage import call
from turncoat.stages.train.local import FedSGD
from turncoat.task import Batch, Model
from turncoat.tasks.models import MLP, Built, LeNet5
from turncoat.tasks.segmentation import UNet, ellipses
from turncoat.views import AggregateView, ServerView

RANDOM = Randomness(7)
FEW = SignedAdam(12)
NAN = float("nan")
torch.set_num_threads(1)

SINGLE: dict[str, Any] = {
    "gradient-inversion": GradientInversion(optimiser=FEW),
    "together": GradientInversion(optimiser=FEW, num_restarts=2, together=True),
    "other labels": GradientInversion(optimiser=Adam(12), labels=BiasCorrected()),
    "adversarial prior": GradientInversion(
        optimiser=FEW,
        priors=(TotalVariation(), StylePrior(1e-3), FeaturePrior(1e-3)),
        start=AdversarialStart(None),
        labels=LowestEntry(),
    ),
    "learned": GradientInversion(optimiser=FEW, priors=(), space=Learned(num_steps=2)),
    "inverting-gradients": InvertingGradients(num_steps=12),
    "dlg": DLG(local_lr=0.1, num_steps=1),
    "idlg": IDLG(local_lr=0.1, num_steps=1),
    "linear-layer": LinearLayer(),
    "spear": SPEAR(num_draws=500),
    "robbing-the-fed": RobbingTheFed(),
    "model-inconsistency": RobbingTheFed(server=ModelInconsistency(victim=0)),
    "fishing": Fishing(server=ClassFishing(target=1)),
}
SUMMED: dict[str, Any] = {
    "aggregate-inversion": AggregateInversion(optimiser=FEW, num_images=3),
    "inverting-aggregate": InvertingAggregate(num_steps=12),
    "linear-layer, sum": LinearLayer(num_images=3),
    "spear, sum": SPEAR(num_images=3, num_draws=500),
    "robbing-the-fed, sum": RobbingTheFed(),
    "fishing, sum": Fishing(server=ClassFishing(target=1)),
}
ATTACKS = SINGLE | SUMMED
every = pytest.mark.parametrize("name", ATTACKS)


def images(num: int, channels: int = 1, at: int = 0) -> Tensor:
    """Return soft blobs in [0, 1]. Shape: ``(num, channels, 8, 8)``."""
    noise = torch.rand(num, channels, 3, 3, generator=RANDOM.at("images", at, channels))
    soft = torch.nn.functional.interpolate(noise, (8, 8), mode="bilinear")
    return soft.clamp(0, 1)


def played(name: str, data: Batch, spoil: Any = None) -> tuple[Any, Any]:
    """Return an attack's guess on one update of ``data``, and the mark that the game gives it."""
    attack, channels = ATTACKS[name], data[0].shape[1]
    population = images(40, channels, at=1), torch.arange(40) % 4
    net = LeNet5("tanh") if name == "adversarial prior" else MLP((60,), "relu")  # style needs maps
    model = Model(Built(net, (channels, 8, 8), 4))
    start = model.initial(RANDOM.at("begin"))
    server = getattr(attack, "server", None)
    sent = start
    if server is not None:
        sent = call(server, start, model=model, public=population, envelope=Envelope(0, (0,), 0))
    update = FedSGD(0.1)(model, sent, data, rng=RANDOM.at("train"))
    delta = update.delta if spoil is None else spoil(update.delta)
    view: Any = ServerView(0, model, (0,), (replace(update, delta=delta),), sent=(sent,))
    if name in SUMMED:
        view = AggregateView(0, model, start, start + delta if len(delta) == len(start) else delta)
    offers = {"victims": (0,), "population": population, "rng": RANDOM.at("attack")}
    guess = call(attack, view, **offers)
    truth = Records((data,), population)
    return guess[0], Reconstruct(num_victims=1).mark(guess, truth, rng=RANDOM.at("mark"))


def sound(guess: Any, marked: Any, channels: int = 1) -> None:
    """Check that guess and marks are what they should be, whatever they are worth."""
    assert guess.inputs.shape[1:] == (channels, 8, 8)
    assert len(guess.labels) == len(guess.inputs) > 0
    assert bool(guess.inputs.isfinite().all())
    for m in (marked.headline, *marked.others):
        ends = torch.tensor([m.value, m.baseline, m.low, m.high])
        assert bool(ends.isfinite().all()), m
    assert marked.headline.value <= 100


@every
def test_an_update_with_nan_is_refused(name: str) -> None:
    def spoil(delta: Tensor) -> Tensor:
        holed = delta.clone()
        holed[5] = NAN
        return holed

    with pytest.raises(ValueError, match=r"holds NaN or infinity.*choose another"):
        played(name, (images(1), torch.tensor([1])), spoil)


@every
def test_an_update_of_another_layout_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"has shape \(7,\); \(\d+,\) is due.*another model"):
        played(name, (images(1), torch.tensor([1])), lambda delta: delta[:7])


@every
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_constant_image_gets_a_finite_answer(name: str, value: float) -> None:
    sound(*played(name, (torch.full((1, 1, 8, 8), value), torch.tensor([1]))))


@every
def test_a_batch_of_equal_constant_images_gets_a_finite_answer(name: str) -> None:
    sound(*played(name, (torch.full((3, 1, 8, 8), 0.5), torch.tensor([1, 1, 2]))))


@every
@pytest.mark.parametrize("label", [1, 3])  # the one that the malicious server fishes for, or not
def test_a_batch_of_one_class_gets_a_finite_answer(name: str, label: int) -> None:
    sound(*played(name, (images(3), torch.full((3,), label))))


@every
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_one_channel_are_images_like_any(name: str, channels: int) -> None:
    sound(*played(name, (images(3, channels), torch.tensor([0, 1, 2]))), channels)


def test_a_black_image_is_read_off_a_linear_layer_exactly_and_scores_100() -> None:
    black = torch.zeros(1, 1, 8, 8)
    guess, marked = played("linear-layer", (black, torch.tensor([1])))
    assert torch.equal(guess.inputs, black)
    assert marked.headline.value == 100


@pytest.mark.parametrize("attack", ["gradient-inversion", "inverting-gradients", "dlg", "idlg"])
def test_one_class_is_found_in_a_batch_of_it(attack: str) -> None:
    guess, _ = played(attack, (images(1), torch.tensor([2])))
    assert guess.labels.tolist() == [2] or attack == "dlg"  # which searches, and has one step here


def test_a_client_of_one_class_is_counted_right_from_its_update() -> None:
    guess, _ = played("gradient-inversion", (images(3), torch.full((3,), 2)))
    assert guess.labels.tolist() == [2, 2, 2]


def test_equal_images_are_100_db_alike_and_constant_ones_have_every_measure() -> None:
    flat = torch.full((2, 1, 8, 8), 0.5)
    assert psnr(flat, flat).tolist() == [100, 100]
    assert ssim(flat, flat).tolist() == [1, 1]
    assert mse(flat, flat).tolist() == feature_distance(flat, flat).tolist() == [0, 0]
    for measure in (psnr, ssim, mse, feature_distance):
        assert bool(measure(flat, images(2)).isfinite().all())


# tables and slices


def table(rows: Tensor, labels: Tensor, spoil: Any = None) -> Any:
    public = torch.randn(30, 5, generator=RANDOM.at("table")), torch.arange(30) % 2
    model = Model(Built(MLP((16,)), (5,), 2))
    start = model.initial(RANDOM.at("begin"))
    update = FedSGD(0.1)(model, start, (rows, labels), rng=RANDOM.at("train"))
    delta = update.delta if spoil is None else spoil(update.delta)
    view = ServerView(0, model, (0,), (replace(update, delta=delta),), sent=(start,))
    attack = TabLeak(num_steps=10, num_guesses=2)
    return attack(view, victims=(0,), population=public, rng=RANDOM.at("attack"))[0]


def slices(inputs: Tensor, masks: Tensor, known: bool = True, spoil: Any = None) -> Any:
    task = ellipses(1, model=UNet(width=4, depth=2, activation="silu"), side=16)
    start = task.model.initial(RANDOM.at("begin"))
    update = FedSGD(0.1)(task.model, start, (inputs, masks), rng=RANDOM.at("train"))
    delta = update.delta if spoil is None else spoil(update.delta)
    view = ServerView(0, task.model, (0,), (replace(update, delta=delta),), sent=(start,))
    attack = InvertingSegmentation(optimiser=LBFGS(num_steps=1))
    return attack(
        view,
        victims=(0,),
        masks=(masks,) if known else None,
        population=task.population,
        rng=RANDOM.at("attack"),
    )[0]


def spoilt(delta: Tensor) -> Tensor:
    return torch.full_like(delta, NAN)


def test_tables_refuse_bad_updates() -> None:
    rows, labels = torch.randn(1, 5), torch.tensor([1])
    with pytest.raises(ValueError, match=r"holds NaN or infinity.*choose another"):
        table(rows, labels, spoilt)
    with pytest.raises(ValueError, match=r"has shape \(7,\).*another model"):
        table(rows, labels, lambda delta: delta[:7])


def test_tables_answer_constant_rows_of_one_class() -> None:
    guess = table(torch.full((3, 5), 0.7), torch.ones(3).long())
    assert guess.inputs.shape == (3, 5) and bool(guess.inputs.isfinite().all())
    assert guess.labels.tolist() == [1, 1, 1]


def test_slices_refuse_bad_updates() -> None:
    data = torch.rand(1, 1, 16, 16), torch.zeros(1, 16, 16).long()
    with pytest.raises(ValueError, match=r"holds NaN or infinity.*choose another"):
        slices(*data, spoil=spoilt)
    with pytest.raises(ValueError, match=r"has shape \(7,\).*another model"):
        slices(*data, spoil=lambda delta: delta[:7])


@pytest.mark.parametrize("known", [True, False])
def test_slices_answer_constant_images_and_masks_of_one_class(known: bool) -> None:
    guess = slices(torch.full((2, 1, 16, 16), 0.5), torch.ones(2, 16, 16).long(), known)
    assert guess.inputs.shape == (2, 1, 16, 16) and bool(guess.inputs.isfinite().all())
    assert guess.labels.shape[0] == 2
