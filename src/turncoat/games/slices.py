"""Reconstruction where labels are masks: what did the victims' images show, and where?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from turncoat.games.reconstruction import MAX_SHOWN, Records, check_images, victims_of
from turncoat.metrics.images import match, psnr, ssim
from turncoat.metrics.intervals import of_mean
from turncoat.task import Batch, Task
from turncoat.tasks.segmentation import overlap
from turncoat.trial import Marked, Measurement, Reconstruction
from turncoat.validate import at_least

Pair = tuple[Tensor, Tensor, Tensor, Tensor]  # guessed images and masks, originals and masks


@dataclass(frozen=True, slots=True)
class Slices:
    """Whom to attack, by number; what such data look like; and their masks, if they are granted.

    ``masks`` are those of all records of each victim, in order: an upper bound for the attacker.
    """

    victims: tuple[int, ...]
    population: Batch = field(repr=False)
    masks: tuple[Tensor, ...] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class ReconstructSlices:
    """Rebuild images of some clients of the round, and their masks. Marked by PSNR, in dB.

    Guesses and records are paired as in ``Reconstruct``, and so is the baseline: the better of the
    mean public image and of random public ones. Of the guessed masks the Dice coefficient is given,
    beside that of random public masks and of the commonest class of each pixel; not where the game
    grants the masks.

    Args:
        victim: The client to attack; None draws ``num_victims`` from the round's cohort.
        num_victims: How many, or all where the cohort has fewer.
        masks_known: Grant the masks to the attacker.
    """

    victim: int | None = None
    num_victims: int = 4
    masks_known: bool = False
    family = "inversion"
    says = (
        "{who} can rebuild images that clients trained on: {value} {interval} of likeness to the "
        "originals, where a guess from public images reaches {baseline}."
    )

    def __post_init__(self) -> None:
        at_least(0, self, victim=self.victim)
        at_least(1, self, num_victims=self.num_victims)

    def pose(
        self, task: Task, *, took_part: frozenset[int], cohort: tuple[int, ...], rng: Generator
    ) -> tuple[Slices, Records]:
        if task.population[1].ndim != 3:
            raise ValueError(
                f"ReconstructSlices needs masks for labels, (n, height, width); those of "
                f"{task.name!r} have the shape {tuple(task.population[1].shape)}: use the game "
                "Reconstruct"
            )
        victims = victims_of(self, task, cohort, rng)
        truth = Records(tuple(task.clients[v] for v in victims), task.population)
        check_images(self, task.name, (*(data[0] for data in truth.records), truth.population[0]))
        masks = tuple(m for _, m in truth.records) if self.masks_known else None
        return Slices(victims, truth.population, masks), truth

    def mark(self, guess: Sequence[Reconstruction], truth: Records, *, rng: Generator) -> Marked:
        if len(guess) != len(truth.records):
            raise ValueError(f"{len(truth.records)} victims, but {len(guess)} reconstructions")
        found = [_sound(g, *r) for g, r in zip(guess, truth.records, strict=True)]
        images, masks = (part.cpu() for part in truth.population)
        mean, common = images.mean(dim=0, keepdim=True), masks.mode(dim=0).values[None]
        draws = [torch.randint(len(images), (len(x),), generator=rng) for x, _ in found]
        pairs = _paired(found, truth.records)
        blind = (
            _paired([(mean.expand_as(x), common.expand_as(y)) for x, y in found], truth.records),
            _paired([(images[d], masks[d]) for d in draws], truth.records),
        )
        others = []
        if min(mean.shape[-2:]) >= 3:
            others.append(_likeness("ssim", ssim, pairs, blind, 1.0))
        if not self.masks_known:
            others.append(self._masks_found(pairs, blind))
        shown = {
            "originals": pairs[2][:MAX_SHOWN],
            "reconstructions": pairs[0][:MAX_SHOWN],
            "mean_image": mean,
            "psnr": psnr(pairs[0], pairs[2])[:MAX_SHOWN],
        }
        return Marked(_likeness("psnr", psnr, pairs, blind, 30.0, "dB"), tuple(others), shown)

    def _masks_found(self, pairs: Pair, blind: Sequence[Pair]) -> Measurement:
        num_classes = 1 + max(int(m.max()) for p in (pairs, *blind) for m in (p[1], p[3]))
        scores = [overlap(p[1], p[3], max(2, num_classes)) for p in (pairs, *blind)]
        baseline = max(float(s.mean()) for s in scores[1:])
        low, high = of_mean(scores[0])
        value = float(scores[0].mean())
        return Measurement("mask_dice", value, baseline, max(0.0, low), min(1.0, high), 1.0)


def _paired(guesses: Sequence[Batch], records: Sequence[Batch]) -> Pair:
    """Pair each victim's guesses with its records, so that the squared error is least."""
    parts = []
    for (images, masks), (inputs, true) in zip(guesses, records, strict=True):
        rows, columns = match(images, inputs)
        parts.append((images[rows], masks[rows], inputs.cpu()[columns], true.cpu()[columns]))
    first, second, third, fourth = (torch.cat(column) for column in zip(*parts, strict=True))
    return first, second, third, fourth


def _likeness(
    name: str,
    measure: Callable[[Tensor, Tensor], Tensor],
    pairs: Pair,
    blind: Sequence[Pair],
    worst: float,
    unit: str = "",
) -> Measurement:
    """Return the mean over pairs, beside that of the better blind guess."""
    values = measure(pairs[0], pairs[2])
    baseline = max(float(measure(b[0], b[2]).mean()) for b in blind)
    return Measurement(name, float(values.mean()), baseline, *of_mean(values), worst, unit)


def _sound(guess: Reconstruction, inputs: Tensor, masks: Tensor) -> Batch:
    """Return the guessed images within [0, 1] and their masks, or say what is wrong with them."""
    images, said = guess.inputs.detach().cpu().float(), guess.labels.detach().cpu()
    if not len(images) or images.shape[1:] != inputs.shape[1:]:
        raise ValueError(
            f"images of shape {tuple(inputs.shape[1:])} are due; the guess has the shape "
            f"{tuple(images.shape)}"
        )
    due = (len(images), *masks.shape[1:])
    if said.shape != due or said.dtype.is_floating_point or int(said.min()) < 0:
        raise ValueError(
            f"{len(images)} images need masks of shape {due}, of whole numbers from 0 on; the "
            f"guess has {said.dtype} of shape {tuple(said.shape)}"
        )
    if not bool(images.isfinite().all()):
        raise ValueError("the guess holds NaN or infinity")
    return images.clamp(0, 1), said
