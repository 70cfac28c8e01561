"""A learned space: move what a small generative model decodes, not the pixels."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import interpolate, silu

from turncoat.attacks.inversion.engine import Clue
from turncoat.attacks.inversion.priors import Near
from turncoat.describe import ADDED
from turncoat.task import Batch
from turncoat.validate import at_least, positive


@dataclass(frozen=True)
class Learned:
    """Search among the images that a generative model of the attacker's data can make [1]_.

    A convolutional variational autoencoder [2]_ is trained on the population, once for each clue;
    ``trained`` does so ahead, for as many clues as there are. A guess then is its latent: the
    search cannot leave what such data look like, which helps where an update says little, or is
    noisy, and forbids the last detail where it says all.

    With a ``pull`` the latents are the first of two searches: the second moves pixels, by the same
    optimiser from what the first found, and is held to that.

    Differs from the paper: a VAE in place of a GAN, which some hundred images would not train; its
    weights stay as trained (the paper goes on to fit them to each update, to leave what the model
    can make: here that is up to ``pull``).

    Args:
        num_latents: Numbers that stand for an image.
        width: Channels at the finest scale; twice as many at the coarser one.
        num_steps: Batches to train on.
        noise: Standard deviation of a pixel around what is decoded: the smaller, the sharper, and
            the less of a Gaussian the latents are.
        bound: Latents stay within so many standard deviations.
        pull: Weight of the mean square distance, in the second search, from what the first found;
            None for the first alone.

    .. [1] Jeon et al., NeurIPS 2021, section 4. https://arxiv.org/abs/2110.14962
    .. [2] Kingma and Welling, ICLR 2014, eq. (10). https://arxiv.org/abs/1312.6114
    """

    num_latents: int = 32
    width: int = 16
    num_steps: int = 500
    batch_size: int = 32
    lr: float = 2e-3
    noise: float = 0.1
    bound: float = 3.0
    pull: float | None = field(default=None, metadata=ADDED)

    def __post_init__(self) -> None:
        at_least(1, self, num_latents=self.num_latents, width=self.width)
        at_least(1, self, num_steps=self.num_steps, batch_size=self.batch_size)
        positive(self, lr=self.lr, noise=self.noise, bound=self.bound)
        at_least(0, self, pull=self.pull)

    def prepared(self, clue: Clue, labels: Tensor, rng: Generator) -> Decoded:
        """Return the space of a model trained on the clue's population, for guesses of ``labels``.

        Images of the classes that it knows are told apart; others are decoded as of no class.
        """
        return self.trained(clue.population, rng).prepared(clue, labels, rng)

    def trained(self, population: Batch, rng: Generator) -> Trained:
        """Return the space of a model that is trained once, and serves any number of clues."""
        inputs, own = population
        if inputs.ndim != 4 or not len(inputs):
            raise ValueError(
                f"Learned needs images to learn from; the population has inputs of shape "
                f"{tuple(inputs.shape)}: search the pixels instead"
            )
        classes = own.new_tensor(sorted(set(own.tolist())) if own.ndim == 1 else [])
        with torch.random.fork_rng(devices=[]):  # what the constructors draw is drawn again
            net = _VAE(tuple(inputs.shape[1:]), self.num_latents, self.width, len(classes))
        net = net.to(inputs.device)
        _begin(net, rng)
        _train(net, inputs, _one_hot(own, classes), self, rng)
        return Trained(net, classes, self.bound, self.pull)

    def encode(self, start: Tensor) -> Tensor:
        raise _unprepared()

    def decode(self, variable: Tensor) -> Tensor:
        raise _unprepared()

    def clamp_(self, variable: Tensor) -> None:
        raise _unprepared()


def _unprepared() -> RuntimeError:
    return RuntimeError("Learned works once it is prepared: call prepared() first")


@dataclass(frozen=True, eq=False)
class Trained:
    """A model that has learned, before it is known which classes are asked of it."""

    net: _VAE = field(repr=False)
    classes: Tensor = field(repr=False)  # that it knows
    bound: float
    pull: float | None = None

    def prepared(self, clue: Clue, labels: Tensor, rng: Generator) -> Decoded:
        """Return the space for guesses of ``labels``; the clue's population is left alone."""
        classes = _one_hot(labels.to(self.classes), self.classes)
        return Decoded(self.net, classes, self.bound, self.pull)

    def encode(self, start: Tensor) -> Tensor:
        raise _unprepared()

    def decode(self, variable: Tensor) -> Tensor:
        raise _unprepared()

    def clamp_(self, variable: Tensor) -> None:
        raise _unprepared()


@dataclass(frozen=True, eq=False)
class Decoded:
    """The latents of a trained model as a space. Images: ``(n, channels, height, width)``."""

    net: _VAE = field(repr=False)
    classes: Tensor = field(repr=False)  # of the guesses, one hot
    bound: float
    pull: float | None = None

    def encode(self, start: Tensor) -> Tensor:
        """Return the latents nearest to some images. Shape: ``(n, num_latents)``."""
        with torch.no_grad():
            mean, _ = self.net.encoded(start)
        return mean.clamp(-self.bound, self.bound)

    def decode(self, variable: Tensor) -> Tensor:
        """Return the images of latents, pixels in [0, 1]."""
        return self.net.decoded(variable, self.classes).sigmoid()

    def clamp_(self, variable: Tensor) -> None:
        """Bring latents back to where the model was trained, in place."""
        with torch.no_grad():
            variable.clamp_(-self.bound, self.bound)

    def onwards(self, found: Tensor) -> Near | None:
        """Return what holds a second search, of pixels, to what this one found; None for none."""
        return None if self.pull is None else Near(self.pull, found)


class _VAE(nn.Module):
    """Two strided convolutions there, two doublings back; the class enters with the latents."""

    def __init__(
        self, shape: tuple[int, ...], num_latents: int, width: int, num_classes: int
    ) -> None:
        super().__init__()
        channels, height, width_ = shape
        self.sides = ((height, width_), (-(-height // 2), -(-width_ // 2)))
        self.coarse = (2 * width, *(-(-side // 4) for side in shape[1:]))
        size = self.coarse[0] * self.coarse[1] * self.coarse[2]
        self.down = nn.Sequential(
            *(nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.SiLU()),
            *(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.SiLU()),
            *(nn.Flatten(), nn.Linear(size, 2 * num_latents)),
        )
        self.up = nn.Linear(num_latents + num_classes, size)
        self.middle = nn.Conv2d(2 * width, width, 3, padding=1)
        self.fine = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def encoded(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of the latents. Shapes: ``(n, num_latents)``."""
        mean, log_variance = self.down(images - 0.5).chunk(2, dim=1)
        return mean, log_variance.clamp(-8, 8)

    def decoded(self, latents: Tensor, classes: Tensor) -> Tensor:
        """Return the logits of the pixels."""
        x = silu(self.up(torch.cat([latents, classes], dim=1))).reshape(-1, *self.coarse)
        x = silu(self.middle(interpolate(x, size=self.sides[1])))
        x = silu(self.fine(interpolate(x, size=self.sides[0])))
        out: Tensor = self.last(x)
        return out


def _begin(net: nn.Module, rng: Generator) -> None:
    """Draw the weights, on the CPU; biases are 0."""
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                drawn = torch.randn(layer.weight.shape, generator=rng)
                layer.weight.copy_(drawn / layer.weight[0].numel() ** 0.5)
                if layer.bias is not None:
                    layer.bias.zero_()


def _train(net: _VAE, inputs: Tensor, classes: Tensor, how: Learned, rng: Generator) -> None:
    """Raise the evidence lower bound, the pixels Gaussian around what is decoded."""
    optimiser = torch.optim.Adam(net.parameters(), lr=how.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, how.num_steps)
    for _ in range(how.num_steps):
        chosen = torch.randint(len(inputs), (how.batch_size,), generator=rng).to(inputs.device)
        images = inputs[chosen]
        mean, log_variance = net.encoded(images)
        drawn = torch.randn(mean.shape, generator=rng).to(inputs.device)
        latents = mean + drawn * (log_variance / 2).exp()
        shown = net.decoded(latents, classes[chosen]).sigmoid()
        error = (shown - images).square().sum() / (2 * how.noise**2)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        optimiser.zero_grad()
        torch.autograd.backward((error + divergence) / len(images))
        optimiser.step()
        schedule.step()
    for parameter in net.parameters():
        parameter.requires_grad_(False)


def _one_hot(labels: Tensor, classes: Tensor) -> Tensor:
    """Return a row for each label; all 0 for a class that is not there, and for a mask."""
    if labels.ndim > 1 or not len(classes):
        return torch.zeros(len(labels), len(classes), device=labels.device)
    return (labels[:, None] == classes).float()
