"""Audit of a federation that claims privacy for clients: dishonest clients send the canaries."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from turncoat.auditing.canaries import Diracs
from turncoat.auditing.evidence import Audited, audited, check_claim
from turncoat.auditing.sampling import poisson_p_value
from turncoat.federation import Federation
from turncoat.messages import Envelope, Update
from turncoat.randomness import Randomness
from turncoat.runtimes.saved import State
from turncoat.runtimes.simulate import Played, simulate
from turncoat.task import Batch, Model, Shards, Task
from turncoat.validate import at_least


def audit_federation(
    federation: Federation[Any, Any],
    *,
    claimed: float,
    delta: float,
    num_rounds: int,
    rate: float | None = None,
    canaries: Diracs | None = None,
    seed: int = 0,
    confidence: float = 0.95,
) -> Audited:
    """Return a lower bound on what a federation really spends on each client [1]_.

    Every client is dishonest, and sends its record of ``canaries`` in the place of an update; a
    fair coin chose which canaries take part at all. Sampling, channel and rule are the
    federation's. Who looks sees the global model after each round, as clients do. A canary's score
    is the sum, over the rounds, of the product of the step with what it would send.

    The bound holds with ``confidence``; that none is found above the claim proves nothing.

    Args:
        federation: Its training is not audited: the clients send what they like.
        claimed: The epsilon of all rounds together, for a client added or removed.
        rate: With which each client is said to be sampled: tested if given.

    Raises:
        ValueError: If what is claimed is out of range, or the federation has no server.

    .. [1] Steinke, Nasr and Jagielski, NeurIPS 2023, section 5. https://arxiv.org/abs/2305.08846
    """
    check_claim(claimed, delta, confidence)
    at_least(1, "audit_federation", num_rounds=num_rounds)
    if federation.graph is not None:
        raise ValueError(
            f"audit_federation looks at a server's model, and {federation.graph!r} has none: "
            "audit the trainer of a node by audit_trainer"
        )
    canaries = canaries or Diracs()
    coins = torch.rand(canaries.num_canaries, generator=Randomness(seed).at("canaries"))
    included = coins < 0.5
    scores = torch.zeros(canaries.num_canaries, dtype=torch.float64)
    states, sizes = list[Tensor](), list[int]()

    def look(state: State, played: Played) -> None:
        states.append(state.params)
        sizes.append(len(played.cohort))

    task = _task(canaries, included)
    first = task.model.initial(Randomness(seed).at("begin"))
    simulate(
        replace(federation, train=Sent(), begin=_From(first), min_clients=0),
        task,
        num_rounds=num_rounds,
        seed=seed,
        on_round=look,
    )
    for t, (before, after) in enumerate(zip([first, *states], states, strict=False)):
        scores += canaries.scores(after - before, t)
    found = audited(
        scores, included, canaries.groups, claimed=claimed, delta=delta, confidence=confidence
    )
    p_value = None if rate is None else poisson_p_value(sizes, len(task.clients), rate)
    return replace(found, batch_sizes=tuple(sizes), sampling_p_value=p_value)


def _task(canaries: Diracs, included: Tensor) -> Task:
    """Return one client for each record; who is left out is not there."""
    inputs, _ = canaries.data(included, 0)
    others = torch.ones(canaries.num_others, dtype=torch.bool)
    kinds = torch.cat([canaries.alternates, ~others]).long()
    there = torch.cat([included, others]).nonzero().flatten()
    if not len(there):
        raise ValueError(f"{canaries!r} leaves no client: give it more canaries, or others")
    clients = Shards.of((inputs, kinds), torch.split(there, 1))
    return Task("canaries", canaries.model(), clients, test=(inputs[:1], kinds[:1]))


@dataclass(frozen=True)
class Sent:
    """A dishonest client's training: its record is its update, or minus it if it alternates."""

    def __call__(self, model: Model, start: Tensor, data: Batch, *, envelope: Envelope) -> Update:
        inputs, kinds = data
        return Update(-inputs[0] if int(kinds[0]) and envelope.round % 2 else inputs[0], 1.0)


@dataclass(frozen=True)
class _From:
    first: Tensor

    def __call__(self, task: Task) -> Tensor:
        return self.first
