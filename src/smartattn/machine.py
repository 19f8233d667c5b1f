"""What identifies this device and these versions. Safe to import and to call everywhere."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from ._version import __version__

#: What a text in a file may hold, so that it can be logged: no control characters, nothing that
#: turns the direction of writing or ends a line.
PLAIN = r"^[^\p{C}\p{Zl}\p{Zp}]*$"
#: One printable line.
Line = Annotated[str, StringConstraints(pattern=PLAIN, max_length=300)]


#: What names a device of any machine, for messages.
DEVICE_NAMES = "'cpu', 'cuda' or 'cuda:N'"


class Record(BaseModel):
    """A part of a profile: immutable, nothing coerced, no field that is not declared."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Device(Record):
    """A device model. Timings are comparable between two devices that are equal in all fields."""

    kind: Literal["cuda", "cpu"]
    #: Marketing name, e.g. "NVIDIA H200" or "AMD EPYC 7763 64-Core Processor".
    name: Line
    #: CUDA compute capability, e.g. "9.0".
    capability: Line | None = None
    #: Threads that torch uses within an operation, for CPUs.
    threads: Annotated[int, Field(ge=1, le=1_000_000)] | None = None

    def __str__(self) -> str:
        if self.threads is None:
            return self.name
        return f"{self.name}, {self.threads} thread{'s' * (self.threads != 1)}"

    @property
    def slug(self) -> str:
        """The name as a file name: lower case letters, digits and dashes."""
        words = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:80] or "unknown"
        return words if self.kind == "cuda" else f"cpu-{words}-{self.threads}-threads"


class Versions(Record):
    """What a timing depends on besides the device; None where something is absent or unknown."""

    smartattn: Line | None = None
    torch: Line | None = None
    transformers: Line | None = None
    flash_attn: Line | None = None
    #: The packages that FlashAttention-3 comes in; kernels are taken from the first that is there.
    fa3_fwd: Line | None = None
    flash_attn_3: Line | None = None
    flash_attn_4: Line | None = None
    cuda: Line | None = None
    cudnn: Line | None = None
    driver: Line | None = None

    def differences(self, running: Versions) -> list[str]:
        """What differs in ``running``, as short phrases such as "torch 2.11 then, 2.13 now".

        smartattn's own version is left out: a release does not change a kernel. So is
        FlashAttention-3 or 4 where none was recorded: older profiles used the one without saying
        so, and do not know the other.
        """
        return [
            f"{field.replace('_', '-')} {then or 'absent'} then, {now or 'absent'} now"
            for field in type(self).model_fields
            if field != "smartattn"
            and (then := getattr(self, field)) != (now := getattr(running, field))
            and not (then is None and field in _RECORDED_LATER)
        ]


def changed_since(differences: Iterable[str]) -> str:
    """The sentence about :meth:`Versions.differences`."""
    return (
        f"changed since the profile was measured: {', '.join(differences)}; smartattn calibrate "
        "measures again"
    )


#: Fields that are unknown, rather than absent, where a profile has none.
_RECORDED_LATER = ("fa3_fwd", "flash_attn_3", "flash_attn_4")


def identify(device: torch.device) -> Device | None:
    """The model of a device; None for kinds that no profile covers or that cannot be asked."""
    try:
        if device.type == "cpu":
            return Device(kind="cpu", name=_printable(cpu_name()), threads=torch.get_num_threads())
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            return Device(
                kind="cuda",
                name=_printable(properties.name),
                capability=f"{properties.major}.{properties.minor}",
            )
    except Exception:
        # A driver that answers nothing must not end an inference: the default profile serves.
        return None
    return None


def processors(device: torch.device) -> int | None:
    """How many multiprocessors a GPU has; None for other kinds."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def versions(kind: str) -> Versions:
    """The versions in this process, those of CUDA only for devices of that kind."""
    cuda = kind == "cuda"
    cudnn = _cudnn_version() if cuda else None
    return Versions(
        smartattn=__version__,
        torch=_printable(str(torch.__version__)),
        transformers=_distribution("transformers"),
        flash_attn=_distribution("flash-attn") if cuda else None,
        fa3_fwd=_distribution("fa3-fwd") if cuda else None,
        flash_attn_3=_distribution("flash-attn-3") if cuda else None,
        flash_attn_4=_distribution("flash-attn-4") if cuda else None,
        cuda=torch.version.cuda if cuda else None,
        cudnn=None if cudnn is None else str(cudnn),
        driver=driver_version() if cuda else None,
    )


@functools.cache
def cpu_name() -> str:
    """The model name of this machine's CPU, the architecture if nothing says more."""
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            label, _, value = line.partition(":")
            if label.strip().lower() in ("model name", "hardware") and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown CPU"


@functools.cache
def driver_version() -> str | None:
    """The NVIDIA driver's release, e.g. "570.86.15"; None if nobody tells."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(errors="replace")
    except OSError:
        text = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found = re.search(r"\b\d{3,4}\.\d+(\.\d+)?\b", text)
    return found.group() if found else None


def _output(*command: str) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=5, check=False
        ).stdout
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""


def _cudnn_version() -> int | None:
    try:
        version = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    except Exception:
        # torch raises if the loaded cuDNN is older than the one it was built for.
        return None
    return version if isinstance(version, int) else None


def _distribution(name: str) -> str | None:
    try:
        return _printable(importlib.metadata.version(name))
    except Exception:
        # Besides PackageNotFoundError, whatever broken metadata raises.
        return None


def one_line(text: str) -> str:
    """A text as one printable line of at most 300 characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300]


def _printable(text: str) -> str:
    return one_line(text) or "unknown"
