"""What a rule of the server promises, and how to try it on messages drawn at random.

For the author of a rule: say what it promises, and run each theorem as one test, by hypothesis or
over a range of seeds::

    PROMISE = Promise(MyRule(2), least=7, num_forged=2, bound=within_the_honest_range)

    @pytest.mark.parametrize(("name", "theorem"), theorems(PROMISE))
    @given(seed=st.integers(0, 2**31))
    def test_my_rule(name: str, theorem: Theorem, seed: int) -> None:
        theorem(seed)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turncoat.messages import Update
from turncoat.randomness import Randomness
from turncoat.stage import Memory, Trace, Verdict, call

Theorem = Callable[[int], None]
Bound = Callable[[Tensor, Tensor], str | None]

ABSURD = {
    "NaN": float("nan"),
    "infinity": float("inf"),
    "minus infinity": float("-inf"),
    "1e30": 1e30,
    "-3e38": -3e38,
    "zeros": 0.0,
}


class PromiseBroken(AssertionError):
    """A rule does not do what is said of it."""


def within_the_honest_range(step: Tensor, honest: Tensor) -> str | None:
    """Say where a step lies outside what honest clients sent, in any coordinate."""
    slack = 1e-5 * honest.abs().max()
    below, above = honest.min(dim=0).values - slack, honest.max(dim=0).values + slack
    out = int(((step < below) | (step > above)).sum())
    return f"{out} coordinates lie beyond every honest update" if out else None


def one_that_was_sent(step: Tensor, honest: Tensor) -> str | None:
    """Say if a step is none of the honest updates."""
    chosen = any(torch.equal(step, row) for row in honest)
    return None if chosen else "the step is none of the honest updates"


def no_longer_than_the_honest(step: Tensor, honest: Tensor) -> str | None:
    """Say if a step is longer than every honest update."""
    length, longest = float(step.norm()), float(honest.norm(dim=1).max())
    fault = f"the step is {length:g} long, the longest honest update {longest:g}"
    return fault if length > longest * (1 + 1e-5) else None


@dataclass(frozen=True)
class Within:
    """A step stays within ``radii`` radii of the honest updates about their mean."""

    radii: float

    def __call__(self, step: Tensor, honest: Tensor) -> str | None:
        centre = honest.mean(dim=0)
        radius = float((honest - centre).norm(dim=1).max())
        away = float((step - centre).norm())
        fault = f"the step is {away:g} from the honest mean, of radius {radius:g}"
        return fault if away > self.radii * radius + 1e-4 else None


@dataclass(frozen=True)
class Promise:
    """What holds of a rule, whatever is sent.

    Attributes:
        least: The fewest messages that it takes.
        num_forged: How many of ``least`` or more messages may be forged.
        bound: What then still holds of its step; None: nothing is claimed.
        permutes: Whether the order of the messages is of no matter.
        translates: Whether a shift of all messages shifts the step.
        absurd: The longest step, in lengths of the longest honest update, that absurd messages may
            bring about; None: nothing is claimed.
        refuses: Whether it says so of fewer.
        num_params: Of the messages to draw.
    """

    rule: Any
    least: int
    num_forged: int = 0
    bound: Bound | None = None
    permutes: bool = True
    translates: bool = True
    absurd: float | None = 3.0
    refuses: bool = True
    num_params: int = 23


def answer(rule: Any, matrix: Tensor, *, weight: float = 1.0) -> Tensor:
    """Return what a rule makes of the rows, in the first round of a server without a past."""
    step: Tensor = call(
        rule,
        [Update(row, weight) for row in matrix],
        rng=Randomness(0).at("aggregate"),
        memory=Memory[Any](),
        before=torch.zeros_like(matrix[0]) if len(matrix) else None,
        cohort=tuple(range(len(matrix))),
        trace=Trace(),
        verdict=Verdict(),
    )
    return step


def theorems(promise: Promise) -> Iterator[tuple[str, Theorem]]:
    """Yield the theorems of a rule by name; each takes a seed, and raises ``PromiseBroken``."""
    rule, size = promise.rule, promise.num_params

    def drawn(seed: int, spread: int = 5) -> Tensor:
        rng = Randomness(seed).at("messages")
        n = promise.least + int(torch.randint(spread, (), generator=rng))
        return torch.randn(n, size, generator=rng)

    def demand(kept: bool, fault: str) -> None:
        if not kept:
            raise PromiseBroken(f"{rule!r}: {fault}")

    def the_order_does_not_matter(seed: int) -> None:
        matrix = drawn(seed)
        order = torch.randperm(len(matrix), generator=Randomness(seed).at("order"))
        first, second = answer(rule, matrix), answer(rule, matrix[order])
        demand(_close(first, second), f"another order moves it by {_apart(first, second):g}")

    def a_shift_of_all_shifts_it(seed: int) -> None:
        matrix = drawn(seed)
        shift = 3 * torch.randn(size, generator=Randomness(seed).at("shift"))
        still, moved = answer(rule, matrix) + shift, answer(rule, matrix + shift)
        demand(_close(still, moved), f"a shift of all is off by {_apart(still, moved):g}")

    def messages_are_left_as_they_were(seed: int) -> None:
        matrix = drawn(seed)
        before = matrix.clone()
        step = answer(rule, matrix)
        demand(step.shape == (size,) and step.dtype == matrix.dtype, "the step has another type")
        step += 1
        demand(torch.equal(matrix, before), "it edits what it was sent, or gives it back")

    def forgeries_far_away_keep_it_bounded(seed: int) -> None:
        matrix, rng = drawn(seed), Randomness(seed).at("forged")
        honest, shape = matrix[promise.num_forged :], (promise.num_forged, size)
        together = bool(torch.rand((), generator=rng) < 0.5)
        spots = torch.randn((1, size) if together else shape, generator=rng)
        sent = torch.cat([1e6 * spots.expand(shape), honest])
        fault = promise.bound(answer(rule, sent), honest) if promise.bound else None
        demand(not fault, str(fault))

    def absurd_messages_do_not_move_it(seed: int) -> None:
        matrix = drawn(seed)
        longest = float(matrix[promise.num_forged :].norm(dim=1).max())
        for name, value in ABSURD.items():
            for where in (slice(None), slice(0, 1)):
                sent = matrix.clone()
                sent[: promise.num_forged, where] = value
                step = answer(rule, sent)
                length = float(step.double().norm())
                fault = f"{name} makes the step {length:g} long; honest ones are {longest:g}"
                demand(length <= (promise.absurd or 0.0) * longest, fault)

    def nothing_from_everyone_is_nothing(seed: int) -> None:
        demand(not bool(answer(rule, torch.zeros_like(drawn(seed))).any()), "zeros move it")

    def a_cohort_below_the_bound_is_refused(seed: int) -> None:
        for n in {0, promise.least - 1}:
            try:
                answer(rule, drawn(seed)[:n])
            except ValueError as error:
                demand("the cohort has" in str(error), f"refuses {n} and says: {error}")
            else:
                demand(False, f"takes {n} messages, below its bound of {promise.least}")

    every: dict[Theorem, bool] = {
        the_order_does_not_matter: promise.permutes,
        a_shift_of_all_shifts_it: promise.translates,
        messages_are_left_as_they_were: True,
        forgeries_far_away_keep_it_bounded: promise.bound is not None,
        absurd_messages_do_not_move_it: promise.absurd is not None,
        nothing_from_everyone_is_nothing: True,
        a_cohort_below_the_bound_is_refused: promise.refuses,
    }
    for theorem, claimed in every.items():
        if claimed:
            yield theorem.__name__, theorem


def _close(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first, second, atol=1e-3, rtol=1e-4)


def _apart(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())
