"""What an inversion gains by images of its own, in miniature.

Kinds: contract (every figure that is judged is measured); sabotage (too few victims, arms that do
not differ).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from papers.informed import INFORMED
from papers.priors import WithAndWithout, _digits_like, _p
from turncoat.attacks.inversion.gradient_inversion import GradientInversion
from turncoat.attacks.inversion.learned import Learned
from turncoat.attacks.inversion.optimisers import SignedAdam
from turncoat.stages.train.local import FedSGD
from turncoat.tasks.bundled import faces

TINY = WithAndWithout(
    faces,
    FedSGD(0.1),
    without=GradientInversion(optimiser=SignedAdam(1), num_images=1),
    informed=GradientInversion(
        optimiser=SignedAdam(1), space=Learned(num_latents=2, num_steps=2), num_images=1
    ),
    num_victims=2,
    per_client=1,
    num_clients=12,
    only=1,
)


def test_every_figure_that_an_expectation_judges_is_measured() -> None:
    figures = TINY(100)
    judged = {e.figure for experiment in INFORMED for e in experiment.expectations}
    assert judged <= set(figures)
    assert figures["label_accuracy"] == 1.0


def test_too_few_clients_of_the_chosen_class_are_refused() -> None:
    with pytest.raises(ValueError, match="hold images of class 1 alone, and num_victims is 12"):
        replace(TINY, num_victims=12)(100)


def test_foreign_images_are_digits_as_many_and_as_large() -> None:
    own = torch.rand(5, 1, 25, 25), torch.tensor([1, 0, 1, 1, 0])
    inputs, labels = _digits_like(own)
    assert inputs.shape == own[0].shape and torch.equal(labels, own[1])
    assert float(inputs.min()) >= 0 and float(inputs.max()) <= 1


def test_arms_that_do_not_differ_gain_nothing() -> None:
    assert _p(torch.zeros(8)) == 1.0
    assert _p(torch.arange(1.0, 9.0)) < 0.05 < _p(-torch.arange(1.0, 9.0))
