"""Every aggregation rule of Turncoat as a Flower strategy, by wrapping another one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from flwr.server.strategy import Strategy as LegacyStrategy
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from turncoat.flower.replies import Frame, Incidents, Received, Sound, sound
from turncoat.flower.wrapping import (
    S,
    Treated,
    Treatment,
    Wrapping,
    WrappingLegacy,
    refuse_strategy,
)
from turncoat.messages import Clear, Update
from turncoat.randomness import Randomness
from turncoat.stage import (
    Aggregate,
    IncompatibleStages,
    Memory,
    Trace,
    asks,
    call,
    check,
    code_of,
    join,
    takes,
    within,
)
from turncoat.validate import at_least

_FOREIGN = {
    "model": "of server optimisers, use Flower's own inside (FedAdam, FedAvgM)",
    "public": "a Flower app has no public data that a rule could be given",
}


class _ByRule(Treatment[S]):
    """Moves the replies that are fit by the step of a rule."""

    reads_claims: ClassVar[bool] = True

    def __init__(
        self,
        rule: Aggregate[Clear],
        strategy: S,
        *,
        max_weight_ratio: float = 10.0,
        seed: int = 0,
    ) -> None:
        refuse_strategy(self, strategy)
        at_least(1, self, max_weight_ratio=max_weight_ratio)
        self.rule = rule
        self.strategy = strategy
        self.incidents = Incidents()
        self._max_weight_ratio = max_weight_ratio
        self._server = _Server(rule, seed)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rule!r}, {type(self.strategy).__name__})"

    def _expect(self, round: int, num_messages: int) -> None:
        self._server.try_out(num_messages)

    def _treat(self, received: Sequence[Received], frame: Frame, round: int) -> Treated | None:
        kept = sound(
            received,
            frame,
            round=round,
            incidents=self.incidents,
            max_weight_ratio=self._max_weight_ratio,
        )
        step = self._server.step(kept, frame, round=round, incidents=self.incidents)
        if step is None:
            return None
        return Treated(frame.moved(step, frame.median_of([each.others for each in kept])), kept)


class Robust(_ByRule[Strategy], Wrapping):
    """Aggregate with ``rule``, and go on as ``strategy`` does from there.

    ``strategy`` chooses nodes, configures and evaluates as before. Of the replies to a training
    round, those that are errors, or hold NaN, other shapes or other records than most, or are no
    answer to what was asked, are left out; weights are capped. ``rule`` then makes one step of the
    rest, and ``strategy`` is handed the replies with their arrays moved by that step: its average
    of them is that step, and all else that it does (server optimiser, metrics) follows.

    A round in which too few replies are left for the rule keeps the model as it was, and is an
    incident. A rule that no cohort of this size can satisfy stops the run at its first round.

    Integer and boolean arrays (a count of batches) take no part in the rule: of these the median
    counts. Float buffers (running means) do take part, for their names do not tell them apart.

    Attributes:
        incidents: What was left out, capped or missing, and why; also logged as warnings.

    Args:
        rule: Any rule that reads updates: ``Krum(2)``, ``NormBound(Median(), max_norm=1.0)``.
        strategy: Any Flower strategy of the Message API that is no DP wrapper.
        max_weight_ratio: How many times the median claim a claimed number of examples may count.
        seed: Of the rules that draw.

    >>> from flwr.serverapp.strategy import FedAdam
    >>> from turncoat.stages.aggregate.coordinatewise import Median
    >>> Robust(Median(), FedAdam())
    Robust(Median(), FedAdam)
    """


class RobustLegacy(_ByRule[LegacyStrategy], WrappingLegacy):
    """`Robust` for strategies of ``flwr.server.strategy``: of ``client_fn`` and ``server_fn`` apps.

    Under ``SecAggPlusWorkflow`` every reply arrives as the same aggregate. A rule that must read
    updates is then void, and the run stops with that reason.

    Args: as of `Robust`.
    """


class _Server:
    """A rule with what it is offered: its memory, its draws, and a cohort to be tried out on."""

    def __init__(self, rule: Any, seed: int) -> None:
        check(rule, Aggregate)
        join("Robust", Update, rule)
        for stage in within(rule):
            for name, cure in _FOREIGN.items():
                if name in asks(code_of(stage))[0]:
                    raise IncompatibleStages(
                        f"{stage!r} asks for {name!r}, which a Flower strategy has none of: {cure}"
                    )
        self._rule = rule
        self._reads_each = any(issubclass(needed, Clear) for needed in takes(rule))
        self._memory: dict[str, Any] = {}
        self._randomness = Randomness(seed)

    def try_out(self, num_messages: int) -> None:
        """Raise what the rule raises for a cohort of this size; its memory is not touched."""
        self._call([Update(torch.zeros(1), 1.0)] * num_messages, torch.zeros(1), {}, 0)

    def step(
        self, kept: Sequence[Sound], frame: Frame, *, round: int, incidents: Incidents
    ) -> Tensor | None:
        """Return the rule's step. Shape: ``(num_floats,)``. None if there is none to be taken."""
        if not kept:
            incidents.note(round, None, "no sound reply: the model stays as it was")
            return None
        updates = [each.update for each in kept]
        if self._reads_each:
            _refuse_one_for_all(self._rule, updates)
        memory = dict(self._memory)
        try:
            step = self._call(updates, frame.vector.float(), memory, round)
        except ValueError as reason:  # it could have coped with all that were asked
            incidents.note(round, None, f"{reason}; the model stays as it was")
            return None
        if not bool(torch.isfinite(step).all()):
            what = f"{self._rule!r} gave NaN or infinity: the model stays as it was"
            incidents.note(round, None, what)
            return None
        self._memory = memory
        return step

    def _call(
        self, updates: Sequence[Update], before: Tensor, memory: dict[str, Any], round: int
    ) -> Tensor:
        step: Tensor = call(
            self._rule,
            updates,
            rng=self._randomness.at("aggregate", round),
            memory=Memory(memory),
            before=before,
            cohort=tuple(range(len(updates))),
            trace=Trace(),
        )
        return step


def cohort_fault(rule: Any, num_messages: int) -> str | None:
    """Return why a rule cannot work in a cohort of this size, if it cannot."""
    try:
        _Server(rule, 0).try_out(num_messages)
    except (ValueError, IncompatibleStages) as reason:
        return str(reason)
    return None


def _refuse_one_for_all(rule: Any, updates: Sequence[Update]) -> None:
    first = updates[0].delta
    same = len(updates) > 2 and all(torch.equal(first, u.delta) for u in updates[1:])
    if same and bool(first.any()):
        raise IncompatibleStages(
            f"{rule!r} must read each client's update, but all {len(updates)} are the same vector, "
            "which is what Flower's secure aggregation leaves: this defence would do nothing; "
            "take the secure aggregation off, or use a rule that needs only the sum (Mean)"
        )
