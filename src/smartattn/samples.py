"""Raw timings: one row per workload and backend, kept as safetensors with metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from .cost import LAYERS, BackendName
from .files import StrPath, read_bounded, write_atomically
from .machine import Device, Line, Record, Versions, one_line
from .profile import Seconds, Sentence
from .surroundings import Surroundings, waited_us
from .workload import FIELDS, WORDS, Workload

#: Bytes of the largest file that is read.
MAX_BYTES = 256 * 1024 * 1024

#: "slow" was not run, since its first run alone would have taken too long.
Status = Literal["ok", "wrong", "failed", "memory", "slow"]
STATUSES: tuple[Status, ...] = ("ok", "wrong", "failed", "memory", "slow")
_METADATA_KEY = "smartattn"


class SamplesError(ValueError):
    """Why a file cannot be used as raw samples, in one line."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One backend on one workload. Times are microseconds, see :class:`~smartattn.timing.Timing`.

    ``error`` is the largest error of the output relative to the largest reference value, and
    ``tolerance`` what the backend may have; other states than "ok" have no times (zeros).
    """

    #: Place of the workload in its grid.
    index: int
    workload: Workload
    backend: str
    status: Status
    host_us: float = 0.0
    host_spread: float = 0.0
    device_us: float = 0.0
    device_spread: float = 0.0
    rounds: int = 0
    peak_bytes: int = 0
    error: float = 0.0
    tolerance: float = 0.0
    #: What the first layer of a forward on a batch of other lengths takes longer than the next
    #: ones: the price of preparing, which all layers of the forward share. 0 if not measured.
    prepare_us: float = 0.0
    #: The first run of all on such shapes: kernels may be loaded, or built for the shape.
    first_us: float = 0.0

    def us(self, slack_us: float = 0.0) -> float:
        """What a call takes on its own, or adds to a layer: see :class:`~smartattn.cost.Estimate`.

        Args:
            slack_us: see :meth:`~smartattn.surroundings.Surroundings.slack_us`.
        """
        return waited_us(self.host_us, self.device_us, slack_us) + self.prepare_us / LAYERS


class Header(Record):
    """What the rows have in common."""

    schema_version: Literal["smartattn-samples/1"] = "smartattn-samples/1"
    device: Device
    versions: Versions
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]
    mode: Literal["quick", "default"]
    #: Version of the grid and seed it was drawn with: with both equal, rows can be added.
    grid: Line
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)]
    #: Wall-clock seconds that measuring took so far, and whether it came to its end.
    seconds: Seconds = 0.0
    complete: bool = False
    backends: Annotated[tuple[BackendName, ...], Field(max_length=64)] = ()
    #: Backends whose outputs were wrong or that failed, each with the evidence.
    excluded: dict[BackendName, Sentence] = Field(default={}, max_length=64)
    #: The caches were flushed before every timed call.
    cold: bool = False
    #: The rest of a layer, None where host and device are the same.
    surroundings: Surroundings | None = None
    #: What makes the timings doubtful: other work on the device, throttling.
    complaints: Annotated[tuple[Sentence, ...], Field(max_length=16)] = ()


_NUMBERS = tuple(
    field.name for field in fields(Sample) if field.name not in ("workload", "backend", "status")
)
#: Columns that files of before do not have; zeros stand for them.
_LATER = ("prepare_us", "first_us")


def save(path: StrPath, header: Header, samples: list[Sample]) -> None:
    """Replaces the file at ``path`` atomically.

    Raises:
        OSError: the file cannot be written; whatever was there stays.
    """
    names = tuple(sorted({sample.backend for sample in samples}))
    header = header.model_copy(update={"backends": names})
    columns: dict[str, Any] = {
        name: np.array([getattr(sample, name) for sample in samples]) for name in _NUMBERS
    }
    columns["backend"] = np.array([names.index(sample.backend) for sample in samples])
    columns["status"] = np.array([STATUSES.index(sample.status) for sample in samples])
    for name in FIELDS:
        values = [getattr(sample.workload, name) for sample in samples]
        words = WORDS.get(name)
        columns[f"workload.{name}"] = np.array(
            [words.index(v) for v in values] if words else values
        )
    arrays = {
        name: column.astype(np.float64 if column.dtype.kind == "f" else np.int64)
        for name, column in columns.items()
    }
    metadata = {_METADATA_KEY: json.dumps({**header.model_dump(mode="json"), "words": WORDS})}
    write_atomically(path, save_tensors(arrays, metadata))


def load(path: StrPath) -> tuple[Header, list[Sample]]:
    """Reads raw samples.

    Raises:
        SamplesError: the file cannot be read or holds something else; the message is one line.
    """
    try:
        content = read_bounded(path, MAX_BYTES)
    except OSError as error:
        raise SamplesError(error.strerror or type(error).__name__) from None
    except ValueError as error:
        raise SamplesError(str(error)) from None
    return parse(content)


def parse(content: bytes) -> tuple[Header, list[Sample]]:
    """The raw samples in the content of a file.

    Raises:
        SamplesError: it holds something else; the message is one line.
    """
    try:
        header, words = _header(content)
        return header, _rows(header, words, load_tensors(content))
    except (SafetensorError, ValidationError, ValueError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, SamplesError):
            raise
        raise SamplesError(f"no samples of smartattn calibrate: {one_line(str(error))}") from None
    except RecursionError:
        raise SamplesError("no samples of smartattn calibrate: nested too deeply") from None


def _header(content: bytes) -> tuple[Header, dict[str, list[str]]]:
    # A safetensors file begins with the length of its JSON header as eight bytes.
    length = int.from_bytes(content[:8], "little")
    if length > len(content) - 8:
        raise SamplesError("not a whole safetensors file")
    metadata = json.loads(content[8 : 8 + length].decode("utf-8"))
    metadata = metadata.get("__metadata__") if isinstance(metadata, dict) else None
    given = json.loads(metadata.get(_METADATA_KEY, "null")) if isinstance(metadata, dict) else None
    if not isinstance(given, dict):
        raise SamplesError("no samples of smartattn calibrate: the metadata is missing")
    words = given.pop("words", None)
    if not isinstance(words, dict):
        raise SamplesError("no samples of smartattn calibrate: the words are missing")
    return Header.model_validate_json(json.dumps(given)), words


def _rows(header: Header, words: dict[str, list[str]], arrays: dict[str, Any]) -> list[Sample]:
    absent = np.zeros(arrays["index"].shape)
    columns = {
        name: arrays.get(name, absent) if name in _LATER else arrays[name]
        for name in (*_NUMBERS, "backend", "status")
    }
    columns |= {f"workload.{name}": arrays[f"workload.{name}"] for name in FIELDS}
    sizes = {column.shape for column in columns.values()}
    if len(sizes) != 1 or len(next(iter(sizes))) != 1:
        raise SamplesError("the columns are not of one length")
    for name, column in columns.items():
        # An error may be infinite: the output was.
        finite = ~np.isnan(column) if name == "error" else np.isfinite(column)
        if not (finite & (column >= 0)).all():
            raise SamplesError(f"column {name} has negative or non-finite values")
    lists = {name: column.tolist() for name, column in columns.items()}
    samples = []
    for row in range(len(lists["index"])):
        given = {name: lists[f"workload.{name}"][row] for name in FIELDS}
        for name in given.keys() & words.keys():
            word = words[name][given[name]]
            if word not in WORDS[name]:
                raise SamplesError(f"unknown {name} {word!r}")
            given[name] = word
        given["causal"] = bool(given["causal"])
        samples.append(
            Sample(
                workload=_bounded(Workload(**given)),
                backend=header.backends[lists["backend"][row]],
                status=STATUSES[lists["status"][row]],
                **{name: lists[name][row] for name in _NUMBERS},
            )
        )
    return samples


def _bounded(workload: Workload) -> Workload:
    """The workload, if it is one that somebody may have measured."""
    sizes = (workload.batch, workload.q_len, workload.kv_len, workload.head_dim)
    heads = (workload.kv_heads, workload.heads)
    if (
        not all(isinstance(size, int) and 1 <= size <= 1 << 24 for size in (*sizes, *heads))
        or workload.batch * workload.kv_len > 1 << 26
        or workload.heads % workload.kv_heads
        or not 0 <= workload.padding_share < 1
        or workload.q_len > workload.kv_len
        or (workload.side == "packed" and not 1 <= workload.sequences <= workload.kv_len)
    ):
        raise SamplesError(f"a workload that cannot be: {workload}")
    return workload
