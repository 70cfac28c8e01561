"""Records that the others' model finds implausible."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap

from turncoat.messages import Envelope
from turncoat.stage import Verdict
from turncoat.stages.prepare.suspects import outlyingness, without
from turncoat.task import Batch, Model
from turncoat.validate import at_least, exactly_one, fraction, positive


@dataclass(frozen=True)
class LossFilter:
    """Drop the records with the largest loss under the global model [1]_.

    That model has learnt from all clients: what it finds implausible is perhaps not true. So it
    finds lying labels, and triggers as long as the model does not know them: after that they are
    plausible, and nothing finds them here.

    Differs from the paper: the losses are those of the model as it was received; only ``share`` is
    the paper's rule, which knows how much is poisoned.

    Args:
        ratio: Drop what has a loss this many times that of a blind guess (all outputs equal).
        threshold: Drop instead what lies so many robust deviations above the client's median: of
            ``log(exp(loss) - 1)``, the log odds, which are nearly Gaussian where losses are not.
        share: Drop instead this part of the records.
        from_round: The first round in which anything is dropped: the first model of all, at 0, has
            no opinion.

    .. [1] Shen and Sanghavi, ICML 2019, algorithm 1. https://arxiv.org/abs/1810.11874
    """

    ratio: float | None = None
    threshold: float | None = None
    share: float | None = None
    from_round: int = 1

    def __post_init__(self) -> None:
        exactly_one(self, ratio=self.ratio, threshold=self.threshold, share=self.share)
        positive(self, ratio=self.ratio, threshold=self.threshold)
        fraction(self, share=self.share)
        at_least(0, self, from_round=self.from_round)

    def __call__(
        self, data: Batch, *, model: Model, start: Tensor, envelope: Envelope, verdict: Verdict
    ) -> Batch:
        inputs, labels = data
        if envelope.round < self.from_round or not len(labels):
            return data
        with torch.no_grad():
            parts = [model.logits(start, some) for some in torch.split(inputs, 1_000)]
            outputs = torch.cat(parts)
            blind = _losses(model, torch.zeros_like(outputs), labels)
            suspects = self.suspects(_losses(model, outputs, labels), blind)
        return without(data, suspects, verdict)

    def suspects(self, losses: Tensor, blind: Tensor) -> Tensor:
        """Say which losses are suspicious, beside those of a blind guess. Shapes: ``(n,)``."""
        if self.ratio is not None:
            return losses > self.ratio * blind
        if self.threshold is not None:
            bounded = losses.double().clamp(min=1e-12)
            return outlyingness(bounded + torch.log(-torch.expm1(-bounded))) > self.threshold
        assert self.share is not None
        answer = torch.zeros(len(losses), dtype=torch.bool, device=losses.device)
        if bool(losses.min() < losses.max()):
            num = int(self.share * len(losses))
            answer[losses.argsort(descending=True, stable=True)[:num]] = True
        return answer


def _losses(model: Model, outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of each record. Shape: ``(examples,)``."""
    each: Tensor = vmap(lambda out, label: model.criterion(out[None], label[None]))(outputs, labels)
    return each
