"""Client jobs, here or in worker processes. Payload vectors come back through shared memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import Any

import torch
import torch.multiprocessing  # teaches pickle to share tensors
from torch import Tensor

from turncoat.messages import Envelope
from turncoat.runtimes.seat import Done, Job, Seats, attempt, one_thread

_CHUNKS = 4  # a worker's share of a round comes in so many pieces, for balance


def context() -> BaseContext:
    """Return how processes start: by fork where that is safe and known, else by spawn."""
    known = multiprocessing.get_all_start_methods()
    method = os.environ.get("TURNCOAT_START", "fork" if "fork" in known else "spawn")
    if method not in known:
        raise ValueError(f"TURNCOAT_START={method!r} is no start method: {', '.join(known)} are")
    return multiprocessing.get_context(method)


def become_worker() -> None:
    """Make this process a quiet worker: one thread, deaf to Ctrl-C, and gone with its parent."""
    one_thread()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()


def _follow(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


@dataclass(frozen=True)
class _Share:
    """A stretch of one round's jobs for one worker; job i starts at row ``starts[i]``."""

    round: int
    cohort: tuple[int, ...]
    first: int
    starts: tuple[int, ...]
    jobs: tuple[Job, ...]


class Workers:
    """A context that runs jobs and keeps their order. One process means: this one.

    Args:
        num_processes: How many; on a device other than the CPU there is one.
    """

    def __init__(self, seats: Seats, num_processes: int) -> None:
        if num_processes < 1:
            raise ValueError(f"num_processes must be at least 1; it is {num_processes}")
        self._seats = seats
        self._num_processes = num_processes
        self._pool: ProcessPoolExecutor | None = None
        self._starts = self._matrix = torch.empty(0, 0)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __call__(
        self,
        round: int,
        cohort: tuple[int, ...],
        jobs: Sequence[Job],
        starts: Mapping[int, Tensor],
    ) -> list[Done]:
        """Do the jobs of some of a cohort. Payloads are rows of a matrix that is used again.

        Whoever keeps a payload beyond the next call keeps a copy.
        """
        if not jobs:
            return []
        size = starts[jobs[0].client].numel()
        if self._num_processes == 1:
            done = [
                attempt(self._seats, Envelope(j.client, cohort, round), starts[j.client], j)
                for j in jobs
            ]
            like = starts[jobs[0].client]
            if self._matrix.shape[0] < len(jobs) or self._matrix.device != like.device:
                self._matrix = like.new_empty(len(jobs), size)
            for i, d in enumerate(done):
                if d.payload is not None:
                    self._matrix[i] = d.payload.delta
        else:
            done = self._spread(round, cohort, jobs, starts, size)
        return [
            d if d.payload is None else replace(d, payload=replace(d.payload, delta=row))
            for d, row in zip(done, self._matrix, strict=False)
        ]

    def _spread(
        self,
        round: int,
        cohort: tuple[int, ...],
        jobs: Sequence[Job],
        starts: Mapping[int, Tensor],
        size: int,
    ) -> list[Done]:
        different = {id(starts[j.client]): starts[j.client] for j in jobs}
        if (
            self._pool is None
            or self._matrix.shape[0] < len(jobs)
            or self._starts.shape[0] < len(different)
        ):
            if self._pool is not None:
                self._pool.shutdown()
            self._starts, self._matrix = _shared(len(different), size), _shared(len(jobs), size)
            self._pool = ProcessPoolExecutor(  # and no Pool, which waits for the dead
                self._num_processes,
                context(),
                _begin,
                (self._seats, self._starts, self._matrix),
            )
        row_of = {}
        for i, (name, vector) in enumerate(different.items()):
            self._starts[i] = vector
            row_of[name] = i
        length = -(-len(jobs) // (self._num_processes * _CHUNKS))
        shares = [
            _Share(
                round,
                cohort,
                first,
                tuple(row_of[id(starts[j.client])] for j in jobs[first : first + length]),
                tuple(jobs[first : first + length]),
            )
            for first in range(0, len(jobs), length)
        ]
        return [d for done in self._pool.map(_in_worker, shares) for d in done]


def _shared(*shape: int) -> Tensor:
    shared: Tensor = torch.empty(shape).share_memory_()  # type: ignore[no-untyped-call]
    return shared


_here: Any = None


def _begin(seats: Seats, starts: Tensor, matrix: Tensor) -> None:
    global _here
    become_worker()
    _here = seats, starts, matrix


def _in_worker(share: _Share) -> list[Done]:
    seats, starts, matrix = _here
    done = []
    for i, (start, job) in enumerate(zip(share.starts, share.jobs, strict=True)):
        envelope = Envelope(job.client, share.cohort, share.round)
        d = attempt(seats, envelope, starts[start], job)
        if d.payload is not None:
            matrix[share.first + i] = d.payload.delta
            d = replace(d, payload=replace(d.payload, delta=matrix.new_empty(0)))
        done.append(d)
    return done
