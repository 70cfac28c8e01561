"""Records whose lessons run against those of trusted data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from turncoat.activations import features
from turncoat.messages import Envelope
from turncoat.stage import Verdict
from turncoat.stages.prepare.suspects import without
from turncoat.task import Batch, Model
from turncoat.validate import at_least, fraction


@dataclass(frozen=True)
class InfluenceFilter:
    """Drop records that would raise the loss of some class of the public data [1]_.

    The influence of a record on another is the product of their gradients: how much a step on the
    one lowers the loss of the other. A record counts by its influence on the class that it harms
    most. What is harmful is learnt from the public data themselves: less influence than all but a
    share ``false_alarms`` of these have on the others.

    What the model has already learnt has little gradient left: a backdoor is found before that, or
    not at all.

    Differs from the paper: the gradient is that of the last linear layer alone, at one model, the
    global one as it was received, and not summed over checkpoints; those of the trusted records
    are scaled to length 1, else the few that are judged wrongly would speak for all.

    Args:
        false_alarms: The share of genuine records that it may cost.
        from_round: The first round in which anything is dropped; rounds count from 0.

    .. [1] Pruthi et al., NeurIPS 2020 (TracIn), eq. (1). https://arxiv.org/abs/2002.08484
    """

    false_alarms: float = 0.02
    from_round: int = 1

    def __post_init__(self) -> None:
        fraction(self, false_alarms=self.false_alarms)
        at_least(0, self, from_round=self.from_round)

    def __call__(
        self,
        data: Batch,
        *,
        model: Model,
        start: Tensor,
        public: Batch | None,
        envelope: Envelope,
        verdict: Verdict,
    ) -> Batch:
        if public is None:
            raise ValueError(
                f"{self!r} needs trusted data, but the task has no public data: "
                "give it some (public_size), or take another filter"
            )
        if envelope.round < self.from_round or not len(data[1]):
            return data
        given, usual = influences(model, start, data, public)
        return without(data, given < usual.quantile(self.false_alarms), verdict)


def influences(model: Model, params: Tensor, data: Batch, trusted: Batch) -> tuple[Tensor, Tensor]:
    """Return the influence of each record on the trusted class that it harms most.

    Returns:
        That of the records, and that of each trusted record on all the others. Shapes: ``(n,)`` and
        ``(m,)``.
    """
    (read, error), (known, slip) = (_halves(model, params, d) for d in (data, trusted))
    length = (known.norm(dim=1) * slip.norm(dim=1)).clamp(min=1e-12)
    classes = trusted[1].new_tensor(sorted(set(trusted[1].tolist())))
    others = (trusted[1][:, None] == classes) / length[:, None]
    counts = (others > 0).sum(dim=0)

    def worst(products: Tensor) -> Tensor:
        means: Tensor = products @ others / counts
        return means.amin(dim=1)

    among = (slip @ slip.T) * (known @ known.T)
    return worst((error @ slip.T) * (read @ known.T)), worst(among.fill_diagonal_(0))


def _halves(model: Model, params: Tensor, data: Batch) -> tuple[Tensor, Tensor]:
    """Return the two factors of each record's gradient: what the last layer reads, and its error.

    Shapes: ``(n, width + 1)``, with the bias, and ``(n, classes)``.
    """
    inputs, labels = data
    read = features(model, params, inputs)
    with torch.no_grad():
        outputs = torch.cat([model.logits(params, some) for some in torch.split(inputs, 1_000)])
    leaf = outputs.detach().requires_grad_()
    with torch.enable_grad():
        (error,) = torch.autograd.grad(model.criterion(leaf, labels), leaf)
    return torch.cat([read, torch.ones_like(read[:, :1])], dim=1), error * len(labels)
