"""Flower's SecAgg+, with an account of the rounds in which it gives up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from flwr.app import Context
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.serverapp import Grid

from turncoat.flower.grid import reason_of, round_of
from turncoat.flower.replies import Incidents
from turncoat.validate import at_least


class AggregationHalted(RuntimeError):
    """Secure aggregation gave up in more rounds than the run was to survive."""


class Watched:
    """A SecAgg+ workflow whose lost nodes and halts are told, and which halts for a reason.

    When too few nodes are left, Flower's workflow logs one line and returns: the model stays as it
    was, and a run in which that happened every round ends with exit code 0. This one counts it,
    and stops the run at one halt more than ``max_halts``.

    Attributes:
        incidents: Nodes that were lost and rounds that halted; also logged as warnings.
        num_halts: Rounds so far in which nothing was aggregated.

    Args:
        workflow: As it would be without.
        max_halts: How many halted rounds the run is to survive.

    Raises:
        AggregationHalted: At the first halt beyond ``max_halts``, with its reason.

    >>> from flwr.server.workflow import DefaultWorkflow
    >>> DefaultWorkflow(fit_workflow=Watched(SecAggPlusWorkflow(3, 2))).fit_workflow
    Watched(SecAggPlusWorkflow, max_halts=0)
    """

    def __init__(self, workflow: SecAggPlusWorkflow, *, max_halts: int = 0) -> None:
        if not isinstance(workflow, SecAggPlusWorkflow):
            raise TypeError(
                f"Watched wraps a SecAggPlusWorkflow; {workflow!r} is none: give "
                "SecAggPlusWorkflow(num_shares, reconstruction_threshold)"
            )
        at_least(0, self, max_halts=max_halts)
        self.workflow = workflow
        self.max_halts = max_halts
        self.incidents = Incidents()
        self.num_halts = 0

    def __repr__(self) -> str:
        return f"Watched({type(self.workflow).__name__}, max_halts={self.max_halts})"

    def __call__(self, grid: Grid, context: Context) -> None:
        """Run one round."""
        with passages(self.workflow) as found:
            self.workflow(grid, context)
        for passage in found:
            if passage.halted:
                self.num_halts += 1
                said = f"{passage}; the model stays as it was"
                self.incidents.note(passage.round, None, said)
            elif passage.num_left < passage.num_asked:
                self.incidents.note(passage.round, None, str(passage))
        if self.num_halts > self.max_halts:
            raise AggregationHalted(
                f"{self.incidents[-1]}. Halted rounds: {self.num_halts}, of which {self.max_halts} "
                "were to be survived: ask more nodes, lower reconstruction_threshold, or raise "
                "max_halts"
            )


STAGES = {
    "setup_stage": "exchanging keys",
    "share_keys_stage": "sharing secrets",
    "collect_masked_vectors_stage": "collecting masked updates",
    "unmask_stage": "unmasking",
}


@dataclass(frozen=True)
class Passage:
    """How one stage of one round of SecAgg+ went.

    Attributes:
        num_asked, num_left: Nodes before it, and those that answered.
        shares: How many open a secret, and of how many; zeros if that was not settled yet.
        reasons: Of those that answered with an error.
        halted: Whether the protocol ended here, with nothing aggregated.
    """

    round: int
    stage: str
    num_asked: int
    num_left: int
    shares: tuple[int, int]
    reasons: tuple[str, ...]
    halted: bool

    def __str__(self) -> str:
        if self.halted and not any(self.shares):
            return f"SecAgg+ halted: it takes two nodes at least, and {self.num_asked} was chosen"
        left = f"{self.num_left} of {self.num_asked} nodes answered"
        why = f" ({'; '.join(dict.fromkeys(self.reasons))})" if self.reasons else ""
        if not self.halted:
            return f"{left} SecAgg+ when {self.stage}{why}"
        need = "{} of {}".format(*self.shares)
        return f"SecAgg+ halted when {self.stage}: {left}; a secret takes {need} shares{why}"


@contextlib.contextmanager
def passages(
    workflow: SecAggPlusWorkflow, tell: Callable[[Passage], None] | None = None
) -> Iterator[list[Passage]]:
    """Note meanwhile how each stage of a SecAgg+ workflow goes, and ``tell`` it.

    By itself the workflow only logs that it halts; the run goes on, and ends with exit code 0.
    """
    found: list[Passage] = []

    def watched(name: str, stage: Callable[..., bool]) -> Callable[..., bool]:
        def run(grid: Grid, context: Any, state: Any) -> bool:
            before, failed = set(state.active_node_ids), len(state.failures)
            goes_on = stage(grid, context, state)
            found.append(
                Passage(
                    round_of(context),
                    STAGES[name],
                    len(before or state.nid_to_proxies),
                    len(state.active_node_ids),
                    (state.threshold, state.num_shares),
                    tuple(reason_of(*f.args) for f in state.failures[failed:]),
                    not goes_on,
                )
            )
            if tell is not None:
                tell(found[-1])
            return goes_on

        return run

    held = {name: vars(workflow).get(name) for name in STAGES}
    for name in STAGES:
        setattr(workflow, name, watched(name, getattr(workflow, name)))
    try:
        yield found
    finally:
        for name, stage in held.items():
            delattr(workflow, name) if stage is None else setattr(workflow, name, stage)


@contextlib.contextmanager
def all_passages(tell: Callable[[Passage], None]) -> Iterator[None]:
    """`passages` of every SecAgg+ workflow that runs meanwhile."""
    original = SecAggPlusWorkflow.__call__

    def call(self: SecAggPlusWorkflow, grid: Grid, context: Context) -> None:
        with passages(self, tell):
            original(self, grid, context)

    SecAggPlusWorkflow.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        SecAggPlusWorkflow.__call__ = original  # type: ignore[method-assign]
