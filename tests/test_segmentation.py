"""Segmentation and its inversion.

Kinds: contract (in test_contracts.py too), theorem (Dice and its loss), oracle (per-example
gradients against a loop), golden (parameter counts), sabotage (an attack that knows nothing is at
its baseline; noise stops the attack; brightness that the net hides is not found).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot

from turncoat.attacks.inversion.engine import Clue, invert
from turncoat.attacks.inversion.optimisers import LBFGS
from turncoat.attacks.inversion.segmentation import (
    GivenMasks,
    InvertingSegmentation,
    JointMasks,
    LayerCosine,
    NearestMasks,
)
from turncoat.federation import Federation, Plain
from turncoat.games.slices import ReconstructSlices
from turncoat.messages import Update
from turncoat.metrics.images import psnr
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import simulate
from turncoat.stage import Plan
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.train.book_keeping import clipped_sum
from turncoat.stages.train.dpsgd import DPSGD
from turncoat.stages.train.local import FedSGD, LocalSGD
from turncoat.task import Model, Task
from turncoat.tasks.models import Built
from turncoat.tasks.partitions import IID, ByColumn, ByGroup, Dirichlet
from turncoat.tasks.segmentation import (
    DiceCrossEntropy,
    UNet,
    dice,
    ellipses,
    hippocampus,
    overlap,
)
from turncoat.tasks.sources import DataMissing, DataUnusable
from turncoat.trial import Marked, Measurement, Reconstruction, Trial
from turncoat.views import ServerView

DATA = Path(__file__).parents[1].parent / "shared" / "data"
SLICES = DATA / "msd_hippocampus_2d.npz"
local = pytest.mark.skipif(not SLICES.is_file(), reason="needs the local slices")
RANDOM = Randomness(5)


def masks(num: int = 3, side: int = 8, classes: int = 3) -> Tensor:
    return torch.randint(classes, (num, side, side), generator=RANDOM.at("masks", num))


def sure(said: Tensor, classes: int = 3) -> Tensor:
    """Return outputs that leave no doubt."""
    return 50 * one_hot(said, classes).movedim(-1, 1).float()


# The task ------------------------------------------------------------------------------------


def test_dice_is_one_for_the_mask_itself_and_symmetric() -> None:
    true = masks()
    assert torch.equal(dice(sure(true), true), torch.ones(3))
    other = masks(3, 8).flip(2)
    assert torch.allclose(overlap(true, other, 3), overlap(other, true, 3))


def test_dice_counts_the_classes_that_are_there() -> None:
    empty = torch.zeros(1, 4, 4, dtype=torch.long)
    one, half = empty.clone(), empty.clone()
    one[0, :2], half[0, :1] = 1, 1
    assert dice(sure(empty), empty).item() == 1.0
    assert dice(sure(one), empty).item() == 0.0
    assert dice(sure(half), one).item() == pytest.approx(2 / 3)
    both = half.clone()
    both[0, 3] = 2  # a class that is not there: half of the mean is lost
    assert dice(sure(both), one).item() == pytest.approx(1 / 3)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(0, 99))
def test_the_loss_is_a_mean_over_examples_and_least_at_the_mask(num: int, seed: int) -> None:
    rng = RANDOM.at("loss", seed)
    outputs = torch.randn(num, 3, 8, 8, generator=rng)
    true, loss = torch.randint(3, (num, 8, 8), generator=rng), DiceCrossEntropy()
    parts = [loss(outputs[i : i + 1], true[i : i + 1]) for i in range(num)]
    assert torch.allclose(loss(outputs, true), torch.stack(parts).mean(), atol=1e-6)
    assert 0 <= loss(sure(true), true) < 1e-4 < loss(outputs, true)


def test_a_hard_mask_is_a_soft_one_without_doubt() -> None:
    outputs = torch.randn(3, 3, 8, 8, generator=RANDOM.at("outputs"))
    soft = one_hot(masks(), 3).movedim(-1, 1).float()
    assert torch.equal(DiceCrossEntropy()(outputs, masks()), DiceCrossEntropy()(outputs, soft))


@pytest.mark.parametrize(
    ("net", "side", "count"),
    [(UNet(), 64, 29_955), (UNet(16), 64, 118_659), (UNet(4, 2, 2), 16, 1_731)],
)
def test_a_u_net_has_the_parameters_it_should(net: UNet, side: int, count: int) -> None:
    built = net((1, side, side), 3)
    assert sum(p.numel() for p in built.parameters()) == count


@pytest.mark.parametrize("sides", [(8, 8), (13, 17), (64, 48)])
def test_a_mask_is_as_large_as_its_image(sides: tuple[int, int]) -> None:
    assert UNet(4)((1, *sides), 3)(torch.rand(2, 1, *sides)).shape == (2, 3, *sides)


def test_a_u_net_refuses_what_it_cannot_read() -> None:
    for shape in ((30,), (1, 4, 64)):
        with pytest.raises(ValueError, match="lower depth, or choose another model"):
            UNet()(shape, 3)
    with pytest.raises(ValueError, match="num_groups must divide width"):
        UNet(6, num_groups=4)


def small(num_clients: int = 2, **options: Any) -> Task:
    given: dict[str, Any] = {"per_client": 1, "side": 16, "model": UNet(8, activation="silu")}
    return ellipses(num_clients, **(given | options))


def test_per_example_gradients_are_those_of_a_loop() -> None:
    task = small(per_client=3)
    model, data = task.model, task.clients[0]
    start = model.initial(RANDOM.at("begin"))
    singly = [model.gradient(start, (data[0][i : i + 1], data[1][i : i + 1])) for i in range(3)]
    expected = sum(g * min(1.0, 0.5 / float(g.norm())) for g in singly)
    learner = model.learner(start)
    total = clipped_sum(model, learner, data, 0.5)
    learner.finish()
    assert isinstance(expected, Tensor)
    assert torch.allclose(total, expected[: len(total)], atol=1e-5)


def test_a_segmentation_net_learns_with_and_without_dp() -> None:
    task = small(2, per_client=60, model=UNet(4, 2))
    for train in (
        LocalSGD(0.1, batch_size=10, momentum=0.9),
        DPSGD(0.5, 1.0, 20, noise_multiplier=0.3, momentum=0.5),
    ):
        federation = Federation(train=train, channel=Plain(), aggregate=Mean())
        run = simulate(federation, task, num_rounds=6, seed=0)
        before = task.model.initial(RANDOM.at("begin"))
        scores = [
            float(task.metric(task.model.logits(p, task.test[0]), task.test[1]).mean())
            for p in (before, run.state.params)
        ]
        assert scores[1] > scores[0] + 0.1


def test_masks_are_partitioned_by_their_commonest_class() -> None:
    task = ellipses(2, partition=Dirichlet(0.1), side=16)
    shares = [float((y.flatten(1).max(dim=1).values == 1).float().mean()) for _, y in task.clients]
    assert abs(shares[0] - shares[1]) > 0.3
    named = ellipses(None, partition=ByColumn("label"), side=16)
    assert named.client_names == ("full", "ring")


def test_a_group_is_never_divided_and_shares_are_even() -> None:
    column = [str(i // 3) for i in range(60)]
    labels = torch.zeros(60, dtype=torch.long)
    parts = ByGroup("who")(labels, 4, columns={"who": column}, rng=RANDOM.at("parts"))
    owners = [{column[i] for i in part.tolist()} for part in parts]
    assert [len(part) for part in parts] == [15] * 4
    assert not any(a & b for i, a in enumerate(owners) for b in owners[:i])
    with pytest.raises(DataUnusable, match="20 groups for 21 clients"):
        ByGroup("who")(labels, 21, columns={"who": column}, rng=RANDOM.at("parts"))


@local
def test_no_patient_is_on_two_sides() -> None:
    with np.load(SLICES) as held:
        whose = {bytes(i): int(v) for i, v in zip(held["images"], held["volume"], strict=True)}
    task = hippocampus(data=SLICES)
    assert task.public is not None

    def patients(inputs: Tensor) -> set[int]:
        return {whose[(x[0] * 255).round().byte().numpy().tobytes()] for x in inputs}

    sides = [patients(x) for x, _ in (*task.clients, task.test, task.public)]
    assert not any(a & b for i, a in enumerate(sides) for b in sides[:i])
    assert (len(task.test[1]), len(task.public[1])) == (600, 200)
    assert max(task.sizes) - min(task.sizes) <= 18 and "CC BY-SA 4.0" in task.source
    mixed = hippocampus(data=SLICES, partition=IID())
    assert patients(mixed.clients[0][0]) & patients(mixed.clients[1][0])


def test_slices_that_are_not_there_are_told_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TURNCOAT_DATA", raising=False)
    with pytest.raises(DataMissing, match=r"medicaldecathlon\.com"):
        hippocampus()
    file = tmp_path / "msd_hippocampus_2d.npz"
    np.savez(file, images=np.zeros((4, 64, 64), np.uint8))
    with pytest.raises(DataUnusable, match="lacks masks, volume; it has images"):
        hippocampus(data=file)
    wrong = np.zeros((4, 32, 32), np.uint8)
    np.savez(file, images=np.zeros((4, 64, 64), np.uint8), masks=wrong, volume=np.arange(4))
    with pytest.raises(DataUnusable, match="the same size"):
        hippocampus(data=file)
    whole = np.zeros((4, 64, 64), np.uint8)
    np.savez(file, images=whole, masks=whole, volume=np.arange(4))
    with pytest.raises(DataUnusable, match="leave no example of 4"):
        hippocampus(data=file, test_size=4)


# The attack ----------------------------------------------------------------------------------

_ATTACK = InvertingSegmentation(optimiser=LBFGS(num_steps=5))


def seen(task: Task, train: Any) -> ServerView[Update]:
    start = task.model.initial(RANDOM.at("begin"))
    sent = tuple(
        train(task.model, start, data, rng=RANDOM.at("train", i))
        for i, data in enumerate(task.clients)
    )
    senders = tuple(range(len(sent)))
    return ServerView(0, task.model, senders, sent, sent=(start,) * len(sent))


def played(task: Task, train: Any, known: bool, attack: InvertingSegmentation) -> Marked:
    view, game = seen(task, train), ReconstructSlices(victim=0, masks_known=known)
    question, truth = game.pose(
        task, took_part=frozenset(view.senders), cohort=view.senders, rng=RANDOM.at("pose")
    )
    guess = attack(
        view,
        victims=question.victims,
        masks=question.masks,
        population=question.population,
        rng=RANDOM.at("attack"),
    )
    return game.mark(guess, truth, rng=RANDOM.at("mark"))


def test_an_image_comes_back_from_the_gradient_with_its_mask_known() -> None:
    marked = played(small(), FedSGD(0.1), True, _ATTACK)
    assert marked.headline.value > 25 > 20 > marked.headline.baseline
    assert [m.name for m in marked.others] == ["ssim"]


def test_image_and_mask_come_back_together() -> None:
    marked = played(small(), FedSGD(0.1), False, replace(_ATTACK, optimiser=LBFGS(7)))
    found = {m.name: m for m in marked.others}["mask_dice"]
    assert marked.headline.value > 25 and found.value > 0.9 > 0.7 > found.baseline


def test_differential_privacy_leaves_no_more_than_the_mean_image() -> None:
    private = DPSGD(0.1, 1.0, 1, target_epsilon=8.0, delta=1e-5, num_steps=1)
    marked = played(small(), private.planned(Plan(20, (1, 1))), True, _ATTACK)
    assert marked.headline.value <= marked.headline.baseline + 1
    assert not marked.headline.beats_baseline


def test_an_attack_deaf_to_the_gradient_does_no_better_than_the_mean_image() -> None:
    task = small()
    view = seen(task, FedSGD(0.1))
    (blind,) = _ATTACK.prior_only(
        view, victims=(0,), population=task.population, rng=RANDOM.at("attack")
    )
    mean = task.population[0].mean(dim=0, keepdim=True)
    held = task.clients[0][0]
    assert float(psnr(blind.inputs, held)) < float(psnr(mean, held)) + 0.5


def test_one_cosine_for_each_layer_is_blind_to_lengths_between_but_not_within() -> None:
    a, b = torch.rand(3, 4), torch.rand(3)
    c, d = torch.rand(2, 3), torch.rand(2)
    far = LayerCosine()
    assert far((a, b, c, d), (2 * a, 2 * b, 7 * c, 7 * d)).item() == pytest.approx(0, abs=1e-6)
    assert far((a, b, c, d), (2 * a, b, c, d)).item() > 1e-3
    assert far((a, b, c, d), (a, b, 0 * c, 0 * d)).item() == pytest.approx(0, abs=1e-6)


def test_a_net_without_biases_hides_how_bright_the_image_is() -> None:
    """Group normalisation takes the length out of what it reads, and out of the gradient."""
    net = Built(UNet(4, 2, 2, "silu"), (1, 8, 8), 3)
    model = Model(net, DiceCrossEntropy())
    start = model.initial(RANDOM.at("begin"))
    slots = {s.name: s for s in model.layout.slots}
    weight, bias = (slots[f"down.0.0.{name}"] for name in ("weight", "bias"))
    start[bias.start : bias.stop] = 0  # as if it were not there
    image, mask = torch.rand(1, 1, 8, 8, generator=RANDOM.at("image")), masks(1)
    bright, dark = (model.gradient(start, (s * image, mask)) for s in (1.0, 0.5))
    assert torch.allclose(
        bright[weight.start : weight.stop], dark[weight.start : weight.stop], rtol=0.02, atol=1e-4
    )
    assert float(dark[bias.start : bias.stop].norm()) > 1.5 * float(
        bright[bias.start : bias.stop].norm()
    )


def test_masks_begin_at_what_the_attackers_own_look_like() -> None:
    task = small()
    start = task.model.initial(RANDOM.at("begin"))
    clue = Clue(task.model, start, torch.ones_like(start), 2, task.population)
    shares = JointMasks(1e-6)(clue).softmax(dim=1)
    assert shares.shape == (2, 3, 16, 16)
    common = (task.population[1] == 1).float().mean(dim=0)
    assert torch.allclose(shares[0, 1], common, atol=1e-4)


def test_masks_begin_at_that_of_the_attackers_most_alike_in_gradient() -> None:
    task = small()
    model, (images, shown) = task.model, task.population
    start = model.initial(RANDOM.at("begin"))
    clues = [
        Clue(model, start, -model.gradient(start, (images[i : i + 1], shown[i : i + 1])), n, held)
        for i, n, held in ((2, 1, task.population), (0, 2, task.population))
    ]
    rule = NearestMasks()
    first, second = rule.together(clues)
    assert torch.equal(first.argmax(dim=1), shown[2:3])
    assert torch.equal(second.argmax(dim=1), shown[:1].expand(2, -1, -1))
    assert float(first.softmax(dim=1).min()) > 0.02  # no class is ruled out
    assert torch.equal(rule(clues[0]), first)
    with pytest.raises(ValueError, match="several states"):
        rule.together((clues[0], replace(clues[1], before=start + 1)))


def test_image_and_mask_come_back_from_the_nearest_mask() -> None:
    attack = replace(_ATTACK, optimiser=LBFGS(7), labels=NearestMasks())
    marked = played(small(), FedSGD(0.1), False, attack)
    assert marked.headline.value > 25 > 20 > marked.headline.baseline


def test_fewer_masks_than_images_are_refused() -> None:
    task = small()
    start = task.model.initial(RANDOM.at("begin"))
    clue = Clue(task.model, start, torch.ones_like(start), 2, task.population)
    recipe = replace(_ATTACK.spelt_out.recipe, labels=GivenMasks(task.clients[0][1]))
    with pytest.raises(ValueError, match="1 masks are known of 2 images"):
        invert(clue, recipe, rng=RANDOM.at("attack"))


# The game ------------------------------------------------------------------------------------


def test_the_game_keeps_the_masks_unless_it_grants_them() -> None:
    task = small(3, per_client=2)
    for known in (False, True):
        game = ReconstructSlices(num_victims=2, masks_known=known)
        question, truth = game.pose(
            task, took_part=frozenset({0, 1, 2}), cohort=(0, 1, 2), rng=RANDOM.at("pose")
        )
        assert (question.masks is not None) == known and len(truth.records) == 2
        assert Trial(_ATTACK, game).family == "inversion"


def test_a_guess_of_the_wrong_kind_is_refused_with_both_shapes() -> None:
    task = small(2, per_client=2)
    game = ReconstructSlices(victim=0)
    _, truth = game.pose(task, took_part=frozenset({0, 1}), cohort=(0, 1), rng=RANDOM.at("pose"))
    images, true = task.clients[0]
    for bad, said in (
        (Reconstruction(images[:, :, :4], true), "images of shape"),
        (Reconstruction(images, true.float()), "masks of shape"),
        (Reconstruction(images, torch.zeros(2, dtype=torch.long)), "masks of shape"),
        (Reconstruction(images * torch.nan, true), "NaN"),
    ):
        with pytest.raises(ValueError, match=said):
            game.mark([bad], truth, rng=RANDOM.at("mark"))
    best = game.mark([Reconstruction(images, true)], truth, rng=RANDOM.at("mark"))
    values: dict[str, Measurement] = {m.name: m for m in best.others}
    assert best.headline.value == 100 and values["mask_dice"].value == 1.0
    swapped = game.mark([Reconstruction(images.flip(0), true.flip(0))], truth, rng=RANDOM.at("m"))
    assert swapped.headline.value == 100  # paired, whatever the order


def test_masks_are_asked_of_the_task() -> None:
    from turncoat.tasks.bundled import digits

    with pytest.raises(ValueError, match="use the game Reconstruct"):
        ReconstructSlices().pose(
            digits(2, per_client=2), took_part=frozenset({0}), cohort=(0,), rng=RANDOM.at("pose")
        )
