"""Raw timings: one row per workload and backend, kept as safetensors with metadata."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
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
from .stack_rule import MAX_WORK
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


@dataclass(frozen=True, slots=True)
class StackSample:
    """One batch through a stack of layers, with its padding and without it: wall times.

    ``workload`` is what a layer's attention gets; the hidden size is its heads times its head_dim,
    and a causal one stands for a decoder. Times are medians in microseconds.
    """

    workload: Workload
    layers: int
    padded_us: float
    packed_us: float
    #: Median over the rounds of the padded time / the packed time in the same round, and the
    #: interquartile range of that ratio / its median.
    speedup: float
    spread: float
    rounds: int

    @property
    def hidden(self) -> int:
        """Hidden size of the stack."""
        return self.workload.heads * self.workload.head_dim

    @property
    def padding_share(self) -> float:
        """Share of the tokens that is padding, as the lengths came out."""
        tokens = self.workload.batch * self.workload.kv_len
        return 1.0 - int(self.workload.lengths.sum()) / tokens

    @property
    def work(self) -> float:
        """Tokens, padding included, times the square of the hidden size."""
        return float(self.workload.batch * self.workload.kv_len * self.hidden**2)

    @property
    def spared_work(self) -> float:
        """Padding tokens times the square of the hidden size."""
        tokens = self.workload.batch * self.workload.kv_len
        return float((tokens - int(self.workload.lengths.sum())) * self.hidden**2)


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
    #: Multiprocessors of a GPU; None if unknown, as in files of before.
    processors: Annotated[int, Field(ge=1, le=10**5)] | None = None
    #: The rest of a layer, None where host and device are the same.
    surroundings: Surroundings | None = None
    #: What makes the timings doubtful: other work on the device, throttling.
    complaints: Annotated[tuple[Sentence, ...], Field(max_length=16)] = ()


_NUMBERS = tuple(
    field.name for field in fields(Sample) if field.name not in ("workload", "backend", "status")
)
#: Columns that files of before do not have; zeros stand for them.
_LATER = ("prepare_us", "first_us")
#: Columns of :class:`StackSample`: files of before have none of them, others have all.
_STACK = "stack."
_STACK_NUMBERS = tuple(field.name for field in fields(StackSample) if field.name != "workload")
_MAX_LAYERS = 1 << 16


def save(
    path: StrPath, header: Header, samples: list[Sample], stacks: Sequence[StackSample] = ()
) -> None:
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
    columns |= _workload_columns([sample.workload for sample in samples])
    if stacks:
        made = {
            name: np.array([getattr(stack, name) for stack in stacks]) for name in _STACK_NUMBERS
        }
        made |= _workload_columns([stack.workload for stack in stacks])
        columns |= {f"{_STACK}{name}": column for name, column in made.items()}
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
    return parse(_read(path))


def load_stacks(path: StrPath) -> list[StackSample]:
    """Reads the samples of padding-free stacks; none in files from before these were measured.

    Raises:
        SamplesError: as for :func:`load`.
    """
    return parse_stacks(_read(path))


def parse(content: bytes) -> tuple[Header, list[Sample]]:
    """The raw samples in the content of a file.

    Raises:
        SamplesError: it holds something else; the message is one line.
    """
    with _one_line():
        header, words = _header(content)
        return header, _rows(header, words, load_tensors(content))


def parse_stacks(content: bytes) -> list[StackSample]:
    """The samples of padding-free stacks in the content of a file.

    Raises:
        SamplesError: as for :func:`parse`.
    """
    with _one_line():
        _, words = _header(content)
        return _stacks(words, load_tensors(content))


def _read(path: StrPath) -> bytes:
    try:
        return read_bounded(path, MAX_BYTES)
    except OSError as error:
        raise SamplesError(error.strerror or type(error).__name__) from None
    except ValueError as error:
        raise SamplesError(str(error)) from None


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
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
    lists = _lists(columns)
    return [
        Sample(
            workload=_workload(words, lists, row),
            backend=header.backends[lists["backend"][row]],
            status=STATUSES[lists["status"][row]],
            **{name: lists[name][row] for name in _NUMBERS},
        )
        for row in range(len(lists["index"]))
    ]


def _stacks(words: dict[str, list[str]], arrays: dict[str, Any]) -> list[StackSample]:
    columns = {
        name.removeprefix(_STACK): column
        for name, column in arrays.items()
        if name.startswith(_STACK)
    }
    if not columns:
        return []
    expected = {*_STACK_NUMBERS, *(f"workload.{name}" for name in FIELDS)}
    if columns.keys() != expected:
        odd = sorted(columns.keys() ^ expected)[0]
        raise SamplesError(f"column {_STACK}{odd} is missing or not known")
    lists = _lists(columns)
    found = []
    for row in range(len(lists["layers"])):
        stack = StackSample(
            workload=_workload(words, lists, row),
            **{name: lists[name][row] for name in _STACK_NUMBERS},
        )
        times = (stack.padded_us, stack.packed_us, stack.speedup)
        whole = isinstance(stack.layers, int) and isinstance(stack.rounds, int)
        if (
            not whole
            or not 1 <= stack.layers <= _MAX_LAYERS
            or stack.work > MAX_WORK
            or not all(time > 0 for time in times)
        ):
            raise SamplesError(one_line(f"a stack that cannot be: {stack}"))
        found.append(stack)
    return found


def _workload_columns(workloads: Sequence[Workload]) -> dict[str, Any]:
    """A column per field, with the places of words in ``WORDS``."""
    columns = {}
    for name in FIELDS:
        values = [getattr(workload, name) for workload in workloads]
        words = WORDS.get(name)
        columns[f"workload.{name}"] = np.array(
            [words.index(v) for v in values] if words else values
        )
    return columns


def _lists(columns: dict[str, Any]) -> dict[str, list[Any]]:
    """Columns of one length without impossible numbers, as lists."""
    sizes = {column.shape for column in columns.values()}
    if len(sizes) != 1 or len(next(iter(sizes))) != 1:
        raise SamplesError("the columns are not of one length")
    for name, column in columns.items():
        # An error may be infinite: the output was.
        finite = ~np.isnan(column) if name == "error" else np.isfinite(column)
        if not (finite & (column >= 0)).all():
            raise SamplesError(f"column {name} has negative or non-finite values")
    return {name: column.tolist() for name, column in columns.items()}


def _workload(words: dict[str, list[str]], lists: dict[str, list[Any]], row: int) -> Workload:
    """The workload of a row.

    Raises:
        SamplesError: one that cannot be.
    """
    given = {name: lists[f"workload.{name}"][row] for name in FIELDS}
    for name in given.keys() & words.keys():
        word = words[name][given[name]]
        if word not in WORDS[name]:
            raise SamplesError(one_line(f"unknown {name} {word!r}"))
        given[name] = word
    given["causal"] = bool(given["causal"])
    return _bounded(Workload(**given))


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
