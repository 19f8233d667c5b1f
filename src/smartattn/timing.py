"""Times callables on a device: host and device time, median and spread, in interleaved rounds."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Function = Callable[[], object]

#: Clock ticks per microsecond that ``torch.cuda._sleep`` is asked for: above what GPUs clock at, so
#: that the device never wakes up before the host has queued its calls.
_TICKS_PER_US = 2500
#: Calls in a burst that still fit the launch queue of a device.
_MAX_BURST = 16
#: Seconds that a burst aims at, and that end one on a CPU.
_BURST_SECONDS = 1e-3
#: Multiple of the time asked for after which even the fewest rounds are cut short.
_HARD_LIMIT = 3.0
#: Multiple of the fastest one's time at which a function gets no rounds after the second: nobody
#: would choose it, and the little that has to be known of it is known. One round may have met
#: other work.
_HOPELESS = 5.0


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of one call in microseconds; spreads are interquartile range / median.

    Device times are medians over the rounds, and so are those of a CPU; the host time of a GPU's
    call is the least of the rounds', each of which has that of its median call.

    ``device_us`` is how long the device works on a call, ``host_us`` how long the call takes to
    return. On a CPU both are the same. Caches are warm, with the inputs of the call before, unless
    they are flushed.
    """

    host_us: float
    host_spread: float
    device_us: float
    device_spread: float
    rounds: int
    #: Bytes allocated on the device at the worst moment, above what was before; 0 on a CPU.
    peak_bytes: int


def interleaved(
    functions: Mapping[str, Function],
    device: torch.device,
    *,
    max_rounds: int = 15,
    min_rounds: int = 3,
    seconds: float = 0.1,
    spread: float = 0.02,
    flush: Function | None = None,
) -> dict[str, Timing]:
    """Times functions against each other, a burst of each per round, so that drift hits all alike.

    Ends after ``max_rounds``, or, once ``min_rounds`` are done, after ``seconds`` or when the
    median of each function is known to within ``spread``: that of the larger one of host and device
    time, which is what a call takes. A machine so slow that the fewest rounds take several times as
    long gets fewer, and so does a function that is several times slower than the fastest.

    Args:
        functions: what to time; each has run at least once before.
        flush: run before each timed call, its time not counted: see :func:`cache_flush`.

    Raises:
        Whatever a function raises.
    """
    bursts: dict[str, Callable[[], tuple[float, float]]] = {}
    peaks: dict[str, int] = {}
    for name, function in functions.items():
        peaks[name] = _peak_bytes(function, device)
        bursts[name] = _burst(function, device, flush)
    host: dict[str, list[float]] = {name: [] for name in functions}
    busy: dict[str, list[float]] = {name: [] for name in functions}
    start = time.perf_counter()
    order = list(bursts)
    for round_number in range(1, max_rounds + 1):
        for name in order:
            host_us, device_us = bursts[name]()
            host[name].append(host_us)
            busy[name].append(device_us)
        # Whoever comes after a slow one is not always the same.
        order.append(order.pop(0))
        if round_number == 2:
            least = {name: min(map(max, host[name], busy[name])) for name in functions}
            order = [name for name in order if least[name] <= _HOPELESS * min(least.values())]
        elapsed = time.perf_counter() - start
        settled = all(
            _uncertainty(list(map(max, host[name], busy[name]))) <= spread for name in order
        )
        if round_number >= min_rounds and (settled or elapsed >= seconds):
            break
        if elapsed >= _HARD_LIMIT * seconds:
            break
    return {
        name: Timing(
            # Other work on the cores only ever adds to what a launch takes.
            host_us=min(host[name]) if device.type == "cuda" else statistics.median(host[name]),
            host_spread=relative_spread(host[name]),
            device_us=statistics.median(busy[name]),
            device_spread=relative_spread(busy[name]),
            rounds=len(busy[name]),
            peak_bytes=peaks[name],
        )
        for name in functions
    }


def cache_flush(device: torch.device) -> Function:
    """A function that replaces what is in the caches of a device by something else."""
    size = 64 * 1024**2
    if device.type == "cuda":
        size = torch.cuda.get_device_properties(device).L2_cache_size
    # Twice the size, since not every line of a cache is where a new one goes.
    filler = torch.empty(2 * size, dtype=torch.uint8, device=device)
    return filler.zero_


def relative_spread(times: list[float]) -> float:
    """Interquartile range divided by the median; 0 for fewer than two times."""
    if len(times) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / middle if middle > 0 else 0.0


def synchronize(device: torch.device) -> None:
    """Waits until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _uncertainty(times: list[float]) -> float:
    return relative_spread(times) / math.sqrt(len(times))


def _peak_bytes(function: Function, device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return max(0, torch.cuda.max_memory_allocated(device) - before)


def _burst(
    function: Function, device: torch.device, flush: Function | None
) -> Callable[[], tuple[float, float]]:
    """A function that runs a burst of calls and gives (host, device) microseconds per call."""
    synchronize(device)
    start = time.perf_counter()
    function()
    host_us = (time.perf_counter() - start) * 1e6
    synchronize(device)
    total_us = (time.perf_counter() - start) * 1e6
    # Enough calls for the clock, few enough for long ones to be timed at all.
    calls = int(min(_MAX_BURST, max(1, _BURST_SECONDS * 1e6 / max(total_us, 1.0))))
    if device.type == "cuda":
        return lambda: _cuda_burst(function, device, calls, host_us, flush)
    return lambda: _cpu_burst(function, calls, flush)


def _cpu_burst(function: Function, calls: int, flush: Function | None) -> tuple[float, float]:
    done, elapsed = 0, 0.0
    start = time.perf_counter()
    while done < calls:
        if flush is not None:
            flush()
            start = time.perf_counter() - elapsed
        function()
        done += 1
        elapsed = time.perf_counter() - start
        # Other work on the cores can make any call take a hundred times as long.
        if elapsed > _BURST_SECONDS:
            break
    us = elapsed * 1e6 / done
    return us, us


def _cuda_burst(
    function: Function,
    device: torch.device,
    calls: int,
    expected_host_us: float,
    flush: Function | None,
) -> tuple[float, float]:
    with torch.cuda.device(device):
        torch.cuda.synchronize(device)
        if flush is None:
            return _cuda_calls(function, calls, expected_host_us)
        times = []
        for _ in range(calls):
            flush()
            times.append(_cuda_calls(function, 1, expected_host_us))
        host_us, device_us = zip(*times, strict=True)
        return statistics.median(host_us), statistics.fmean(device_us)


def _cuda_calls(function: Function, calls: int, expected_host_us: float) -> tuple[float, float]:
    # While the device sleeps the host queues all calls: the events then enclose device time only,
    # however slow the host is.
    ahead_us = min(2.0 * expected_host_us * calls, 50_000.0)
    torch.cuda._sleep(int(ahead_us * _TICKS_PER_US))  # type: ignore[no-untyped-call]
    before, after = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    before.record()
    marks = [time.perf_counter()]
    for _ in range(calls):
        function()
        marks.append(time.perf_counter())
    after.record()
    after.synchronize()
    # One call of a burst that met other work must not count for all.
    host_us = statistics.median(end - start for start, end in itertools.pairwise(marks)) * 1e6
    return host_us, before.elapsed_time(after) * 1e3 / calls
