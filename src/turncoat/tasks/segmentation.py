"""Segmentation: what is where in an image? A label is a mask, with a class for each pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate, one_hot

from turncoat.randomness import Randomness
from turncoat.task import Batch, Model, Task
from turncoat.tasks.images import arrays, as_images
from turncoat.tasks.models import _ACTIVATIONS, Activation, Architecture, _known
from turncoat.tasks.partitions import IID, ByGroup, Partition
from turncoat.tasks.pool import Pool, Split, federate
from turncoat.tasks.sources import DataUnusable, local, missing
from turncoat.validate import at_least, positive

_SMALLEST = 8  # pixels a side


@dataclass(frozen=True)
class UNet:
    """A small U-Net [1]_: down by halves, up again, and across at every level.

    Width 8 and depth 3 have 29,955 parameters. Group normalisation [2]_ keeps the records of a
    batch apart, as per-example gradients, and so DP-SGD, need it.

    Differs from the paper: 3x3 convolutions are padded, so that the mask is as large as the image;
    pooling takes means, and the way up repeats pixels, so that with a smooth ``activation`` the net
    has the second derivatives that inversion wants; GroupNorm.

    Args:
        width: Channels at the top; twice as many a level further down.
        depth: Levels; each but the first halves the sides.
        num_groups: Of each normalisation; must divide ``width``.

    .. [1] Ronneberger et al., MICCAI 2015. https://arxiv.org/abs/1505.04597
    .. [2] Wu and He, ECCV 2018. https://arxiv.org/abs/1803.08494
    """

    width: int = 8
    depth: int = 3
    num_groups: int = 4
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        at_least(1, self, width=self.width, depth=self.depth, num_groups=self.num_groups)
        if self.width % self.num_groups:
            raise ValueError(
                f"UNet: num_groups must divide width; they are {self.num_groups} and {self.width}"
            )
        _known(self, self.activation)

    def __call__(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        smallest = max(_SMALLEST, 1 << (self.depth - 1))
        if len(input_shape) != 3 or min(input_shape[1:]) < smallest:
            raise ValueError(
                f"UNet needs images of shape (channels, height, width), at least {smallest} pixels "
                f"a side; an example here has shape {input_shape}: lower depth, or choose another "
                "model"
            )
        return _UNet(self, input_shape[0], num_classes)


class _UNet(nn.Module):
    def __init__(self, sizes: UNet, channels: int, num_classes: int) -> None:
        super().__init__()
        widths = [sizes.width << level for level in range(sizes.depth)]

        def block(before: int, after: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for inside in (before, after):
                layers += [
                    nn.Conv2d(inside, after, 3, padding=1),
                    nn.GroupNorm(sizes.num_groups, after),
                    _ACTIVATIONS[sizes.activation](),
                ]
            return nn.Sequential(*layers)

        before = [channels, *widths[:-1]]
        self.down = nn.ModuleList(map(block, before, widths))
        self.up = nn.ModuleList(
            block(low + high, high) for low, high in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(widths[0], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        across = []
        for level, block in enumerate(self.down):
            x = block(avg_pool2d(x, 2) if level else x)
            across.append(x)
        across.pop()
        for block in self.up:
            side = across.pop()
            x = block(torch.cat([side, interpolate(x, size=side.shape[-2:])], dim=1))
        logits: Tensor = self.head(x)
        return logits


@dataclass(frozen=True)
class DiceCrossEntropy:
    """Cross-entropy of the pixels plus the soft Dice loss [1]_ of each class but the first.

    A mean over examples, so that DP-SGD takes it. Masks may be soft: a probability for each class.

    Differs from the paper: the denominator has no squares; cross-entropy is added, without which
    the classes that a slice lacks would have hardly a gradient.

    Args:
        smooth: Pixels added to both sides of the fraction: its value where there is nothing.

    .. [1] Milletari et al., 3DV 2016, section 3. https://arxiv.org/abs/1606.04797
    """

    smooth: float = 1.0

    def __post_init__(self) -> None:
        positive(self, smooth=self.smooth)

    def __call__(self, outputs: Tensor, masks: Tensor) -> Tensor:
        """Return the loss.

        Args:
            outputs: Shape: ``(n, classes, height, width)``.
            masks: Shape: ``(n, height, width)``, whole numbers; or as ``outputs``.
        """
        soft = _soft(masks, outputs.shape[1]).to(outputs.dtype)
        said, true = outputs.softmax(dim=1)[:, 1:].flatten(2), soft[:, 1:].flatten(2)
        both, either = (said * true).sum(dim=2), said.sum(dim=2) + true.sum(dim=2)
        overlap = (2 * both + self.smooth) / (either + self.smooth)
        return cross_entropy(outputs, soft) + 1 - overlap.mean()


def dice(outputs: Tensor, masks: Tensor) -> Tensor:
    """Return the Dice coefficient of each example. Shape: ``(examples,)``.

    The mean over the classes, but the first, that the mask or the answer has; 1 if there are none.

    >>> mask = torch.tensor([[[0, 1, 1]]])
    >>> said = torch.tensor([[[1, 1, 0]]])
    >>> dice(torch.nn.functional.one_hot(said).movedim(-1, 1).float(), mask).tolist()
    [0.5]
    """
    return overlap(outputs.argmax(dim=1), masks, outputs.shape[1])


def overlap(said: Tensor, masks: Tensor, num_classes: int) -> Tensor:
    """Return the Dice coefficient of masks and masks, as ``dice``. Shape: ``(examples,)``."""
    first, second = (_soft(m, num_classes)[:, 1:].flatten(2) for m in (said, masks))
    both, either = (first * second).sum(dim=2), first.sum(dim=2) + second.sum(dim=2)
    there = either > 0
    shares = torch.where(there, 2 * both / either.clamp(min=1), 0.0)
    return torch.where(there.any(dim=1), shares.sum(dim=1) / there.sum(dim=1).clamp(min=1), 1.0)


def _soft(masks: Tensor, num_classes: int) -> Tensor:
    """Return masks as probabilities. Shape: ``(n, classes, height, width)``."""
    if masks.dtype.is_floating_point:
        return masks
    return one_hot(masks, num_classes).movedim(-1, 1).float()


_PATIENTS = ByGroup("patient")
_IID = IID()
_UNET = UNet()


def hippocampus(
    num_clients: int | None = 5,
    *,
    partition: Partition = _PATIENTS,
    model: Architecture = _UNET,
    per_client: int | None = None,
    train_size: int | None = None,
    test_size: int | None = 600,
    public_size: int = 200,
    data: str | Path | None = None,
    seed: int = 0,
) -> Task:
    """Return 3,307 slices, 64x64, of 260 patients: which pixels are of the hippocampus?

    Slices of one patient are alike: tests, public data and each client have patients of their
    own. Tests and public data are whole patients until there are as many slices as asked for; what
    is over of the last one is left out.

    The masks say background, anterior, posterior. Their Dice is the metric.
    """
    split = Split(num_clients, partition, per_client, train_size, test_size, public_size, seed)
    names = ["msd_hippocampus_2d.npz"]
    path = local(names, data, holds=lambda p: p.is_file() and p.name in names)
    if path is None:
        why = (
            "it is not fetched: http://medicaldecathlon.com has Task04_Hippocampus as volumes, "
            "which have to be cut into slices first (arrays images and masks, (n, height, width), "
            "and volume, (n,))"
        )
        raise missing("hippocampus", names, why)
    held = arrays(path)
    wanted = {"images", "masks", "volume"}
    if absent := sorted(wanted - held.keys()):
        raise DataUnusable(f"{path.name} lacks {', '.join(absent)}; it has {', '.join(held)}")
    images = as_images(held["images"], f"{path.name}: images")
    masks = torch.from_numpy(held["masks"]).long()
    if masks.shape != (len(images), *images.shape[2:]) or len(held["volume"]) != len(images):
        raise DataUnusable(
            f"{path.name}: images {tuple(images.shape)} and masks {tuple(masks.shape)} must be of "
            f"the same size, with a volume for each; there are {len(held['volume'])}"
        )
    pool = Pool(
        "hippocampus",
        (images, masks),
        None,
        ("background", "anterior", "posterior"),
        columns={"patient": [str(v) for v in held["volume"].tolist()]},
        source="Medical Segmentation Decathlon, Task04 Hippocampus, slices; CC BY-SA 4.0",
    )
    return _federated(pool, split, model, "patient")


def ellipses(
    num_clients: int | None = 4,
    *,
    partition: Partition = _IID,
    model: Architecture = _UNET,
    per_client: int | None = None,
    train_size: int | None = 240,
    test_size: int | None = 80,
    public_size: int = 40,
    side: int = 32,
    seed: int = 0,
) -> Task:
    """Return drawn images of ``side`` pixels, an ellipse in each: bright, or bright at its rim.

    No data are needed: for trying out. Which pixels are of a full one, and which of a ring?

    >>> ellipses(2, per_client=3).sizes
    (3, 3)
    """
    at_least(_SMALLEST, "ellipses", side=side)
    split = Split(num_clients, partition, per_client, train_size, test_size, public_size, seed)
    count = (train_size or 240) + (test_size or 80) + public_size
    pool = Pool(
        "ellipses",
        _drawn(count, side, Randomness(seed).at("ellipses")),
        None,
        ("background", "full", "ring"),
        columns={"patient": [str(i) for i in range(count)]},
        source="drawn at random",
    )
    return _federated(pool, replace(split, test_size=test_size or 80), model, "patient")


def _drawn(count: int, side: int, rng: Generator) -> Batch:
    """Return ellipses on a slanted ground, with a little noise, and their masks."""

    def some(low: float, high: float) -> Tensor:
        return torch.rand(count, 1, 1, generator=rng) * (high - low) + low

    place = (torch.arange(side) + 0.5) / side - 0.5
    y, x = torch.meshgrid(place, place, indexing="ij")
    turn, ring = some(0, torch.pi), torch.randint(2, (count, 1, 1), generator=rng) == 1
    y, x = y - some(-0.2, 0.2), x - some(-0.2, 0.2)
    along, across = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
    radius = ((along / some(0.2, 0.35)).square() + (across / some(0.12, 0.25)).square()).sqrt()
    inside = radius < 1
    bright = torch.where(ring & (radius < 0.6), 0.1, some(0.6, 0.9))
    ground = 0.2 + 0.3 * (x * some(-1, 1) + y * some(-1, 1))
    noise = 0.03 * torch.randn(count, side, side, generator=rng)
    images = (torch.where(inside, bright, ground) + noise).clamp(0, 1)
    return images[:, None], inside.long() * torch.where(ring, 2, 1)


def _federated(pool: Pool, split: Split, model: Architecture, column: str) -> Task:
    """Return the task: tests and public data of groups of a column that no client has."""
    groups = pool.columns[column]
    rng = Randomness(split.seed).at("task: groups")
    test, public, rest = _apart(groups, split.test_size or len(groups) // 5, split.public_size, rng)
    if not len(rest):
        raise DataUnusable(
            f"{pool.name}: test_size and public_size leave no example of {len(groups)} to the "
            "clients: lower one of them"
        )
    images, masks = pool.train
    if images.dtype == torch.uint8:
        images = images.float() / 255
    chosen = rest.tolist()
    kept = replace(
        pool,
        train=(images[rest], masks[rest]),
        test=(images[test], masks[test]),
        columns={name: [values[i] for i in chosen] for name, values in pool.columns.items()},
    )
    task = federate(kept, replace(split, test_size=None, public_size=0), model)
    return replace(
        task,
        model=Model(task.model.build, DiceCrossEntropy()),
        public=(images[public], masks[public]) if len(public) else None,
        metric=dice,
    )


def _apart(
    groups: Sequence[str], test: int, public: int, rng: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return test, public and all other examples, no two of them with a group in common."""
    names = sorted(set(groups))
    members: dict[str, list[int]] = {name: [] for name in names}
    for i, group in enumerate(groups):
        members[group].append(i)
    left = [names[i] for i in torch.randperm(len(names), generator=rng).tolist()]
    parts = []
    for size in (test, public):
        found: list[int] = []
        while left and len(found) < size:
            found += members[left.pop()]
        parts.append(torch.tensor(sorted(found[:size]), dtype=torch.long))
    rest = sorted(i for name in left for i in members[name])
    return parts[0], parts[1], torch.tensor(rest, dtype=torch.long)
