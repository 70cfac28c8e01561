"""One form of message for a field out of range: what, of whom, what is due."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from math import isfinite
from typing import Any, get_args


def positive(owner: Any, **numbers: float | None) -> None:
    """Refuse numbers that are not finite and above 0; None passes.

    >>> positive("LocalSGD", lr=-1)
    Traceback (most recent call last):
    ValueError: LocalSGD: lr must be positive; it is -1
    """
    for name, number in numbers.items():
        if number is not None and not (isfinite(number) and number > 0):
            raise ValueError(f"{_name(owner)}: {name} must be positive; it is {number}")


def at_least(bound: float, owner: Any, **numbers: float | None) -> None:
    """Refuse finite numbers below ``bound``, and others; None passes."""
    for name, number in numbers.items():
        if number is not None and not (isfinite(number) and number >= bound):
            raise ValueError(f"{_name(owner)}: {name} must be at least {bound}; it is {number}")


def fraction(owner: Any, **numbers: float | None) -> None:
    """Refuse numbers outside [0, 1]; None passes."""
    for name, number in numbers.items():
        if number is not None and not 0 <= number <= 1:
            raise ValueError(f"{_name(owner)}: {name} must be within 0 and 1; it is {number}")


def exactly_one(owner: Any, **options: Any) -> None:
    """Refuse none or several of some options."""
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        said = f"; {' and '.join(given)} are given" if given else ""
        raise ValueError(f"{_name(owner)} needs exactly one of {', '.join(options)}{said}")


def one_of(choices: Any, owner: Any, **words: Any) -> None:
    """Refuse what is none of the words of a ``Literal``."""
    for name, word in words.items():
        if word not in get_args(choices):
            cure = nearest(str(word), get_args(choices))
            raise ValueError(f"{_name(owner)}: {name} is {word!r}; {cure}")


def nearest(name: str, right: Iterable[str]) -> str:
    """Return the cure for a misspelt name.

    >>> nearest("kurm", ["krum", "mean"])
    "did you mean 'krum'?"
    >>> nearest("x", ["krum", "mean"])
    'there are krum, mean'
    """
    known = sorted(map(str, right))
    near = get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known) or 'none'}"


def _name(owner: Any) -> str:
    return owner if isinstance(owner, str) else type(owner).__name__
