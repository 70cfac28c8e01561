"""Membership by a net that reads gradients, activations and losses, and learnt on known members."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from turncoat.activations import features
from turncoat.attacks.membership.white_box import counts, gradients
from turncoat.games.membership import Known
from turncoat.messages import Update
from turncoat.randomness import ambient
from turncoat.stage import Broadcast
from turncoat.task import Batch, Model
from turncoat.trial import Memberships
from turncoat.validate import at_least, fraction, positive
from turncoat.views import AggregateView, ModelView, ServerView

_MOST = 256  # entries of a layer's gradient that are read as they are; more are projected
_FAR = 5.0  # deviations from the mean at which an entry is cut off


@dataclass(frozen=True)
class WhiteBoxNet:
    """Learn on known records what a model shows of its members, and judge others by it [1]_.

    Of each record and each round the net reads, at the state that the client in question came to
    (or, where single updates cannot be read or no client is named, at the new global state): the
    gradients of the last layers, the last hidden activations, the outputs, the loss; and the
    label. Each part passes a layer of its own, an encoder joins them, and the mean over some nets
    is the score.

    It must be told of some records whether they are members: a game with ``num_known`` grants
    them. Of the candidates it knows as little as any other attack.

    Differs from the paper: fully connected layers where it has convolutions over a gradient's
    columns; of a gradient with more than 256 entries 256 random projections are read, and the
    logarithm of its length; fewer and narrower layers, for few known records.

    Args:
        num_layers: Of how many layers, counted from the last, the gradients are read.
        width: Of the layer of each part, and of the encoder.
        num_epochs: Passes over the known records.
        lr: Of Adam.
        weight_decay: Of Adam.
        dropout: Share of the parts' units that are left out in each step of training.
        num_nets: How many nets are trained; their scores are averaged.
        rounds: Which rounds count, by number; None for all.
        server: What a malicious server sends, such as ``GradientAscent``; None: it is honest.

    .. [1] Nasr, Shokri and Houmansadr, S&P 2019, section III (the supervised attack model).
       https://arxiv.org/abs/1812.00910
    """

    num_layers: int = 2
    width: int = 32
    num_epochs: int = 60
    lr: float = 1e-3
    weight_decay: float = 1e-2
    dropout: float = 0.2
    num_nets: int = 3
    rounds: tuple[int, ...] | None = None
    server: Broadcast | None = None

    def __post_init__(self) -> None:
        at_least(1, self, num_layers=self.num_layers, width=self.width)
        at_least(1, self, num_epochs=self.num_epochs, num_nets=self.num_nets)
        positive(self, lr=self.lr)
        at_least(0, self, weight_decay=self.weight_decay)
        fraction(self, dropout=self.dropout)
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
        states = [state for v in view for state in _states(v, client) if self._counts(v.round)]
        if not states:
            raise ValueError(
                f"{self!r} saw no state of anyone in question in the rounds that count: let it see "
                "more rounds, and the client take part in them"
            )
        model, both = view[0].model, _joined(known.records, candidates)
        seed = int(torch.randint(2**31 - 1, (1,), generator=rng))
        read = [list(_read(model, params, both, self.num_layers, seed)) for params in states]
        parts = [torch.cat(part, dim=1).float() for part in zip(*read, strict=True)]
        parts.append(_label(model, states[0], both))
        num_known, inside = len(known.inside), known.inside.to(parts[0])
        parts = [_standard(part, num_known) for part in parts]
        total = torch.zeros(len(candidates[1]), dtype=torch.float64)
        for _ in range(self.num_nets):
            net = self._learnt([part[:num_known] for part in parts], inside, rng)
            with torch.no_grad():
                total += net([part[num_known:] for part in parts]).cpu().double()
        return Memberships(total / self.num_nets)

    def _counts(self, t: int) -> bool:
        return counts(self.rounds, t)

    def _learnt(self, parts: list[Tensor], inside: Tensor, rng: Generator) -> Joined:
        torch.rand(1, generator=rng)  # so that each net begins elsewhere
        with ambient(rng), torch.enable_grad():
            widths = [part.shape[1] for part in parts]
            net = Joined(widths, self.width, self.dropout).to(inside.device)
            optimiser = torch.optim.AdamW(
                net.parameters(), lr=self.lr, weight_decay=self.weight_decay
            )
            for _ in range(self.num_epochs):
                for chosen in torch.randperm(len(inside)).split(32):
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


def _states(
    view: ServerView[Update] | AggregateView[Update], client: int | None
) -> Iterator[Tensor]:
    """Yield the state that the client came to in a round, or all did; none if it was not there."""
    if isinstance(view, AggregateView):
        yield view.after
    elif client is None:
        before = torch.stack(view.sent).mean(dim=0)
        yield before + Update.total(view.messages).delta
    elif client in view.senders:
        i = view.senders.index(client)
        yield view.sent[i] + view.messages[i].delta


def _read(
    model: Model, params: Tensor, data: Batch, num_layers: int, seed: int
) -> Iterator[Tensor]:
    """Yield the parts of what a state shows of each record: each ``(records, entries)``."""
    view = ModelView(model, params)
    log_probs = view.scores(data[0]).double().clamp(min=-30)
    own = log_probs.gather(1, data[1][:, None])
    yield torch.cat([log_probs, -own, (-own).clamp(min=1e-9).log()], dim=1)
    yield features(model, params, data[0])
    weights = [s for s in model.layout.slots if s.trainable and len(s.shape) > 1][-num_layers:]
    found: list[list[Tensor]] = [[] for _ in weights]
    projections = [_projection(s.stop - s.start, seed).to(params) for s in weights]
    for rows in gradients(model, params, data):
        for slot, projection, into in zip(weights, projections, found, strict=True):
            here = rows[:, slot.start : slot.stop]
            length = here.norm(dim=1, keepdim=True).clamp(min=1e-12)
            into.append(torch.cat([here @ projection, length.log()], dim=1))
    for into in found:
        yield torch.cat(into)


def _projection(size: int, seed: int) -> Tensor:
    """Return what makes at most so many entries of a gradient: itself, or random mixtures."""
    if size <= _MOST:
        return torch.eye(size)
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(size, _MOST, generator=rng) / _MOST**0.5


def _label(model: Model, params: Tensor, data: Batch) -> Tensor:
    num_classes = model.logits(params, data[0][:1]).shape[1]
    return one_hot(data[1], num_classes).float()


def _standard(part: Tensor, num_known: int) -> Tensor:
    """Return a part in deviations of the known records."""
    centre, scale = part[:num_known].mean(dim=0), part[:num_known].std(dim=0)
    return ((part - centre) / scale.clamp(min=1e-6)).clamp(-_FAR, _FAR)


def _joined(first: Batch, second: Batch) -> Batch:
    return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])
