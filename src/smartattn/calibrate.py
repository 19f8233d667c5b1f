"""The sweep: times every backend on a device within a budget and makes a profile of it."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from . import grid, profile, samples
from .backends import BACKENDS, Backend
from .fit import fit_profile
from .grid import RunMode
from .health import Watch
from .machine import Device, identify, versions
from .measure import Patience, free_memory, measure, warm_up
from .profile import Profile, ProfileError
from .samples import Header, Sample, SamplesError
from .surroundings import Surroundings, measure_surroundings
from .timing import cache_flush

#: Seconds of measuring by device kind and mode. Start and fit come on top: they leave room for
#: "quick" to be over within 60 s on two CPU cores and within 30 s on a GPU.
BUDGETS: Mapping[tuple[str, RunMode], float] = {
    ("cpu", "quick"): 30.0,
    ("cuda", "quick"): 14.0,
    ("cpu", "default"): 120.0,
    ("cuda", "default"): 120.0,
}
#: Seconds between two writes of the raw samples.
_SAVE_EVERY = 3.0
#: Seconds that the rounds of one workload may take, and the rounds.
_PER_WORKLOAD = {"cpu": 0.25, "cuda": 0.08}
#: Seconds that a first run of a backend may take.
_PATIENCE: Mapping[RunMode, float] = {"quick": 0.2, "default": 0.5}
#: Seconds for the last one, however little of the budget is left.
_LEAST = 0.02
#: Median spread of the timings above which other work must have been in the way.
BUSY_SPREAD = 0.15


class CalibrationError(RuntimeError):
    """Why a calibration cannot be made, in one line that says what to do."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to measure and where to keep it. None stands for the default."""

    device: torch.device
    mode: RunMode = "default"
    #: Seconds of measuring.
    budget: float | None = None
    #: Path of the profile; by default the user's own for the device.
    output: Path | None = None
    #: Measure although a current profile exists, and drop samples of a run that was cut short.
    force: bool = False
    seed: int = 0
    #: Flush the caches before every timed call.
    cold: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a calibration is. Times in seconds."""

    elapsed: float
    budget: float
    samples: int
    #: What is being timed.
    doing: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a calibration came to."""

    profile: Profile
    path: Path
    #: None where nothing was measured because a current profile exists.
    samples: Path | None
    measured: int = 0
    resumed: int = 0
    #: Workloads that were left out of by a backend for lack of memory.
    out_of_memory: int = 0
    #: Median spread of the device times, see ``BUSY_SPREAD``.
    spread: float = 0.0
    #: Workloads that a backend was not run on since its first run would have taken too long.
    slow: int = 0
    #: What makes the measurements doubtful, each in one sentence.
    complaints: tuple[str, ...] = ()


Report = Callable[[Progress], None]


def default_path(device: Device) -> Path:
    """Where the profile of a device goes if nobody says."""
    return profile.user_profiles() / f"{device.slug}.json"


def samples_path(device: Device, mode: RunMode) -> Path:
    """Where the raw samples of a device are kept."""
    return profile.user_profiles().parent / "samples" / f"{device.slug}-{mode}.safetensors"


def current(request: Request, identity: Device) -> Profile | None:
    """The profile that makes a new calibration unnecessary, if there is one."""
    try:
        existing = profile.load(request.output or default_path(identity))
    except ProfileError:
        return None
    if existing.device != identity or existing.run is None or existing.versions is None:
        return None
    if existing.run.cold != request.cold:
        return None
    if existing.versions.differences(versions(identity.kind)):
        return None
    return existing if request.mode == "quick" or existing.run.mode == "default" else None


def calibrate(
    request: Request,
    report: Report = lambda progress: None,
    waiting: Callable[[], None] = lambda: None,
    backends: tuple[Backend, ...] = BACKENDS,
    lock: bool = True,
) -> Outcome:
    """Measures a device and saves its profile, unless a current one exists.

    What was measured is kept if the run is cut short, by Ctrl-C too; the next run goes on from
    there. Only one calibration runs at a time on a machine, since two would disturb each other.

    Args:
        report: called with the progress after every workload.
        waiting: called once if another calibration has to end first.
        lock: False if the caller sees to it that nothing else calibrates the device.

    Raises:
        CalibrationError: the device cannot be used, or a file cannot be written.
        KeyboardInterrupt: the samples are saved.
    """
    identity = identify(request.device)
    if identity is None:
        raise CalibrationError(f"device {request.device} cannot be used here; try --device cpu")
    path = request.output or default_path(identity)
    raw = samples_path(identity, request.mode)
    for file in (path, raw):
        _check_writable(file, make_folder=file != request.output)
    with alone(waiting) if lock else nullcontext():
        existing = None if request.force else current(request, identity)
        if existing is not None:
            return Outcome(existing, path, None)
        sweep = _Sweep(request, identity, raw, report, backends)
        try:
            sweep.run()
            return sweep.outcome(path)
        except OSError as error:
            raise CalibrationError(
                f"cannot write {error.filename2 or error.filename or path} ({error.strerror}); "
                "make room for it and run the same command again"
            ) from error


def _check_writable(path: Path, *, make_folder: bool) -> None:
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise CalibrationError(f"{path} is a directory; name a file")
        if not path.parent.is_dir():
            raise CalibrationError(f"the folder of {path} does not exist; make it first")
        probe = path.with_name(f".{path.name}.{os.getpid()}.probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        advice = (
            "set XDG_DATA_HOME to a folder of yours" if make_folder else "choose another --output"
        )
        raise CalibrationError(f"cannot write {path} ({reason}); {advice}") from None


@contextmanager
def alone(waiting: Callable[[], None]) -> Iterator[None]:
    """Holds the machine's lock for calibrations; ``waiting`` is called if another one has it."""
    profile.user_profiles().parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(profile.user_profiles().parent / "calibrate.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waiting()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@dataclass
class _Sweep:
    request: Request
    identity: Device
    raw: Path
    report: Report
    backends: tuple[Backend, ...]
    taken: list[Sample] = field(default_factory=list)
    excluded: dict[str, str] = field(default_factory=dict)
    resumed: int = 0
    #: Seconds of measuring, those of a run that was cut short included.
    seconds: float = 0.0
    surroundings: Surroundings | None = None
    watch: Watch = field(init=False)

    def __post_init__(self) -> None:
        self.watch = Watch(self.request.device)

    def run(self) -> None:
        request, kind = self.request, self.identity.kind
        self.watch.begin()
        if not request.force:
            self._resume()
        budget = request.budget or BUDGETS[kind, request.mode]
        start = time.monotonic() - self.seconds
        saved = time.monotonic()
        done = {sample.workload for sample in self.taken}
        bounds = grid.limits(kind, request.mode, free_memory(request.device))
        every = grid.workloads(grid.families(kind, request.mode), bounds, request.seed)
        warm_up(request.device, self.backends)
        self.surroundings = measure_surroundings(request.device)
        patience = Patience(_PATIENCE[request.mode])
        for sample in self.taken:
            patience.learn(sample)
        flush = cache_flush(request.device) if request.cold else None
        complete = False
        try:
            for index, workload in enumerate(every):
                self.seconds = time.monotonic() - start
                if self.seconds >= budget:
                    break
                self.report(Progress(self.seconds, budget, len(self.taken), str(workload)))
                if workload not in done:
                    self.watch.tick()
                    self.taken += measure(
                        index,
                        workload,
                        request.device,
                        self.backends,
                        self.excluded,
                        seconds=min(_PER_WORKLOAD[kind], max(budget - self.seconds, _LEAST)),
                        patience=patience,
                        flush=flush,
                    )
                if time.monotonic() - saved > _SAVE_EVERY:
                    self._save(complete=False)
                    saved = time.monotonic()
            complete = True
        finally:
            self.seconds = time.monotonic() - start
            self._save(complete)
        self.report(Progress(budget, budget, len(self.taken), "fitting"))

    def outcome(self, path: Path) -> Outcome:
        """Fits and saves the profile."""
        taken = self.taken
        header = self._header(self.seconds, complete=True)
        made = fit_profile(header, taken, profile.default_rules(), self.raw.name)
        if not made.thresholds:
            reasons = "".join(f"; {name} {why}" for name, why in self.excluded.items())
            raise CalibrationError(
                f"{len(taken)} samples are too few to compare backends on {self.request.device}"
                f"{reasons}; run it on an idle machine or with a larger --budget"
            )
        if path == default_path(self.identity):
            profile.save_for_user(made)
        else:
            profile.save(made, path)
        spreads = sorted(sample.device_spread for sample in taken if sample.status == "ok")
        return Outcome(
            profile=made,
            path=path,
            samples=self.raw,
            measured=len(taken) - self.resumed,
            resumed=self.resumed,
            out_of_memory=sum(sample.status == "memory" for sample in taken),
            spread=spreads[len(spreads) // 2],
            slow=sum(sample.status == "slow" for sample in taken),
            complaints=tuple(self.watch.complaints()),
        )

    def _header(self, seconds: float, complete: bool) -> Header:
        return Header(
            device=self.identity,
            versions=versions(self.identity.kind),
            date=datetime.date.today().isoformat(),
            mode=self.request.mode,
            grid=grid.VERSION,
            seed=self.request.seed,
            seconds=seconds,
            complete=complete,
            excluded=self.excluded,
            cold=self.request.cold,
            surroundings=self.surroundings,
            complaints=tuple(self.watch.complaints()),
        )

    def _save(self, complete: bool) -> None:
        # Nothing measured yet must not replace what an earlier run measured.
        if self.taken:
            samples.save(self.raw, self._header(self.seconds, complete), self.taken)

    def _resume(self) -> None:
        """Takes over the samples of an earlier run, if they are what this one would measure."""
        try:
            header, taken = samples.load(self.raw)
        except SamplesError:
            return
        wanted = self._header(header.seconds, complete=False)
        unlike = {"date", "backends", "excluded", "complete", "complaints", "surroundings"}
        if header.model_dump(exclude=unlike) == wanted.model_dump(exclude=unlike):
            self.taken, self.excluded = taken, dict(header.excluded)
            self.resumed, self.seconds = len(taken), header.seconds
