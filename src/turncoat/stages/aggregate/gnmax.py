"""The aggregator of PATE: the noisy winner of a vote, query by query."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from math import sqrt

import dp_accounting
import torch
from torch import Generator, Tensor
from torch.nn.functional import one_hot

from turncoat.messages import Votes
from turncoat.privacy import Unit
from turncoat.stage import Memory
from turncoat.stages.begin.unanswered import answers_due
from turncoat.stages.channel.secure_aggregation import Masked
from turncoat.task import Batch, Model
from turncoat.validate import at_least, positive


@dataclass(frozen=True, kw_only=True)
class GNMax:
    """Answer public examples with the class that has most votes, once noise is on them [1]_.

    Each round answers the next ``num_queries`` of the public examples. With a ``threshold``
    (Confident-GNMax) those are left out whose largest count, with noise of its own, is below it:
    teachers who disagree are not heard.

    Formal guarantee: an answer is a Gaussian mechanism of noise ``sigma`` on counts that change by
    the square root of 2 at most, as a client that changes its mind moves two of them by 1; a look
    at the threshold is one of noise ``threshold_sigma`` on a count that changes by 1. All queries
    of all rounds compose, each counted as answered, up to ``max_answers``. Neighbours differ in the
    records of one client, some or all of them, or in the client. A single record may turn every
    vote of its teacher: its ε is no smaller. Nothing is gained from sampling clients. It holds
    against users and clients, who see answers, and not against the server, which counts votes
    before the noise: under secure aggregation it learns the counts still, if no single vote. What
    is made of the answers is post-processing.

    This bound does not look at the votes. The paper's does, is often several times smaller, and
    leaks itself unless it is smoothed: it is not built.

    Differs from the paper: ``max_answers``; noise is float64, which the theorem's real numbers are
    not. What a client sends in the clear counts once, for its largest entry. Under masks a
    dishonest client may vote more than once, which bends answers and leaves the ε of others alone.

    Args:
        sigma: Standard deviation of the noise on each class's count, in votes.
        num_queries: How many public examples are asked about in a round.
        threshold: In votes; None for an answer to every query.
        threshold_sigma: Of the noise on the largest count, in votes; goes with the threshold.
        max_answers: How many are answered in a round at most; later queries are not answered.

    .. [1] Papernot et al., ICLR 2018, section 3 and algorithm 1; the RDP of both noises is
       propositions 8 and 10 of its appendix. https://arxiv.org/abs/1802.08908
    """

    sigma: float
    num_queries: int
    threshold: float | None = None
    threshold_sigma: float | None = None
    max_answers: int | None = None
    unit = Unit.CLIENT
    mixes_clients = False
    amplified = False  # a record less in a sampled client is a vote turned, and not a vote less

    def __post_init__(self) -> None:
        at_least(0, self, sigma=self.sigma, threshold_sigma=self.threshold_sigma)
        at_least(1, self, num_queries=self.num_queries, max_answers=self.max_answers)
        positive(self, threshold=self.threshold)
        if (self.threshold is None) != (self.threshold_sigma is None):
            raise ValueError(
                "GNMax: threshold and threshold_sigma belong together; give both or none"
            )

    def event(self, num_records: int) -> dp_accounting.DpEvent:
        """Return what one round costs a client, however many records it holds."""
        if not self.sigma or self.threshold_sigma == 0:
            return dp_accounting.NonPrivateDpEvent()
        num = min(self.num_queries, self.max_answers or self.num_queries)
        answers = dp_accounting.SelfComposedDpEvent(
            dp_accounting.GaussianDpEvent(self.sigma / sqrt(2)), num
        )
        if self.threshold_sigma is None:
            return answers
        looks = dp_accounting.SelfComposedDpEvent(
            dp_accounting.GaussianDpEvent(self.threshold_sigma), self.num_queries
        )
        return dp_accounting.ComposedDpEvent([looks, answers])

    def __call__(
        self,
        messages: Iterable[Votes | Masked],
        *,
        rng: Generator,
        model: Model,
        public: Batch | None,
        memory: Memory[int],
    ) -> Tensor:
        num, num_classes = answers_due(self, model, public)
        asked = memory.last(0)
        end = asked + self.num_queries
        if end > num:
            raise ValueError(
                f"GNMax asks about num_queries = {self.num_queries} public examples in each round, "
                f"but {num - asked} of {num} are left: lower num_queries or 'rounds', or give more "
                "public data (public_size)"
            )
        memory.keep(end)
        answers = torch.zeros(num, num_classes)
        answers[asked:end] = self.answered(counted(messages, num, num_classes)[asked:end], rng)
        return answers.flatten()

    def answered(self, counts: Tensor, rng: Generator) -> Tensor:
        """Return the answers, one-hot, and zeros where there is none. Shape: that of ``counts``.

        Args:
            counts: How many votes each class has. Shape: ``(queries, classes)``, float64.
        """
        drawn = torch.randn(counts.shape, generator=rng, dtype=torch.float64)
        winners = one_hot((counts + self.sigma * drawn).argmax(dim=1), counts.shape[1])
        heard = torch.ones(len(counts), dtype=torch.bool)
        if self.threshold is not None and self.threshold_sigma is not None:
            drawn = torch.randn(len(counts), generator=rng, dtype=torch.float64)
            heard = counts.amax(dim=1) + self.threshold_sigma * drawn >= self.threshold
        if self.max_answers is not None:
            heard &= heard.cumsum(dim=0) <= self.max_answers
        return (winners * heard[:, None]).float()


def counted(messages: Iterable[Votes | Masked], num: int, num_classes: int) -> Tensor:
    """Return how many votes each class has. Shape: ``(num, num_classes)``, float64."""
    parts = iter(messages)
    first = next(parts, None)
    counts = torch.zeros(num, num_classes, dtype=torch.float64)
    if isinstance(first, Masked):
        total = Masked.total(chain([first], (m for m in parts if isinstance(m, Masked))))
        opened = total.open().double() * total.weight
        return opened.round().cpu().reshape(num, num_classes)
    for message in [] if first is None else chain([first], parts):
        assert isinstance(message, Votes)
        chosen = message.delta.cpu().reshape(num, num_classes).argmax(dim=1)
        counts += one_hot(chosen, num_classes)
    return counts
