"""Audit of a trainer that claims privacy for records: white-box, one round after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from turncoat.auditing.canaries import Diracs, Probes
from turncoat.auditing.evidence import Audited, audited, check_claim
from turncoat.auditing.sampling import poisson_p_value
from turncoat.messages import Clear, Envelope
from turncoat.randomness import Randomness
from turncoat.stage import Memory, Train, call
from turncoat.validate import at_least


def audit_trainer(
    train: Train[Clear],
    *,
    claimed: float,
    delta: float,
    num_rounds: int,
    rate: float | None = None,
    canaries: Diracs | None = None,
    seed: int = 0,
    confidence: float = 0.95,
) -> Audited:
    """Return a lower bound on what ``train`` really spends in ``num_rounds`` calls [1]_.

    Train once with canaries, of which a fair coin chose half, and see what each call releases. A
    canary's score is the sum, over the calls, of the product of the update with its gradient. One
    call should be one step: what is wrong from step to step is seen only from call to call.

    The bound holds with ``confidence``, whatever the trainer does, for neighbours that differ in
    one record: there, or all zeros, which to sums of gradients is the same as not there. That none
    is found above the claim proves nothing: an error that costs less than the audit can see stays
    hidden, and one of the sampling rate is tested for itself.

    Args:
        train: Called as any stage at train; it is given the model of ``canaries``.
        claimed: The epsilon of all calls together, for data of ``canaries.num_records`` records.
        rate: With which every call is said to draw each record: tested if given.

    Raises:
        ValueError: If what is claimed is out of range, or scores are not finite.

    .. [1] Steinke, Nasr and Jagielski, NeurIPS 2023, section 5, with canaries of Nasr et al.,
       USENIX Security 2023. https://arxiv.org/abs/2305.08846, https://arxiv.org/abs/2302.07956
    """
    check_claim(claimed, delta, confidence)
    at_least(1, "audit_trainer", num_rounds=num_rounds)
    canaries = canaries or Diracs()
    randomness, model = Randomness(seed), canaries.model()
    coins = torch.rand(canaries.num_canaries, generator=randomness.at("canaries"))
    included = coins < 0.5
    sides = [canaries.data(included, t) for t in range(min(num_rounds, 2))]
    here, module = model.initial(randomness.at("begin")), model.module
    assert isinstance(module, Probes)
    scores = torch.zeros(canaries.num_canaries, dtype=torch.float64)
    memory: dict[str, Any] = {}
    sizes: list[int] = []
    for t in range(num_rounds):
        update = call(
            train,
            model,
            here,
            sides[t % 2],
            rng=randomness.at("train", t, 0),
            memory=Memory[Any](memory),
            envelope=Envelope(0, (0,), t),
            public=None,
        ).delta.detach()
        scores += canaries.scores(update, t)
        here = here + update
        sizes.append(module.tally.taken())
    found = audited(
        scores, included, canaries.groups, claimed=claimed, delta=delta, confidence=confidence
    )
    p_value = None if rate is None else poisson_p_value(sizes, canaries.num_records, rate)
    return replace(found, batch_sizes=tuple(sizes), sampling_p_value=p_value)
