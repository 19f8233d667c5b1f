"""Calibrates several devices at once, each in a process of its own.

Threads would not do: the host's time for a call is part of what is measured, and threads of one
process take turns at Python's lock.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from .calibrate import CalibrationError, Outcome, Request, alone, calibrate

#: Cores that a calibration keeps busy: one that launches, one for the backward and the driver.
_CORES = 2


def at_once(devices: int) -> int:
    """How many devices can be calibrated side by side without disturbing each other."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    return max(1, min(devices, cores // _CORES))


def calibrate_all(
    requests: Sequence[Request], waiting: Callable[[], None] = lambda: None
) -> Iterator[tuple[Request, Outcome | CalibrationError]]:
    """Yields what each calibration came to, in the order in which they end.

    Ctrl-C reaches the processes too; each saves what it has measured.
    """
    context = multiprocessing.get_context("spawn")
    with (
        alone(waiting),
        ProcessPoolExecutor(at_once(len(requests)), mp_context=context) as pool,
    ):
        running = {pool.submit(_one, request): request for request in requests}
        for future in as_completed(running):
            yield running[future], future.result()


def _one(request: Request) -> Outcome | CalibrationError:
    # An exception that is returned keeps the other calibrations going.
    try:
        return calibrate(request, lock=False)
    except CalibrationError as error:
        return error
