"""Long calls that wait for the host, timed in short turns.

A host that others use is slow for seconds at a time. Calls that take a second each meet it by
chance, which few rounds do not even out; parts of a few milliseconds that take turns meet it alike.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import nn

from smartattn.timing import synchronize

T = TypeVar("T")
#: Ends a turn: returns when the next one begins.
Turn = Callable[[], None]


def _no_turn() -> None:
    """Goes on."""


def _use(device: torch.device) -> None:
    """Makes a thread launch where the others do."""
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)


class _Player:
    """One call, which runs in a thread of its own while it holds the baton.

    The thread stays: cuDNN and cuBLAS keep what they have built per thread.
    """

    def __init__(self, name: str, call: Callable[[Turn], Any], device: torch.device) -> None:
        self._call = call
        self._device = device
        self._threads = ThreadPoolExecutor(1, name, _use, (device,))
        self._mine, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._ms = 0.0
        self._stopped = False
        #: The turn just played was the last one.
        self.over = False

    def alone(self) -> Any:
        """What the call returns, in one turn."""
        return self._threads.submit(self._call, _no_turn).result()

    def begin(self) -> Future[float]:
        """Lines up for :meth:`play`; the future is of the milliseconds of all turns."""
        return self._threads.submit(self._run)

    def play(self) -> None:
        """One turn."""
        self._mine.release()
        self._back.acquire()

    def close(self) -> None:
        self._stopped = True
        self._mine.release()
        self._threads.shutdown()

    def _run(self) -> float:
        self._ms, self.over = 0.0, False
        try:
            self._begin_turn()
            self._call(self._turn)
            self._end_turn()
        finally:
            # Whatever went wrong, the others must not wait for it.
            self.over = True
            self._back.release()
        return self._ms

    def _turn(self) -> None:
        self._end_turn()
        self._back.release()
        self._begin_turn()

    def _begin_turn(self) -> None:
        self._mine.acquire()
        if self._stopped:
            raise RuntimeError("the round was broken off")
        self._started = time.perf_counter()

    def _end_turn(self) -> None:
        synchronize(self._device)
        self._ms += (time.perf_counter() - self._started) * 1e3


class Turns:
    """Calls that run side by side, one of them at any time.

    Args:
        calls: by name; each is handed what ends its turn.
    """

    def __init__(self, calls: Mapping[str, Callable[[Turn], Any]], device: torch.device) -> None:
        self._players = {name: _Player(name, call, device) for name, call in calls.items()}

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *_: object) -> None:
        for player in self._players.values():
            player.close()

    def alone(self, name: str) -> Any:
        """Runs one call by itself, in its thread."""
        return self._players[name].alone()

    def round(self, order: Sequence[str]) -> dict[str, float]:
        """Milliseconds of each call's turns; ``order`` says whose turn is when, over and over.

        Raises:
            BaseException: what a call raised.
        """
        waiting = {name: self._players[name].begin() for name in order}
        ends = dict(waiting)
        while waiting:
            for name in tuple(waiting):
                self._players[name].play()
                # The last turn ends just before its call does.
                if self._players[name].over:
                    del waiting[name]
        return {name: end.result() for name, end in ends.items()}


def twin(model: nn.Module) -> Any:
    """A copy with its own configuration and caches of choices, and the same weights."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def by_forwards(model: nn.Module, call: Callable[[], T]) -> Callable[[Turn], T]:
    """A call whose turns end where a forward of the model begins, after the first one."""

    def run(turn: Turn) -> T:
        begun = False

        def before(*_: Any) -> None:
            nonlocal begun
            if begun:
                turn()
            begun = True

        hook = model.register_forward_pre_hook(before)
        try:
            return call()
        finally:
            hook.remove()

    return run
