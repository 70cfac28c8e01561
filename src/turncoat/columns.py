"""Work on the columns of a matrix, block by block, on every core.

Blocks are equally wide on every machine, one thread computes each, and results come in their order:
how many cores there are changes no bit of what follows.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_FEW = 1 << 17  # columns up to which starting threads takes longer than they save


def by_columns(work: Callable[[slice], T], num_columns: int, width: int = 4096) -> Iterator[T]:
    """Yield what ``work`` makes of each block of columns, from left to right.

    >>> list(by_columns(lambda where: where.stop - where.start, 10_000))
    [4096, 4096, 1808]
    """
    starts = range(0, num_columns, width)
    if num_columns <= _FEW:
        for start in starts:
            yield work(slice(start, min(start + width, num_columns)))
        return
    threads = max(1, min(num_cores(), len(starts)))
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for start in starts:
            where = slice(start, min(start + width, num_columns))
            waiting.append(pool.submit(work, where))
            if len(waiting) > 4 * threads:  # results that nobody fetched take memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def filled(target: Tensor, make: Callable[[slice], Tensor], width: int = 4096) -> Tensor:
    """Put what ``make`` gives for each block of columns into ``target``, and return that."""

    def work(where: slice) -> None:
        target[..., where] = make(where)

    for _ in by_columns(work, target.shape[-1], width):
        pass
    return target


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
