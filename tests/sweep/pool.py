"""Worker processes: a crash or a hang costs one architecture, not the sweep."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

# A fresh interpreter per worker: torch's threads do not survive a fork.
_CONTEXT = multiprocessing.get_context("spawn")


class _Worker:
    """One process that answers one job at a time."""

    def __init__(self, prepare: Callable[[], None], work: Callable[[Any], Any]) -> None:
        self.connection, remote = _CONTEXT.Pipe()
        arguments = (remote, prepare, work)
        self.process = _CONTEXT.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        remote.close()
        self.job: Any = None
        self.deadline = float("inf")

    def give(self, job: Any, timeout: float) -> None:
        self.job = job
        self.deadline = time.monotonic() + timeout
        with contextlib.suppress(BrokenPipeError):  # the worker has died: receiving will tell
            self.connection.send(job)

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


def run_jobs(
    jobs: Sequence[Any],
    work: Callable[[Any], Any],
    *,
    prepare: Callable[[], None],
    workers: int,
    timeout: float,
    startup: float = 60.0,
) -> Iterator[tuple[Any, Any, str]]:
    """Yields (job, answer, failure) as they are done; `failure` is empty where there is an answer.

    A worker that dies or takes longer than `timeout` seconds over a job is replaced; a new one gets
    `startup` seconds on top for its imports. `prepare` runs once in each worker, before its first
    job. Both functions must be importable by name.
    """
    pending = list(reversed(jobs))
    busy: list[_Worker] = []

    def start_worker() -> None:
        worker = _Worker(prepare, work)
        worker.give(pending.pop(), timeout + startup)
        busy.append(worker)

    def retire(worker: _Worker) -> None:
        busy.remove(worker)
        worker.stop()

    try:
        for _ in range(min(workers, len(pending))):
            start_worker()
        while busy:
            nearest = min(worker.deadline for worker in busy) - time.monotonic()
            ready = wait([worker.connection for worker in busy], max(0.0, nearest))
            for worker in list(busy):
                job = worker.job
                if worker.connection in ready:
                    answer, failure = _receive(worker)
                elif time.monotonic() >= worker.deadline:
                    answer, failure = None, f"no answer within {timeout:g} s"
                else:
                    continue
                if failure or not pending:
                    retire(worker)
                    if pending:
                        start_worker()
                else:
                    worker.give(pending.pop(), timeout)
                yield job, answer, failure
    finally:
        for worker in busy:
            worker.stop()


def _receive(worker: _Worker) -> tuple[Any, str]:
    try:
        return worker.connection.recv(), ""
    except (EOFError, ConnectionError):
        worker.process.join()
        return None, f"the worker died with exit code {worker.process.exitcode}"


def _serve(connection: Connection, prepare: Callable[[], None], work: Callable[[Any], Any]) -> None:
    prepare()
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(work(job))
