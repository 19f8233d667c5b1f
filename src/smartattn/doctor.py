"""What works on this machine and what does not: versions, devices, profiles, and every backend that
can be used, run on small calls and compared with attention in float64.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from . import profiles
from .backends import BACKENDS, Backend
from .machine import changed_since, driver_version, identify, versions
from .measure import runner
from .reference import error_of, expected
from .workload import Workload

#: Seconds per device after which no further call is tested, once every backend ran one, unless
#: others are asked for.
SECONDS = 2.0

Health = Literal["works", "wrong", "fails", "unusable", "untested"]


@dataclass(frozen=True, slots=True)
class BackendReport:
    """One backend on one device."""

    backend: str
    #: "unusable": it refuses this device; "untested": it runs the models' own code.
    health: Health
    #: Calls that were right, and calls that were tried.
    passed: int
    tried: int
    #: Largest error relative to what the backend's tolerance allows; above 1 is wrong.
    worst: float
    #: What failed first, or why it cannot be used.
    problems: tuple[str, ...] = ()
    #: The command that would change that.
    fix: str | None = None


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """One device, the profile in force for it, and the backends on it."""

    device: str
    name: str
    #: GiB of memory, None for a CPU.
    memory: float | None
    profile: str
    profile_source: str
    profile_path: str | None
    #: What was passed over in the search, and what differs from the versions of the measurement.
    remarks: tuple[str, ...]
    backends: tuple[BackendReport, ...]
    #: Seconds that the self-test took, how many calls it came to, and how many there are.
    seconds: float
    reached: int
    cases: int
    #: The kinds of calls of which none was reached, in words.
    unreached: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """This machine."""

    versions: dict[str, str | None]
    devices: tuple[DeviceReport, ...]
    #: What is wrong with the machine as a whole, each with the command that would change it.
    problems: tuple[tuple[str, str], ...]

    @property
    def healthy(self) -> bool:
        """No backend that was tested gives wrong answers or fails."""
        return not any(
            backend.health in ("wrong", "fails")
            for device in self.devices
            for backend in device.backends
        )

    @property
    def untested(self) -> tuple[str, ...]:
        """The backends that can be used and run what no test here knows: the models' own code."""
        names = (
            backend.backend
            for device in self.devices
            for backend in device.backends
            if backend.health == "untested"
        )
        return tuple(dict.fromkeys(names))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {"healthy": self.healthy, **asdict(self)}


def examine(backends: Sequence[Backend] = BACKENDS, seconds: float = SECONDS) -> Report:
    """Looks at every device of this machine and tests every backend on it."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [*(torch.device("cuda", n) for n in range(count)), torch.device("cpu")]
    found = {"python": platform.python_version(), **versions("cuda").model_dump()}
    return Report(
        versions=found,
        devices=tuple(_device(device, backends, seconds) for device in devices),
        problems=tuple(_problems(count)),
    )


def _problems(gpus: int) -> list[tuple[str, str]]:
    driver = driver_version()
    if gpus or driver is None:
        return []
    if torch.version.cuda is None:
        return [
            (
                f"torch {torch.__version__} is built without CUDA, and there is an NVIDIA driver "
                f"({driver})",
                "pip install --force-reinstall torch",
            )
        ]
    return [
        (
            f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU, and there is an "
            f"NVIDIA driver ({driver})",
            'nvidia-smi && echo "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"',
        )
    ]


def _device(device: torch.device, backends: Sequence[Backend], seconds: float) -> DeviceReport:
    identity = identify(device)
    found = profiles.found_for(device)
    remarks = list(found.passed_over)
    if identity is not None and found.profile.versions is not None:
        differences = found.profile.versions.differences(versions(identity.kind))
        if differences:
            remarks.append(changed_since(differences))
    remarks += [f"{b.name}: {why}" for b in backends if (why := b.handicap(device)) is not None]
    memory = None
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    start = time.perf_counter()
    workloads = cases(device.type)
    tested, reached = _test(workloads, device, backends, seconds)
    return DeviceReport(
        device=str(device),
        name=str(identity or device),
        memory=memory,
        profile=found.profile.name,
        profile_source=found.source,
        profile_path=None if found.path is None else str(found.path),
        remarks=tuple(remarks),
        backends=tested,
        seconds=time.perf_counter() - start,
        reached=reached,
        cases=len(workloads),
        unreached=_unreached(workloads, reached),
    )


def _unreached(workloads: Sequence[Workload], reached: int) -> tuple[str, ...]:
    """What none of the first few workloads is."""
    done = {_kind(one) for one in workloads[:reached]}
    return tuple(dict.fromkeys(kind for one in workloads if (kind := _kind(one)) not in done))


def _kind(workload: Workload) -> str:
    if workload.mode != "forward":
        return {"train": "training", "decode": "decoding"}[workload.mode]
    if workload.side == "packed":
        return "packed sequences"
    if workload.window:
        return "windows"
    if not workload.causal:
        return "forwards of encoders"
    return "forwards without padding" if workload.side == "none" else "padded forwards"


# -- the self-test -------------------------------------------------------------------------------


def cases(kind: str) -> list[Workload]:
    """Small calls: one of each kind, in the commonest dtype, comes before a second of any.

    The time may not suffice for all.
    """
    dtypes = ("bfloat16", "float32", "float16") if kind == "cuda" else ("float32", "bfloat16")
    sizes: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 64}
    made: list[list[Workload]] = []
    for dtype in dtypes:
        common = {"dtype": dtype, **sizes}
        forward = {"mode": "forward", **common}
        made.append([
            _case(causal=True, side="left", batch=3, length=65, padding_share=0.4, **forward),
            _case(causal=True, side="left", batch=3, length=70, padding_share=0.4, mode="decode",
                  **common),
            _case(causal=True, side="left", batch=2, length=48, padding_share=0.4, mode="train",
                  **common),
            _case(causal=True, side="packed", batch=1, length=96, sequences=3, **forward),
            _case(causal=True, side="none", batch=2, length=96, window=16, **forward),
            _case(causal=True, side="none", batch=2, length=128, **forward),
            _case(causal=False, side="right", batch=3, length=50, padding_share=0.4, **forward),
            _case(causal=True, side="right", batch=2, length=80, padding_share=0.3, **forward),
            _case(causal=False, side="right", batch=2, length=48, padding_share=0.4, mode="train",
                  **common),
        ])  # fmt: skip
    # One of each kind, then the same in the other dtypes, then what is left of all.
    kinds = len({_kind(case) for case in made[0]})
    first, rest = ([part[:kinds] for part in made], [part[kinds:] for part in made])
    return [case for part in (*first, *rest) for case in part]


def _case(*, mode: Any, length: int, **fields: Any) -> Workload:
    return Workload(mode=mode, q_len=1 if mode == "decode" else length, kv_len=length, **fields)


@dataclass
class _Tally:
    passed: int = 0
    tried: int = 0
    worst: float = 0.0
    wrong: str | None = None
    failed: str | None = None
    refused: tuple[str, ...] = ()


def _test(
    workloads: Sequence[Workload],
    device: torch.device,
    backends: Sequence[Backend],
    seconds: float,
) -> tuple[tuple[BackendReport, ...], int]:
    """What came of each backend, and how many of the workloads time was left for."""
    tallies = {backend.name: _Tally() for backend in backends}
    end = time.perf_counter() + seconds
    reached = 0
    for workload in workloads:
        late = time.perf_counter() > end
        reached += not late
        # Time is up: only what has not had a turn yet.
        due = [
            b for b in backends if _is_due(b, tallies[b.name], late) and not _builds(b, workload)
        ]
        if due:
            _try(workload, device, due, tallies)
    # Building takes seconds for each kind of call. It comes last, and begins with training, which
    # has a forward in it.
    for workload in sorted(workloads, key=lambda one: one.mode != "train"):
        late = time.perf_counter() > end
        for backend in backends:
            if _is_due(backend, tallies[backend.name], late) and _builds(backend, workload):
                _try(workload, device, [backend], tallies)
    verdicts = tuple(_verdict(backend, tallies[backend.name], device) for backend in backends)
    return verdicts, reached


def _is_due(backend: Backend, tally: _Tally, late: bool) -> bool:
    return not backend.last_resort and not (late and tally.tried) and not backend.unavailable()


def _builds(backend: Backend, workload: Workload) -> bool:
    cpu = torch.device("cpu")
    return backend.built_for(workload.plan(cpu), workload.call(cpu)) is not None


def _try(
    workload: Workload,
    device: torch.device,
    backends: Sequence[Backend],
    tallies: dict[str, _Tally],
) -> None:
    plan, call = workload.plan(device), workload.call(device)
    able = []
    for backend in backends:
        refusals = backend.refusals(plan, call)
        tally = tallies[backend.name]
        tally.refused = tally.refused or tuple(refusals)
        if not refusals:
            able.append(backend)
    if not able:
        return
    tensors = workload.tensors(device)
    references = expected(workload, tensors)
    for backend in able:
        tally = tallies[backend.name]
        tally.tried += 1
        try:
            result = runner(backend, plan, call, tensors)()
            error = error_of(workload, *result, references)
        except Exception as problem:
            # A broken build may raise anything; the others are still to be tested.
            message = " ".join(str(problem).split())[:200]
            tally.failed = tally.failed or f"{type(problem).__name__}: {message}, for {workload}"
            continue
        allowed = backend.support.tolerances[workload.torch_dtype]
        tally.worst = max(tally.worst, error / allowed)
        if error <= allowed:
            tally.passed += 1
        else:
            tally.wrong = tally.wrong or (
                f"wrong output: relative error {error:.3g}, allowed is {allowed:.3g}, "
                f"for {workload}"
            )


def _verdict(backend: Backend, tally: _Tally, device: torch.device) -> BackendReport:
    counts: dict[str, Any] = {"passed": tally.passed, "tried": tally.tried, "worst": tally.worst}
    if backend.last_resort:
        why = ("runs the models' own code, where all others refuse",)
        return BackendReport(backend.name, "untested", problems=why, **counts)
    problems = tuple(text for text in (tally.wrong, tally.failed) if text)
    if problems:
        health: Health = "wrong" if tally.wrong else "fails"
        return BackendReport(backend.name, health, problems=problems, fix=_fix(backend), **counts)
    if tally.tried:
        return BackendReport(backend.name, "works", **counts)
    unavailable = backend.unavailable()
    reasons = (unavailable,) if unavailable else tally.refused
    devices = backend.support.devices
    if devices is not None and device.type not in devices:
        # No package and no command would help here.
        why = (f"runs on {' or '.join(sorted(devices))} only",)
        return BackendReport(backend.name, "unusable", problems=why, **counts)
    return BackendReport(backend.name, "unusable", problems=reasons, fix=backend.remedy(), **counts)


def _fix(backend: Backend) -> str:
    return (
        backend.remedy()
        or f"keep it out: smartattn.configure(backends=[...]) without {backend.name}"
    )
