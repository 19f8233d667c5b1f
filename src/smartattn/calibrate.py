"""The sweep: times every backend on a device within a budget and makes a profile of it."""

from __future__ import annotations

import datetime
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from . import grid, profile, profiles, samples
from .backends import BACKENDS, Backend
from .fit import fit_profile
from .grid import RunMode
from .health import Watch
from .machine import Device, identify, one_line, processors, versions
from .measure import Patience, free_memory, measure, release, takes_sequences, warm_up
from .profile import Profile, ProfileError
from .samples import Header, Sample, SamplesError, StackSample
from .stack_fit import FEWEST, fit_stack_rules
from .stack_measure import StackTimer
from .surroundings import Surroundings, measure_surroundings
from .timing import cache_flush

logger = logging.getLogger("smartattn")

#: Seconds of measuring by device kind and mode. Start and fit come on top: they leave room for
#: "quick" to be over within 60 s on two CPU cores and within 30 s on a GPU.
BUDGETS: Mapping[tuple[str, RunMode], float] = {
    ("cpu", "quick"): 30.0,
    ("cuda", "quick"): 15.0,
    ("cpu", "default"): 120.0,
    ("cuda", "default"): 102.0,
}
#: Seconds between two writes of the raw samples.
_SAVE_EVERY = 3.0
#: Seconds that the rounds of one workload may take, and the rounds.
_PER_WORKLOAD = {"cpu": 0.25, "cuda": 0.03}
#: Seconds that a first run of a backend may take.
_PATIENCE: Mapping[RunMode, float] = {"quick": 0.2, "default": 0.5}
#: Seconds for the last one, however little of the budget is left.
_LEAST = 0.02
#: What of a budget is for padding-free stacks: a share of it, but at most so many seconds, and
#: nothing if that leaves fewer than are worth beginning with.
_STACK_SHARE, _STACK_SECONDS, _STACK_LEAST = 0.1, 10.0, 0.5
#: Median spread of the timings above which other work must have been in the way.
BUSY_SPREAD = 0.15


def stack_seconds(budget: float) -> float:
    """Seconds of a budget that are for padding-free stacks; 0 if too few to begin with."""
    seconds = min(_STACK_SECONDS, _STACK_SHARE * budget)
    return seconds if seconds >= _STACK_LEAST else 0.0


class CalibrationError(RuntimeError):
    """Why a calibration cannot be made, in one line that says what to do."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to measure and where to keep it. None stands for the default."""

    device: torch.device
    mode: RunMode = "default"
    #: Seconds of measuring. Kernels that are built once for a kind of call, not for each shape, may
    #: take as long again.
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
    #: Why it was not measured when taking the padding out of whole stacks pays; None if it was.
    unmeasured: str | None = None


Report = Callable[[Progress], None]


def default_path(device: Device) -> Path:
    """Where the profile of a device goes if nobody says."""
    return profiles.user_profiles() / f"{device.slug}.json"


def samples_path(device: Device, mode: RunMode) -> Path:
    """Where the raw samples of a device are kept."""
    return profiles.user_profiles().parent / "samples" / f"{device.slug}-{mode}.safetensors"


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
            made = sweep.fitted()
            sweep.time_stacks(made)
            return sweep.outcome(made, path)
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
    profiles.user_profiles().parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(profiles.user_profiles().parent / "calibrate.lock")
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
    stacks: list[StackSample] = field(default_factory=list)
    unmeasured: str | None = None
    excluded: dict[str, str] = field(default_factory=dict)
    resumed: int = 0
    #: Seconds of measuring, those of a run that was cut short included; without building kernels
    #: for kinds of calls, see :class:`~smartattn.measure.Patience`.
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
        budget = self.budget
        # The stacks come last, and what is fitted before them knows how plain "smart" chooses.
        until = budget - stack_seconds(budget)
        start = time.monotonic() - self.seconds
        saved = time.monotonic()
        done = {sample.workload for sample in self.taken}
        bounds = grid.limits(kind, request.mode, free_memory(request.device))
        varlen = takes_sequences(request.device, self.backends)
        families = grid.families(kind, request.mode, varlen)
        every = grid.workloads(families, bounds, request.seed, request.mode)
        warm_up(request.device, self.backends)
        if self.surroundings is None:
            self.surroundings = self._surroundings()
        patience = Patience(_PATIENCE[request.mode], thrifty=True, building=budget)
        for sample in self.taken:
            patience.learn(sample, here=False)
        flush = cache_flush(request.device) if request.cold else None
        complete = False
        try:
            for index, workload in enumerate(every):
                self.seconds = time.monotonic() - start - patience.built_seconds
                if self.seconds >= until:
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
                        seconds=min(_PER_WORKLOAD[kind], max(until - self.seconds, _LEAST)),
                        patience=patience,
                        flush=flush,
                    )
                if time.monotonic() - saved > _SAVE_EVERY:
                    self._save(complete=False)
                    saved = time.monotonic()
            if self.surroundings is not None:
                # In a second a host may be busy with something else.
                self.surroundings = self.surroundings.or_faster(self._surroundings())
            complete = True
        finally:
            self.seconds = time.monotonic() - start - patience.built_seconds
            self._save(complete)
        self._tell("fitting")

    def _surroundings(self) -> Surroundings | None:
        """The rest of a layer; None where it cannot be measured, and calls count on their own."""
        try:
            return measure_surroundings(self.request.device)
        except Exception as problem:
            # Such as a card that others have filled.
            logger.warning("the rest of a layer was not measured: %s", one_line(str(problem)))
            return None
        finally:
            release(self.request.device)

    def fitted(self) -> Profile:
        """The profile without the rules for padding-free stacks.

        Raises:
            CalibrationError: nothing can be fitted to what was measured.
        """
        taken = self.taken
        header = self._header(self.seconds, complete=True)
        made = fit_profile(header, taken, profiles.default_rules(), self.raw.name)
        if not made.thresholds:
            reasons = "".join(f"; {name} {why}" for name, why in self.excluded.items())
            raise CalibrationError(
                f"{len(taken)} samples are too few to compare backends on {self.request.device}"
                f"{reasons}; run it on an idle machine or with a larger --budget"
            )
        return made

    def time_stacks(self, made: Profile) -> None:
        """Times padding-free stacks under a profile, as its models will run, in what time is left.

        Nothing that fails here ends the calibration: the default's rules hold then.
        """
        budget = self.budget
        seconds = min(stack_seconds(budget), budget - self.seconds)
        if seconds < _STACK_LEAST:
            if not self.stacks:
                self.unmeasured = (
                    f"not measured, since no time of {budget:.3g} s was left; the default rules "
                    "hold, a larger --budget measures it"
                )
            return
        before, start = self.seconds, time.monotonic()

        def report(doing: str) -> None:
            self.seconds = before + time.monotonic() - start
            self._tell(doing)

        device = torch.empty(0, device=self.request.device).device
        timer = StackTimer(device, seconds, report, self.stacks)
        problem, complete = None, True
        try:
            with profiles.in_force(made, device):
                timer.run()
        except Exception as error:
            # Of a model or a kernel: backends are judged by their own samples.
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        except KeyboardInterrupt:
            complete = False
            raise
        finally:
            self.seconds = before + time.monotonic() - start
            self._save(complete)
        if len(self.stacks) < FEWEST:
            reason = problem or timer.refusal or f"{seconds:.2g} s were too few"
            self.unmeasured = f"not measured ({reason}); the default rules hold"

    def outcome(self, made: Profile, path: Path) -> Outcome:
        """Completes and saves the profile."""
        taken, budget = self.taken, self.budget
        self._tell("saving", budget)
        assert made.run is not None
        made = made.model_copy(
            update={
                "padding_free": fit_stack_rules(
                    self.stacks,
                    self._header(self.seconds, complete=True),
                    profiles.default_stack_rules(),
                ),
                "run": made.run.model_copy(update={"seconds": round(self.seconds, 1)}),
            }
        )
        if path == default_path(self.identity):
            profiles.save_for_user(made)
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
            unmeasured=self.unmeasured,
        )

    @property
    def budget(self) -> float:
        """Seconds that all measuring may take."""
        return self.request.budget or BUDGETS[self.identity.kind, self.request.mode]

    def _tell(self, doing: str, elapsed: float | None = None) -> None:
        elapsed = self.seconds if elapsed is None else elapsed
        self.report(Progress(min(elapsed, self.budget), self.budget, len(self.taken), doing))

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
            processors=processors(self.request.device),
            surroundings=self.surroundings,
            complaints=tuple(self.watch.complaints()),
        )

    def _save(self, complete: bool) -> None:
        # Nothing measured yet must not replace what an earlier run measured.
        if self.taken:
            samples.save(self.raw, self._header(self.seconds, complete), self.taken, self.stacks)

    def _resume(self) -> None:
        """Takes over the samples of an earlier run, if they are what this one would measure."""
        try:
            header, taken = samples.load(self.raw)
            stacks = samples.load_stacks(self.raw)
        except SamplesError:
            return
        wanted = self._header(header.seconds, complete=False)
        unlike = {"date", "backends", "excluded", "complete", "complaints"}
        unlike |= {"processors", "surroundings"}
        if header.model_dump(exclude=unlike) == wanted.model_dump(exclude=unlike):
            self.taken, self.excluded = taken, dict(header.excluded)
            self.stacks, self.surroundings = stacks, header.surroundings
            self.resumed, self.seconds = len(taken), header.seconds
