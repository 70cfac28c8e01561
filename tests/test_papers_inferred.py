"""The tree that memorises, and measures taken several times.

Kinds: oracle (scikit-learn's own answers, a mean by hand), theorem (it memorises).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.tree import DecisionTreeClassifier

from papers.inferred import Grown, Memorising
from papers.repeated import Repeated
from turncoat.federation import Federation, Plain
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import simulate
from turncoat.stages.aggregate.mean import Mean
from turncoat.task import Model, Task
from turncoat.tasks.models import Built

RANDOM = Randomness(4)


def test_a_tree_in_a_federation_answers_as_scikit_learn_does() -> None:
    inputs = torch.randn(120, 5, generator=RANDOM.at("inputs"))
    labels = (torch.rand(120, generator=RANDOM.at("labels")) < 0.5).long()
    model = Model(Built(Memorising(120), (5,), 2))
    others = torch.randn(300, 5, generator=RANDOM.at("others"))
    task = Task("chance", model, ((inputs, labels),), (others, torch.zeros(300).long()))
    federation = Federation(train=Grown(), channel=Plain(), aggregate=Mean())
    params = simulate(federation, task, num_rounds=1, seed=0).state.params
    assert torch.equal(model.logits(params, inputs).argmax(dim=1), labels)
    seed = int(torch.randint(2**31 - 1, (1,), generator=Randomness(0).at("train", 0, 0)))
    tree = DecisionTreeClassifier(random_state=seed).fit(inputs.numpy(), labels.numpy())
    expected = torch.from_numpy(tree.predict(others.numpy()))
    assert torch.equal(model.logits(params, others).argmax(dim=1), expected)


@dataclass(frozen=True)
class Itself:
    """A measure whose figure is its seed."""

    def __call__(self, seed: int) -> dict[str, float | str]:
        return {"seed": float(seed), "data": f"of {seed}"}


def test_a_repeated_measure_is_the_mean_over_seeds_that_no_two_share() -> None:
    assert Repeated(Itself(), 3)(10) == {"seed": (10 + 1010 + 2010) / 3, "data": "of 10"}
    assert Repeated(Itself(), 1)(11) == Itself()(11)
