"""A new model is handed out, which learnt from what others say of public examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy

from turncoat.messages import Update
from turncoat.stage import Release, Train, call
from turncoat.stages.begin.unanswered import answers_due
from turncoat.stages.release.mending import trusted
from turncoat.stages.release.remaking import hand_out
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Batch, Model
from turncoat.validate import fraction, positive

V = TypeVar("V")

_STUDYING = LocalSGD(0.05, num_epochs=60, batch_size=32, momentum=0.9)


@dataclass(frozen=True)
class Student(Generic[V]):
    """Train a new model on the public examples that teachers answered, release it: PATE [1]_.

    Formal guarantee: that of the answers (``GNMax``), of which this is post-processing, however
    often the released model is asked, and whoever reads it.

    Differs from the paper: the student learns from the answered examples alone, and not from the
    others too (no GAN, no virtual adversarial training). Where none is answered it stays untrained.

    Args:
        tuning: How to train on the answers; the numbers are ours.

    .. [1] Papernot et al., ICLR 2017, section 2.3. https://arxiv.org/abs/1610.05755
    """

    inner: Release[V]
    tuning: Train[Update] = _STUDYING

    def __call__(self, model: Model, params: Tensor, *, rng: Generator, public: Batch | None) -> V:
        return hand_out(self, model, params, rng=rng, public=public)

    def remade(
        self, model: Model, params: Tensor, *, rng: Generator, public: Batch | None
    ) -> Tensor:
        """Return the student's parameters.

        Args:
            params: The answers, one-hot, or zeros. Shape: ``(public examples * classes,)``.
        """
        num, num_classes = answers_due(self, model, public)
        assert public is not None
        if len(params) != num * num_classes:
            raise ValueError(
                f"Student learns from answers, {num} x {num_classes} numbers, and is given "
                f"{len(params)}: train with 'teacher' and begin with 'unanswered'"
            )
        answers = params.reshape(num, num_classes)
        heard = answers.amax(dim=1) > 0
        data = public[0][heard], answers[heard].argmax(dim=1)
        start = model.initial(rng).to(params)
        return _taught(self.tuning, model, start, data, rng)


@dataclass(frozen=True)
class Distilled(Generic[V]):
    """Hand out a new model that learnt the trained one's soft answers to public examples: DMP [1]_.

    Of the public examples the ``share`` that the model is surest of (of least entropy) is kept:
    what the model thinks of those depends least on whether it saw a record. Their labels are not
    looked at.

    Formal guarantee: none. No theorem bounds what soft answers tell of the records; here and in
    the paper it is measured. The server and the clients hold the model that is distilled: against
    them nothing changes.

    Differs from the paper: public data are the reference data, none are made by a GAN; the numbers
    of ``tuning`` are ours.

    Args:
        temperature: By which the model's logits are divided: above 1, softer answers.
        share: Of the public examples.
        tuning: How to train on the answers, by cross-entropy, which is the divergence of the paper
            up to a constant.

    .. [1] Shejwalkar and Houmansadr, AAAI 2021, section 4 and algorithm 1.
       https://arxiv.org/abs/1906.06589
    """

    inner: Release[V]
    temperature: float = 4.0
    share: float = 0.5
    tuning: Train[Update] = _STUDYING

    def __post_init__(self) -> None:
        positive(self, temperature=self.temperature, share=self.share)
        fraction(self, share=self.share)

    def __call__(self, model: Model, params: Tensor, *, rng: Generator, public: Batch | None) -> V:
        return hand_out(self, model, params, rng=rng, public=public)

    def remade(
        self, model: Model, params: Tensor, *, rng: Generator, public: Batch | None
    ) -> Tensor:
        """Return the student's parameters. Shape: ``(num_params,)``."""
        if model.criterion is not cross_entropy:
            raise ValueError(
                "Distilled trains on soft labels by cross-entropy, and the model's criterion is "
                "another: release the model as it is"
            )
        if len(params) != model.layout.num_params:
            raise ValueError(
                f"Distilled learns from a model of {model.layout.num_params} numbers, and is given "
                f"{len(params)}: leave 'distilled' out where a 'student' is taught by votes"
            )
        inputs, _ = trusted(self, public)
        data = self.answers(model, params, inputs)
        start = model.initial(rng).to(params)
        return _taught(self.tuning, model, start, data, rng)

    def answers(self, model: Model, params: Tensor, inputs: Tensor) -> Batch:
        """Return the inputs that are kept, in their order, and soft labels: ``(n, classes)``."""
        with torch.no_grad():
            parts = [model.logits(params, some) for some in torch.split(inputs, 1_000)]
        logits = torch.cat(parts)
        sure = logits.log_softmax(dim=1)
        entropy = -(sure.exp() * sure).sum(dim=1)
        num = max(1, round(self.share * len(inputs)))
        kept = entropy.argsort(stable=True)[:num].sort().values
        return inputs[kept], (logits[kept] / self.temperature).softmax(dim=1)


def _taught(
    tuning: Train[Update], model: Model, start: Tensor, data: Batch, rng: Generator
) -> Tensor:
    update: Update = call(tuning, model, start, data, rng=rng, public=None)
    return start + update.delta
