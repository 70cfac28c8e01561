"""Defences that clients wear against inversion, and attackers who know them.

Kinds: contract is in test_contracts; theorem (hypothesis: what is kept, what is right in the mean,
how many bytes); oracle (Soteria's scores by a loop); sabotage (the attacker who does not know the
defence falls to a blind guess, the one who does gets through).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from turncoat.attacks.inversion.adaptive import Kept, Signs
from turncoat.attacks.inversion.engine import Objective
from turncoat.attacks.inversion.gradient_inversion import GradientInversion
from turncoat.attacks.inversion.objectives import L2, Cosine
from turncoat.attacks.inversion.optimisers import SignedAdam
from turncoat.federation import Federation, Plain
from turncoat.games.reconstruction import Reconstruct
from turncoat.messages import Update
from turncoat.params import Layout
from turncoat.privacy import Private, guarantees
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import Watch, simulate
from turncoat.stage import Memory, Train, call
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.channel.secure_aggregation import SecureAggregation
from turncoat.stages.train.compressed import Compressed
from turncoat.stages.train.dpsgd import DPSGD
from turncoat.stages.train.local import FedSGD, LocalSGD
from turncoat.stages.train.pruned import GradientPruning, pruned
from turncoat.stages.train.quantised import Quantised
from turncoat.stages.train.soteria import Soteria, first_reader, leaks
from turncoat.task import Batch, Model, Task
from turncoat.tasks.bundled import digits
from turncoat.tasks.models import MLP, Built, ConvNet, LeNet5
from turncoat.trial import Marked
from turncoat.views import ServerView

RANDOM = Randomness(11)
STEP = FedSGD(0.1)
torch.set_num_threads(1)


@dataclass(frozen=True)
class Sends:
    """A client that sends what the test says."""

    delta: tuple[float, ...]

    def __call__(self, model: Model, start: Tensor, data: Batch) -> Update:
        return Update(torch.tensor(self.delta), 3.0)


def line(size: int) -> Model:
    """A model whose state is one tensor of so many numbers."""
    return Model(lambda: nn.Linear(size, 1, bias=False))


def sent(stage: Train[Update], model: Model, cell: dict[str, Any] | None = None) -> Update:
    start, data = torch.zeros(model.layout.num_params), (torch.zeros(0), torch.zeros(0))
    memory: Memory[Any] = Memory({} if cell is None else cell)
    answer: Update = call(stage, model, start, data, rng=RANDOM.at("train"), memory=memory)
    return answer


NUMBERS = st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=30).map(tuple)


# pruning


@settings(deadline=None)
@given(NUMBERS, st.floats(0, 0.99))
def test_pruning_keeps_the_largest_and_as_many_as_it_says(
    numbers: tuple[float, ...], sparsity: float
) -> None:
    whole = torch.tensor(numbers)
    left = sent(GradientPruning(sparsity, Sends(numbers)), line(len(numbers))).delta
    kept = len(numbers) - min(round(sparsity * len(numbers)), len(numbers) - 1)
    assert int(left.count_nonzero()) <= kept
    assert torch.equal(left[left != 0], whole[left != 0])
    assert torch.equal(left.abs().sort().values[-kept:], whole.abs().sort().values[-kept:])


def test_pruning_leaves_something_of_every_tensor_and_all_statistics() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    layout = Layout.of(module)
    left = pruned(torch.arange(1.0, layout.num_params + 1), layout, 0.99)
    for slot in layout.slots:
        here = left[slot.start : slot.stop]
        whole = 1 if slot.trainable else slot.stop - slot.start
        assert int(here.count_nonzero()) == whole


@settings(max_examples=30, deadline=None)
@given(NUMBERS, st.integers(1, 5))
def test_what_pruning_keeps_back_is_sent_later(numbers: tuple[float, ...], rounds: int) -> None:
    stage, model = GradientPruning(0.8, Sends(numbers), feedback=True), line(len(numbers))
    cell: dict[str, Any] = {}
    total = torch.stack([sent(stage, model, cell).delta for _ in range(rounds)]).sum(dim=0)
    (held,) = cell.values()
    torch.testing.assert_close(total + held, rounds * torch.tensor(numbers), atol=1e-4, rtol=1e-4)


# quantisation


@settings(deadline=None)
@given(NUMBERS, st.integers(1, 8), st.booleans())
def test_quantised_numbers_are_few_and_near(
    numbers: tuple[float, ...], bits: int, stochastic: bool
) -> None:
    whole = torch.tensor(numbers)
    rounded = sent(Quantised(bits, Sends(numbers), stochastic), line(len(numbers))).delta
    assert len(set(rounded.tolist())) <= max(2**bits - 1, 3)
    if bits > 1:
        step = whole.abs().max() / (2 ** (bits - 1) - 1)
        room = step * (1 if stochastic else 0.5) * 1.0001 + 1e-6
        assert bool(((rounded - whole).abs() <= room).all())
    else:
        assert torch.equal(rounded.sign(), whole.sign())


def test_stochastic_rounding_is_right_in_the_mean_and_nearest_is_not() -> None:
    whole = torch.tensor([1.0, 0.1, -0.3, 0.0])
    for stochastic in (True, False):
        stage = Quantised(2, Sends(tuple(whole.tolist())), stochastic)
        draws = [
            call(stage, line(4), torch.zeros(4), (torch.zeros(0),) * 2, rng=RANDOM.at("r", i)).delta
            for i in range(1_000)
        ]
        away = (torch.stack(draws).mean(dim=0) - whole).abs().max()
        assert bool(away < 0.05) is stochastic


def test_a_change_of_nothing_stays_nothing() -> None:
    for stage in (Quantised(8, Sends((0.0, 0.0))), Quantised(1, Sends((0.0, 0.0)))):
        assert torch.equal(sent(stage, line(2)).delta, torch.zeros(2))


# bytes


def test_a_compressed_update_tells_what_it_would_take() -> None:
    dense = torch.arange(1.0, 1001)
    sparse = dense * (torch.arange(1000) % 100 == 0)
    assert Compressed(dense, 1.0).num_bytes == Update(dense, 1.0).num_bytes == 4008
    assert Compressed(sparse, 1.0).num_bytes == 10 * 8 + 8  # a place and a number each
    assert Compressed(dense * (dense > 500), 1.0).num_bytes == 500 * 4 + 125 + 8  # and a map
    assert Compressed(dense, 1.0, bits=8, num_scales=1).num_bytes == 1000 + 4 + 8
    assert Compressed(dense, 1.0, bits=1, num_scales=1).num_bytes == 125 + 4 + 8
    assert Compressed(sparse, 1.0, bits=1, num_scales=1).num_bytes == -(-10 * 33 // 8) + 4 + 8
    assert Compressed(dense, 1.0, bits=8, num_coded=900).num_bytes == 900 + 400 + 8


def test_a_run_counts_what_the_defences_save() -> None:
    task = digits(2, per_client=4, model=MLP((8,)))

    def bytes_up(train: Train[Update], channel: Any = Plain()) -> int:  # noqa: B008
        federation = Federation(train=train, channel=channel, aggregate=Mean())
        run = simulate(federation, task, num_rounds=1, seed=0)
        return run.log[0].bytes_up

    plain = bytes_up(STEP)
    assert bytes_up(Quantised(8, STEP)) < 0.27 * plain
    assert bytes_up(GradientPruning(0.9, STEP)) < 0.16 * plain
    assert bytes_up(Quantised(8, GradientPruning(0.9, STEP))) < 0.09 * plain
    masked = bytes_up(STEP, SecureAggregation())
    assert bytes_up(GradientPruning(0.9, STEP), SecureAggregation()) == masked >= plain


def test_a_defence_around_dp_leaves_its_guarantee() -> None:
    noisy = DPSGD(0.1, 1.0, 4, noise_multiplier=1.0)
    stated = []
    for train in (
        noisy,
        GradientPruning(0.9, noisy),
        Quantised(8, noisy),
        Soteria(0.4, noisy),
    ):
        federation = Federation(train=train, channel=Plain(), aggregate=Mean())
        (found,) = guarantees(federation, num_records=20, num_rounds=5, delta=1e-5)
        assert isinstance(found, Private)
        stated.append(found)
    assert len(set(stated)) == 1


# Soteria


def shared(architecture: Any) -> tuple[Model, Tensor, Batch]:
    model = Model(Built(architecture, (1, 8, 8), 10))
    task = digits(1, per_client=5)
    return model, model.initial(RANDOM.at("begin")), task.clients[0]


@pytest.mark.parametrize(
    ("net", "layer"), [(MLP((6,)), "3"), (ConvNet((3, 2), (2, 2), "relu", "max"), "7")], ids=str
)
def test_features_are_scored_as_a_loop_would(net: Any, layer: str) -> None:
    model, start, (inputs, _) = shared(net)
    assert first_reader(model.module) == layer
    seen: list[Tensor] = []
    reader = model.module.get_submodule(layer)
    assert isinstance(reader, nn.Linear)
    hook = reader.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    expected = torch.zeros(reader.in_features)
    for image in inputs:
        leaf = image[None].clone().requires_grad_()
        model.logits(start, leaf)
        for i, feature in enumerate(seen[-1][0]):
            (slope,) = torch.autograd.grad(feature, leaf, retain_graph=True)
            if float(slope.norm()):
                expected[i] += float(feature.detach().abs() / slope.norm())
    hook.remove()
    torch.testing.assert_close(leaks(model, start, inputs, layer), expected)


def test_soteria_hides_features_of_one_layer_and_touches_nothing_else() -> None:
    model, start, data = shared(LeNet5("tanh"))
    plain = STEP(model, start, data, rng=RANDOM.at("train")).delta
    hidden = call(Soteria(0.25, STEP), model, start, data, rng=RANDOM.at("train")).delta
    for slot in model.layout.slots:
        a, b = (v[slot.start : slot.stop].view(slot.shape) for v in (plain, hidden))
        if slot.name == f"{first_reader(model.module)}.weight":
            gone = (b == 0).all(dim=0)
            assert int(gone.sum()) == round(0.25 * slot.shape[1])
            assert torch.equal(a[:, ~gone], b[:, ~gone])
        else:
            assert torch.equal(a, b)


def test_soteria_needs_a_layer_that_reads_a_representation() -> None:
    model, start, data = shared(MLP(()))
    with pytest.raises(ValueError, match="needs a dense layer that reads"):
        call(Soteria(0.5, STEP), model, start, data, rng=RANDOM.at("train"))
    model, start, data = shared(MLP((4,)))
    with pytest.raises(ValueError, match="no dense layer '2'"):
        call(Soteria(0.5, STEP, "2"), model, start, data, rng=RANDOM.at("train"))


# attacked


@cache
def one_image_each() -> Task:
    return digits(2, per_client=1, model=LeNet5("tanh"))


@cache
def attacked(train: Any, objective: Objective) -> Marked:
    """Return the marks of an inversion of the first round."""
    task = one_image_each()
    federation = Federation(train=train, channel=Plain(), aggregate=Mean())
    need = ServerView[Update]
    run = simulate(federation, task, num_rounds=1, seed=0, watch=[Watch(need, frozenset({0}))])
    (view,) = run.seen(need)
    game = Reconstruct(num_victims=2)
    everyone = frozenset(view.senders)
    question, truth = game.pose(
        task, took_part=everyone, cohort=view.senders, rng=RANDOM.at("pose")
    )
    attack = GradientInversion(objective=objective, optimiser=SignedAdam(120), together=True)
    guess = attack(
        view, victims=question.victims, population=question.population, rng=RANDOM.at("attack")
    )
    return game.mark(guess, truth, rng=RANDOM.at("mark"))


def test_without_a_defence_the_image_comes_back() -> None:
    found = attacked(STEP, Cosine()).headline
    assert found.value > found.baseline + 15
    assert attacked(STEP, Kept()).headline.value == pytest.approx(found.value)


@pytest.mark.parametrize(
    "defence", [GradientPruning(0.9, STEP), Soteria(0.8, STEP)], ids=["pruning", "soteria"]
)
def test_zeros_stop_an_attacker_who_does_not_know_of_them_and_no_other(
    defence: Any,
) -> None:
    ignorant, knowing = (attacked(defence, o).headline for o in (Cosine(), Kept()))
    assert ignorant.value < ignorant.baseline + 3
    assert knowing.value > knowing.baseline + 10 and knowing.value > ignorant.value + 10


def test_eight_bits_hide_nothing_and_one_bit_hides_much() -> None:
    eight, one = (attacked(Quantised(bits, STEP), Cosine()).headline for bits in (8, 1))
    assert eight.value > eight.baseline + 12
    assert one.value < eight.value - 12


def test_who_knows_that_signs_were_sent_sees_more_than_who_does_not() -> None:
    ignorant, knowing = (attacked(Quantised(1, STEP), o) for o in (Cosine(), Signs()))
    assert ignorant.headline.value < ignorant.headline.baseline + 3
    assert knowing.headline.value > ignorant.headline.value + 4


def test_the_objectives_are_what_they_say() -> None:
    guess = [torch.tensor([3.0, 4.0]), torch.tensor([[5.0]])]
    target = [torch.tensor([3.0, 0.0]), torch.tensor([[5.0]])]
    assert float(Kept()(guess, target)) == pytest.approx(0, abs=1e-6)
    assert float(Cosine()(guess, target)) > 0.1
    assert Kept(L2()).needs_scale and not Kept().needs_scale
    quantised = [torch.full((2,), 3.5), torch.tensor([[5.0]])]
    assert float(Signs()(guess, quantised)) == pytest.approx(0, abs=1e-6)
    assert float(Signs()([-g for g in guess], quantised)) == pytest.approx(2, abs=1e-6)
    assert float(Cosine()(guess, quantised)) > 0.005 and Signs(L2()).needs_scale


def test_the_model_still_learns_behind_each_defence() -> None:
    task = digits(4, per_client=100, model=MLP((32,)))
    train = LocalSGD(0.2, num_epochs=2, batch_size=20)
    for wearing in (
        GradientPruning(0.9, train, feedback=True),
        Quantised(8, train),
        Quantised(1, train),
        Soteria(0.4, train),
    ):
        federation = Federation(train=wearing, channel=Plain(), aggregate=Mean())
        run = simulate(federation, task, num_rounds=8, seed=0)
        outputs = task.model.logits(run.state.params, task.test[0])
        assert float(task.metric(outputs, task.test[1]).mean()) > 0.65, wearing
