"""Times the backends on one workload, and checks what they compute while at it."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from .backends import NAMED, Backend
from .call import Call
from .features import FEATURES, Mode, features
from .least_squares import relative_fit
from .plan import Plan
from .reference import Expected, error_of, expected
from .samples import Sample, Status
from .timing import Function, Timing, interleaved, synchronize
from .workload import Tensors, Workload

#: Output and gradients of a call, the latter empty without a backward.
Result = tuple[torch.Tensor, tuple[torch.Tensor, ...]]

#: Batches of other lengths that preparation is timed on, and seconds after which one is enough.
_TWINS = 3
_LONG = 0.05
#: First runs of a backend that are needed to know how long others will take, and the groups that
#: are dared until then.
_FEWEST_FIRST_RUNS = 3
_FEW_GROUPS = 16
#: How many times as many first runs make it worth to find that out anew.
_REFIT = 1.25
#: Workloads of a kind on which a backend's preparation is timed whatever their seed.
_PREPARED = 4
#: Workloads of a kind on which a backend that builds kernels is timed whatever their seed.
_BUILT = 8
#: Seconds of a first run above which kernels are built for the shape.
_BUILDS = 0.01
_GROUPS = list(FEATURES).index("groups")


@dataclass
class Patience:
    """Knows how long first runs take, to leave out what would use up the time of many others.

    Kernels that are built for each shape make a backend that runs one group of sequences after the
    other take seconds for a batch that it then runs in milliseconds. Those that are built for each
    kind of call, as :meth:`~smartattn.backends.Backend.built_for` tells them apart, take seconds
    once: first runs of kinds that are not built yet have a limit of their own, all together.
    """

    #: Longest first run that is waited for.
    seconds: float
    #: Leave a backend that builds kernels for each shape out of every second workload that others
    #: can be compared on, once some of the kind are known: it takes many times as long as they do.
    #: Likewise preparation is timed on every third workload alone, once some of its kind are known.
    thrifty: bool = False
    #: Seconds for kernels that are built for each kind of call. A thrifty one has one kind built
    #: of those that differ in the heads per group alone: the models know what a group changes.
    building: float = math.inf
    #: Seconds that such kernels have taken so far.
    built_seconds: float = 0.0
    _kinds: set[Hashable] = field(default_factory=set)
    _classes: set[Hashable] = field(default_factory=set)
    _longest_build: dict[tuple[str, Mode], float] = field(default_factory=dict)
    _seen: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    #: How many first runs were fitted, the seconds of one, and those of each group in it.
    _lines: dict[str, tuple[int, float, float]] = field(default_factory=dict)
    _prepared: dict[tuple[str, ...], int] = field(default_factory=lambda: defaultdict(int))
    _timed: dict[tuple[str, ...], int] = field(default_factory=lambda: defaultdict(int))

    def learn(self, sample: Sample, here: bool = True) -> None:
        """Takes note of a first run.

        Args:
            here: it ran in this process, which still has what was built for it.
        """
        if sample.first_us <= 0:
            return
        kind, alike = _built_for(sample.backend, sample.workload)
        if kind is None or kind in self._kinds:
            groups = _groups(sample.workload)
            self._seen[sample.backend].append((groups, sample.first_us * 1e-6))
            self._timed[(sample.backend, sample.workload.mode, sample.workload.side)] += 1
        elif here:
            self._kinds.add(kind)
            self._classes.add(alike)
            seconds, of = sample.first_us * 1e-6, (sample.backend, sample.workload.mode)
            self.built_seconds += seconds
            self._longest_build[of] = max(seconds, self._longest_build.get(of, 0.0))

    def spares(self, backend: str, workload: Workload) -> bool:
        """Whether a workload is one that a backend is left out of."""
        seconds = [seconds for _, seconds in self._seen[backend]]
        builds = len(seconds) >= _FEWEST_FIRST_RUNS and float(np.median(seconds)) > _BUILDS
        known = self._timed[(backend, workload.mode, workload.side)] >= _BUILT
        return self.thrifty and builds and known and workload.seed % 2 == 1

    def times_preparation(self, backend: str, workload: Workload) -> bool:
        """Whether what is made once per forward is timed on a workload; asked once of each."""
        kind = (backend, workload.mode, workload.side, workload.dtype)
        if self.thrifty and self._prepared[kind] >= _PREPARED and workload.seed % 3:
            return False
        self._prepared[kind] += 1
        return True

    def lasts(self, backend: str, workload: Workload) -> bool:
        """Whether the first run of a backend will end in time, as far as is known."""
        kind, alike = _built_for(backend, workload)
        if kind is not None and kind not in self._kinds:
            if self.thrifty and alike in self._classes:
                return False
            longest = self._longest_build.get((backend, workload.mode), 0.0)
            return self.built_seconds + longest <= self.building
        if len(self._seen[backend]) < _FEWEST_FIRST_RUNS:
            return _groups(workload) <= _FEW_GROUPS
        start, each = self._line(backend)
        return start + each * _groups(workload) <= self.seconds

    def _line(self, backend: str) -> tuple[float, float]:
        """Seconds of a first run, and of each group in it."""
        count = len(self._seen[backend])
        fitted, start, each = self._lines.get(backend, (0, 0.0, 0.0))
        # A fit after every run would take a tenth of a calibration.
        if count > _REFIT * fitted:
            groups, seconds = np.array(self._seen[backend]).T
            amounts = np.stack([np.ones(count), groups], axis=1)
            start, each = map(float, relative_fit(amounts, np.maximum(seconds, 1e-6)))
            self._lines[backend] = count, start, each
        return start, each


@functools.lru_cache(maxsize=32)
def _built_for(name: str, workload: Workload) -> tuple[Hashable, Hashable]:
    """The kind that a backend builds kernels for, and that of the same call without groups.

    (None, None) for one that does not build kernels for kinds of calls.
    """
    backend = NAMED.get(name)
    if backend is None:
        return None, None
    cpu = torch.device("cpu")
    plan, call = workload.plan(cpu), workload.call(cpu)
    kind = backend.built_for(plan, call)
    if kind is None:
        return None, None
    alone = backend.built_for(plan, replace(call, heads=call.kv_heads))
    return (name, kind), (name, alone)


@functools.lru_cache(maxsize=4)
def _groups(workload: Workload) -> float:
    cpu = torch.device("cpu")
    return features(workload.plan(cpu), workload.call(cpu))[_GROUPS]


def measure(
    index: int,
    workload: Workload,
    device: torch.device,
    backends: tuple[Backend, ...],
    excluded: dict[str, str],
    seconds: float,
    patience: Patience | None = None,
    flush: Function | None = None,
) -> list[Sample]:
    """One sample per backend that can run a workload; none where there is nothing to choose.

    What is timed is a layer like the second one of a forward: everything that the layers share is
    there. What the first one does beyond that is timed apart, on batches of the same padded shape
    with other lengths, as the next batch of a user would be.

    Args:
        index: place of the workload in its grid.
        excluded: why backends are left out; those whose output is wrong or that fail are added.
        seconds: what the rounds may take together.
        patience: how long to wait for first runs; None waits for all.
        flush: see :func:`~smartattn.timing.interleaved`.
    """
    plan, call = workload.plan(device), workload.call(device)
    able = candidates(plan, call, backends, excluded)
    if len(able) < 2:
        return []
    try:
        tensors = workload.tensors(device)
        references = expected(workload, tensors)
    except Exception as problem:
        if not lacks_memory(problem):
            raise
        release(device)
        return []
    found: dict[str, Sample] = {}
    functions: dict[str, Callable[[], Result]] = {}
    spared = {b.name for b in able if patience is not None and patience.spares(b.name, workload)}
    if len(able) - len(spared) < 2:
        spared = set()
    for backend in able:
        sample = Sample(index, workload, backend.name, "ok")
        if backend.name in spared:
            continue
        if (
            patience is not None
            and not backend.indispensable
            and not patience.lasts(backend.name, workload)
        ):
            found[backend.name] = replace(sample, status="slow")
            continue
        sample, function, reason = _verified(sample, backend, plan, call, tensors, references)
        if patience is not None:
            patience.learn(sample)
        if function is not None:
            functions[backend.name] = function
        if sample.status == "memory":
            release(device)
        if reason:
            excluded[backend.name] = f"{reason}, for {workload}"
        found[backend.name] = sample
    timings = _timings(functions, device, seconds, flush)
    named = {backend.name: backend for backend in able}
    for name in functions:
        timing = timings.get(name)
        prepare_us = 0.0
        if timing is not None and (patience is None or patience.times_preparation(name, workload)):
            prepare_us = _prepare_us(named[name], workload, device, tensors)
        found[name] = (
            replace(found[name], status="memory")
            if timing is None
            else replace(
                found[name],
                host_us=timing.host_us,
                host_spread=timing.host_spread,
                device_us=timing.device_us,
                device_spread=timing.device_spread,
                rounds=timing.rounds,
                peak_bytes=timing.peak_bytes,
                prepare_us=prepare_us,
            )
        )
    return list(found.values())


def _takes_all_lengths(backend: Backend) -> bool:
    """Whether one kernel takes sequences of all lengths."""
    return backend.walks in ("sequences", "tokens")


def takes_sequences(device: torch.device, backends: tuple[Backend, ...]) -> bool:
    """Whether one kernel takes sequences of several lengths here, in half precision on a GPU."""
    tiny = _tiny("forward", device)
    able = candidates(tiny.plan(device), tiny.call(device), backends, {})
    return any(map(_takes_all_lengths, able))


def _tiny(mode: Mode, device: torch.device) -> Workload:
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    return Workload(mode, True, "left", dtype, 2, 32, 32, 4, 4, 64, padding_share=0.4)


def warm_up(device: torch.device, backends: tuple[Backend, ...]) -> None:
    """Runs every backend once, so that no first run of :class:`Patience` starts up a library."""
    modes: tuple[Mode, ...] = ("forward", "train")
    for mode in modes:
        tiny = _tiny(mode, device)
        plan, call = tiny.plan(device), tiny.call(device)
        tensors = tiny.tensors(device)
        for backend in candidates(plan, call, backends, {}):
            if backend.built_for(plan, call) is not None:
                # That takes seconds, and says how many where it is measured.
                continue
            # One that fails does so again when it is measured, and is then left out.
            with contextlib.suppress(Exception):
                runner(backend, plan, call, tensors)()
    synchronize(device)


def candidates(
    plan: Plan, call: Call, backends: tuple[Backend, ...], excluded: Mapping[str, str]
) -> list[Backend]:
    """The backends between which ``choose`` would have to decide."""
    able = [
        backend
        for backend in backends
        if backend.name not in excluded
        and not backend.last_resort
        and not backend.refusals(plan, call)
    ]
    able = [backend for backend in able if backend.set_aside(plan, call) is None] or able
    if plan.device.type == "cuda" and any(map(_takes_all_lengths, able)):
        # Nearly every batch brings new lengths, and SDPA builds kernels for each of them: never
        # worth it beside a kernel that takes all lengths, and most of a calibration's time.
        able = [backend for backend in able if backend.name != "sdpa_unpadded"]
    return able


def free_memory(device: torch.device) -> int:
    """Free memory in bytes; a guess where the system does not tell."""
    if device.type == "cuda":
        # What torch keeps for tensors to come counts as used by the driver.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2 * 1024**3


def _verified(
    sample: Sample,
    backend: Backend,
    plan: Plan,
    call: Call,
    tensors: Tensors,
    references: list[Expected],
) -> tuple[Sample, Callable[[], Result] | None, str | None]:
    """The sample with its verdict, and what to time if it is right or why to leave it out."""
    tolerance = backend.support.tolerances[sample.workload.torch_dtype]
    status: Status
    try:
        synchronize(call.device)
        start = time.perf_counter()
        function = runner(backend, plan, call, tensors)
        result = function()
        synchronize(call.device)
        sample = replace(sample, first_us=(time.perf_counter() - start) * 1e6)
        error = error_of(sample.workload, *result, references)
    except Exception as problem:
        # Whatever a backend raises must not end the calibration of the others.
        if lacks_memory(problem):
            return replace(sample, status="memory"), None, None
        message = " ".join(str(problem).split())[:300]
        reason = f"fails with {type(problem).__name__}: {message}"
        return replace(sample, status="failed"), None, reason
    status = "ok" if error <= tolerance else "wrong"
    checked = replace(sample, status=status, error=error, tolerance=tolerance)
    if status == "ok":
        return checked, function, None
    reason = f"wrong output: relative error {error:.3g}, allowed is {tolerance:.3g}"
    return checked, None, reason


def runner(backend: Backend, plan: Plan, call: Call, tensors: Tensors) -> Callable[[], Result]:
    """A function that runs a backend once, with its backward if the tensors are for one."""
    query, key, value, leaves, grad_output = tensors
    run = backend.bind(plan, call)

    def forward() -> Result:
        with torch.no_grad():
            return run(query, key, value, {}), ()

    def both() -> Result:
        output = run(query, key, value, {})
        return output.detach(), torch.autograd.grad(output, leaves, grad_output)

    return forward if grad_output is None else both


def _prepare_us(
    backend: Backend, workload: Workload, device: torch.device, tensors: Tensors
) -> float:
    """How much longer the first layer takes than the second, on a batch of other lengths."""
    times = []
    own = workload.plan(device)
    kind = backend.built_for(own, workload.call(device))
    for number in range(_TWINS):
        twin = replace(workload, seed=workload.seed + 1 + number)
        plan, call = twin.plan(device), twin.call(device)
        if backend.built_for(plan, call) != kind or plan.is_padded != own.is_padded:
            # Building comes once per process, not once per forward; and little padding may come to
            # nothing in some batches, for which SDPA has other kernels.
            continue
        try:
            if backend.refusals(plan, call):
                break
            synchronize(device)
            start = time.perf_counter()
            function = runner(backend, plan, call, tensors)
            function()
            synchronize(device)
            first = time.perf_counter()
            function()
            synchronize(device)
            times.append((first - start) - (time.perf_counter() - first))
        except Exception as problem:
            if not lacks_memory(problem):
                raise
            release(device)
            break
        if times[-1] > _LONG:
            break
    # Not 0, which would stand for "not measured".
    return max(1.0, float(np.median(times)) * 1e6) if times else 0.0


def _timings(
    functions: dict[str, Callable[[], Result]],
    device: torch.device,
    seconds: float,
    flush: Function | None,
) -> dict[str, Timing]:
    if not functions:
        return {}
    try:
        return interleaved(functions, device, seconds=seconds, flush=flush)
    except Exception as problem:
        if not lacks_memory(problem):
            raise
        release(device)
        return {}


def lacks_memory(problem: Exception) -> bool:
    """Whether an error says that memory was too small."""
    if isinstance(problem, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(problem)
    return isinstance(problem, RuntimeError) and (
        "not enough memory" in text or "out of memory" in text
    )


def release(device: torch.device) -> None:
    """Gives memory that tensors no longer hold back to the device."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()
