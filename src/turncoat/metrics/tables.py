"""Which columns of a table say what, and how near one row is to another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from turncoat.validate import positive

QUARTER = 0.319  # deviations around the mean in which a quarter of a normal population lies


@dataclass(frozen=True)
class Schema:
    """The features of a table: numbers, and categories written as one column for each value.

    Attributes:
        numeric: The columns that are numbers.
        groups: The columns of each category, of which one is 1 (none: a missing value).
        mean, deviation: Of each numeric column.
        low, high: The range of each numeric column.
    """

    numeric: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def of(cls, rows: Tensor) -> Self:
        """Read it off rows: neighbours of zeros and ones, one of them at most, are a category.

        A value that is in no row joins the category before it.

        >>> table = torch.tensor([[0.3, 1, 0, 0, 1], [-2, 0, 1, 1, 0]])
        >>> Schema.of(table).numeric, Schema.of(table).groups
        ((0,), ((1, 2), (3, 4)))
        """
        if rows.ndim != 2 or not len(rows):
            raise ValueError(f"a table has rows of features; the shape here is {tuple(rows.shape)}")
        binary = ((rows == 0) | (rows == 1)).all(dim=0).tolist()
        numeric, groups = [], list[list[int]]()
        held = torch.zeros(len(rows))
        for i, is_binary in enumerate(binary):
            if not is_binary:
                numeric.append(i)
                continue
            joins = bool(groups) and groups[-1][-1] == i - 1
            if joins and float((held + rows[:, i].cpu()).max()) <= 1:
                groups[-1].append(i)
                held += rows[:, i].cpu()
            else:
                groups.append([i])
                held = rows[:, i].cpu().clone()
        numbers = rows[:, numeric].double()
        return cls(
            tuple(numeric),
            tuple(map(tuple, groups)),
            tuple(numbers.mean(dim=0).tolist()),
            tuple(numbers.std(dim=0, correction=0).tolist()),
            tuple(numbers.min(dim=0).values.tolist() if numeric else ()),
            tuple(numbers.max(dim=0).values.tolist() if numeric else ()),
        )

    @property
    def features(self) -> tuple[int, ...]:
        """The first column of each feature: numbers first, then categories."""
        return (*self.numeric, *(group[0] for group in self.groups))

    def categories(self, rows: Tensor) -> Tensor:
        """Return which value each category has, -1 for none. Shape: ``(n, len(groups))``."""
        found = [
            torch.where(rows[:, list(g)].sum(dim=1) > 0, rows[:, list(g)].argmax(dim=1), -1)
            for g in self.groups
        ]
        return torch.stack(found, dim=1) if found else torch.zeros(len(rows), 0, dtype=torch.long)

    def blind(self, rows: Tensor) -> Tensor:
        """Return the row that someone guesses who knows the table alone: means and modes."""
        row = torch.zeros(1, rows.shape[1])
        row[0, list(self.numeric)] = rows[:, list(self.numeric)].float().cpu().mean(dim=0)
        for group in self.groups:
            row[0, group[int(rows[:, list(group)].sum(dim=0).argmax())]] = 1
        return row

    def hardened(self, rows: Tensor) -> Tensor:
        """Return the rows with the likeliest value of each category as the only one."""
        sure = rows.clone()
        for group in self.groups:
            columns = list(group)
            likeliest = rows[:, columns].argmax(dim=1)
            sure[:, columns] = torch.eye(len(columns)).to(rows)[likeliest]
        return sure

    def errors(self, guesses: Tensor, rows: Tensor) -> Tensor:
        """Return how wrong each feature is. Shape: ``(n, features)``, float64.

        Of a number the distance in deviations; of a category 0 where it is right, else 1.
        """
        spread = torch.tensor(self.deviation, dtype=torch.float64).clamp(min=1e-12)
        at = list(self.numeric)
        numbers = (guesses[:, at].double() - rows[:, at].double()).abs() / spread
        wrong = self.categories(guesses) != self.categories(rows)
        return torch.cat([numbers, wrong.double()], dim=1)

    def match(self, guesses: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Pair guesses and rows one to one, so that their errors, at most 1 each, are least.

        Returns:
            Indices of guesses, rising, and of their rows. Shape: ``(min(n, m),)`` each.
        """
        cost = torch.stack([c for c in self._costs(guesses, rows)])
        first, second = linear_sum_assignment(cost.numpy())
        return torch.as_tensor(first), torch.as_tensor(second)

    def right(self, errors: Tensor, tolerance: float = QUARTER) -> Tensor:
        """Return 1 where a feature is right: a number within ``tolerance`` deviations."""
        positive("Schema.right", tolerance=tolerance)
        return (errors <= tolerance).double()

    def _costs(self, guesses: Tensor, rows: Tensor) -> Iterator[Tensor]:
        for guess in guesses:
            yield self.errors(guess.expand(len(rows), -1), rows).clamp(max=1).mean(dim=1)
