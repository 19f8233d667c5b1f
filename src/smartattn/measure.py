"""Times the backends on one workload, and checks what they compute while at it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from .backends import Backend
from .call import Call
from .plan import Plan
from .reference import Expected, error_of, expected
from .samples import Sample, Status
from .timing import Timing, interleaved, synchronize
from .workload import Tensors, Workload

#: Output and gradients of a call, the latter empty without a backward.
Result = tuple[torch.Tensor, tuple[torch.Tensor, ...]]


def measure(
    index: int,
    workload: Workload,
    device: torch.device,
    backends: tuple[Backend, ...],
    excluded: dict[str, str],
    seconds: float,
) -> list[Sample]:
    """One sample per backend that can run a workload; none where there is nothing to choose.

    Args:
        index: place of the workload in its grid.
        excluded: why backends are left out; those whose output is wrong or that fail are added.
        seconds: what the rounds may take together.
    """
    plan, call = workload.plan(device), workload.call(device)
    able = candidates(plan, call, backends, excluded)
    if len(able) < 2:
        return []
    try:
        tensors = workload.tensors(device)
        references = expected(workload, tensors)
    except Exception as problem:
        if not _lacks_memory(problem):
            raise
        _release(device)
        return []
    found: dict[str, Sample] = {}
    functions: dict[str, Callable[[], Result]] = {}
    for backend in able:
        sample = Sample(index, workload, backend.name, "ok")
        sample, function, reason = _verified(sample, backend, plan, call, tensors, references)
        if function is not None:
            functions[backend.name] = function
        if sample.status == "memory":
            _release(device)
        if reason:
            excluded[backend.name] = f"{reason}, for {workload}"
        found[backend.name] = sample
    timings = _timings(functions, device, seconds)
    for name in functions:
        timing = timings.get(name)
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
            )
        )
    return list(found.values())


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
    if plan.is_packed:
        able = [backend for backend in able if not backend.uses_dense_mask(plan, call)] or able
    return able


def free_memory(device: torch.device) -> int:
    """Free memory in bytes; a guess where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
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
        function = runner(backend, plan, call, tensors)
        error = error_of(sample.workload, *function(), references)
    except Exception as problem:
        # Whatever a backend raises must not end the calibration of the others.
        if _lacks_memory(problem):
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


def _timings(
    functions: dict[str, Callable[[], Result]], device: torch.device, seconds: float
) -> dict[str, Timing]:
    if not functions:
        return {}
    try:
        return interleaved(functions, device, seconds=seconds)
    except Exception as problem:
        if not _lacks_memory(problem):
            raise
        _release(device)
        return {}


def _lacks_memory(problem: Exception) -> bool:
    if isinstance(problem, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(problem)
    return isinstance(problem, RuntimeError) and (
        "not enough memory" in text or "out of memory" in text
    )


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()
