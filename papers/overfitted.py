"""Does a likelihood ratio of shadow models tell members apart where the loss alone does not?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from papers.accuracy import accuracy_on
from turncoat.attacks.membership.lira import LiRA, confidence
from turncoat.attacks.membership.loss_threshold import LossThreshold
from turncoat.audit import Audit, Entry, released, run_audit
from turncoat.federation import Federation, Plain
from turncoat.games.membership import Membership
from turncoat.plan import pose
from turncoat.randomness import Randomness
from turncoat.record import AuditFolder
from turncoat.runtimes.saved import read_tensors
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Task
from turncoat.trial import Marked, Memberships, Scored, Trial
from turncoat.views import Seat

_RATE = "tpr_at_1pct_fpr"


@dataclass(frozen=True)
class LiRAVersusLoss:
    """Audit one overfitting federation with both attacks, on the same candidates.

    All training records are candidates, and as many of the test set. Shadow models are trained by
    the audit, each on a random half of the candidates, so that they are as large as the target's.

    In float32 the loss of a confident record is rounded to 0, so that many records tie, and the
    loss threshold loses its left edge. It is therefore marked twice: as it is, and by the
    confidence of which the loss is a monotone function, and which does not round.
    """

    make: Callable[..., Task]
    train: LocalSGD
    num_rounds: int
    attack: LiRA
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int) -> dict[str, float | str]:
        task = self.make(seed=seed, **self.options)
        federation = Federation(train=self.train, channel=Plain(), aggregate=Mean())
        game, seats = Membership(), (Seat.USER,)
        entries = {
            "lira": Entry(Trial(self.attack, game), seats),
            "loss": Entry(Trial(LossThreshold(), game), seats),
        }
        audit = Audit("overfitted", task, {"none": federation}, entries, self.num_rounds, (seed,))
        found: dict[str, float] = {}
        with TemporaryDirectory() as folder:
            cells = run_audit(audit, Path(folder))
            for planned, cell in cells.items():
                if not isinstance(cell, Scored):
                    raise RuntimeError(f"{planned.attack} was not scored: {cell}")
                found |= _figures(planned.attack, cell.marked)
            state = AuditFolder(Path(folder)).state(next(iter(cells)).run)
            view = released(federation, task, read_tensors(state)[0]["params"], seed)
        question, truth = pose(audit, federation, game, -1, seed)
        unrounded = Memberships(confidence(view, question.candidates))
        rounded = LossThreshold()(view, candidates=question.candidates).scores
        marked = game.mark(unrounded, truth, rng=Randomness(seed).at("mark"))
        found |= _figures("unrounded_loss", marked)
        inputs, labels = (torch.cat(column) for column in zip(*task.clients, strict=True))
        lira = found[f"{_RATE}_lira"]
        return {
            "tpr_lira_minus_loss": lira - found[f"{_RATE}_loss"],
            "tpr_lira_minus_unrounded_loss": lira - found[f"{_RATE}_unrounded_loss"],
            **found,
            "non_members_whose_loss_is_rounded_to_0": float((rounded[~truth] == 0).double().mean()),
            "training_accuracy": accuracy_on((inputs, labels), task, view),
            "test_accuracy": accuracy_on(task.test, task, view),
            "data": task.source,
        }


def _figures(attack: str, marked: Marked) -> dict[str, float]:
    rates = {m.name: m.value for m in marked.others}
    return {f"{_RATE}_{attack}": rates[_RATE], f"auc_{attack}": marked.headline.value}
