"""Whether a device was left alone while it was measured: other work on it, and throttling."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .timing import synchronize

#: Seconds between two looks at a device.
_EVERY = 2.0
#: Runs of the reference kernel in a look, of which the fastest counts.
_RUNS = 5
#: Looks at either end of a calibration that are compared with each other.
_ENDS = 3
#: Share of the device's time that others use, above which it is not idle.
BUSY_SHARE = 0.1
#: How much slower than its best the reference kernel may be at times, and how much slower than in
#: the beginning in the end.
SLOWER_AT_TIMES = 0.25
SLOWER_IN_THE_END = 0.1
#: How much a clock may fall, of what it was at its highest.
CLOCK_FALL = 0.15


@dataclass
class Watch:
    """Looks at a device from time to time, with a kernel whose time should never change."""

    device: torch.device
    now: Callable[[], float] = time.monotonic
    #: Seconds of the reference kernel and MHz of the device's clock, per look.
    kernel: list[float] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)
    #: Share of the device's time that was in use before anything was measured; None if unknown.
    busy: float | None = None
    _last: float = float("-inf")
    _run: Callable[[], object] | None = None

    def begin(self) -> None:
        """Looks at who else uses the device; to be called before any work of one's own."""
        share = _told(torch.cuda.utilization, self.device)
        self.busy = None if share is None else share / 100

    def tick(self) -> None:
        """Looks at the device, if the last look was a while ago."""
        if self.now() - self._last < _EVERY:
            return
        if self._run is None:
            self._run = _reference(self.device)
            self._run()
            synchronize(self.device)
        times = []
        for _ in range(_RUNS):
            start = time.perf_counter()
            self._run()
            synchronize(self.device)
            times.append(time.perf_counter() - start)
        self.kernel.append(min(times))
        # Read right after the work: an idle device clocks down.
        clock = _told(torch.cuda.clock_rate, self.device)
        if clock is not None:
            self.clock.append(clock)
        self._last = self.now()

    def complaints(self) -> list[str]:
        """What makes the measurements doubtful, each in one sentence; empty if nothing does."""
        found = []
        if self.busy is not None and self.busy > BUSY_SHARE:
            found.append(f"other work used {self.busy:.0%} of the device before the run")
        if len(self.kernel) >= 2 * _ENDS:
            best = min(self.kernel)
            late = statistics.median(self.kernel[-_ENDS:]) / statistics.median(self.kernel[:_ENDS])
            # The slowest tenth: a single look may coincide with anything.
            tenth = sorted(self.kernel)[(9 * len(self.kernel)) // 10 - 1] / best
            if late - 1 > SLOWER_IN_THE_END:
                found.append(f"a reference kernel took {late - 1:.0%} longer in the end")
            elif tenth - 1 > SLOWER_AT_TIMES:
                found.append(f"one run in ten of a reference kernel took {tenth - 1:.0%} longer")
        if len(self.clock) >= 2 * _ENDS:
            fall = 1 - statistics.median(self.clock[-_ENDS:]) / max(self.clock)
            if fall > CLOCK_FALL:
                found.append(f"the device's clock fell by {fall:.0%}")
        return found


def _reference(device: torch.device) -> Callable[[], object]:
    """A matrix product that keeps a device busy for about a millisecond."""
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (384, torch.float32)
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    return lambda: left @ right


def _told(ask: Callable[[torch.device], int], device: torch.device) -> float | None:
    """What the driver's library says of a GPU; None without pynvml, or if it does not say."""
    if device.type != "cuda":
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = float(ask(device))
    except Exception:
        # torch raises ModuleNotFoundError without pynvml, and RuntimeErrors for the driver's.
        return None
    return value if value >= 0 else None
