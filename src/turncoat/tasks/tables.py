"""Tables: a CSV file, its categories one-hot, its missing values filled in and said to be."""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from turncoat.task import Task
from turncoat.tasks.models import MLP, Architecture
from turncoat.tasks.partitions import IID, Partition
from turncoat.tasks.pool import Pool, Split, federate
from turncoat.tasks.sources import DataMissing, DataUnusable

_IID = IID()
_MLP = MLP()
_MISSING = ("", "?", "NA", "NaN", "nan")
_FEW = 10  # classes that may have one example each
_MOST = 256  # categories of one column, before it is taken for a mistake


def from_csv(
    path: str | Path,
    num_clients: int | None = None,
    *,
    label: str,
    drop: tuple[str, ...] = (),
    categorical: tuple[str, ...] = (),
    split_column: str | None = None,
    missing: tuple[str, ...] = _MISSING,
    impute: Literal["median", "refuse"] = "median",
    partition: Partition = _IID,
    model: Architecture = _MLP,
    per_client: int | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
    public_size: int = 0,
    seed: int = 0,
    source: str = "",
) -> Task:
    """Return a task from a CSV file with a header, gzipped or not.

    A column of numbers is standardised by the mean and deviation of all training examples, its
    missing values replaced by their median first: figures that the clients are taken to have
    agreed on beforehand, outside what is attacked. Any other column is one-hot, a missing value
    being a category of its own.

    Args:
        label: The column to predict; its values in sorted order are the classes.
        drop: Columns that are no features; they may still be partitioned by.
        categorical: Columns of numbers that are categories.
        split_column: Says ``train`` or ``test`` for each row; otherwise ``test_size``, or a fifth,
            is held out.
        missing: What stands for a missing value.
        impute: ``"refuse"`` to stop at a missing number instead.
    """
    split = Split(num_clients, partition, per_client, train_size, test_size, public_size, seed)
    file = Path(path).expanduser()
    header, rows = _read(file)
    absent = [c for c in (label, *drop, *categorical, split_column) if c and c not in header]
    if absent:
        raise DataUnusable(f"{file.name} has no column {absent[0]!r}; it has {', '.join(header)}")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    for i, value in enumerate(columns[label]):
        if value in missing:
            raise DataUnusable(
                f"{file.name}: the label {label!r} is missing in row {i + 1}: drop that row"
            )
    classes = _ordered(columns[label])
    if len(classes) > max(_FEW, len(rows) // 2):
        raise DataUnusable(
            f"{file.name}: the label {label!r} has {len(classes)} classes in {len(rows)} rows: "
            "name a column of classes, or group its values"
        )
    number = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([number[value] for value in columns[label]])
    features, continuous = [], []
    for name in header:
        if name not in {label, split_column, *drop}:
            found = None if name in categorical else _numbers(columns[name], missing)
            if found is None:
                block = _one_hot(file.name, name, columns[name], missing)
            else:
                block = _sound(file.name, name, found, impute)
            features.append(block)
            continuous += [found is not None] * block.shape[1]
    if not features:
        raise DataUnusable(f"{file.name} has no features but the label {label!r}: drop less")
    inputs = torch.cat(features, dim=1)
    train, test = torch.arange(len(rows)), None
    if split_column:
        train, test = _told(columns[split_column], file.name, split_column)
    chosen = train.tolist()
    pool = Pool(
        name=file.name.split(".")[0],
        train=(inputs[train], labels[train]),
        test=None if test is None else (inputs[test], labels[test]),
        classes=classes,
        columns={name: [values[i] for i in chosen] for name, values in columns.items()},
        continuous=torch.tensor(continuous),
        source=source or f"local file {file.name}",
    )
    return federate(pool, split, model)


def _read(file: Path) -> tuple[list[str], list[list[str]]]:
    if not file.is_file():
        raise DataMissing(f"there is no file {str(file)!r}: name a CSV file")
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8-sig", newline="") as lines:
            table = [[cell.strip() for cell in row] for row in csv.reader(lines) if row]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise DataUnusable(
            f"{file} cannot be read ({error}): it is truncated, or no CSV in UTF-8"
        ) from error
    if len(table) < 2:
        raise DataUnusable(f"{file.name} has no rows below its header")
    header, rows = table[0], table[1:]
    if "" in header or len(set(header)) < len(header):
        raise DataUnusable(f"{file.name}: the columns need names, each of them once: {header}")
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise DataUnusable(
                f"{file.name}: row {i + 1} has {len(row)} cells, the header {len(header)}: the "
                "file is truncated or wrongly quoted"
            )
    return header, rows


def _ordered(values: Sequence[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(set(values), key=float))
    except ValueError:  # not all of them are numbers
        return tuple(sorted(set(values)))


def _numbers(values: Sequence[str], missing: Sequence[str]) -> Tensor | None:
    """Return a column of numbers, NaN where missing, or None if it is none. Shape: ``(n, 1)``."""
    try:
        found = [math.nan if value in missing else float(value) for value in values]
    except ValueError:
        return None
    return torch.tensor(found, dtype=torch.float32)[:, None]


def _sound(file: str, name: str, numbers: Tensor, impute: str) -> Tensor:
    """Return numbers that are finite, or missing where that may be and there are others."""
    absent = int(numbers.isnan().sum())
    if numbers.isinf().any():
        row = int(numbers.isinf().nonzero()[0, 0]) + 1
        raise DataUnusable(f"{file}: column {name!r} is infinite in row {row}: repair or drop it")
    if absent == len(numbers):
        raise DataUnusable(f"{file}: column {name!r} is missing in every row: drop it")
    if absent and impute == "refuse":
        raise DataUnusable(
            f"{file}: column {name!r} is missing in {absent} rows: fill them in, drop the column, "
            'or say impute = "median"'
        )
    return numbers


def _one_hot(file: str, name: str, values: Sequence[str], missing: Sequence[str]) -> Tensor:
    plain = ["" if value in missing else value for value in values]
    number = {value: i for i, value in enumerate(sorted(set(plain)))}
    if len(number) > _MOST:
        raise DataUnusable(
            f"{file}: column {name!r} has {len(number)} categories, over {_MOST}: drop it, or "
            "group them"
        )
    return torch.eye(len(number))[[number[value] for value in plain]]


def _told(values: Sequence[str], file: str, column: str) -> tuple[Tensor, Tensor]:
    strange = sorted(set(values) - {"train", "test"})
    if strange or len(set(values)) < 2:
        said = ", ".join(map(repr, strange or set(values)))
        raise DataUnusable(
            f"{file}: column {column!r} must say train or test, and both; it says {said}"
        )
    is_test = torch.tensor([value == "test" for value in values])
    return (~is_test).nonzero().flatten(), is_test.nonzero().flatten()
