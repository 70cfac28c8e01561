"""Reconstruction: what did the victims' images look like?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from turncoat.metrics.images import match, psnr, ssim
from turncoat.metrics.intervals import clopper_pearson, of_mean
from turncoat.task import Batch, Task
from turncoat.trial import Marked, Measurement, Reconstruction
from turncoat.validate import at_least

MAX_SHOWN = 16  # pairs kept for the report


@dataclass(frozen=True, slots=True)
class Victims:
    """Whom to attack, by number; what ``population`` looks like is public."""

    victims: tuple[int, ...]
    population: Batch = field(repr=False)


@dataclass(frozen=True, slots=True)
class Records:
    """The truth: what each victim holds, and what anybody knows of such data."""

    records: tuple[Batch, ...] = field(repr=False)
    population: Batch = field(repr=False)


@dataclass(frozen=True)
class Reconstruct:
    """Rebuild images of some clients of the round. Marked by PSNR, in dB.

    A victim's n guesses are paired one to one with n of the records it *holds*, so that the squared
    error is least: which of them were in its batch is not known here. Someone who only guesses has
    the same choice, so the baseline is paired the same way: it is the better of the mean public
    image and of random public images, and grows with the records to choose from.

    The interval is over pairs; a single pair has none, and gives its value twice.

    Args:
        victim: The client to attack; None draws ``num_victims`` from the round's cohort.
        num_victims: How many, or all where the cohort has fewer.
    """

    victim: int | None = None
    num_victims: int = 4
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
    ) -> tuple[Victims, Records]:
        present = sorted(c for c in cohort if task.sizes[c])
        if not present:
            raise ValueError(f"{self!r} finds nobody with data in a round of {len(cohort)} clients")
        if self.victim is None:
            order = torch.randperm(len(present), generator=rng)[: self.num_victims]
            victims = tuple(sorted(present[i] for i in order.tolist()))
        elif self.victim in present:
            victims = (self.victim,)
        else:
            raise ValueError(
                f"{self!r}: client {self.victim} was not in this round, or holds nothing; "
                f"there are {', '.join(map(str, present))}: name one of these, or none"
            )
        truth = Records(tuple(task.clients[v] for v in victims), task.population)
        for inputs in (*(data[0] for data in truth.records), truth.population[0]):
            _check_images(inputs, task.name)
        return Victims(victims, truth.population), truth

    def mark(self, guess: Sequence[Reconstruction], truth: Records, *, rng: Generator) -> Marked:
        if len(guess) != len(truth.records):
            raise ValueError(f"{len(truth.records)} victims, but {len(guess)} reconstructions")
        found = [_sound(g, r[0]) for g, r in zip(guess, truth.records, strict=True)]
        public = truth.population[0].cpu()
        mean = public.mean(dim=0, keepdim=True)
        draws = [torch.randint(len(public), (len(g),), generator=rng) for g in found]
        pairs = Pairs.of(found, truth.records)
        blind = (
            Pairs.of([mean.expand_as(g) for g in found], truth.records),
            Pairs.of([public[d] for d in draws], truth.records),
        )
        others = [_label_accuracy([g.labels for g in guess], truth)]
        if min(mean.shape[-2:]) >= 3:
            others.insert(0, _likeness("ssim", ssim, pairs, blind, worst=1.0))
        return Marked(
            _likeness("psnr", psnr, pairs, blind, worst=30.0, unit="dB"),
            tuple(others),
            {
                "originals": pairs.originals[:MAX_SHOWN],
                "reconstructions": pairs.images[:MAX_SHOWN],
                "mean_image": mean,
                "labels": pairs.labels[:MAX_SHOWN],
            },
        )


@dataclass(frozen=True, slots=True)
class Pairs:
    """Guessed images beside the originals they go with, of all victims in their order.

    Attributes:
        images, originals: Shape: ``(pairs, channels, height, width)``.
        labels: Of the originals. Shape: ``(pairs,)``.
    """

    images: Tensor
    originals: Tensor
    labels: Tensor

    @classmethod
    def of(cls, guesses: Sequence[Tensor], records: Sequence[Batch]) -> Pairs:
        """Pair each victim's guesses with its records, so that the squared error is least."""
        parts = []
        for images, (inputs, labels) in zip(guesses, records, strict=True):
            rows, columns = match(images, inputs)
            rows, columns = rows[columns.argsort()], columns.sort().values  # as the records come
            parts.append((images[rows], inputs.cpu()[columns], labels.cpu()[columns]))
        images, originals, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        return cls(images, originals, labels)


def _likeness(
    name: str,
    measure: Callable[[Tensor, Tensor], Tensor],
    pairs: Pairs,
    blind: Sequence[Pairs],
    *,
    worst: float,
    unit: str = "",
) -> Measurement:
    """Return the mean over pairs, beside that of the better blind guess."""
    values = measure(pairs.images, pairs.originals)
    baseline = max(float(measure(b.images, b.originals).mean()) for b in blind)
    return Measurement(name, float(values.mean()), baseline, *of_mean(values), worst, unit)


def _label_accuracy(guesses: Sequence[Tensor], truth: Records) -> Measurement:
    """Return the share of guessed labels that a record can be found for, each used once.

    The baseline is the better of saying the most common public class only, and all in proportion.
    """
    prior = Counter(truth.population[1].tolist())
    held = [Counter(labels.tolist()) for _, labels in truth.records]
    sizes = [len(labels) for labels in guesses]
    common = [Counter({max(prior, key=lambda c: prior[c]): n}) for n in sizes]
    spread = [_in_proportion(prior, n) for n in sizes]

    def hits(said: Sequence[Counter[int]]) -> int:
        return sum((s & h).total() for s, h in zip(said, held, strict=True))

    total, found = sum(sizes), hits([Counter(labels.tolist()) for labels in guesses])
    baseline = max(hits(common), hits(spread)) / total
    interval = clopper_pearson(found, total)
    return Measurement("label_accuracy", found / total, baseline, *interval, worst=1.0)


def _in_proportion(prior: Counter[int], num_labels: int) -> Counter[int]:
    """Return so many labels in the proportions of ``prior``, by largest remainders."""
    due = {c: num_labels * n / prior.total() for c, n in prior.items()}
    said = Counter({c: int(d) for c, d in due.items()})
    rest = sorted(due, key=lambda c: (said[c] - due[c], c))[: num_labels - said.total()]
    return said + Counter(rest)


def _sound(guess: Reconstruction, inputs: Tensor) -> Tensor:
    """Return the guessed images within [0, 1], or say what is wrong with them."""
    images = guess.inputs.detach().cpu().float()
    if not len(images) or images.shape[1:] != inputs.shape[1:]:
        raise ValueError(
            f"images of shape {tuple(inputs.shape[1:])} are due; the guess has the shape "
            f"{tuple(images.shape)}"
        )
    if guess.labels.shape != images.shape[:1]:
        raise ValueError(
            f"{len(images)} images need as many labels; the guess has the shape "
            f"{tuple(guess.labels.shape)}"
        )
    if not bool(images.isfinite().all()):
        raise ValueError("the guess holds NaN or infinity")
    return images.clamp(0, 1)


def _check_images(inputs: Tensor, name: str) -> None:
    if inputs.ndim != 4:
        raise ValueError(
            f"Reconstruct marks images; {name!r} has inputs of shape {tuple(inputs.shape[1:])}: "
            "leave this trial out, or choose a task of images"
        )
    low, high = float(inputs.min()), float(inputs.max())
    if low < 0 or high > 1:
        raise ValueError(
            f"Reconstruct needs pixels in [0, 1]; those of {name!r} lie in [{low:.3g}, {high:.3g}]:"
            " let the task scale them, and the model normalise"
        )
