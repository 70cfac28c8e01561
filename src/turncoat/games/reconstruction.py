"""Reconstruction: what did the victims' images look like?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import fmean
from typing import Protocol

import torch
from torch import Generator, Tensor

from turncoat.describe import ADDED
from turncoat.metrics.images import feature_distance, features, match, mse, psnr, ssim
from turncoat.metrics.intervals import clopper_pearson, of_mean
from turncoat.task import Batch, Task
from turncoat.trial import Marked, Measurement, Reconstruction
from turncoat.validate import at_least

MAX_SHOWN = 16  # pairs kept for the report
MAX_DECOYS = 99  # public images that a record stands among


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
    the same choice, so the baseline is paired the same way: it is the best of the mean public
    image, of random public images, and of what the attack's priors give without the update, if that
    is asked for; it grows with the records to choose from.

    Likeness is not recognition. So every pair is put to a line-up, too: the record among the others
    of its class that the victim holds and up to 99 public ones of that class. It is *identified* if
    the guess is nearer to it than to any other, in pixels or in ``features``. The baseline is
    chance: whoever knows the class alone points at each with the same odds.

    The interval is over pairs; a single pair has none, and gives its value twice.

    Args:
        victim: The client to attack; None draws ``num_victims`` from the round's cohort.
        num_victims: How many, or all where the cohort has fewer.
        prior_only: Whether the attack shall play once more without the update, which makes what its
            priors alone are worth a baseline. It must have a ``prior_only``, and takes twice as
            long.
    """

    victim: int | None = None
    num_victims: int = 4
    prior_only: bool = field(default=False, metadata=ADDED)
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
        if task.population[1].ndim != 1:
            raise ValueError(
                f"Reconstruct marks labels of one class an image; those of {task.name!r} have the "
                f"shape {tuple(task.population[1].shape[1:])}: use the game ReconstructSlices"
            )
        victims = victims_of(self, task, cohort, rng)
        truth = Records(tuple(task.clients[v] for v in victims), task.population)
        check_images(self, task.name, (*(data[0] for data in truth.records), truth.population[0]))
        return Victims(victims, truth.population), truth

    def mark(self, guess: Sequence[Reconstruction], truth: Records, *, rng: Generator) -> Marked:
        if len(guess) != len(truth.records):
            raise ValueError(f"{len(truth.records)} victims, but {len(guess)} reconstructions")
        found = [_sound(g, r[0]) for g, r in zip(guess, truth.records, strict=True)]
        public = truth.population[0].cpu()
        mean = public.mean(dim=0, keepdim=True)
        draws = [torch.randint(len(public), (len(g),), generator=rng) for g in found]
        pairs = Pairs.of(found, truth.records)
        blind = [
            Pairs.of([mean.expand_as(g) for g in found], truth.records),
            Pairs.of([public[d] for d in draws], truth.records),
        ]
        if prior := _prior_only(guess, truth):
            blind.append(prior)
        side = min(mean.shape[-2:])
        others = [_label_accuracy([g.labels for g in guess], truth)]
        if side >= 3:
            others.insert(0, _likeness("ssim", ssim, pairs, blind, worst=1.0))
        others.append(_likeness("mse", mse, pairs, blind, worst=0.0))
        line_ups = LineUps.of(pairs, truth, rng)
        near = line_ups.distances(_pixels)
        others.append(_identified("identified", near, line_ups.chance))
        if side >= 4:
            others.append(_likeness("feature_distance", feature_distance, pairs, blind, worst=0.0))
            seen = line_ups.distances(features)
            others.append(_identified("identified_by_features", seen, line_ups.chance))
        shown = {
            "originals": pairs.originals[:MAX_SHOWN],
            "reconstructions": pairs.images[:MAX_SHOWN],
            "mean_image": mean,
            "labels": pairs.labels[:MAX_SHOWN],
            "psnr": psnr(pairs.images, pairs.originals)[:MAX_SHOWN],
            "identified": _hits(near)[:MAX_SHOWN].to(torch.uint8),
            "decoys": line_ups.likest_decoys(near)[:MAX_SHOWN],
        }
        if prior:
            shown["prior_only"] = prior.in_the_order_of(pairs).images[:MAX_SHOWN]
        headline = _likeness("psnr", psnr, pairs, blind, worst=30.0, unit="dB")
        return Marked(headline, tuple(others), shown)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Guessed images beside the originals they go with, of all victims in their order.

    Attributes:
        images, originals: Shape: ``(pairs, channels, height, width)``.
        labels: Of the originals. Shape: ``(pairs,)``.
        victims, places: Whose record an original is, and which of theirs. Shape: ``(pairs,)``.
    """

    images: Tensor
    originals: Tensor
    labels: Tensor
    victims: Tensor
    places: Tensor

    @classmethod
    def of(cls, guesses: Sequence[Tensor], records: Sequence[Batch]) -> Pairs:
        """Pair each victim's guesses with its records, so that the squared error is least."""
        parts = []
        for i, (images, (inputs, labels)) in enumerate(zip(guesses, records, strict=True)):
            rows, columns = match(images, inputs)
            rows, columns = rows[columns.argsort()], columns.sort().values  # as the records come
            whose = torch.full_like(columns, i)
            parts.append(
                (images[rows], inputs.cpu()[columns], labels.cpu()[columns], whose, columns)
            )
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def in_the_order_of(self, other: Pairs) -> Pairs:
        """Return it with the pairs of the records that ``other`` has first, in their order."""
        mine = list(zip(self.victims.tolist(), self.places.tolist(), strict=True))
        theirs = zip(other.victims.tolist(), other.places.tolist(), strict=True)
        first = [mine.index(at) for at in theirs if at in mine]
        order = torch.tensor([*first, *(i for i in range(len(mine)) if i not in first)])
        return Pairs(*(getattr(self, f.name)[order] for f in fields(self)))


@dataclass(frozen=True, slots=True)
class LineUps:
    """For each pair, those among whom its guess shall point out the record.

    Attributes:
        guesses: Shape: ``(pairs, channels, height, width)``.
        bank: All images that stand in any line-up. Shape: ``(n, channels, height, width)``.
        candidates: Of each pair, by place in the bank: the record, others of its class that the
            victim holds, then public ones; of any class, if none of its class is public.
        num_held: Of each pair, how many of these the victim holds.
    """

    guesses: Tensor
    bank: Tensor
    candidates: tuple[Tensor, ...]
    num_held: tuple[int, ...]

    @classmethod
    def of(cls, pairs: Pairs, truth: Records, rng: Generator) -> LineUps:
        """Return the line-ups of all pairs; those of one class share their public images."""
        inputs, labels = (part.cpu() for part in truth.population)
        bank = [data.cpu() for data, _ in truth.records]
        begins = [sum(map(len, bank[:i])) for i in range(len(bank) + 1)]
        size, decoys = begins[-1], {}
        for label in sorted(set(pairs.labels.tolist())):
            pool = (labels == label).nonzero().flatten()
            pool = pool if len(pool) else torch.arange(len(labels))
            drawn = pool[torch.randperm(len(pool), generator=rng)[:MAX_DECOYS]]
            decoys[label] = torch.arange(size, size + len(drawn))
            bank.append(inputs[drawn])
            size += len(drawn)
        candidates, num_held = [], []
        rows = torch.stack([pairs.labels, pairs.victims, pairs.places], dim=1).tolist()
        for label, victim, place in rows:
            same = (truth.records[victim][1].cpu() == label).nonzero().flatten()
            others = same[same != place]
            held = torch.cat([torch.tensor([place]), others]) + begins[victim]
            candidates.append(torch.cat([held, decoys[label]]))
            num_held.append(len(held))
        return cls(pairs.images, torch.cat(bank), tuple(candidates), tuple(num_held))

    @property
    def chance(self) -> float:
        """Return how often a guess that knows the class alone points at a record of the victim."""
        return fmean(n / len(c) for n, c in zip(self.num_held, self.candidates, strict=True))

    def distances(self, seen_as: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Return how far each guess is from its candidates, as something sees them."""
        guesses, bank = seen_as(self.guesses), seen_as(self.bank)
        return [
            (bank[among] - guess).norm(dim=1)
            for guess, among in zip(guesses, self.candidates, strict=True)
        ]

    def likest_decoys(self, distances: Sequence[Tensor]) -> Tensor:
        """Return the public image that each guess is nearest to; the record, if there is none."""
        near = [
            among[n + int(d[n:].argmin())] if len(d) > n else among[0]
            for d, n, among in zip(distances, self.num_held, self.candidates, strict=True)
        ]
        return self.bank[torch.stack(near)]


def _pixels(images: Tensor) -> Tensor:
    return images.double().flatten(1)


def _identified(name: str, distances: Sequence[Tensor], chance: float) -> Measurement:
    """Return the share of guesses that point out their record, beside chance. A tie is a miss."""
    num_hits, trials = int(_hits(distances).sum()), len(distances)
    interval = clopper_pearson(num_hits, trials)
    return Measurement(name, num_hits / trials, chance, *interval, worst=1.0)


def _hits(distances: Sequence[Tensor]) -> Tensor:
    return torch.tensor([bool((d[0] < d[1:]).all()) for d in distances])


def _prior_only(guess: Sequence[Reconstruction], truth: Records) -> Pairs | None:
    """Return what the attack's priors make of nothing, if it tells for every victim."""
    told = [replace(g, inputs=g.prior_only) for g in guess if g.prior_only is not None]
    if len(told) < len(guess):
        return None
    sound = [_sound(g, r[0]) for g, r in zip(told, truth.records, strict=True)]
    return Pairs.of(sound, truth.records)


def _likeness(
    name: str,
    measure: Callable[[Tensor, Tensor], Tensor],
    pairs: Pairs,
    blind: Sequence[Pairs],
    *,
    worst: float,
    unit: str = "",
) -> Measurement:
    """Return the mean over pairs, beside that of the best blind guess."""
    values = measure(pairs.images, pairs.originals)
    best = max if worst else min  # of an error, the least
    baseline = best(float(measure(b.images, b.originals).mean()) for b in blind)
    if unit and baseline >= worst:  # a blind guess that is this good leaves the attacker a way up
        worst = baseline + 10
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


class Chooses(Protocol):
    """A game that has a victim, or draws some."""

    @property
    def victim(self) -> int | None: ...
    @property
    def num_victims(self) -> int: ...


def victims_of(
    game: Chooses, task: Task, cohort: tuple[int, ...], rng: Generator
) -> tuple[int, ...]:
    """Return a game's victim, or as many as it wants of those in the round who hold data."""
    present = sorted(c for c in cohort if task.sizes[c])
    if not present:
        raise ValueError(f"{game!r} finds nobody with data in a round of {len(cohort)} clients")
    if game.victim is None:
        order = torch.randperm(len(present), generator=rng)[: game.num_victims]
        return tuple(sorted(present[i] for i in order.tolist()))
    if game.victim not in present:
        raise ValueError(
            f"{game!r}: client {game.victim} was not in this round, or holds nothing; "
            f"there are {', '.join(map(str, present))}: name one of these, or none"
        )
    return (game.victim,)


def check_images(game: object, name: str, parts: Iterable[Tensor]) -> None:
    """Refuse inputs that are no images, or whose pixels are not in [0, 1]."""
    who = type(game).__name__
    for inputs in parts:
        if inputs.ndim != 4:
            raise ValueError(
                f"{who} marks images; {name!r} has inputs of shape {tuple(inputs.shape[1:])}: "
                "leave this trial out, or choose a task of images"
            )
        low, high = float(inputs.min()), float(inputs.max())
        if low < 0 or high > 1:
            raise ValueError(
                f"{who} needs pixels in [0, 1]; those of {name!r} lie in [{low:.3g}, {high:.3g}]:"
                " let the task scale them, and the model normalise"
            )
