"""Membership by a net that reads gradients, losses and activations, and learnt on known members."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from turncoat.activations import features
from turncoat.attacks.membership.lira import confidence
from turncoat.attacks.membership.white_box import Feature, Moved, counts, evidence, moved_by
from turncoat.games.membership import Known
from turncoat.messages import Update
from turncoat.randomness import ambient
from turncoat.stage import Broadcast
from turncoat.task import Batch, Model
from turncoat.trial import Memberships
from turncoat.validate import at_least, fraction, one_of, positive
from turncoat.views import AggregateView, ModelView, ServerView

Part = Literal["gradients", "loss", "outputs", "activations", "label"]
_FAR = 5.0  # deviations from the mean at which an entry is cut off
_BATCH = 32
_OF_GRADIENTS: tuple[Feature, ...] = ("alignment", "gradient-norm")


@dataclass(frozen=True)
class WhiteBoxNet:
    """Learn on known records what a model shows of its members, and judge others by it [1]_.

    Of each record and each round that counts the net reads, at the update of the client in question
    (or, where single updates cannot be read or no client is named, at the step of the global
    model), for every layer how long the record's gradient is before and after, and how far the
    update points along it; and how sure the model is of the label before and after. Each part
    passes a layer of its own, an encoder joins them, and the mean of some such nets is the score.

    It must be told of some records whether they are members: a game with ``num_known`` grants
    them. Of the candidates it knows as little as any other attack.

    Differs from the paper: gradients are read by their lengths and their cosines with the update,
    not entry by entry; the outputs, the last hidden activations and the label are read if they are
    asked for: on a few hundred known records they only teach it these records by heart. Fully
    connected layers, fewer and narrower, for the same reason.

    Args:
        parts: Which to read.
        width: Of the layer of each part, and of the encoder.
        num_epochs: Passes over the known records.
        lr: Of AdamW.
        weight_decay: Of AdamW.
        dropout: Share of the parts' units that are left out in each step of training.
        num_nets: How many nets are trained; their scores are averaged.
        rounds: Which rounds count, by number; None for all.
        server: What a malicious server sends, such as ``GradientAscent``; None: it is honest.

    .. [1] Nasr, Shokri and Houmansadr, S&P 2019, section III (the supervised attack model).
       https://arxiv.org/abs/1812.00910
    """

    parts: tuple[Part, ...] = ("gradients", "loss")
    width: int = 16
    num_epochs: int = 30
    lr: float = 1e-3
    weight_decay: float = 0.1
    dropout: float = 0.2
    num_nets: int = 5
    rounds: tuple[int, ...] | None = None
    server: Broadcast | None = None

    def __post_init__(self) -> None:
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ValueError("WhiteBoxNet: parts must name one or more, each once")
        for part in self.parts:
            one_of(Part, self, parts=part)
        at_least(1, self, width=self.width, num_epochs=self.num_epochs, num_nets=self.num_nets)
        positive(self, lr=self.lr)
        at_least(0, self, weight_decay=self.weight_decay)
        fraction(self, dropout=self.dropout)
        if self.rounds is not None and not self.rounds:
            raise ValueError("WhiteBoxNet: rounds must name one or more, or be None for all")
        for t in self.rounds or ():
            at_least(0, self, rounds=t)

    def __call__(
        self,
        view: Sequence[ServerView[Update] | AggregateView[Update]],
        *,
        candidates: Batch,
        known: Known | None,
        client: int | None,
        rng: Generator,
    ) -> Memberships:
        if known is None:
            raise ValueError(
                f"{self!r} learns on records that are known to be members or not, and the game "
                "grants none: give it num_known"
            )
        moved = [m for v in view if counts(self.rounds, v.round) for m in moved_by(v, client)]
        if not moved:
            raise ValueError(
                f"{self!r} saw no step of anyone in question in the rounds that count: let it see "
                "more rounds, and the client take part in them"
            )
        data = _joined(known.records, candidates)
        read = [[_read(part, view[0].model, m, data) for m in moved] for part in self.parts]
        num_known, inside = len(known.inside), known.inside.to(moved[0][1])
        parts = [_standard(torch.cat(rounds, dim=1), num_known) for rounds in read]
        total = torch.zeros(len(candidates[1]), dtype=torch.float64)
        for _ in range(self.num_nets):
            net = self._learnt([part[:num_known] for part in parts], inside, rng)
            with torch.no_grad():
                total += net([part[num_known:] for part in parts]).cpu().double()
        return Memberships(total / self.num_nets)

    def _learnt(self, parts: list[Tensor], inside: Tensor, rng: Generator) -> Joined:
        torch.rand(1, generator=rng)  # so that each net begins elsewhere
        with ambient(rng), torch.enable_grad():
            net = Joined([part.shape[1] for part in parts], self.width, self.dropout)
            net.to(inside.device)
            optimiser = torch.optim.AdamW(
                net.parameters(), lr=self.lr, weight_decay=self.weight_decay
            )
            for _ in range(self.num_epochs):
                for chosen in torch.split(torch.randperm(len(inside)), _BATCH):
                    here = chosen.to(inside.device)
                    optimiser.zero_grad()
                    said = net([part[here] for part in parts])
                    torch.autograd.backward(binary_cross_entropy_with_logits(said, inside[here]))
                    optimiser.step()
        return net.eval()


class Joined(nn.Module):
    """One layer for each part, and an encoder over all of them."""

    def __init__(self, widths: Sequence[int], width: int, dropout: float) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(w, width), nn.ReLU(), nn.Dropout(dropout)) for w in widths
        )
        self.encoder = nn.Sequential(
            nn.Linear(len(widths) * width, width), nn.ReLU(), nn.Linear(width, 1)
        )

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        read = [layer(part) for layer, part in zip(self.parts, parts, strict=True)]
        out: Tensor = self.encoder(torch.cat(read, dim=1)).squeeze(1)
        return out


def _read(part: Part, model: Model, moved: Moved, data: Batch) -> Tensor:
    """Return one part of what a step shows of each record. Shape: ``(records, entries)``."""
    _, before, delta = moved
    after = before + delta
    if part == "gradients":
        lengths = evidence(model, before, torch.zeros_like(delta), data, "gradient-norm")
        shown = [lengths, *(evidence(model, before, delta, data, f) for f in _OF_GRADIENTS)]
        return torch.cat(shown).T.float()
    if part == "loss":
        here, there = (confidence(ModelView(model, p), data) for p in (before, after))
        return torch.stack([here, there, there - here], dim=1).float()
    if part == "activations":
        return features(model, after, data[0])
    scores = ModelView(model, after).scores(data[0])
    return scores if part == "outputs" else one_hot(data[1], scores.shape[1]).float()


def _standard(part: Tensor, num_known: int) -> Tensor:
    """Return a part in deviations of the known records."""
    centre, scale = part[:num_known].mean(dim=0), part[:num_known].std(dim=0)
    return ((part - centre) / scale.clamp(min=1e-6)).clamp(-_FAR, _FAR)


def _joined(first: Batch, second: Batch) -> Batch:
    return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])
