"""The federation's epsilon, composed from what its stages say of themselves.

A stage that adds noise has a ``unit`` and an ``event(num_records)``: what one call costs. Where
calls do not compose by themselves it has a ``training_event(num_records, num_rounds)`` too, which
counts for all of them, and is not amplified. All that is downstream of it is post-processing; a
wrapper around it must say that it does not mix clients, and what prepares the records that it keeps
each of them (``keeps_records``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from turncoat.messages import Revealed
from turncoat.stage import nested

if TYPE_CHECKING:
    from turncoat.selection import Search


class Unit(StrEnum):
    """What two neighbouring data sets differ in."""

    RECORD = "record"
    CLIENT = "client"


_SEE_THE_BEST = frozenset({"user"})  # of a search: the seats that see no other run of it
_UNPROVEN_IN_A_GRAPH = {
    "channel": "{!r} draws noise anew for each neighbour, and neighbours may compare",
    "aggregate": "{!r} adds noise where a node mixes, after its neighbours' messages were read",
}


@dataclass(frozen=True, slots=True)
class Private:
    """An upper bound. ``against`` names the seats that see nothing upstream of the noise.

    Attributes:
        event: The whole training's, from which more than one epsilon can be had; that of the best
            of several trainings, where hyper-parameters were searched for.
        search: How many these were, in words; empty for one.
    """

    unit: Unit
    epsilon: float
    delta: float
    against: frozenset[str]
    event: Any = field(default=None, repr=False, compare=False)
    search: str = ""

    def __str__(self) -> str:
        seats = ", ".join(sorted(self.against))
        best = f", for the best of {self.search}" if self.search else ""
        return (
            f"ε = {self.epsilon:.3g} at δ = {self.delta:.1g} for each {self.unit}, against {seats}"
            f"{best}"
        )


@dataclass(frozen=True, slots=True)
class Unproven:
    """Noise is added, but no theorem here turns it into a bound."""

    unit: Unit
    reason: str

    def __str__(self) -> str:
        return f"noise for each {self.unit}, but no proven ε: {self.reason}"


def guarantees(
    federation: Any,
    *,
    num_records: int,
    num_rounds: int,
    delta: float,
    search: Search | None = None,
) -> tuple[Private | Unproven, ...]:
    """Return the guarantees of a federation: there may be none, or several.

    Args:
        num_records: Of the smallest client, for which the guarantee is the weakest.
        delta: The failure probability at which ε is stated.
        search: How many such trainings are run, of which the best is kept; None for one. Seats that
            see each of them have no ε where their number is random: it has no bound.

    A client-level guarantee is stated twice where its clients are sampled: amplified against those
    who do not know who took part, and in full against the seats that do. Noise that each client
    brings along (``amplified = False``) is not amplified: with the client its noise is missing.
    Seats that could subtract some of the noise (``noise_known_to``) are left out.

    In a graph only what a node adds while it trains is proven: all that the others ever get of its
    data is post-processing of that, so the rounds compose, and it holds against its peers too.
    """
    found: list[Private | Unproven] = []
    readable = issubclass(federation.sends, Revealed)  # so the server sees what comes before noise
    for place, everyone in (("train", True), ("channel", True), ("aggregate", False)):
        noisy, broken = _noisy(getattr(federation, place))
        if noisy is None:
            continue
        seats = {"client", "user"} | ({"neighbour"} if everyone else set())
        seats |= {"server"} if everyone or not readable else set()
        seats -= getattr(noisy, "noise_known_to", frozenset())
        event = noisy.event(num_records)
        if broken is not None:
            found.append(Unproven(noisy.unit, f"{broken!r} mixes clients before {noisy!r} clips"))
            continue
        if noisy.unit is Unit.RECORD and not getattr(federation.prepare, "keeps_records", False):
            chooses = f"{federation.prepare!r} chooses among the records before {noisy!r} draws"
            found.append(Unproven(noisy.unit, chooses))
            continue
        if federation.graph is not None:
            if place == "train":
                seats = {"peer", "user", "neighbour"}
                found += _compose(noisy, event, num_rounds, delta, frozenset(seats), search)
            else:
                found.append(Unproven(noisy.unit, _UNPROVEN_IN_A_GRAPH[place].format(noisy)))
            continue
        rate = getattr(federation.sample, "rate", None)
        if hasattr(noisy, "training_event"):
            whole = noisy.training_event(num_records, num_rounds)
            found += _compose(noisy, whole, 1, delta, frozenset(seats), search)
            continue
        alike = getattr(noisy, "amplified", True)
        if noisy.unit is Unit.CLIENT and alike and rate is not None:  # Poisson alone amplifies
            from dp_accounting import PoissonSampledDpEvent

            amplified = PoissonSampledDpEvent(rate, event)
            blind = frozenset(seats - {"server", "neighbour"})  # they do not see who takes part
            found += _compose(noisy, amplified, num_rounds, delta, blind, search)
            seats &= {"server", "neighbour"}
            if not seats:
                continue
        found += _compose(noisy, event, num_rounds, delta, frozenset(seats), search)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Claim:
    """What a federation promises for one record or one client, to who looks from one seat.

    Attributes:
        epsilon: At ``delta``; None where nothing is promised.
        text: What it follows from, or why there is none.
        other_unit: Whether it is for want of the unit alone that there is none.
    """

    unit: Unit
    delta: float
    epsilon: float | None
    text: str
    other_unit: bool = False


def claim(
    found: tuple[Private | Unproven, ...], unit: Unit, seat: str | None, delta: float
) -> Claim:
    """Return the least that guarantees promise for a unit, against one seat.

    What holds for each client holds for each record, if not as it is: who changes one record of a
    client takes the client away and adds another, two steps of which each costs ε. What holds for
    each record says nothing of all the records of a client together.
    """
    here = [g for g in found if isinstance(g, Private) and seat in g.against]
    promised = {g.epsilon: str(g) for g in here if g.unit is unit}
    if unit is Unit.RECORD:
        for g in here:
            if g.unit is Unit.CLIENT:
                promised[of_two(g, delta)] = f"{g}; of a client's records one counts as two clients"
    if promised:
        least = min(promised)
        return Claim(unit, delta, least, promised[least])
    if here:
        said = f"{here[0]}: that bounds no client, who has many records"
        return Claim(unit, delta, None, said, other_unit=True)
    said = "; ".join(str(g) for g in found) or "nothing here adds noise"
    return Claim(unit, delta, None, f"nothing is claimed against the {seat}: {said}")


def of_two(guarantee: Private, delta: float) -> float:
    """Return the ε at ``delta`` of two neighbouring steps, each with this guarantee.

    (ε, δ) for one step is (2 ε, (1 + e^ε) δ) for two [1]_; ε is taken at the δ for which the latter
    is ``delta``.

    .. [1] Dwork and Roth, 2014, theorem 2.2 and its proof for δ > 0 (group privacy).
       https://doi.org/10.1561/0400000042
    """
    from math import exp

    from turncoat.metrics.tradeoff import composed

    accountant, each = composed(guarantee.event), delta / 2
    for _ in range(60):  # ε grows as δ shrinks: where the two stand still, both fit
        epsilon = float(accountant.get_epsilon(each))
        if epsilon > 50:
            return float("inf")
        if (1 + exp(epsilon)) * each <= delta * (1 + 1e-9):
            break
        each = delta / (1 + exp(epsilon)) * 0.999
    return 2 * epsilon


def loose(delta: float, num: int, unit: Unit) -> str | None:
    """Return why a δ says little for ``num`` records or clients; None where it is below 1 / num.

    Whoever publishes one of them whole, chosen by lot, keeps to any ε at a δ of 1 / num.

    >>> loose(0.01, 100, Unit.RECORD)
    'δ = 0.01 is not below 1 / 100 records, so that publishing one of them keeps to it: lower delta'
    >>> loose(1e-5, 100, Unit.RECORD)
    """
    if delta * num < 1:
        return None
    return (
        f"δ = {delta:g} is not below 1 / {num:,} {unit}s, so that publishing one of them keeps to "
        "it: lower delta"
    )


def _compose(
    noisy: Any,
    event: Any,
    num_rounds: int,
    delta: float,
    seats: frozenset[str],
    search: Search | None,
) -> list[Private | Unproven]:
    from dp_accounting import SelfComposedDpEvent  # here, for it takes a second to import

    from turncoat.metrics.tradeoff import NotComposed, composed

    found: list[Private | Unproven] = []
    whole, said = SelfComposedDpEvent(event, num_rounds), ""
    if search is not None:
        whole, said = search.event(whole), str(search)
        if not search.bounded and seats - _SEE_THE_BEST:
            who = ", ".join(sorted(seats - _SEE_THE_BEST))
            endless = f"every run of the search is seen by {who}, and {search!r} has no most"
            found.append(Unproven(noisy.unit, endless))
            seats &= _SEE_THE_BEST
            if not seats:
                return found
    try:
        accountant = composed(whole)
    except NotComposed:
        return [*found, Unproven(noisy.unit, f"no accountant here composes {event!r}")]
    epsilon = float(accountant.get_epsilon(delta))
    return [Private(noisy.unit, epsilon, delta, seats, whole, said), *found]


def _noisy(stage: Any) -> tuple[Any, Any]:
    """Return the noisy stage inside ``stage``, and the wrapper that voids it, if any."""
    if hasattr(stage, "event"):
        return stage, None
    for inner, _ in nested(stage):
        noisy, broken = _noisy(inner)
        if noisy is not None:
            return noisy, broken or (stage if getattr(stage, "mixes_clients", True) else None)
    return None, None
