"""Fuzzes the readers of profiles and raw samples: whatever the bytes, only the documented error.

    python -m tests.fuzz --inputs 1000000 --json docs/reports/fuzz.json
    python -m tests.fuzz --engine atheris --seconds 300      # coverage guided, needs atheris

Inputs are valid files with a few mutations: of single bytes, and of the values in the JSON and in
the columns, which reach further. What is checked of each:

- nothing is raised but ``ProfileError`` and ``SamplesError``, in one line of bounded length;
- a profile that is taken predicts finite times that are not negative, or none;
- the process may not take ``MEMORY`` more than at its start, which the system enforces, and no
  input takes longer than ``SECONDS``.

A finding is written to a file that ``--replay`` takes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import random
import resource
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import smartattn
from smartattn import machine, profile, samples
from smartattn.stack_rule import stack_rule
from smartattn.workload import Workload

#: Bytes of address space beyond those at the start, for inputs of at most ``LARGEST`` bytes.
MEMORY = 512 * 2**20
LARGEST = 64 * 2**10
SECONDS = 2.0
_LONGEST_MESSAGE = 600

_WORKLOAD = Workload("forward", True, "left", "float32", 2, 40, 40, 4, 2, 64, padding_share=0.3)
_CPU = torch.device("cpu")
_PLAN, _CALL = _WORKLOAD.plan(_CPU), _WORKLOAD.call(_CPU)


class Finding(Exception):
    """What a reader did that it must not do."""


# -- what is checked -----------------------------------------------------------------------------


def check_profile(content: bytes) -> str:
    """ "taken" or "refused"; raises Finding."""
    try:
        found = profile.parse(content)
    except profile.ProfileError as error:
        return _refused(error)
    for backend in ("sdpa", "sdpa_unpadded"):
        predicted = found.predict(backend, _PLAN, _CALL)
        if predicted is not None and not (math.isfinite(predicted) and predicted >= 0):
            raise Finding(f"predicts {predicted}")
    found.rule(_PLAN, _CALL)
    stack_rule(found.padding_free, "cpu", 0.3, 1e6)
    if found.layers is not None:
        for causal in (False, True):
            us = found.layers.forward_us(causal, 128, 8192, 10**6, 1e11)
            if us is not None and not (math.isfinite(us) and us >= 0):
                raise Finding(f"layers take {us}")
    if profile.parse(found.to_json().encode()) != found:
        raise Finding("does not survive being saved")
    return "taken"


def check_samples(content: bytes) -> str:
    """ "taken" or "refused"; raises Finding."""
    try:
        header, rows = samples.parse(content)
        samples.parse_stacks(content)
    except samples.SamplesError as error:
        return _refused(error)
    if rows and not header.backends:
        raise Finding("rows of no backend")
    return "taken"


def _refused(error: Exception) -> str:
    text = str(error)
    if len(text) > _LONGEST_MESSAGE or not text.isprintable() or not text:
        raise Finding(f"message of {len(text)} characters that is no plain line: {text[:80]!r}")
    return "refused"


TARGETS: dict[str, Callable[[bytes], str]] = {"profile": check_profile, "samples": check_samples}


# -- valid files to start from -------------------------------------------------------------------


def corpus(target: str) -> list[bytes]:
    """Small valid files."""
    if target == "profile":
        cost = {
            "backend": "sdpa", "mode": "forward", "layout": "padded", "causal": True,
            "dtype": "float32", "head_dim": 64, "host_us": {"call": 3.0},
            "device_us": {"call": 10.0, "padded_tiles": 0.5}, "longest_kv_len": 512, "samples": 9,
            "median_error": 0.01,
        }  # fmt: skip
        threshold = {
            "mode": "forward", "layout": "padded", "causal": True, "dtype": "float32",
            "head_dim": 64, "batch": 8, "heads": 16, "kv_heads": 16, "padding_share": 0.1,
            "winners": [{"from_kv_len": 32, "backend": "sdpa", "speedup": 2.8}],
        }  # fmt: skip
        whole = {
            "schema_version": "smartattn-profile/1",
            "name": "seed",
            "notes": "n",
            "device": {"kind": "cpu", "name": "CPU", "threads": 2},
            "versions": {"torch": "2.13"},
            "date": "2026-01-01",
            "run": {"mode": "quick", "seconds": 1.0, "samples": 3, "seed": 0,
                    "excluded": {"eager": "wrong"}},
            "rules": [{"when": {"padded": True, "min_kv_len": 10}, "prefer": ["sdpa"],
                       "because": "b"}],
            "padding_free": [{"when": {"device": "cpu", "min_padding_share": 0.1,
                                       "min_work": 1e6, "min_spared_work": 1e5},
                              "pack": True, "because": "b"}],
            "surroundings": {"host_us": 500.0, "flops_per_us": 8e8, "bytes_per_us": 4e6},
            "layers": {"encoder": 2.27, "decoder": 3.53, "width": 1000.0},
            "thresholds": [threshold],
            "costs": [cost, {**cost, "backend": "sdpa_unpadded"}],
        }  # fmt: skip
        small = {"schema_version": "smartattn-profile/1", "name": "a", "costs": [cost]}
        return [json.dumps(whole).encode(), json.dumps(small, indent=1).encode()]
    header = samples.Header(
        device=machine.Device(kind="cpu", name="CPU", threads=2),
        versions=machine.Versions(torch="2.13"),
        date="2026-01-01",
        mode="quick",
        grid="1",
        seed=0,
        excluded={"eager": "wrong"},
    )
    rows = [
        samples.Sample(n, _WORKLOAD, name, "ok", 5.0, 0.1, 6.0, 0.1, 3, 0, 1e-6, 1e-5)
        for n in range(2)
        for name in ("sdpa", "sdpa_unpadded")
    ]
    stacks = [samples.StackSample(_WORKLOAD, 4, 9.0, 6.0, 1.5, 0.1, 3)] * 2
    return [
        samples_file(header, rows),
        samples_file(header, []),
        samples_file(header, rows, stacks),
    ]


def samples_file(
    header: samples.Header, rows: list[samples.Sample], stacks: Sequence[samples.StackSample] = ()
) -> bytes:
    """What ``samples.save`` writes."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        samples.save(Path(folder) / "raw", header, rows, stacks)
        return (Path(folder) / "raw").read_bytes()


# -- mutations -----------------------------------------------------------------------------------

_HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e308,
    1e-320, float("nan"), float("inf"), -float("inf"), "", "a", "sdpa", "\x00", "\n", "\ud800",
    "\u202e", "x" * 400, "x" * 5000, [], {}, [[]], [None] * 70, {"": ""}, {"a": {"b": {"c": 1}}},
    "smartattn-profile/1", "cuda", "F64", "I64", "BF16", "BOOL", "F8_E4M3", [0], [4], [2, 2],
    [2**62], [0, 2**63], [-1], "decode", "packed", "float16",
)  # fmt: skip
_TOKENS = (
    b"[" * 3000, b'{"a":' * 2000, b"9" * 5000, b"1e999", b"NaN", b"\xff\xfe", b"\xef\xbb\xbf",
    b'"\\ud800"', b"\\u0000", b",", b"}", b"]", b'"', b":", b"\x00" * 8, b"\xff" * 8,
)  # fmt: skip


def mutated(content: bytes, target: str, rng: random.Random) -> bytes:
    """One to four mutations of a file, at most ``LARGEST`` bytes."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        if rng.random() < 0.3:
            content = _bytes_mutated(content, rng)
        elif target == "profile":
            content = _json_mutated(content, rng)
        else:
            content = _tensors_mutated(content, rng)
    return content[:LARGEST]


def _bytes_mutated(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content) + 1)
    kind = rng.randrange(5)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + rng.choice(_TOKENS) + content[place:]
    if kind == 2:
        return content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]
    if kind == 3:
        end = min(len(content), place + rng.randrange(64))
        return content[:place] + content[end:]
    end = min(len(content), place + rng.randrange(200))
    return content[:place] + content[place:end] * rng.randrange(2, 5) + content[end:]


def _json_mutated(content: bytes, rng: random.Random) -> bytes:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return _bytes_mutated(content, rng)
    return json.dumps(_tree_mutated(document, rng)).encode()


def _tree_mutated(document: Any, rng: random.Random) -> Any:
    """A copy with another value, key or length somewhere."""
    if not isinstance(document, dict | list) or not document or rng.random() < 0.05:
        return rng.choice(_HOSTILE)
    if isinstance(document, list):
        made: list[Any] = list(document)
        place = rng.randrange(len(made))
        kind = rng.randrange(4)
        if kind == 0:
            made += [made[place]] * rng.choice((1, 2, 80))
        elif kind == 1:
            del made[place]
        else:
            made[place] = _tree_mutated(made[place], rng)
        return made
    keys = list(document)
    key = rng.choice(keys)
    kind = rng.randrange(8)
    if kind == 0:
        return {k: v for k, v in document.items() if k != key}
    if kind == 1:
        return {**document, rng.choice((rng.choice(keys) + "x", "", "__class__")): document[key]}
    if kind == 2:
        return {**document, key: document[rng.choice(keys)]}
    return {**document, key: _tree_mutated(document[key], rng)}


def _tensors_mutated(content: bytes, rng: random.Random) -> bytes:
    """Another header, other metadata, or other numbers in the columns."""
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header, body = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
        if rng.random() < 0.4 and len(body) >= 8:
            place = rng.randrange(len(body) // 8) * 8
            whole = (rng.randrange(-3, 99), 1 << 24, 1 << 62, -(1 << 63))
            real = (float("nan"), float("inf"), -1.0, 0.5, 1e300)
            number = rng.choice(
                (
                    rng.getrandbits(64).to_bytes(8, "little"),
                    struct.pack("<q", rng.choice(whole)),
                    struct.pack("<d", rng.choice(real)),
                )
            )
            body[place : place + 8] = number
        elif rng.random() < 0.5:
            metadata = header.get("__metadata__", {})
            inner = _tree_mutated(json.loads(metadata["smartattn"]), rng)
            text = "[" * 50_000 if rng.random() < 0.02 else json.dumps(inner)
            header["__metadata__"] = {**metadata, "smartattn": text}
        else:
            header = _tree_mutated(header, rng)
        encoded = json.dumps(header).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error):
        return _bytes_mutated(content, rng)
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded + bytes(body)


# -- running -------------------------------------------------------------------------------------


@dataclass
class Result:
    """One target after a run."""

    target: str
    inputs: int = 0
    distinct: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    #: What was found, by the place it came from, with the file that shows it.
    findings: dict[str, str] = field(default_factory=dict)


def try_one(target: str, content: bytes) -> str:
    """The outcome of one input; raises Finding."""
    start = time.perf_counter()
    try:
        outcome = TARGETS[target](content)
    except Finding:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        raise Finding(f"{type(error).__name__} at {where}: {str(error)[:200]}") from error
    if time.perf_counter() - start > SECONDS:
        raise Finding(f"takes longer than {SECONDS} s")
    return outcome


def run(target: str, inputs: int, seed: int, findings: Path, seconds: float = math.inf) -> Result:
    """Tries mutated files; stops after ``inputs`` or ``seconds``."""
    rng = random.Random(f"{target} {seed}")
    result = Result(target)
    pool = corpus(target)
    seeds = len(pool)
    seen: set[int] = set()
    start = time.perf_counter()
    while result.inputs < inputs and time.perf_counter() - start < seconds:
        content = mutated(rng.choice(pool), target, rng)
        seen.add(hash(content))
        result.inputs += 1
        try:
            outcome = try_one(target, content)
        except Finding as finding:
            outcome = "finding"
            label = str(finding).split(":")[0] if " at " not in str(finding) else str(finding)[:80]
            if label not in result.findings:
                findings.mkdir(parents=True, exist_ok=True)
                digest = hashlib.sha256(content).hexdigest()[:12]
                path = findings / f"{target}-{digest}"
                path.write_bytes(content)
                result.findings[label] = str(path)
                print(f"{target}: {finding}\n  {path}", flush=True)
        result.outcomes[outcome] += 1
        # What is taken is a start for further mutations.
        if outcome == "taken" and rng.random() < 0.05 and len(content) < LARGEST // 4:
            if len(pool) < 200:
                pool.append(content)
            else:
                pool[rng.randrange(seeds, 200)] = content
    result.seconds = time.perf_counter() - start
    result.distinct = len(seen)
    return result


def limit_memory() -> None:
    """Bounds the address space of this process from now on."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bound = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))


def run_atheris(target: str, seconds: float) -> None:
    """Coverage-guided fuzzing until something is found or time is up; does not return."""
    import atheris

    atheris.instrument_imports()
    folder = Path("build") / "fuzz" / target
    folder.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(corpus(target)):
        (folder / f"seed-{number}").write_bytes(content)
    for module in (profile, samples):
        for name in ("parse", "_unique", "_header", "_rows", "_bounded"):
            if hasattr(module, name):
                setattr(module, name, atheris.instrument_func(getattr(module, name)))

    def test_one(content: bytes) -> None:
        try_one(target, content)

    arguments = [sys.argv[0], f"-max_total_time={int(seconds)}", f"-max_len={LARGEST}", str(folder)]
    atheris.Setup(arguments, test_one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--inputs", type=int, default=100_000, help="over all targets")
    parser.add_argument("--seconds", type=float, default=math.inf, help="over all targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=sorted(TARGETS))
    parser.add_argument("--engine", choices=("mutations", "atheris"), default="mutations")
    parser.add_argument("--findings", type=Path, default=Path("build/fuzz/findings"))
    parser.add_argument("--replay", type=Path, help="one input that was found")
    parser.add_argument("--json", type=Path, help="the record of the run")
    given = parser.parse_args()
    if given.replay:
        target = given.target or given.replay.name.split("-")[0]
        print(try_one(target, given.replay.read_bytes()))
        return 0
    if given.engine == "atheris":
        run_atheris(given.target or "profile", min(given.seconds, 3600.0))
    targets = [given.target] if given.target else sorted(TARGETS)
    limit_memory()
    results = [
        run(
            t,
            given.inputs // len(targets),
            given.seed,
            given.findings,
            given.seconds / len(targets),
        )
        for t in targets
    ]
    for result in results:
        counts = ", ".join(f"{count:,} {name}" for name, count in result.outcomes.most_common())
        print(
            f"{result.target}: {result.inputs:,} inputs ({result.distinct:,} distinct) in "
            f"{result.seconds:.0f} s: {counts}"
        )
    if given.json:
        record = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "smartattn": smartattn.__version__,
            "python": platform.python_version(),
            "seed": given.seed,
            "memory_bound_bytes": MEMORY,
            "largest_input_bytes": LARGEST,
            "targets": {
                r.target: {
                    "inputs": r.inputs,
                    "distinct": r.distinct,
                    "seconds": round(r.seconds, 1),
                    "outcomes": dict(r.outcomes),
                    "findings": r.findings,
                }
                for r in results
            },
        }
        given.json.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if any(result.findings for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
