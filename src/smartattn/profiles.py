"""Which profile is in force for a device, and where profiles lie."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import platformdirs
import torch
from filelock import FileLock

from .files import StrPath
from .locks import ForkSafeLock
from .machine import Device, Record, changed_since, identify, versions
from .profile import Profile, ProfileError, Rule, load, save
from .stack_rule import StackRule

logger = logging.getLogger("smartattn")

#: Environment variable with the path of the profile to use.
ENVIRONMENT = "SMARTATTN_PROFILE"


class Found(Record):
    """A profile and how it was found."""

    profile: Profile
    #: None for a profile that is not in a file.
    path: Path | None
    #: The source in words: "given by SMARTATTN_PROFILE", "the user's own", ...
    source: str
    #: One phrase per source before it in the order that gave nothing.
    passed_over: tuple[str, ...]
    #: (file, reason) of every file that exists and cannot be used.
    rejected: tuple[tuple[str, str], ...]


def user_profiles() -> Path:
    """The folder of the user's own profiles; it may not exist."""
    return Path(platformdirs.user_data_dir("smartattn", appauthor=False)) / "profiles"


def shipped_profiles() -> Path:
    """The folder of the profiles that come with the package: in the wheel, or in a checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "calibration" / "profiles"
    return installed if installed.is_dir() else here.parents[1] / "calibration" / "profiles"


def save_for_user(profile: Profile) -> Path:
    """Saves a profile of a device as the user's own and returns where.

    Raises:
        ValueError: the profile names no device.
        OSError: the file cannot be written.
    """
    if profile.device is None:
        raise ValueError("a profile without a device cannot be found again")
    path = user_profiles() / f"{profile.device.slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        save(profile, path)
    return path


def default_rules() -> tuple[Rule, ...]:
    """The rules of the built-in default; none if it cannot be read."""
    try:
        return load(shipped_profiles() / "default.json").rules
    except ProfileError:
        return ()


@functools.cache
def default_stack_rules() -> tuple[StackRule, ...]:
    """The rules of the built-in default for padding-free models; none if it cannot be read."""
    try:
        return load(shipped_profiles() / "default.json").padding_free
    except ProfileError:
        return ()


def stack_rules(profile: Profile) -> tuple[StackRule, ...]:
    """When a padding-free model leaves the padding out: a profile's own rules or the default's."""
    return profile.padding_free or default_stack_rules()


def find(device: Device | None, given: StrPath | None = None) -> Found:
    """Looks a device's profile up: given path, the user's own, a shipped one, the default.

    Never raises for what is in the files, and logs nothing.
    """
    passed: list[str] = []
    rejected: list[tuple[str, str]] = []
    for source, path in _sources(device, given):
        if path is None:
            passed.append(f"{source}: none")
            continue
        try:
            profile = load(path)
            mismatch = _mismatch(profile, device)
            if mismatch:
                raise ProfileError(mismatch)
        except ProfileError as error:
            passed.append(f"{source}: {path} cannot be used: {error}")
            rejected.append((str(path), str(error)))
            continue
        return Found(
            profile=profile,
            path=Path(path),
            source=source,
            passed_over=tuple(passed),
            rejected=tuple(rejected),
        )
    return Found(
        profile=Profile(name="empty", notes="No profile could be read."),
        path=None,
        source="nothing but the order of the backends",
        passed_over=tuple(passed),
        rejected=tuple(rejected),
    )


def _sources(device: Device | None, given: StrPath | None) -> Iterator[tuple[str, StrPath | None]]:
    if given is not None:
        yield "given by set_profile", given
    else:
        variable = os.environ.get(ENVIRONMENT)
        yield f"given by {ENVIRONMENT}", variable or None
    folders = (
        ("the user's own", user_profiles()),
        # The built-in default is shipped as well.
        ("shipped for this device", shipped_profiles()),
    )
    for source, folder in folders:
        path = None if device is None else folder / f"{device.slug}.json"
        yield source, path if path is not None and os.path.lexists(path) else None
    yield "the built-in default", shipped_profiles() / "default.json"


def _mismatch(profile: Profile, device: Device | None) -> str | None:
    if profile.device is None or profile.device == device:
        return None
    return f"measured on {profile.device}, the device is {device or 'of another kind'}"


# -- the profile in force ------------------------------------------------------------------------

_lock = ForkSafeLock()
_in_force: dict[torch.device, Profile] = {}
_found: dict[torch.device, Found] = {}
_given: StrPath | None = None
_warned: set[tuple[str, str]] = set()


def set_profile(path: StrPath | None) -> None:
    """Uses the profile at ``path`` from now on, in this process; None goes back to the search.

    A file that cannot be used is passed over with a warning at the next attention call.
    """
    global _given
    with _lock:
        _given = path
        _in_force.clear()
        _warned.clear()


def profile_for(device: torch.device) -> Profile:
    """The profile in force for a device; looked up once per process and device, never failing.

    The order is: the path given to :func:`set_profile` or in the environment variable
    ``SMARTATTN_PROFILE``, the user's own profile for this device model, one shipped with the
    package, the built-in default. Which one it is and why is logged once at level INFO to the
    logger "smartattn"; a file that exists and cannot be used is a warning.
    """
    profile = _in_force.get(device)
    if profile is None:
        with _lock:
            profile = _in_force.get(device)
            if profile is None:
                profile = _in_force[device] = _look_up(device)
    return profile


@contextlib.contextmanager
def in_force(profile: Profile, device: torch.device) -> Iterator[None]:
    """Puts a profile in force for a device, in this process, for the time of a block."""
    with _lock:
        before = _in_force.get(device)
        _in_force[device] = profile
    try:
        yield
    finally:
        with _lock:
            if before is None:
                _in_force.pop(device, None)
            else:
                _in_force[device] = before


def found_for(device: torch.device) -> Found:
    """The profile in force for a device, with how it was found; see :func:`profile_for`."""
    profile = profile_for(device)
    found = _found.get(device)
    # Another thread may have gone on to another profile in between.
    if found is None or found.profile is not profile:
        found = Found(profile=profile, path=None, source="set", passed_over=(), rejected=())
    return found


def _look_up(device: torch.device) -> Profile:
    identity = identify(device)
    found = _found[device] = find(identity, _given)
    for path, reason in found.rejected:
        if (path, reason) not in _warned:
            _warned.add((path, reason))
            logger.warning("smartattn ignores the profile %s: %s", path, reason)
    logger.info(
        "smartattn uses profile %s for %s (%s, %s)%s",
        found.profile.name,
        f"{device} ({identity})" if identity else device,
        found.source,
        found.path or "no file",
        "".join(f"; {phrase}" for phrase in found.passed_over),
    )
    if found.profile.versions is not None and found.profile.device is not None:
        differences = found.profile.versions.differences(versions(found.profile.device.kind))
        if differences:
            logger.info("profile %s: %s", found.profile.name, changed_since(differences))
    return found.profile
