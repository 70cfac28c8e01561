"""The measure behind the reconstruction of CIFAR-10's images. Kinds: contract, oracle (what algebra
gives back exactly), sabotage (an attack that is deaf to the update gains nothing)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from papers.ledger import Experiment
from papers.rebuilt import REBUILT, Arm, Federated, Few, LeNetZhu, Rebuilt, lossless
from turncoat.attacks.inversion.analytic import LinearLayer
from turncoat.attacks.inversion.gradient_inversion import IDLG, GradientInversion
from turncoat.attacks.inversion.optimisers import SignedAdam
from turncoat.describe import fingerprint
from turncoat.randomness import Randomness
from turncoat.stages.train.local import FedSGD, LocalSGD
from turncoat.task import Task
from turncoat.tasks.models import MLP, Architecture, ConvNet
from turncoat.tasks.pool import Pool, Split, federate
from turncoat.tasks.sources import DataMissing

DATA = Path(__file__).parents[1].parent / "shared" / "data"


def noise(num_victims: int, *, model: Architecture, each: int, num_others: int, seed: int) -> Task:
    """Return images of 8x8 pixels that nobody can guess, in ten classes."""
    rng = Randomness(seed).at("noise")
    images = torch.randint(256, (120, 3, 8, 8), generator=rng).to(torch.uint8)
    pool = Pool("noise", (images, torch.arange(120) % 10), None, tuple("0123456789"), source="made")
    few = Few(num_victims, each)
    return federate(pool, Split(num_victims + num_others, few, None, None, 20, 30, seed), model)


def measured(arms: dict[str, Arm], **fields: Any) -> dict[str, float]:
    found = Rebuilt(arms, num_victims=2, make=noise, **fields)(100)
    return {k: v for k, v in found.items() if isinstance(v, float)}


_MLP = Federated(MLP((16,)), FedSGD(1.0))
_NET = Federated(ConvNet((4,), (2,), activation="tanh"), FedSGD(0.1))
_COSINE = GradientInversion(optimiser=SignedAdam(20))


def test_what_a_linear_layer_read_comes_back_exactly_and_blind_guesses_do_not() -> None:
    found = measured({"linear": Arm(_MLP, LinearLayer())})
    assert found["attack: linear | largest error"] < 1e-5
    assert found["attack: linear | PSNR"] > 90
    assert found["attack: linear | PSNR of mean image"] < 15
    assert found["attack: linear | SSIM of random image"] < 0.5
    assert found["labels_right_at_batch_1"] == 1


def test_victims_are_compared_one_by_one_and_the_deaf_attack_loses() -> None:
    arms = {"it": Arm(_NET, _COSINE), "deaf": Arm(_NET, _COSINE.prior_only)}
    found = measured(arms, compared=(("it", "deaf"),))
    low, gain, high = (found[f"db_gained_by_it_over_deaf{end}"] for end in ("_low", "", "_high"))
    assert low <= gain <= high
    assert gain == pytest.approx(found["attack: it | PSNR"] - found["attack: deaf | PSNR"])
    assert gain > 0


def test_means_that_fall_are_correlated_with_their_order() -> None:
    easy, hard = Arm(_MLP, LinearLayer()), Arm(_NET, _COSINE.prior_only)
    assert measured({"a": easy, "b": hard}, falling=("a", "b"))["spearman_of_means"] < -0.99
    assert measured({"a": easy, "b": hard}, falling=("b", "a"))["spearman_of_means"] > 0.99


def test_the_others_train_the_model_before_the_attacked_round() -> None:
    train = LocalSGD(0.05, num_epochs=1, batch_size=8)
    of = Federated(MLP((16,)), train, num_others=2, attacked=2)
    found = measured({"late": Arm(of, LinearLayer())})
    assert found["attack: late | largest error"] < 1e-3


def test_the_few_hold_what_they_are_told_and_the_others_the_rest() -> None:
    parts = Few(3, 2)(torch.zeros(20), 5, columns={}, rng=torch.Generator())
    assert [len(part) for part in parts] == [2, 2, 2, 7, 7]
    assert torch.cat(parts).sort().values.equal(torch.arange(20))


def test_the_lenet_of_dlg_has_the_size_of_its_paper() -> None:
    net = LeNetZhu()((3, 32, 32), 10)
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in net.parameters()) == 15_826


@pytest.mark.parametrize("experiment", REBUILT, ids=lambda e: e.name)
def test_every_experiment_attacks_16_victims_and_has_a_name_for_its_results(
    experiment: Experiment,
) -> None:
    assert isinstance(experiment.measure, Rebuilt)
    assert experiment.measure.num_victims == 16
    assert fingerprint(experiment.measure, 10)


def test_lossless_images_are_found_or_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURNCOAT_DATA", str(tmp_path))
    with pytest.raises(DataMissing, match="cifar10-lossless-4k"):
        lossless(2, model=MLP())


@pytest.mark.skipif(not DATA.is_dir(), reason="the folder of data sets is not there")
def test_idlg_begins_to_rebuild_lossless_cifar10() -> None:
    of = Federated(LeNetZhu(), FedSGD(1.0))
    attack = IDLG(local_lr=1.0, num_steps=3)
    arms = {"it": Arm(of, attack), "deaf": Arm(of, attack.spelt_out.prior_only)}
    found = Rebuilt(arms, num_victims=1, compared=(("it", "deaf"),), options={"data": DATA})(100)
    assert isinstance(found["db_gained_by_it_over_deaf"], float)
    assert found["db_gained_by_it_over_deaf"] > 0
    assert found["data"] == "CIFAR-10, Alex Krizhevsky: its first 4,000 training images, lossless"
