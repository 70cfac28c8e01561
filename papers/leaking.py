"""What tells more of one client's records: its updates, their sum, or the global models?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from turncoat.attacks.membership.loss_threshold import LossThreshold
from turncoat.attacks.membership.trajectory import Trajectory
from turncoat.attacks.membership.white_box import Colluders, GlobalAttacker, LocalAttacker
from turncoat.audit import Audit, Entry, run_audit
from turncoat.federation import Federation, Plain
from turncoat.games.membership import Membership
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Task
from turncoat.trial import Scored, Trial
from turncoat.views import Seat

UPDATES, STEPS, MODELS, LAST = "single updates", "steps", "global models", "last model"
_RATE = "tpr_at_1pct_fpr"


@dataclass(frozen=True)
class Leaking:
    """Audit one federation for the records of client 0, from all that its parts can see.

    All clients hold as many records. All but the last round count, for that is all that a coalition
    sees of the steps. Half the others collude, and all of them do.
    """

    make: Callable[..., Task]
    train: LocalSGD
    num_rounds: int
    num_clients: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int) -> dict[str, float | str]:
        task = self.make(self.num_clients, seed=seed, **self.options)
        if len(set(task.sizes)) > 1:
            raise ValueError(f"clients must hold as many records each; they have {task.sizes}")
        federation = Federation(train=self.train, channel=Plain(), aggregate=Mean())
        game, size, n = Membership(client=0), task.sizes[0], self.num_clients
        rounds = tuple(range(self.num_rounds - 1))
        few = tuple(range(2, 1 + n // 2))
        entries = {
            UPDATES: Entry(Trial(GlobalAttacker(rounds=rounds), game), (Seat.SERVER,)),
            STEPS: Entry(Trial(LocalAttacker(rounds=rounds), game), (Seat.CLIENT,)),
            self.coalition(n // 2): Entry(
                Trial(Colluders(rest=float(size * (n - n // 2))), game, by=1, allies=few),
                (Seat.CLIENT,),
            ),
            self.coalition(n - 1): Entry(
                Trial(Colluders(), game, by=1, allies=tuple(range(2, n))), (Seat.CLIENT,)
            ),
            MODELS: Entry(Trial(Trajectory(), game), (Seat.CLIENT,)),
            LAST: Entry(Trial(LossThreshold(), game), (Seat.USER,)),
        }
        audit = Audit("leaking", task, {"none": federation}, entries, self.num_rounds, (seed,))
        areas, rates = dict[str, float](), dict[str, float]()
        with TemporaryDirectory() as folder:
            for planned, cell in run_audit(audit, Path(folder)).items():
                if not isinstance(cell, Scored):
                    raise RuntimeError(f"{planned.attack} was not scored: {cell}")
                areas[planned.attack] = cell.marked.headline.value
                for m in cell.marked.others:
                    if m.name == _RATE:
                        rates[planned.attack] = m.value
        one, all_but_one = areas[UPDATES], areas[self.coalition(n - 1)]
        return {
            "auc_updates_minus_last_model": one - areas[LAST],
            "auc_updates_minus_models": one - areas[MODELS],
            "auc_updates_minus_steps": one - areas[STEPS],
            "auc_all_but_one_and_update_differ_by": abs(all_but_one - one),
            **{f"AUC: {attack} | client 0": area for attack, area in areas.items()},
            **{f"TPR at 1 % FPR: {attack} | client 0": rate for attack, rate in rates.items()},
            "data": task.source,
        }

    def coalition(self, size: int) -> str:
        return f"coalition of {size}"
