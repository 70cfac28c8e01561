"""Client jobs, here or in worker processes. Payload vectors come back through shared memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import Any

import torch
import torch.multiprocessing  # teaches pickle to share tensors
from torch import Tensor

from turncoat.messages import Envelope
from turncoat.runtimes.seat import Cell, Done, Incident, Job, Seats, attempt, one_thread

_MOST = 8  # jobs that are handed to a worker at once
_HELD = 4 * _MOST  # payloads a worker that are held at once, where the rule takes one at a time
_NOTHING = torch.empty(0)


def context() -> BaseContext:
    """Return how processes start: by fork where that is safe and known, else by spawn."""
    known = multiprocessing.get_all_start_methods()
    method = os.environ.get("TURNCOAT_START", "fork" if "fork" in known else "spawn")
    if method not in known:
        raise ValueError(f"TURNCOAT_START={method!r} is no start method: {', '.join(known)} are")
    return _Fork() if method == "fork" else multiprocessing.get_context(method)


if hasattr(os, "fork"):

    class _Shielded(multiprocessing.context.ForkProcess):
        """Is born deaf to Ctrl-C, which would strike a child before it is told to ignore it."""

        def start(self) -> None:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                super().start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    class _Fork(multiprocessing.context.ForkContext):
        Process = _Shielded


def become_worker() -> None:
    """Make this process a quiet worker: one thread, deaf to Ctrl-C, and gone with its parent."""
    one_thread()
    keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()


def keep_memory() -> None:
    """Teach glibc to keep what is freed, which it learns from the largest block that came back.

    Else payloads that are held push the temporaries of every step to the top of the heap, from
    where they go back to the system: the page faults are up to a fifth of a round.
    """
    torch.empty(8_000_000)  # just below 32 MiB, the most that it learns from; nobody touches it


def _follow(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


@dataclass(frozen=True)
class _Share:
    """A stretch of one round's jobs; job i starts at ``starts[i]`` and writes to ``rows[i]``."""

    round: int
    starts: tuple[int, ...]
    rows: tuple[int, ...]
    jobs: tuple[Job, ...]


class Workers:
    """A context that runs jobs and keeps their order. One process means: this one.

    Args:
        num_processes: How many; on a device other than the CPU there is one.
    """

    dresses = False  # payloads come here bare

    def __init__(self, seats: Seats, num_processes: int) -> None:
        if num_processes < 1:
            raise ValueError(f"num_processes must be at least 1; it is {num_processes}")
        self._seats = seats
        self._num_processes = num_processes
        self._pool: ProcessPoolExecutor | None = None
        self._starts = self._matrix = torch.empty(0, 0)
        self._handed: deque[Future[list[Done]]] = deque()

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

    def together(
        self, round: int, jobs: Sequence[Job], starts: Mapping[int, Tensor]
    ) -> Iterator[Done]:
        """Yield what became of the jobs. Payloads are rows of a matrix that is used again.

        Whoever keeps a payload beyond the round keeps a copy.
        """
        if self._num_processes > 1:
            yield from self._spread(round, jobs, starts, len(jobs))
            return
        for i, done in enumerate(self._alone(round, jobs, starts)):
            if done.payload is None:
                yield done
                continue
            like = starts[jobs[i].client]
            if self._matrix.shape[0] < len(jobs) or self._matrix.device != like.device:
                self._matrix = like.new_empty(len(jobs), like.numel())
            self._matrix[i] = done.payload.delta
            yield _carrying(done, self._matrix[i])

    def stream(
        self, round: int, jobs: Sequence[Job], starts: Mapping[int, Tensor]
    ) -> Iterator[Done]:
        """Yield the same, holding only a few at a time. Payloads are whoever's takes them."""
        if self._num_processes == 1:
            yield from self._alone(round, jobs, starts)
            return
        for done in self._spread(round, jobs, starts, _HELD * self._num_processes):
            yield done if done.payload is None else _carrying(done, done.payload.delta.clone())

    def dress(
        self, payload: Any, envelope: Envelope, kept: Cell, *, traitor: bool
    ) -> tuple[Any, Cell]:
        """Pass a payload through the channel; return the message and the next memory."""
        return self._seats.dress(payload, envelope, kept, traitor=traitor)

    def incidents(self) -> Sequence[Incident]:
        """Return what was survived beside the jobs: nothing ever, in processes of our own."""
        return ()

    def _alone(
        self, round: int, jobs: Sequence[Job], starts: Mapping[int, Tensor]
    ) -> Iterator[Done]:
        cohort = self._seats.cohort(round)
        for job in jobs:
            envelope = self._seats.envelope(job.client, cohort, round)
            yield attempt(self._seats, envelope, starts[job.client], job)

    def _spread(
        self, round: int, jobs: Sequence[Job], starts: Mapping[int, Tensor], num_rows: int
    ) -> Iterator[Done]:
        """Yield what the workers did; job i has row ``i % num_rows`` until a later one needs it.

        Workers run ahead of whoever takes the results, by as many jobs as there are rows.
        """
        if not jobs:
            return
        different = {id(starts[j.client]): starts[j.client] for j in jobs}
        pool = self._begun(len(different), num_rows, starts[jobs[0].client].numel())
        row_of = {}
        for i, (name, vector) in enumerate(different.items()):
            self._starts[i] = vector
            row_of[name] = i
        first = taken = 0
        while taken < len(jobs):
            while (length := self._length(len(jobs) - first)) and (
                first + length <= taken + num_rows
            ):
                some = jobs[first : first + length]
                share = _Share(
                    round,
                    tuple(row_of[id(starts[j.client])] for j in some),
                    tuple(i % num_rows for i in range(first, first + length)),
                    tuple(some),
                )
                self._handed.append(pool.submit(_in_worker, share))
                first += length
            finished = self._handed.popleft().result()
            for i, done in enumerate(finished, taken):
                held = done.payload is not None
                yield _carrying(done, self._matrix[i % num_rows]) if held else done
            taken += len(finished)

    def _length(self, num_left: int) -> int:
        """Return how many jobs to hand out at once: fewer towards the end, for balance."""
        return min(_MOST, num_left, max(1, num_left // (4 * self._num_processes)))

    def _begun(self, num_starts: int, num_rows: int, size: int) -> ProcessPoolExecutor:
        """Return the workers, idle, with memory enough."""
        wait(self._handed)  # what a rule left unread still writes
        self._handed.clear()
        if (
            self._pool is None
            or self._matrix.shape[0] < num_rows
            or self._starts.shape[0] < num_starts
        ):
            if self._pool is not None:
                self._pool.shutdown()
            self._starts, self._matrix = _shared(num_starts, size), _shared(num_rows, size)
            self._pool = ProcessPoolExecutor(  # and no Pool, which waits for the dead
                self._num_processes,
                context(),
                _begin,
                (self._seats, self._starts, self._matrix),
            )
        return self._pool


def _carrying(done: Done, delta: Tensor) -> Done:
    return replace(done, payload=replace(done.payload, delta=delta))


def _shared(*shape: int) -> Tensor:
    shared: Tensor = torch.empty(shape).share_memory_()  # type: ignore[no-untyped-call]
    return shared


@dataclass
class _Here:
    """What a worker knows. Who takes part follows from the seed, so it need not be sent."""

    seats: Seats
    starts: Tensor
    matrix: Tensor
    round: int = -1
    cohort: tuple[int, ...] = ()

    def enter(self, round: int) -> None:
        if round != self.round:
            self.round, self.cohort = round, self.seats.cohort(round)


_here: _Here | None = None


def _begin(seats: Seats, starts: Tensor, matrix: Tensor) -> None:
    global _here
    become_worker()
    _here = _Here(seats, starts, matrix)


def _in_worker(share: _Share) -> list[Done]:
    assert _here is not None
    here, all_done = _here, []
    here.enter(share.round)
    for start, row, job in zip(share.starts, share.rows, share.jobs, strict=True):
        envelope = here.seats.envelope(job.client, here.cohort, share.round)
        done = attempt(here.seats, envelope, here.starts[start], job)
        if done.payload is not None:
            here.matrix[row] = done.payload.delta
            done = _carrying(done, _NOTHING)
        all_done.append(done)
    return all_done
