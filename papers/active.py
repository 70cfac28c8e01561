"""What acting adds to watching: the loss of records is raised, a client is isolated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from turncoat.attacks.membership.active import (
    ActiveGlobalAttacker,
    ActiveLocalAttacker,
    GradientAscent,
    Isolation,
)
from turncoat.attacks.membership.loss_threshold import LossThreshold
from turncoat.attacks.membership.white_box import GlobalAttacker
from turncoat.attacks.membership.white_box_net import WhiteBoxNet
from turncoat.audit import Audit, Entry, run_audit
from turncoat.federation import Federation, Plain, Same
from turncoat.games.membership import Membership
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Task
from turncoat.trial import Scored, Trial
from turncoat.views import Seat


@dataclass(frozen=True)
class Active:
    """Audit one federation for the records of client 0, by who watches, acts, or knows some.

    Whoever acts begins at round ``first``, and all are read from then on: by then a record tells
    little of itself. A participant acts in a federation of two. The net knows ``num_known`` other
    records, and is asked about the same as the loss.
    """

    make: Callable[..., Task]
    train: LocalSGD
    num_rounds: int
    first: int
    num_clients: int
    num_candidates: int
    num_known: int
    ascent: GradientAscent
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int) -> dict[str, float | str]:
        late = tuple(range(self.first, self.num_rounds))
        raised, never = (
            GradientAscent(self.ascent.lr, self.ascent.num_steps, first=first)
            for first in (self.first, self.num_rounds)
        )
        game = Membership(self.num_candidates, client=0)
        knowing = Membership(self.num_candidates, client=0, num_known=self.num_known)
        server = {
            "passive": Trial(GlobalAttacker(rounds=late), game),
            "passive, contrast": Trial(ActiveGlobalAttacker(server=Same(), rounds=late), game),
            "ascent": Trial(ActiveGlobalAttacker(server=raised, rounds=late), game),
            "isolation": Trial(ActiveGlobalAttacker(server=Isolation(victim=0), rounds=late), game),
            "net": Trial(WhiteBoxNet(), knowing),
        }
        client = {
            name: Trial(
                ActiveLocalAttacker(inner=self.train, ascent=ascent, boost=2.0, rounds=late),
                game,
                by=1,
            )
            for name, ascent in (("passive", never), ("ascent", raised))
        }
        entries = {name: Entry(trial, (Seat.SERVER,)) for name, trial in server.items()}
        entries["loss"] = Entry(Trial(LossThreshold(), knowing), (Seat.USER,))
        area, source = self._areas(entries, self.num_clients, seed)
        two, _ = self._areas({n: Entry(t, (Seat.CLIENT,)) for n, t in client.items()}, 2, seed)
        watching = max(area["passive"], area["passive, contrast"])
        return {
            "auc_server_ascent_minus_passive": area["ascent"] - watching,
            "auc_isolation_minus_passive": area["isolation"] - watching,
            "auc_participant_ascent_minus_passive": two["ascent"] - two["passive"],
            "auc_net_minus_loss": area["net"] - area["loss"],
            **{f"AUC: {name} | {self.num_clients} clients": a for name, a in area.items()},
            **{f"AUC: participant, {name} | 2 clients": a for name, a in two.items()},
            "data": source,
        }

    def _areas(
        self, entries: Mapping[str, Entry], num_clients: int, seed: int
    ) -> tuple[dict[str, float], str]:
        task = self.make(num_clients, seed=seed, **self.options)
        federation = Federation(train=self.train, channel=Plain(), aggregate=Mean())
        audit = Audit("active", task, {"none": federation}, entries, self.num_rounds, (seed,))
        found = {}
        with TemporaryDirectory() as folder:
            for planned, cell in run_audit(audit, Path(folder)).items():
                if not isinstance(cell, Scored):
                    raise RuntimeError(f"{planned.attack} was not scored: {cell}")
                found[planned.attack] = cell.marked.headline.value
        return found, task.source
