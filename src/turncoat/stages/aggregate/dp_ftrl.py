"""Follow the regularised leader in private: a tree of noise instead of sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import dp_accounting
import torch
from torch import Generator, Tensor

from turncoat.messages import Clear
from turncoat.privacy import Unit
from turncoat.stage import Memory
from turncoat.stages.aggregate.dp_fedavg import DPFedAvg
from turncoat.stages.aggregate.layers import num_parameters
from turncoat.task import Model
from turncoat.validate import at_least, positive

Kept = tuple[int, tuple[Tensor | None, ...], tuple[int, ...]]  # steps, a node a level, who came


@dataclass(frozen=True, kw_only=True)
class DPFTRL:
    """Add to the sum of all updates so far the noise of a binary tree: DP-FTRL [1]_, [2]_.

    After step t of a tree the model holds the noise of popcount(t) nodes, at most log2(t) + 1,
    where fresh noise in each round would leave t of them. So it needs no sampling at random, and
    gains nothing by it.

    Formal guarantee: one tree of n rounds is a Gaussian mechanism over clients, whose noise is
    ``noise_multiplier / sqrt(L)`` with L = floor(log2(n)) + 1 levels: a client counts once in a
    tree, in one node of each level. That is enforced here: who comes again before the next restart
    is left out. Trees compose. Neighbours differ by a client whose updates count as none. It holds
    against users and clients, and not against the server, which sees updates.

    Differs from the paper: no variance reduction over the nodes below, and no completion of a tree
    before a restart; momentum and step size are those of ``server-momentum`` or ``server-sgd``
    around it, none and 1 by itself. Buffers of the model are not moved.

    Args:
        max_norm: What each update is shortened to.
        noise_multiplier: Standard deviation of a node's noise, in units of ``max_norm``.
        expected_cohort: What sums are divided by, whoever came.
        restart_every: Rounds after which a new tree begins, and clients may come again.
        per_layer: As of ``dp-fedavg``.

    .. [1] Kairouz et al., ICML 2021, algorithm 1. https://arxiv.org/abs/2103.00039
    .. [2] Denisov et al., NeurIPS 2022: that it holds for adaptive updates too.
       https://arxiv.org/abs/2202.08312
    """

    max_norm: float
    noise_multiplier: float
    expected_cohort: float
    restart_every: int
    per_layer: bool = False
    unit = Unit.CLIENT
    mixes_clients = False

    def __post_init__(self) -> None:
        positive(self, max_norm=self.max_norm, expected_cohort=self.expected_cohort)
        at_least(0, self, noise_multiplier=self.noise_multiplier)
        at_least(1, self, restart_every=self.restart_every)

    def event(self, num_records: int) -> dp_accounting.DpEvent:
        """Return what a tree of one round costs a client, however many records it holds."""
        return self.training_event(num_records, 1)

    def training_event(self, num_records: int, num_rounds: int) -> dp_accounting.DpEvent:
        """Return what a whole training costs a client: its trees, the last of which may be short.

        A client may take part in each tree; sampling is not counted.
        """
        if not self.noise_multiplier:
            return dp_accounting.NonPrivateDpEvent()
        full, left = divmod(num_rounds, self.restart_every)
        trees = [(self.restart_every, full), (left, 1 if left else 0)]
        return dp_accounting.ComposedDpEvent(
            [
                dp_accounting.SelfComposedDpEvent(
                    dp_accounting.GaussianDpEvent(self.noise_multiplier / sqrt(n.bit_length())), num
                )
                for n, num in trees
                if num
            ]
        )

    def __call__(
        self,
        messages: Sequence[Clear],
        *,
        rng: Generator,
        model: Model,
        cohort: tuple[int, ...],
        memory: Memory[Kept],
    ) -> Tensor:
        if len(cohort) < len(messages):
            raise ValueError(
                f"DPFTRL counts each client once, and {len(messages)} messages come of "
                f"{len(cohort)} clients: put no stage around it that makes messages of its own"
            )
        step, nodes, came = memory.last((0, (), ()))
        if step == self.restart_every:
            step, nodes, came = 0, (), ()
        known = set(came)
        new = [i for i, _ in enumerate(messages) if cohort[i] not in known]
        total = self._sum([messages[i] for i in new], rng, model)
        size = num_parameters(model, total)
        after = grown(nodes, step, size, rng)
        moved = sum_of(after, size) - sum_of(nodes, size)
        total[:size] += (moved * (self.noise_multiplier * self.max_norm)).to(total)
        here = tuple(sorted(known | {cohort[i] for i in new}))
        memory.keep((step + 1, after, here))
        return total.div_(self.expected_cohort).float()

    def _sum(self, messages: Sequence[Clear], rng: Generator, model: Model) -> Tensor:
        """Return the sum of the shortened updates, without noise. Shape: ``(num_params,)``."""
        exact = DPFedAvg(
            max_norm=self.max_norm,
            noise_multiplier=0.0,
            expected_cohort=1,
            per_layer=self.per_layer,
        )
        return exact(messages, rng=rng, model=model, memory=Memory[Any]()).double()


def grown(
    nodes: tuple[Tensor | None, ...], step: int, size: int, rng: Generator
) -> tuple[Tensor | None, ...]:
    """Return the nodes that cover one step more than ``step``: one for each bit that is 1.

    As a counter carries: the nodes of all trailing ones give way to a new one above them.
    """
    carry = (~step & (step + 1)).bit_length() - 1  # how many ones trail
    above = nodes[carry + 1 :]
    return (*[None] * carry, torch.randn(size, generator=rng), *above)


def sum_of(nodes: tuple[Tensor | None, ...], size: int) -> Tensor:
    """Return the noise that a model holds. Shape: ``(size,)``, float64."""
    total = torch.zeros(size, dtype=torch.float64)
    for node in nodes:
        if node is not None:
            total += node
    return total
