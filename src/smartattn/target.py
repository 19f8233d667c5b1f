"""The device that a question is about: one of this machine, or one that somebody measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from . import profiles
from .backends import Backend
from .call import Call
from .machine import DEVICE_NAMES, Device, identify
from .plan import Plan
from .profile import ProfileError, load
from .profiles import Found


@dataclass(frozen=True, slots=True)
class Target:
    """A device and the profile that is in force for it."""

    device: torch.device
    identity: Device | None
    found: Found
    #: This machine has the device.
    here: bool

    def ask(self, backend: Backend, plan: Plan, call: Call) -> list[str]:
        """What a backend refuses on this device."""
        if self.here:
            return backend.refusals(plan, call)
        absent = self._absent(backend)
        if absent is not None:
            return [absent]
        capability = None
        if self.identity is not None and self.identity.capability is not None:
            major, _, minor = self.identity.capability.partition(".")
            capability = (int(major), int(minor or 0))
        packages = self.found.profile.versions
        return backend.refusals_elsewhere(plan, call, capability, packages)

    def _absent(self, backend: Backend) -> str | None:
        """What the profile says against a package being where it was measured."""
        profile = self.found.profile
        if not backend.packages or profile.versions is None:
            return None
        if any(getattr(profile.versions, name) is not None for name in backend.packages):
            return None
        # Profiles of before do not say which FlashAttention-3 they have measured.
        if any(cost.backend == backend.name for cost in profile.costs):
            return None
        names = " or ".join(name.replace("_", "-") for name in backend.packages)
        return f"the profile names no version of {names}"


def target_of(given: torch.device | str | None) -> Target:
    """The device that a name stands for, see :func:`smartattn.explain`.

    Raises:
        ValueError: no such device; one line that names those that are known.
    """
    if given is None:
        given = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(given)
    except RuntimeError:
        return _elsewhere(str(given))
    if device.type == "cuda":
        if not torch.cuda.is_available():
            names = _quoted(known_devices())
            raise ValueError(
                f"this torch sees no CUDA device; name one that was measured instead: {names}"
            )
        if ":" not in str(device):
            device = torch.device("cuda", torch.cuda.current_device())
        elif device.index >= torch.cuda.device_count():
            last = torch.device("cuda", torch.cuda.device_count() - 1)
            raise ValueError(f"there is no {str(device)!r}, the last one is {str(last)!r}")
    elif device.type != "cpu":
        raise ValueError(f"device {str(given)!r} is not covered; use {DEVICE_NAMES}")
    return Target(device, identify(device), profiles.found_for(device), here=True)


def _elsewhere(name: str) -> Target:
    devices = known_devices()
    for known, device in devices.items():
        if name.lower() in (known.lower(), device.name.lower(), device.slug):
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            for one in [torch.device("cpu"), *(torch.device("cuda", n) for n in range(count))]:
                if identify(one) == device:
                    return Target(one, device, profiles.found_for(one), here=True)
            # torch.device("cuda") is only a name here: nothing is put there.
            return Target(torch.device(device.kind), device, profiles.find(device), here=False)
    raise ValueError(
        f"{name!r} is no device here and none that was measured; these were: {_quoted(devices)}"
    )


def _quoted(devices: Iterable[str]) -> str:
    """Names as a list; in quotes, since some have a comma."""
    return ", ".join(map(repr, sorted(devices))) or "none"


def known_devices() -> dict[str, Device]:
    """The devices that the user's own and the shipped profiles were measured on, by name."""
    found: dict[str, Device] = {}
    for folder in (profiles.user_profiles(), profiles.shipped_profiles()):
        for path in sorted(folder.glob("*.json")):
            try:
                device = load(path).device
            except ProfileError:
                continue
            if device is not None:
                found.setdefault(str(device), device)
    return found
