"""The verdict: for each seat what it can do, what the best defence leaves of it, at what cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from turncoat.report import words
from turncoat.report.cost import Cost, costs, price
from turncoat.report.pooled import Square, squares
from turncoat.report.record import Record, read

NO_PROOF = "that is no proof of safety"
NOT_TRIED = "not tried"  # how the reason of a blocked cell begins that nothing but a wish blocks
UNKNOWN = ("failed", "missing", "unplayed")
EQUALLY_GOOD = 0.02  # of success: within it, two defences are told apart by what they cost

Matrix = Mapping[tuple[str, str, str], Square]


@dataclass(frozen=True)
class Verdict:
    """What a dishonest holder of one seat achieves.

    Attributes:
        who: The seat in words.
        state: Of the federation as it is: ``"open"`` if an attack beats its baseline, ``"held"``
            if none does, ``"blocked"`` if none can be mounted, ``"failed"``, ``"missing"`` if
            none ran yet, or ``"untried"`` if none was asked for.
        finding: The strongest attack on the federation as it is, in a sentence.
        remedy: What the best defence tested leaves of it, and what that costs; may be empty.
        strongest: That attack's square, if any was scored.
        defence: The best defence tested, if one was called for.
        left: The strongest attack that remains under it, if any was scored.
    """

    seat: str
    who: str
    state: str
    finding: str
    remedy: str = ""
    strongest: Square | None = None
    defence: str | None = None
    left: Square | None = None

    def __str__(self) -> str:
        return " ".join(part for part in (self.finding, self.remedy) if part)


def verdicts(folder: Path) -> list[Verdict]:
    """Return one verdict for each seat that an attack of the plan sits at."""
    record = read(folder)
    return judge(record, squares(record), costs(record))


def judge(record: Record, matrix: Matrix, prices: Mapping[str, Cost]) -> list[Verdict]:
    """Return the verdicts of what was read already."""
    seats = dict.fromkeys(seat for _, seat, _ in matrix if seat)
    return [_judge(record, matrix, prices, seat) for seat in seats]


def column(matrix: Matrix, seat: str, defence: str) -> list[Square]:
    """Return all attacks at a seat against a defence."""
    return [square for (_, s, d), square in matrix.items() if s == seat and d == defence]


def reach(record: Record, matrix: Matrix, seat: str, defence: str) -> list[Square]:
    """Return what a seat can do: its own attacks, and those of others that need what it sees too.

    An attack that was played only at another seat stands for this one as far as that seat saw no
    less; where it saw less, what this one can do is not known, and the square is ``"unplayed"``.
    """
    own = column(matrix, seat, defence)
    known = {square.attack for square in own}
    sees = next(d.get("sees") or {} for d in record.plan["defences"] if d["name"] == defence)
    found = list(own)
    for attack in record.plan["attacks"]:
        needs = set(str(attack.get("needs") or "").split(" or "))
        mine = needs & set(sees.get(seat) or ())
        played = [
            s for (a, at, d), s in matrix.items() if a == attack["name"] and d == defence and at
        ]
        if attack["name"] in known or not mine or not played:
            continue
        enough = [s for s in played if mine <= set(sees.get(s.seat) or ())]
        unplayed = replace(played[0], status="unplayed", headline=None)
        found.append(strongest(enough) or next(iter(enough), unplayed))
    return found


def strongest(found: Sequence[Square]) -> Square | None:
    """Return the attack that went furthest: one that beat its baseline before one that did not.

    Where several got all there is, or nothing, those count that went beyond, or missed by less.
    """
    scored = [square for square in found if square.status == "scored"]
    return max(scored, key=lambda s: (s.beats, s.success, s.reach), default=None)


def furthest(found: Sequence[Square]) -> Square | None:
    """Return the attack with the most success, whether or not it surely beat its baseline.

    Defences are compared by it: few seeds or examples leave an attack unproven, not harmless.
    """
    scored = [square for square in found if square.status == "scored"]
    return max(scored, key=lambda s: (s.success, s.beats, s.reach), default=None)


def still_can(record: Record, matrix: Matrix, seat: str, defence: str) -> str:
    """Say what a seat can still do behind a defence that blocked one of its attacks."""
    others = [s for s in reach(record, matrix, seat, defence) if s.status != "blocked"]
    best, who = strongest(others), words.who(seat)
    if best is None:
        if not others:
            return f"No other attack tried can be mounted by {_low(who)}; {NO_PROOF}."
        return (
            f"The other attacks of {_low(who)} gave no score, so what it can still do is unknown."
        )
    fails = "" if best.beats else ", which does not beat its baseline"
    return f"{who} can still mount {best.attack}{fails}: {best.short}.{_played_at(best, seat)}"


def _played_at(square: Square, seat: str) -> str:
    if square.seat == seat:
        return ""
    where, who = _low(words.who(square.seat)), _low(words.who(seat))
    return f" Played from the seat of {where}; {who} sees as much."


def _judge(record: Record, matrix: Matrix, prices: Mapping[str, Cost], seat: str) -> Verdict:
    who, base = words.who(seat), record.defences[0]
    found = reach(record, matrix, seat, base)
    best = strongest(found)
    failed = [s.attack for s in found if s.status == "failed"]
    missing = [s.attack for s in found if s.status == "missing"]
    asides = [
        f"{words.count(len(failed), 'attack')} failed to run ({words.listed(failed)})"
    ] * bool(failed)
    asides += [
        f"{words.count(len(missing), 'attack')} did not run yet ({words.listed(missing)})"
    ] * bool(missing)
    unplayed = [s.attack for s in found if s.status == "unplayed"]
    asides += [
        f"{words.count(len(unplayed), 'attack')} {'was' if len(unplayed) == 1 else 'were'} played "
        f"only where less is seen ({words.listed(unplayed)})"
    ] * bool(unplayed)
    aside = f" Not judged: {' and '.join(asides)}." if asides else ""
    untried = [s.says for s in found if s.status == "blocked" and s.says.startswith(NOT_TRIED)]
    if best is None and untried and not failed:
        return Verdict(seat, who, "untried", f"{who}: {untried[0].rstrip('.')}.")
    if best is None:
        if failed or missing or unplayed:
            state = "failed" if failed else "missing" if missing else "untried"
            return Verdict(seat, who, state, f"{who}: not known.{aside}")
        names = words.listed([s.attack for s in found])
        text = (
            f"{who} cannot mount any attack tried ({names}): all are blocked. Blocked is not safe."
        )
        return Verdict(seat, who, "blocked", text, _elsewhere(record, matrix, seat))
    if not best.beats:
        text = (
            f"{who}: no attack tried beat its baseline; {NO_PROOF}. "
            f"The nearest was {best.attack}: {best.short}.{_played_at(best, seat)}{aside}"
        )
        return Verdict(seat, who, "held", text, _elsewhere(record, matrix, seat), best)
    defence, left, remedy = _best_defence(record, matrix, prices, seat)
    return Verdict(
        seat,
        who,
        "open",
        _sentence(record, best, who) + _played_at(best, seat) + aside,
        remedy,
        best,
        defence,
        left,
    )


def _sentence(record: Record, square: Square, who: str) -> str:
    figure = square.headline
    assert figure is not None
    attack = next(a for a in record.plan["attacks"] if a["name"] == square.attack)
    if square.seat == "coalition" and attack.get("members"):
        members, clients = len(attack["members"]), len(record.plan["task"]["sizes"])
        some = "One dishonest client" if members == 1 else f"A coalition of {members} clients"
        who = f"{some} of {clients:,}"
    says = (
        attack.get("says") or "{who} reaches {value} {interval}, where the baseline is {baseline}"
    )
    known = figure.low is not None and figure.high is not None
    interval = f"(95 % interval {figure.interval})" if known else ""
    if figure.low == figure.value == figure.high and figure.name.endswith("lower_bound"):
        interval = "(with 95 % confidence)"  # a bound has no interval of its own
    text = words.spoken(
        says, who=who, value=figure.text, interval=interval, baseline=figure.base
    ).rstrip()
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _best_defence(
    record: Record, matrix: Matrix, prices: Mapping[str, Cost], seat: str
) -> tuple[str | None, Square | None, str]:
    base = record.defences[0]
    found = {defence: reach(record, matrix, seat, defence) for defence in record.choices}
    before = _left(found.pop(base))
    known = {d: s for d, s in found.items() if not any(one.status in UNKNOWN for one in s)}
    if not known:
        if len(record.choices) == 1:
            proofs = [d for d in record.plan["defences"] if d.get("proves")]
            shown = "".join(f" {d['name']} is none: it shows {d['proves']}." for d in proofs)
            return None, None, f"No defence was tested.{shown}"
        return None, None, "No defence was tested to the end against all attacks at this seat."

    def weaker(defence: str) -> bool:
        left, still = _left(known[defence]), strongest(known[defence])
        stopped = still is None or not still.beats
        return left < before - EQUALLY_GOOD or (stopped and left < before)

    useful = [d for d in known if not ruins(record, prices[d], prices[base])] or list(known)
    candidates = [d for d in useful if weaker(d)]
    ruined = [d for d in known if d not in useful]
    if not candidates:
        text = "No defence tested makes the strongest attack at this seat noticeably weaker"
        would = [d for d in ruined if weaker(d)]
        ruinous = f" without ruining the model, as {words.listed(would)} would" if would else ""
        return None, None, f"{text}{ruinous}."
    least = min(_left(known[d]) for d in candidates)
    as_good = [d for d in candidates if _left(known[d]) <= least + EQUALLY_GOOD]
    defence = max(as_good, key=lambda d: _quality(prices[d]))
    left, most = strongest(known[defence]), furthest(known[defence])
    best = f"Best of the defences tested: {defence}."
    if others := [d for d in as_good if d != defence]:
        are = "is" if len(others) == 1 else "are"
        best += f" {words.listed(others)} {are} about as good, and no more accurate."
    if left is None or most is None:
        best += f" Under it every attack tried is blocked; {NO_PROOF}."
    elif left.beats:
        best += f" What is left still beats its baseline: {left.attack}, {left.short}."
        if most.success > left.success:
            best += f" {most.attack} went further, but that may be chance: {most.short}."
    else:
        best += (
            f" No attack tried beats its baseline; {NO_PROOF}. "
            f"The nearest is {left.attack}: {left.short}."
        )
    cost = price(prices[defence], prices[base], record.metric)
    if stronger := [d for d in ruined if _left(known[d]) < _left(known[defence])]:
        cost += f" Less is left under {words.listed(stronger)}, but the model is ruined there."
    return defence, left, f"{best} {cost}"


def _left(found: Sequence[Square]) -> float:
    most = furthest(found)
    return most.success if most else 0.0


def ruins(record: Record, cost: Cost, base: Cost) -> bool:
    """Say whether a defence costs more than half of what the model had learnt over chance."""
    if cost.quality is None or base.quality is None:
        return False
    num_classes = len(record.plan["task"].get("classes") or ())
    chance = 1 / num_classes if record.metric == "accuracy" and num_classes else 0.0
    return cost.quality.value - chance < (base.quality.value - chance) / 2


def _quality(cost: Cost) -> float:
    return cost.quality.value if cost.quality else float("-inf")


def _elsewhere(record: Record, matrix: Matrix, seat: str) -> str:
    """Warn of a defence that opens what the federation as it is does not."""
    worse = [
        square
        for defence in record.defences[1:]
        if (square := strongest(reach(record, matrix, seat, defence))) is not None and square.beats
    ]
    if not worse:
        return ""
    most = max(worse, key=lambda square: square.success)
    return f"But under {most.defence}, {most.attack} beats its baseline: {most.short}."


def _low(text: str) -> str:
    return text[:1].lower() + text[1:]
