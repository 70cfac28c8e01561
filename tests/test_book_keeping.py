"""Clipped gradients from one pass back. Kinds: oracle, theorem, sabotage.

Oracles: ``torch.func`` (vmap of grad) for every kind of layer, and Opacus' hooks, by which DPSGD
took gradients apart before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from turncoat.randomness import Randomness
from turncoat.stages.train.book_keeping import Products, clipped_sum, told_apart
from turncoat.stages.train.dpsgd import DPSGD
from turncoat.task import Batch, Model
from turncoat.tasks.models import MLP, Built, LeNet5, ResNet

torch.set_num_threads(1)  # two threads fight over nets so small

ROOT = Randomness(0)
CLASSES = 3


class Sequence(nn.Module):
    """Words, of which 0 is a blank, through layers that see one vector a place."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6, padding_idx=0)
        self.wide = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.bare = nn.LayerNorm(5, bias=False)
        self.last = nn.Linear(5, CLASSES, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.bare(torch.tanh(self.norm(self.wide(self.words(inputs)))))
        out: Tensor = self.last(hidden.mean(dim=1))
        return out


class Shared(nn.Module):
    """A layer that is called twice, and a weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        self.last = nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.tied(torch.tanh(self.first(torch.tanh(self.first(inputs))))))
        out: Tensor = self.last(hidden)
        return out


class Around(nn.Module):
    """A parameter of its own around layers that are known: told apart as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 1.5]))
        self.last = nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.last(inputs * self.factor)
        return out


def convolved(convolution: nn.Module, *more: nn.Module) -> nn.Module:
    net = nn.Sequential(convolution, nn.ReLU(inplace=True), *more, nn.Flatten())
    return nn.Sequential(net, nn.LazyLinear(CLASSES))


def materialised(net: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    net(torch.zeros(2, *shape))
    return net


VECTORS, IMAGES = (4,), (2, 9, 8)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, CLASSES), VECTORS),
    "dense": (Built(MLP((6,), "tanh"), VECTORS, CLASSES), VECTORS),
    "group norm": (Built(MLP((6,), normalisation="group", num_groups=2), VECTORS, 3), VECTORS),
    "shared": (Shared, VECTORS),
    "around": (Around, VECTORS),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, CLASSES)),
        VECTORS,
    ),
    "half frozen": (
        lambda: nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, CLASSES)),
        VECTORS,
    ),
    "convolution": (lambda: convolved(nn.Conv2d(2, 4, 3, padding=1)), IMAGES),
    "strided": (lambda: convolved(nn.Conv2d(2, 4, (3, 2), stride=(2, 3), padding=2)), IMAGES),
    "dilated": (lambda: convolved(nn.Conv2d(2, 4, 3, dilation=(2, 1), padding=1)), IMAGES),
    "same": (lambda: convolved(nn.Conv2d(2, 4, (4, 3), padding="same")), IMAGES),
    "grouped": (lambda: convolved(nn.Conv2d(2, 4, 3, groups=2, bias=False)), IMAGES),
    "mirrored": (
        lambda: convolved(nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")),
        IMAGES,
    ),
    "normalised": (
        lambda: convolved(
            nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)
        ),
        IMAGES,
    ),
    "up again": (lambda: convolved(nn.ConvTranspose2d(2, 4, 3, stride=2)), IMAGES),
    "one axis": (lambda: convolved(nn.Conv1d(2, 4, 3, stride=2, padding=1)), (2, 9)),
    "three axes": (lambda: convolved(nn.Conv3d(2, 4, 2, padding=1)), (2, 4, 5, 3)),
    "LeNet-5": (Built(LeNet5(), (1, 16, 16), CLASSES), (1, 16, 16)),
    "ResNet": (Built(ResNet(width=4, num_groups=2), (1, 8, 8), CLASSES), (1, 8, 8)),
}


def model_of(name: str) -> tuple[Model, tuple[int, ...]]:
    build, shape = NETS[name]
    return Model(lambda: materialised(build(), shape)), shape


def batch(shape: tuple[int, ...], num: int, seed: int = 0) -> Batch:
    rng = Randomness(seed).at("batch")
    inputs = 2 * torch.randn(num, *shape, generator=rng)
    return inputs, torch.randint(CLASSES, (num,), generator=rng)


def words(num: int) -> Batch:
    rng = ROOT.at("words")
    return torch.randint(7, (num, 5), generator=rng), torch.randint(CLASSES, (num,), generator=rng)


def kept(model: Model, params: Tensor, data: Batch, max_norm: float) -> Tensor:
    learner = model.learner(params)
    total = clipped_sum(model, learner, data, max_norm)
    learner.finish()
    return total


def rows_by_functorch(model: Model, params: Tensor, data: Batch) -> Tensor:
    """Return each example's gradient as a row; zero where nothing trains."""
    trains = {n for n, p in model.module.named_parameters() if p.requires_grad}
    named = {n: t for n, t in model.layout.split(params).items() if n in trains}

    def loss(named: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = functional_call(model.module, named, (x[None],))
        return model.criterion(out, y[None])

    with torch.no_grad():
        for name, p in model.module.named_parameters():
            p.copy_(model.layout.split(params)[name])
    found = vmap(grad(loss), in_dims=(None, 0, 0))(named, *data)
    rows = params.new_zeros(len(data[1]), model.layout.num_trainable)
    for slot in model.layout.slots:
        if slot.name in found:
            rows[:, slot.start : slot.stop] = found[slot.name].flatten(1)
    return rows


def clipped(rows: Tensor, max_norm: float) -> Tensor:
    lengths = torch.linalg.vector_norm(rows, dim=1)
    total: Tensor = (max_norm / lengths.clamp(min=1e-12)).clamp(max=1) @ rows
    return total


def lengths_of(model: Model, params: Tensor, data: Batch) -> Tensor:
    learner = model.learner(params)
    parts = told_apart(model, learner, data)
    learner.finish()
    lengths: Tensor = torch.stack([g.norms() for g in parts.values()]).norm(dim=0)
    return lengths


def assert_agree(model: Model, data: Batch) -> None:
    params = model.initial(ROOT.at("start"))
    rows = rows_by_functorch(model, params, data)
    lengths = torch.linalg.vector_norm(rows, dim=1)
    torch.testing.assert_close(lengths_of(model, params, data), lengths, rtol=1e-5, atol=1e-7)
    for max_norm in (1e-3, float(lengths.median()), 1e6):
        found, due = kept(model, params, data, max_norm), clipped(rows, max_norm)
        assert float((found - due).norm()) <= 1e-5 * float(due.norm())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", NETS)
def test_lengths_and_clipped_sums_are_those_of_functorch(name: str) -> None:
    model, shape = model_of(name)
    assert_agree(model, batch(shape, 9))


def test_they_are_for_words_of_which_the_blank_has_no_gradient() -> None:
    model = Model(Sequence)
    assert_agree(model, words(9))
    total = kept(model, model.initial(ROOT.at("start")), words(9), 1.0)
    assert not bool(total[:6].any()) and bool(total[6:12].any())


def test_more_examples_than_pass_together_are_added_up() -> None:
    model, shape = model_of("convolution")
    assert_agree(model, batch(shape, 150))


OPACUS_KNOWS = ["dense", "group norm", "convolution", "strided", "grouped", "LeNet-5", "ResNet"]


def rows_by_opacus(model: Model, params: Tensor, data: Batch) -> Tensor:
    net = model.build()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(model.layout.split(params)[name])
    for layer in net.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # Opacus' hooks do not survive it
    watched: Any = GradSampleModule(net)
    torch.autograd.backward(model.criterion(watched(data[0]), data[1]))
    return torch.cat([p.grad_sample.flatten(1) for p in watched.parameters()], dim=1)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("name", OPACUS_KNOWS)
def test_clipped_sums_are_those_of_opacus(name: str) -> None:
    model, shape = model_of(name)
    params, data = model.initial(ROOT.at("start")), batch(shape, 9)
    rows = rows_by_opacus(model, params, data)
    found, due = kept(model, params, data, 0.5), clipped(rows, 0.5)
    assert float((found - due).norm()) <= 1e-5 * float(due.norm())


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_training_is_that_of_opacus_gradients_and_the_same_noise() -> None:
    """What DPSGD did before it kept books: the same draws, the same noise, to rounding."""
    (model, shape), rng = model_of("LeNet-5"), ROOT.at("train")
    rule = DPSGD(0.1, 0.7, 10, noise_multiplier=1.3, num_epochs=2, momentum=0.5)
    start, data = model.initial(ROOT.at("start")), batch(shape, 40)
    rate, num_steps = rule.schedule(40)
    here, velocity = start.clone(), torch.zeros_like(start)
    for _ in range(num_steps):
        chosen = torch.rand(40, generator=rng, dtype=torch.float64) < rate
        noise = torch.randn(here.shape, generator=rng)
        rows = rows_by_opacus(model, here, (data[0][chosen], data[1][chosen]))
        velocity = 0.5 * velocity + (clipped(rows, 0.7) + 1.3 * 0.7 * noise) / 10
        here = here - 0.1 * velocity
    sent = rule(model, start, data, rng=ROOT.at("train"))
    assert float((sent.delta - (here - start)).norm()) <= 1e-5 * float(sent.delta.norm())


def test_noise_is_the_generators_to_the_bit() -> None:
    """A gradient of 0 leaves the noise alone: at a loss that no weight moves."""
    model = Model(lambda: nn.Linear(4, CLASSES), lambda out, y: (0 * out).mean())
    start, data, rng = torch.zeros(15), batch(VECTORS, 8), ROOT.at("train")
    sent = DPSGD(0.5, 2.0, 8, noise_multiplier=3.0)(model, start, data, rng=ROOT.at("train"))
    torch.rand(8, generator=rng, dtype=torch.float64)
    velocity = torch.zeros(15).add_(
        torch.zeros(15).add_(torch.randn(15, generator=rng), alpha=6.0), alpha=1 / 8
    )
    assert torch.equal(sent.delta, torch.zeros(15).add_(velocity, alpha=-0.5))


@settings(max_examples=25, deadline=None)
@given(
    num=st.integers(1, 6),
    seed=st.integers(0, 999),
    max_norm=st.floats(1e-3, 2.0),
    scale=st.floats(1e-3, 1e3),
)
def test_no_example_adds_more_than_the_clipping_norm(
    num: int, seed: int, max_norm: float, scale: float
) -> None:
    model, shape = model_of("normalised")
    (inputs, labels), params = batch(shape, num, seed), model.initial(Randomness(seed).at("p"))
    inputs = inputs * scale
    whole = kept(model, params, (inputs, labels), max_norm)
    without = kept(model, params, (inputs[1:], labels[1:]), max_norm)
    assert float((whole - without).norm()) <= max_norm * (1 + 1e-4)


def test_products_are_what_they_stand_for() -> None:
    slopes, inputs = (torch.randn(5, k, generator=ROOT.at(f"{k}")) for k in (3, 4))
    products, weights = Products(slopes, inputs), torch.rand(5, generator=ROOT.at("w"))
    rows = torch.stack([torch.outer(s, x).flatten() for s, x in zip(slopes, inputs, strict=True)])
    torch.testing.assert_close(products.rows(), rows)
    torch.testing.assert_close(products.norms(), rows.norm(dim=1))
    torch.testing.assert_close(products.combined(weights), weights @ rows)


class Unclipped(Products):
    """What goes wrong where the length of a gradient is forgotten."""

    def norms(self) -> Tensor:
        return torch.zeros(len(self.slopes))


def test_without_its_lengths_nothing_is_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(lambda: nn.Linear(4, CLASSES, bias=False))
    params, data = model.initial(ROOT.at("start")), batch(VECTORS, 9)
    assert float(kept(model, params, data, 0.01).norm()) <= 0.09 * (1 + 1e-4)
    monkeypatch.setattr(Products, "norms", Unclipped.norms)
    assert float(kept(model, params, data, 0.01).norm()) > 0.2


class Turned(nn.Module):
    """Examples along the second axis, as a recurrent layer likes them."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.last = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.last(self.inside(inputs.mT.contiguous().mT[None]).squeeze(0))
        return out


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.last = nn.GRU(4, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.last(self.inside(inputs[:, None])[0][:, 0])
        return out


class Overwritten(nn.Module):
    """A layer whose input is changed once it was read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inside = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        out: Tensor = self.inside(hidden.detach())
        hidden.detach().mul_(2)
        return out


class Drawn(nn.Module):
    """A layer of one's own that draws at random."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(CLASSES, 4))

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.dropout(inputs, training=True) @ self.weight.T


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (Turned, r"layer 'inside' \(Linear\): .*the examples along the first axis"),
        (Recurrent, r"layer 'inside' \(GRU\): it must .* return one tensor"),
        (Overwritten, r"layer 'inside' \(Linear\).* changed it in place since: change a copy"),
        (Drawn, r"layer '' \(Drawn\)"),
    ],
)
def test_what_cannot_be_told_apart_is_refused_by_name(
    build: Callable[[], nn.Module], why: str
) -> None:
    model = Model(build)
    rule = DPSGD(0.1, 1.0, 8, noise_multiplier=1.0)
    with pytest.raises(ValueError, match=why):
        rule(model, model.initial(ROOT.at("p")), batch(VECTORS, 8), rng=ROOT.at("t"))
    assert not any(layer._forward_hooks for layer in model.module.modules())


def test_an_exception_leaves_no_hook() -> None:
    model, _ = model_of("convolution")
    learner = model.learner(model.initial(ROOT.at("p")))
    with pytest.raises(RuntimeError):
        clipped_sum(model, learner, (torch.zeros(3, 5, 9, 8), torch.zeros(3).long()), 1.0)
    assert not any(layer._forward_hooks for layer in model.module.modules())
